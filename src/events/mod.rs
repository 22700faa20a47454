//! Monitoring: what workers tell Flower, `celery events` and each other.
//!
//! An [`Event`] is a type and its fields; the [`Dispatcher`] adds who, when and the logical
//! clock, and sends it if anybody asked for events of its group; the [`Receiver`] takes the
//! events of others. Nothing here decides when a task event happens: that is the worker.
//!
//! Answers for `celery.events`: exchange `celeryev`, a routing key made of the type with dots,
//! task events in arrays on `task.multi`, everything else as single objects.

use crate::transport::{Exchange, ExchangeKind};

mod dispatcher;
mod event;
mod heart;
mod receiver;

pub use dispatcher::{Dispatcher, Options, Toggle};
pub use event::{Event, Software, WorkerStatus, load_average};
pub use heart::Heart;
pub use receiver::{Ear, Received, Receiver, parse};

/// Default of `event_exchange`.
pub const EXCHANGE: &str = "celeryev";

/// The exchange events go to: Redis only knows fan-out, AMQP has a topic exchange.
///
/// `driver` is the word of [`crate::transport::Transport::driver`].
pub fn exchange(name: &str, driver: &str) -> Exchange {
    let kind = if driver == "redis" {
        ExchangeKind::Fanout
    } else {
        ExchangeKind::Topic
    };
    Exchange::new(name, kind)
}
