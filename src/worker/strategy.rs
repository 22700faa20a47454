//! From a delivery to a request, or to the reason why there is none.
//!
//! Answers for `celery.worker.strategy` and the `on_unknown_*` and `on_decode_error` callbacks
//! of the consumer. Whatever arrives, the worker goes on; where a task id can be read its client
//! gets a FAILURE, and what nobody can process is kept in quarantine, not dropped.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::effects::Verdict;
use super::request::Request;
use super::{Worker, analyze, execute};
use crate::backend::{Meta, ReplyTo};
use crate::events::Event;
use crate::protocol::exception::Exception;
use crate::protocol::message::{DeliveryInfo, Invalid, InvalidKind, Message};
use crate::protocol::state::State;
use crate::protocol::{Limits, saferepr};
use crate::transport::{Delivery, MOST_DEATHS, Tag};

fn decode(worker: &Worker, delivery: &Delivery) -> Result<Message, Box<Invalid>> {
    let info = DeliveryInfo {
        exchange: delivery.exchange.clone(),
        routing_key: delivery.routing_key.clone(),
        redelivered: delivery.redelivered,
        priority: delivery.envelope.properties.priority,
    };
    let limits = Limits::default();
    let mut message = Message::decode(&delivery.envelope, &info, &worker.accept, &limits)?;
    message.show_naive_in(&worker.zones.naive);
    Ok(message)
}

/// The request of a delivery that was set aside: it was read before, so it can be read again.
pub fn reread(worker: &Worker, serial: u64, delivery: &Delivery) -> Option<Request> {
    let message = decode(worker, delivery).ok()?;
    let entry = worker.registry.get(&message.task)?;
    let mut request = Request::new(message, delivery, entry, &worker.settings);
    request.serial = serial;
    Some(request)
}

/// Makes a request of a delivery. `None`: it was dealt with here.
pub fn receive(worker: &Arc<Worker>, delivery: &Delivery) -> Option<Arc<Request>> {
    let message = match decode(worker, delivery) {
        Ok(message) => message,
        Err(invalid) => {
            refuse(worker, delivery, *invalid);
            return None;
        }
    };
    let Some(entry) = worker.registry.get(&message.task) else {
        unregistered(worker, delivery.tag.clone(), message);
        return None;
    };
    if delivery.redelivered
        && let Some(running) = worker.state.disowned(&message.id)
    {
        // The broker took the message back and gave it to us again while we were at it: the
        // work under way settles it.
        running.adopt(delivery.tag.clone());
        analyze::count_death(worker, &running, 1);
        return None;
    }
    if delivery.redelivered && worker.state.doubts.take(&message.id, message.retries) {
        log::info!(
            "Task {}[{}] came again, but was done: its acknowledgement was lost with the connection",
            message.display_name(),
            message.id
        );
        worker.link.ack(delivery.tag.clone());
        return None;
    }
    let request = Arc::new(Request::new(message, delivery, entry, &worker.settings));
    worker.state.hold(&request);
    if delivery.deaths >= MOST_DEATHS {
        let (worker, request) = (worker.clone(), request.clone());
        tokio::spawn(async move {
            let verdict = given_up(&request);
            analyze::given_up(&worker, &request, &verdict).await;
            execute::finish(&worker, &request, verdict, Duration::ZERO).await;
        });
        return None;
    }
    Some(request)
}

/// Whether a request is not to run: revoked or too late.
pub fn discarded(worker: &Worker, request: &Request) -> Option<Verdict> {
    if request.expired() {
        worker.revoked.add([request.id().to_owned()]);
        return Some(Verdict::Revoked {
            reason: "expired",
            signal: None,
        });
    }
    if worker.revoked.contains(request.id()) {
        return Some(Verdict::Revoked {
            reason: "revoked",
            signal: None,
        });
    }
    let (name, stamp) = worker.revoked.stamp_of(&request.message.stamps)?;
    log::info!(
        "Discarding revoked task: {} (revoked by header: {{{}: {}}})",
        request.label(),
        saferepr::repr(&Value::from(name)),
        saferepr::repr(&stamp),
    );
    Some(Verdict::Revoked {
        reason: "revoked",
        signal: None,
    })
}

/// A delivery whose body cannot be read at all.
pub fn undecodable(worker: &Arc<Worker>, delivery: &Delivery, reason: String) {
    let header = |name: &str| {
        delivery
            .envelope
            .headers
            .get(name)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let properties = &delivery.envelope.properties;
    let invalid = Invalid {
        kind: InvalidKind::Undecodable,
        id: header("id"),
        task: header("task"),
        reply_to: properties.reply_to.clone(),
        correlation_id: properties.correlation_id.clone(),
        reason,
    };
    refuse(worker, delivery, invalid);
}

fn refuse(worker: &Arc<Worker>, delivery: &Delivery, invalid: Invalid) {
    log::error!("{invalid} (kept in quarantine)");
    let worker = worker.clone();
    let tag = delivery.tag.clone();
    tokio::spawn(async move {
        let exception = invalid.exception();
        if let Some(id) = invalid.id {
            let reply_to = invalid.reply_to.as_deref();
            let correlation_id = invalid.correlation_id.as_deref();
            fail(
                &worker,
                &id,
                &exception,
                ReplyTo {
                    reply_to,
                    correlation_id,
                },
            )
            .await;
        }
        worker.link.quarantine(tag, invalid.reason);
    });
}

fn unregistered(worker: &Arc<Worker>, tag: Tag, message: Message) {
    let known: Vec<&str> = worker.registry.iter().map(|entry| entry.name).collect();
    log::error!(
        "Received unregistered task of type {}.\nThe message has been ignored and discarded.\n\n\
         This worker knows: {}. Check the name, or route the task to the queue of a worker that \
         has it.",
        saferepr::repr(&Value::from(message.task.as_str())),
        known.join(", "),
    );
    let exception = Exception::not_registered(&message.task);
    let event = Event::task_failed(&message.id, &exception.repr(), None);
    let worker = worker.clone();
    tokio::spawn(async move {
        let reply_to = message.reply_to.as_deref();
        let correlation_id = message.correlation_id.as_deref();
        fail(
            &worker,
            &message.id,
            &exception,
            ReplyTo {
                reply_to,
                correlation_id,
            },
        )
        .await;
        worker.link.reject(tag, false);
        worker.events.send(&event);
    });
}

/// The end of a task on which too many workers died: it fails with all that follows from it, and its
/// message is kept.
pub fn given_up(request: &Request) -> Verdict {
    Verdict::GivenUp(Exception::worker_lost(&format!(
        "{} was given up: its worker or child died on it, or lost it, too often",
        request.label()
    )))
}

async fn fail(worker: &Worker, id: &str, exception: &Exception, to: ReplyTo<'_>) {
    let mut meta = Meta::new(id, State::Failure.as_str(), exception.to_value());
    meta.traceback.clone_from(&exception.traceback);
    meta.date_done = Some(worker.now());
    if let Err(error) = worker.backend.store(&meta, &to).await {
        log::error!("Cannot store the failure of task {id}: {error}");
    }
}
