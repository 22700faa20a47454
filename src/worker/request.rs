//! One task message that this worker holds, from receipt until it is settled.
//!
//! A request is shared: the consumer queues it, a journey runs it, remote control looks at it
//! and may end it. What changes is behind one small lock and is never held over an await.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chrono::Utc;
use secrecy::zeroize::Zeroize;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use super::effects::{Cancel, Rules};
use crate::backend::ReplyTo;
use crate::config::Settings;
use crate::protocol::mask::{mask_secrets, mask_value};
use crate::protocol::message::Message;
use crate::protocol::saferepr::{MAX_LENGTH, MAX_LEVELS, saferepr, saferepr_args, saferepr_kwargs};
use crate::protocol::time::format_iso;
use crate::tasks::registry::{Options, seconds};
use crate::tasks::{Entry, Kind};
use crate::transport::{Delivery, Tag};

static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// Where a request is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waits for a slot or its rate limit.
    Reserved,
    /// A slot has it.
    Active,
    /// Every effect was performed.
    Settled,
}

#[derive(Debug)]
struct Changing {
    phase: Phase,
    tag: Option<Tag>,
    acknowledged: bool,
    fenced: bool,
    terminated: Option<i32>,
    cancelled: Option<Cancel>,
    beside: bool,
    end_told: bool,
    pid: Option<u32>,
    started: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    hard: Option<Duration>,
    soft: Option<Duration>,
    since: Instant,
}

/// A task message and everything this worker knows of it.
#[derive(Debug)]
pub struct Request {
    /// Order of arrival in this process.
    pub serial: u64,
    /// The decoded message.
    pub message: Message,
    /// The registered task.
    pub name: &'static str,
    /// How it is carried out.
    pub kind: Kind,
    /// When it is acknowledged and what is stored.
    pub rules: Rules,
    limits: OnceLock<Limits>,
    /// Whether task events are sent for it.
    pub send_events: bool,
    /// The queue it came from.
    pub queue: String,
    /// The exchange it was published to.
    pub exchange: String,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Whether it was delivered before.
    pub redelivered: bool,
    /// The priority its follow-ups inherit (`task_inherit_parent_priority`).
    pub inherited_priority: Option<u8>,
    /// Its arguments as Python would show them, secrets masked.
    pub args_repr: String,
    /// The same for keyword arguments.
    pub kwargs_repr: String,
    secrets: Vec<String>,
    opened: OnceLock<SecretString>,
    changing: Mutex<Changing>,
}

impl Request {
    /// A request for a decoded message of a registered task.
    pub fn new(message: Message, delivery: &Delivery, entry: &Entry, settings: &Settings) -> Self {
        let options = entry.options();
        let on_failure = settings.task_acks_on_failure;
        let on_timeout = settings.task_acks_on_timeout;
        let either = settings.task_acks_on_failure_or_timeout;
        let rules = Rules {
            acks_late: options.acks_late,
            acks_on_failure: on_failure.unwrap_or(either),
            acks_on_timeout: on_timeout.unwrap_or(either),
            reject_on_worker_lost: settings.task_reject_on_worker_lost,
            ignore_result: message.ignore_result.unwrap_or(options.ignore_result),
            store_errors: options.store_errors_even_if_ignored,
            track_started: options.track_started,
        };
        let secrets = entry.kind.secrets(&message.args, &message.kwargs);
        let (args_repr, kwargs_repr) = reprs(&message, &secrets);
        Self {
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            name: entry.name,
            kind: entry.kind,
            rules,
            limits: OnceLock::new(),
            send_events: options.send_events,
            queue: delivery.queue.clone(),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
            redelivered: delivery.redelivered,
            inherited_priority: message
                .priority
                .filter(|_| settings.task_inherit_parent_priority),
            args_repr,
            kwargs_repr,
            secrets,
            opened: OnceLock::new(),
            changing: Mutex::new(Changing {
                phase: Phase::Reserved,
                tag: Some(delivery.tag.clone()),
                acknowledged: false,
                fenced: false,
                terminated: None,
                cancelled: None,
                beside: false,
                end_told: false,
                pid: None,
                started: None,
            }),
            message,
        }
    }

    fn changing(&self) -> std::sync::MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Task id.
    pub fn id(&self) -> &str {
        &self.message.id
    }

    /// Where an `rpc://` result goes.
    pub fn reply_to(&self) -> ReplyTo<'_> {
        ReplyTo {
            reply_to: self.message.reply_to.as_deref(),
            correlation_id: self.message.correlation_id.as_deref(),
        }
    }

    /// Whose task it is.
    pub fn user(&self) -> Option<String> {
        self.kind.user(&self.message.args, &self.message.kwargs)
    }

    /// The name shown in logs and events.
    pub fn display_name(&self) -> &str {
        self.message.display_name()
    }

    /// `name[id]`, as Celery's log lines have it.
    pub fn label(&self) -> String {
        format!("{}[{}]", self.display_name(), self.id())
    }

    /// The broker's name of the delivery, as long as it is ours to settle.
    pub fn tag(&self) -> Option<Tag> {
        self.changing().tag.clone()
    }

    /// A later delivery of the same message takes the place of one that was lost.
    pub fn adopt(&self, tag: Tag) {
        let mut changing = self.changing();
        changing.tag = Some(tag);
        changing.fenced = false;
    }

    /// The delivery is not ours any more, though the work may go on. Whether it was until now.
    pub fn disown(&self) -> bool {
        self.changing().tag.take().is_some()
    }

    /// Takes the tag for settling it; `None` when it is settled or not ours.
    pub fn settle(&self) -> Option<Tag> {
        let mut changing = self.changing();
        changing.acknowledged = true;
        changing.tag.take()
    }

    /// Whether the message was settled.
    pub fn acknowledged(&self) -> bool {
        self.changing().acknowledged
    }

    /// Somebody else holds the message: no effect of the work may be seen. Whether it was ours
    /// until now.
    pub fn fence(&self) -> bool {
        let mut changing = self.changing();
        changing.fenced = true;
        changing.tag.take().is_some()
    }

    /// Whether somebody else holds the message.
    pub fn fenced(&self) -> bool {
        self.changing().fenced
    }

    /// Remembers that the request is to end by this signal; `true` the first time.
    pub fn terminate(&self, signal: i32) -> bool {
        let mut changing = self.changing();
        let first = changing.terminated.is_none();
        changing.terminated.get_or_insert(signal);
        first
    }

    /// The signal the request is to end by.
    pub fn terminated(&self) -> Option<i32> {
        self.changing().terminated
    }

    /// The worker itself ends it: the end of the child is no failure of the task.
    pub fn cancel(&self, why: Cancel) {
        self.changing().cancelled = Some(why);
    }

    /// Whether, and why, the worker itself ends it.
    pub fn cancelled(&self) -> Option<Cancel> {
        self.changing().cancelled
    }

    /// Where it is on its way.
    pub fn phase(&self) -> Phase {
        self.changing().phase
    }

    /// It waits for its ETA, or no longer does.
    pub fn set_phase(&self, phase: Phase) {
        self.changing().phase = phase;
    }

    /// A slot is there for it. `false`: it was withdrawn in the meantime.
    pub fn activate(&self) -> bool {
        let mut changing = self.changing();
        let waits = changing.phase != Phase::Settled;
        if waits {
            changing.phase = Phase::Active;
        }
        waits
    }

    /// Its message is to go back or is gone: unless it runs, it will not. `false`: it runs.
    pub fn withdraw(&self) -> bool {
        let mut changing = self.changing();
        if changing.phase == Phase::Active {
            return false;
        }
        changing.phase = Phase::Settled;
        changing.fenced = true;
        changing.tag = None;
        true
    }

    /// From now on it takes no place among the messages fetched ahead; `true` the first time.
    pub fn step_aside(&self) -> bool {
        !std::mem::replace(&mut self.changing().beside, true)
    }

    /// Whether it takes no place among the messages fetched ahead.
    pub fn beside(&self) -> bool {
        self.changing().beside
    }

    /// The consumer wants to know when it ends.
    pub fn tell_end(&self) {
        self.changing().end_told = true;
    }

    /// Whether the prefetch count depends on its end.
    pub fn counts_in_prefetch(&self) -> bool {
        let changing = self.changing();
        changing.beside || changing.end_told
    }

    /// A slot has it now.
    pub fn start(&self, pid: u32) {
        let mut changing = self.changing();
        changing.pid = Some(pid);
        changing.started = Some(unix_time());
    }

    /// A slot accepts it: from now on its time limits are those of the message, else those that
    /// its task type has at this moment, however long ago the message came.
    pub fn fix_limits(&self, options: &Options) {
        let message = &self.message;
        let hard = message.time_limit.and_then(seconds).or(options.time_limit);
        let soft = message
            .soft_time_limit
            .and_then(seconds)
            .or(options.soft_time_limit);
        let since = Instant::now();
        self.limits.get_or_init(|| Limits { hard, soft, since });
    }

    /// Hard time limit, once it is accepted.
    pub fn hard_limit(&self) -> Option<Duration> {
        self.limits.get()?.hard
    }

    /// Soft time limit, once it is accepted.
    pub fn soft_limit(&self) -> Option<Duration> {
        self.limits.get()?.soft
    }

    /// What is left of the hard and of the soft time limit. They begin when it is accepted, also
    /// where it waits for somebody else's work before its own.
    pub fn time_left(&self) -> [Option<Duration>; 2] {
        let Some(limits) = self.limits.get() else {
            return [None, None];
        };
        let spent = limits.since.elapsed();
        [limits.hard, limits.soft].map(|limit| Some(limit?.saturating_sub(spent)))
    }

    /// Whether its time has passed.
    pub fn expired(&self) -> bool {
        self.message
            .expires
            .is_some_and(|expires| Utc::now() > expires)
    }

    /// Replaces this request's secrets, and what looks like one, by asterisks.
    pub fn mask(&self, text: &str) -> String {
        mask_secrets(text, &self.secret_texts()).into_owned()
    }

    /// A secret that was opened or looked up for this request is masked like one that came
    /// with it.
    pub fn keep_secret(&self, secret: SecretString) {
        // There is one token, so whatever is there already is the same.
        drop(self.opened.set(secret));
    }

    fn secret_texts(&self) -> Vec<&str> {
        let opened = self.opened.get().map(ExposeSecret::expose_secret);
        self.secrets
            .iter()
            .map(String::as_str)
            .chain(opened)
            .collect()
    }

    /// Positional arguments with secrets masked.
    pub fn shown_args(&self) -> Value {
        mask_value(
            &Value::Array(self.message.args.clone()),
            &self.secret_texts(),
        )
    }

    /// Keyword arguments with secrets masked.
    pub fn shown_kwargs(&self) -> Value {
        mask_value(
            &Value::Object(self.message.kwargs.clone()),
            &self.secret_texts(),
        )
    }

    /// The request info object of remote control. `safe` shows arguments as text.
    pub fn info(&self, node: &str, safe: bool) -> Value {
        let changing = self.changing();
        let (args, kwargs) = if safe {
            (
                Value::from(self.args_repr.as_str()),
                Value::from(self.kwargs_repr.as_str()),
            )
        } else {
            (self.shown_args(), self.shown_kwargs())
        };
        json!({
            "id": self.id(),
            "name": self.display_name(),
            "args": args,
            "kwargs": kwargs,
            "type": self.name,
            "hostname": node,
            "time_start": changing.started,
            "acknowledged": changing.acknowledged,
            "delivery_info": {
                "exchange": self.exchange,
                "routing_key": self.routing_key,
                "priority": self.message.priority,
                "redelivered": self.redelivered,
            },
            "worker_pid": changing.pid,
        })
    }

    /// An entry of the `scheduled` command.
    pub fn schedule_info(&self, node: &str) -> Value {
        let eta = self.message.eta.as_ref().map(format_iso);
        json!({"eta": eta, "priority": 6, "request": self.info(node, false)})
    }
}

impl Drop for Request {
    /// The token does not outlive its task in this process's memory.
    fn drop(&mut self) {
        if !self.secrets.is_empty() {
            // Clients write arguments down here, too.
            self.message.argsrepr.zeroize();
            self.message.kwargsrepr.zeroize();
        }
        for secret in &mut self.secrets {
            for argument in &mut self.message.args {
                erase(argument, secret);
            }
            for (_, argument) in &mut self.message.kwargs {
                erase(argument, secret);
            }
            secret.zeroize();
        }
    }
}

fn erase(argument: &mut Value, secret: &str) {
    if let Value::String(text) = argument
        && text == secret
    {
        text.zeroize();
    }
}

/// The texts that the client sent, unless they show a secret; then texts of our own.
fn reprs(message: &Message, secrets: &[String]) -> (String, String) {
    let texts: Vec<&str> = secrets.iter().map(String::as_str).collect();
    let kept =
        |sent: &str| (!shows_any(sent, secrets)).then(|| mask_secrets(sent, &texts).into_owned());
    let args = kept(&message.argsrepr).unwrap_or_else(|| {
        let masked: Vec<Value> = message
            .args
            .iter()
            .map(|arg| mask_value(arg, &texts))
            .collect();
        // A list where the client sent one: monitors show what they would have shown.
        if message.argsrepr.starts_with('[') {
            saferepr(&Value::Array(masked), MAX_LENGTH, MAX_LEVELS)
        } else {
            saferepr_args(&masked, MAX_LENGTH, MAX_LEVELS)
        }
    });
    let kwargs = kept(&message.kwargsrepr).unwrap_or_else(|| {
        match mask_value(&Value::Object(message.kwargs.clone()), &texts) {
            Value::Object(masked) => saferepr_kwargs(&masked, MAX_LENGTH, MAX_LEVELS),
            _ => String::new(),
        }
    });
    (args, kwargs)
}

/// Clients cut long texts, so the beginning of a secret counts as well.
fn shows_any(text: &str, secrets: &[String]) -> bool {
    const ENOUGH: usize = 6;
    secrets.iter().any(|secret| {
        let start: String = secret.chars().take(ENOUGH).collect();
        text.contains(&start)
    })
}

/// Seconds since 1970, as Celery's records have them.
pub fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
