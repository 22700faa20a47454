//! `celeriac call`: sends a task to the workers, and waits for its result when told to.
//!
//! Answers for `celery.bin.call` and the routing of `Celery.send_task`. What looks like a
//! secret does not stand in `argsrepr` and `kwargsrepr`, where everybody could read it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::args::{Call, Global};
use super::{connect, output, remote, result, worker};
use crate::backend::Meta;
use crate::config::Settings;
use crate::events::{self, Event};
use crate::protocol::clock::Clock;
use crate::protocol::publish::TaskCall;
use crate::protocol::serialization::{self, Accept};
use crate::protocol::signature::Signature;
use crate::protocol::state::State;
use crate::protocol::time::format_iso;
use crate::protocol::{Limits, json, mask, saferepr};
use crate::transport::{Channel, Delivery, Exchange, ExchangeKind, Publication, Queue, Transport};
use crate::worker::canvas::routed;

/// Sends the task and prints its id, or with `--wait` its result; returns the exit code.
pub(super) fn run(global: &Global, options: &Call) -> anyhow::Result<i32> {
    let settings = remote::settings(global)?;
    let mut call = match task_call(&settings, options) {
        Ok(call) => call,
        Err(text) => return Ok(remote::wrong_usage("call", "NAME", &text)),
    };
    let queue = queue_of(&settings, &call)?;
    let (exchange, routing_key) = address(&call, &queue);
    let transport = connect::transport(&settings, "celeriac")?;
    let backend = connect::backend_for_client(&settings, &transport)?;
    if options.wait {
        result::check_kept(backend.as_ref(), true)?;
    }
    let id = call.id.clone();
    let answers_by_message = backend.driver() == "rpc";
    let timeout = options
        .timeout
        .map(|seconds| Duration::from_secs_f64(seconds.clamp(0.0, remote::A_YEAR)));
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let outcome = remote::runtime()?.block_on(async {
        let channel = match transport.connect().await {
            Ok(channel) => channel,
            Err(error) => return Ok(Err(remote::broker_away(&error))),
        };
        let mut answers = None;
        if options.wait && answers_by_message {
            let replies = reply_queue(&settings, &call.reply_to);
            answers = Some(
                channel
                    .subscribe(&replies, &[])
                    .await
                    .context("cannot wait for the result")?,
            );
        }
        send(
            &settings,
            transport.as_ref(),
            &channel,
            &mut call,
            &queue,
            exchange,
            routing_key,
        )
        .await
        .with_context(|| format!("cannot send {}", call.name))?;
        let meta = match (&mut answers, options.wait) {
            (_, false) => None,
            (Some(answers), true) => answered(answers, &settings, &id, deadline).await?,
            (None, true) => result::wait(backend.as_ref(), &id, deadline).await?,
        };
        drop(channel.close().await);
        Ok::<_, anyhow::Error>(Ok(meta))
    })?;
    match outcome {
        Err(code) => Ok(code),
        Ok(Some(meta)) => Ok(result::show(&meta)),
        Ok(None) if options.wait => bail!("the result of {id} was not there in time"),
        Ok(None) => {
            output::print(&format!("{id}\n"));
            Ok(0)
        }
    }
}

/// The call that the options mean, else what to tell the user.
fn task_call(settings: &Settings, options: &Call) -> Result<TaskCall, String> {
    let wrong = |option: &str, reason: String| format!("Invalid value for {option}: {reason}");
    let parse = |text: &str| json::parse(text.as_bytes(), &Limits::default());
    let args = match parse(&options.args) {
        Ok(Value::Array(args)) => args,
        Ok(_) => {
            return Err(wrong(
                "'-a' / '--args'",
                format!("{} was not an array", options.args),
            ));
        }
        Err(reason) => return Err(wrong("'-a' / '--args'", reason)),
    };
    let kwargs = match parse(&options.kwargs) {
        Ok(Value::Object(kwargs)) => kwargs,
        Ok(_) => {
            return Err(wrong(
                "'-k' / '--kwargs'",
                format!("{} was not an object", options.kwargs),
            ));
        }
        Err(reason) => return Err(wrong("'-k' / '--kwargs'", reason)),
    };
    let mut signature = Signature::new(&options.name, args, kwargs);
    if let Some(countdown) = options.countdown {
        signature.set_option("countdown", json::float(countdown));
    }
    if let Some(expires) = &options.expires {
        let seconds = expires.trim().parse::<f64>().map(json::float);
        signature.set_option(
            "expires",
            seconds.unwrap_or_else(|_| Value::from(expires.as_str())),
        );
    }
    if let Some(priority) = options.priority {
        signature.set_option("priority", priority);
    }
    let texts = [
        ("eta", &options.eta),
        ("queue", &options.queue),
        ("exchange", &options.exchange),
        ("routing_key", &options.routing_key),
    ];
    for (name, text) in texts {
        if let Some(text) = text {
            signature.set_option(name, text.as_str());
        }
    }
    signature.set_option("serializer", options.serializer.as_str());
    let now = chrono::Utc::now().fixed_offset();
    let fresh = || {
        options
            .task_id
            .clone()
            .unwrap_or_else(|| Uuid::new_v4().to_string())
    };
    let mut call = TaskCall::from_signature(&signature, &[], fresh, &now)?;
    let host = nix::unistd::gethostname().unwrap_or_default();
    call.origin = format!("gen{}@{}", std::process::id(), host.to_string_lossy());
    call.reply_to = Uuid::new_v4().to_string();
    call.compression.clone_from(&settings.task_compression);
    if call.priority.is_none() {
        let default = settings.task_default_priority;
        call.priority = default.and_then(|priority| u8::try_from(priority).ok());
    }
    if let Value::Array(args) = mask::mask_value(&Value::Array(call.args.clone()), &[]) {
        call.argsrepr = Some(saferepr::saferepr_args(
            &args,
            saferepr::MAX_LENGTH,
            saferepr::MAX_LEVELS,
        ));
    }
    if let Value::Object(kwargs) = mask::mask_value(&Value::Object(call.kwargs.clone()), &[]) {
        call.kwargsrepr = Some(saferepr::saferepr_kwargs(
            &kwargs,
            saferepr::MAX_LENGTH,
            saferepr::MAX_LEVELS,
        ));
    }
    Ok(call)
}

/// The queue the call says, else the one of `task_routes`, else the default one.
fn queue_of(settings: &Settings, call: &TaskCall) -> anyhow::Result<Queue> {
    let known = worker::configured_queues(settings)?;
    let name = call
        .queue
        .clone()
        .or_else(|| routed(&settings.task_routes, &call.name))
        .unwrap_or_else(|| settings.task_default_queue.clone());
    match known.into_iter().find(|queue| queue.name == name) {
        Some(queue) => Ok(queue),
        None if settings.task_create_missing_queues => Ok(connect::missing_queue(settings, &name)),
        None => Err(anyhow!(
            "--queue: the queue '{name}' is not in task_queues, and task_create_missing_queues is off"
        )),
    }
}

/// Exchange and routing key: a direct exchange that is not named is the default one, where the
/// queue is the key.
fn address(call: &TaskCall, queue: &Queue) -> (Exchange, String) {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    match (given(&call.exchange), given(&call.routing_key)) {
        (Some(exchange), Some(key)) => (Exchange::new(exchange, ExchangeKind::Direct), key),
        _ if queue.exchange.kind == ExchangeKind::Direct => {
            (Exchange::default_exchange(), queue.name.clone())
        }
        (Some(exchange), None) => (
            Exchange::new(exchange, queue.exchange.kind),
            queue.routing_key.clone(),
        ),
        (None, key) => (
            queue.exchange.clone(),
            key.unwrap_or_else(|| queue.routing_key.clone()),
        ),
    }
}

async fn send(
    settings: &Settings,
    transport: &dyn Transport,
    channel: &Arc<dyn Channel>,
    call: &mut TaskCall,
    queue: &Queue,
    exchange: Exchange,
    routing_key: String,
) -> anyhow::Result<()> {
    let envelope = call.to_envelope()?;
    // A message to a queue that nobody declared is lost on some brokers.
    channel.declare(queue).await?;
    let name = exchange.name.clone();
    channel
        .publish(Publication {
            exchange,
            routing_key: routing_key.clone(),
            envelope,
        })
        .await?;
    if settings.task_send_sent_event {
        let exchange = events::exchange(&settings.event_exchange, transport.driver());
        let dispatcher = events::Dispatcher::new(events::Options {
            task_events: true,
            ..events::Options::new(call.origin.clone(), Clock::default(), exchange)
        });
        dispatcher.connect(Arc::clone(channel));
        dispatcher.send(&sent_event(call, &queue.name, &name, &routing_key));
        dispatcher.flush();
        channel.flush().await?;
    }
    Ok(())
}

fn sent_event(call: &TaskCall, queue: &str, exchange: &str, routing_key: &str) -> Event {
    Event::new("task-sent")
        .with("uuid", call.id.as_str())
        .with("root_id", call.id.as_str())
        .with("parent_id", Value::Null)
        .with("name", call.name.as_str())
        .with("args", call.shown_args())
        .with("kwargs", call.shown_kwargs())
        .with("retries", call.retries)
        .with("eta", call.eta.as_ref().map(format_iso))
        .with("expires", call.expires.clone())
        .with("queue", queue)
        .with("exchange", exchange)
        .with("routing_key", routing_key)
}

/// Where `rpc://` answers, as Celery's clients make it.
fn reply_queue(settings: &Settings, name: &str) -> Queue {
    Queue {
        durable: settings.result_persistent,
        auto_delete: true,
        expires: settings.result_expires,
        ..Queue::bound(name, Exchange::default_exchange(), name)
    }
}

/// The final answer of `rpc://`; none when the deadline passes.
async fn answered(
    answers: &mut mpsc::Receiver<Delivery>,
    settings: &Settings,
    id: &str,
    deadline: Option<Instant>,
) -> anyhow::Result<Option<Meta>> {
    let accept = Accept::from_names([settings.result_serializer.as_str(), "json"])?;
    loop {
        let delivery = match deadline {
            None => answers.recv().await,
            Some(deadline) => match tokio::time::timeout_at(deadline, answers.recv()).await {
                Ok(delivery) => delivery,
                Err(_) => return Ok(None),
            },
        };
        let Some(delivery) = delivery else {
            bail!("the connection ended while waiting for the result")
        };
        let envelope = &delivery.envelope;
        let content_type = envelope.content_type.as_deref();
        let body =
            serialization::decode(content_type, &envelope.body, &accept, &Limits::default())?;
        if let Some(meta) = Meta::from_value(body)
            && meta.task_id == id
            && State::parse(&meta.status).is_ready()
        {
            return Ok(Some(meta));
        }
    }
}
