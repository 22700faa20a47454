//! Publishing: with the broker's word for it, or without waiting.
//!
//! As with kombu, an exchange is declared before the first message to it, and so is the queue
//! of a task message on the default exchange: without it the message would be dropped. Replies
//! and results are not held against a queue that is gone: nobody waits for them any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lapin::Confirmation;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::core::{Core, declare_exchange, declare_queue, lock};
use super::delayed;
use super::error::broken;
use super::message::{properties, short};
use crate::protocol::time;
use crate::transport::{Error, Exchange, ExchangeKind, Publication, Queue};

/// Messages that may wait to be sent without confirmation; more are dropped.
pub(super) const CASTS: usize = 10_000;

const PUBLISHING: &str = "publishing";

/// Something for the task that sends without confirmation.
pub(super) enum Cast {
    Message(Box<Publication>),
    /// Answered when everything before it has reached the broker.
    Flush(oneshot::Sender<()>),
}

/// Publishes and waits for the broker's confirmation.
pub(super) async fn publish(core: &Arc<Core>, publication: Publication) -> Result<(), Error> {
    let publication = routed(core, publication);
    let is_task = publication.envelope.headers.contains_key("task");
    for _ in 0..2 {
        prepare(core, &publication).await?;
        if confirmed(core, &publication, is_task).await? {
            return Ok(());
        }
        // Its queue was deleted since we declared it.
        lock(&core.declared).clear();
    }
    log::warn!(
        "A message for {} was dropped by RabbitMQ: no queue is bound there",
        place(&publication)
    );
    Ok(())
}

/// Publishes to where everything is declared. False: the broker gave the message back, because
/// it reached no queue, which is asked for with `mandatory`.
pub(super) async fn confirmed(
    core: &Arc<Core>,
    publication: &Publication,
    mandatory: bool,
) -> Result<bool, Error> {
    let line = core.publishing().await?;
    let known = lock(&core.confirming)
        .clone()
        .filter(|channel| channel.status().connected());
    let channel = match known {
        Some(channel) => channel,
        None => {
            let channel = line.channel().await?;
            let select = channel
                .confirm_select(ConfirmSelectOptions::default())
                .await;
            select.map_err(|error| broken(PUBLISHING, &error))?;
            *lock(&core.confirming) = Some(channel.clone());
            channel
        }
    };
    let confirmation = match send(&channel, publication, mandatory).await? {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    match confirmation {
        Ok(Confirmation::Nack(_)) => Err(Error::Refused {
            operation: PUBLISHING,
            reason: format!(
                "RabbitMQ did not take a message for {}: the queue is full \
                 (x-overflow=reject-publish) or its leader is away",
                place(publication)
            ),
        }),
        Ok(Confirmation::Ack(Some(_))) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => {
            // Perhaps an exchange was deleted meanwhile: the next attempt declares it again.
            lock(&core.declared).clear();
            Err(broken(PUBLISHING, &error))
        }
    }
}

/// The outer result is about the message, the inner one about the channel.
async fn send(
    channel: &lapin::Channel,
    publication: &Publication,
    mandatory: bool,
) -> Result<lapin::Result<lapin::PublisherConfirm>, Error> {
    let exchange = short(&publication.exchange.name)?;
    let routing_key = short(&publication.routing_key)?;
    let properties = properties(&publication.envelope)?;
    let body = &publication.envelope.body;
    let options = BasicPublishOptions {
        mandatory,
        ..BasicPublishOptions::default()
    };
    Ok(channel
        .basic_publish(exchange, routing_key, options, body, properties)
        .await)
}

fn place(publication: &Publication) -> String {
    match publication.exchange.name.as_str() {
        "" => format!("queue {}", publication.routing_key),
        exchange => format!("exchange {exchange}, key {}", publication.routing_key),
    }
}

/// Where a publication really goes: the exchange with the kind it was declared with, and by way
/// of the queues that delay where its ETA is ahead and its queue takes part.
fn routed(core: &Core, mut publication: Publication) -> Publication {
    let name = &publication.exchange.name;
    if delayed::is_ours(name) {
        publication.exchange.kind = ExchangeKind::Topic;
    } else if let Some(known) = lock(&core.shared.exchanges).get(name) {
        publication.exchange = known.clone();
    }
    if !core.shared.delays.load(Ordering::Relaxed)
        || publication.exchange.name.is_empty()
        || publication.exchange.kind == ExchangeKind::Direct
    {
        return publication;
    }
    let eta = publication
        .envelope
        .headers
        .get("eta")
        .and_then(Value::as_str);
    let Some(eta) = eta.and_then(|text| time::parse_iso(text).ok()) else {
        return publication;
    };
    let ahead = (eta.with_timezone(&chrono::Utc) - chrono::Utc::now()).num_seconds();
    if let Ok(seconds @ 1..) = u64::try_from(ahead) {
        publication.routing_key = delayed::routing_key(seconds, &publication.routing_key);
        publication.exchange = delayed::exchange();
    }
    publication
}

/// Declares what the message needs.
async fn prepare(core: &Arc<Core>, publication: &Publication) -> Result<(), Error> {
    let exchange = &publication.exchange;
    if !exchange.name.is_empty() {
        return ensure_exchange(core, exchange).await;
    }
    if publication.envelope.headers.contains_key("task") {
        let mut queue = core.shared.options.missing_queue.clone();
        queue.name.clone_from(&publication.routing_key);
        queue.routing_key.clone_from(&publication.routing_key);
        queue.exchange = Exchange::new(queue.name.clone(), queue.exchange.kind);
        return ensure_queue(core, &queue).await;
    }
    Ok(())
}

async fn ensure_exchange(core: &Arc<Core>, exchange: &Exchange) -> Result<(), Error> {
    // Those that delay are made with their queues.
    if delayed::is_ours(&exchange.name) {
        return Ok(());
    }
    let name = format!("exchange {}", exchange.name);
    if lock(&core.declared).contains(&name) {
        return Ok(());
    }
    let line = core.publishing().await?;
    settled(declare_exchange(line, exchange).await)?;
    lock(&core.declared).insert(name);
    Ok(())
}

/// Makes a queue, unless it is known to be there.
pub(super) async fn ensure_queue(core: &Arc<Core>, queue: &Queue) -> Result<(), Error> {
    let name = format!("queue {}", queue.name);
    if lock(&core.declared).contains(&name) {
        return Ok(());
    }
    let line = core.publishing().await?;
    let keys = [queue.routing_key.clone()];
    settled(declare_queue(line, queue, &keys).await.map(drop))?;
    lock(&core.declared).insert(name);
    Ok(())
}

/// A refusal means that it exists, though not as we would have made it, or that declaring is
/// not our business: the message can be sent all the same.
fn settled(declared: Result<(), Error>) -> Result<(), Error> {
    match declared {
        Err(Error::Refused { reason, .. }) => {
            log::debug!("publishing without declaring: {reason}");
            Ok(())
        }
        other => other,
    }
}

/// Sends what needs no confirmation, until the channel ends.
pub(super) async fn run(core: Arc<Core>, mut casts: mpsc::Receiver<Cast>) {
    let mut channel: Option<lapin::Channel> = None;
    loop {
        let cast = tokio::select! {
            biased;
            () = core.life.over() => return,
            cast = casts.recv() => match cast {
                Some(cast) => cast,
                None => return,
            },
        };
        let outcome = tokio::select! {
            biased;
            () = core.life.over() => return,
            outcome = perform(&core, &mut channel, cast) => outcome,
        };
        match outcome {
            Ok(()) => {}
            Err(error) if error.is_connection() => core.life.fail(error),
            Err(error) => log::warn!("A message was not sent: {error}"),
        }
    }
}

async fn perform(
    core: &Arc<Core>,
    channel: &mut Option<lapin::Channel>,
    cast: Cast,
) -> Result<(), Error> {
    match cast {
        Cast::Flush(done) => {
            if let Some(open) = channel.as_ref().filter(|open| open.status().connected()) {
                // Its answer comes after everything else was read.
                super::consume::limit(open, 0, false).await?;
            }
            let _ = done.send(());
            Ok(())
        }
        Cast::Message(publication) => {
            let publication = routed(core, *publication);
            prepare(core, &publication).await?;
            let open = match channel.take().filter(|open| open.status().connected()) {
                Some(open) => open,
                None => {
                    // The last one was closed because of a message nobody waits for.
                    lock(&core.declared).clear();
                    prepare(core, &publication).await?;
                    core.publishing().await?.channel().await?
                }
            };
            let sent = send(&open, &publication, false).await?;
            *channel = Some(open);
            sent.map(drop).map_err(|error| broken(PUBLISHING, &error))
        }
    }
}

/// Hands a message to [`run`]; drops it when too many wait.
pub(super) fn cast(core: &Core, publication: Publication) {
    match core.casts.try_send(Cast::Message(Box::new(publication))) {
        Err(mpsc::error::TrySendError::Full(_)) => {
            if core.lost_casts.fetch_add(1, Ordering::Relaxed) == 0 {
                log::warn!(
                    "More than {CASTS} events and replies wait for RabbitMQ; further ones are \
                     dropped until it takes them"
                );
            }
        }
        Ok(()) => core.lost_casts.store(0, Ordering::Relaxed),
        Err(mpsc::error::TrySendError::Closed(_)) => {}
    }
}
