//! Remote control: requests to workers by broadcast, and the replies.
//!
//! The [`Mailbox`] is the asking side (`celeriac inspect`, mingle), [`serve`] the answering one
//! (a worker's node). Neither knows any command: the worker gives a [`Handler`].
//!
//! Answers for `kombu.pidbox` and `celery.worker.pidbox`. Where those leave replies behind for
//! clients that are gone, or stop at a malformed request, this does not.

use serde_json::{Map, Value};

use crate::protocol::exception::Exception;
use crate::protocol::serialization;
use crate::transport::{self, Exchange, ExchangeKind, Queue};

mod mailbox;
mod node;
mod pattern;

pub use mailbox::{Mailbox, Reply, Request};
pub use node::{Answer, Handler, Node, serve};

/// Default of `control_exchange`.
pub const NAMESPACE: &str = "celery";

/// Names and lifetimes of the exchanges and queues of remote control.
#[derive(Debug, Clone, PartialEq)]
pub struct Addresses {
    /// `control_exchange`.
    pub namespace: String,
    /// `control_queue_ttl` in seconds.
    pub queue_ttl: Option<f64>,
    /// `control_queue_expires` in seconds.
    pub queue_expires: Option<f64>,
    /// `control_queue_exclusive`.
    pub exclusive: bool,
    /// `control_queue_durable`: the queue of a node stays where the node is gone.
    pub durable: bool,
}

/// Why a request could not be made, or could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// The request or a reply cannot be written or read.
    #[error("control message: {0}")]
    Body(#[from] crate::protocol::Error),
    /// The bytes hold a value that is no request.
    #[error("control message: {0}")]
    Shape(String),
    /// The channel ended while replies were awaited.
    #[error("the connection ended while waiting for replies")]
    Ended,
}

/// A command that failed; the caller is told its `repr`.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandError(pub Exception);

impl Default for Addresses {
    fn default() -> Self {
        Self {
            namespace: NAMESPACE.to_owned(),
            queue_ttl: Some(300.0),
            queue_expires: Some(10.0),
            exclusive: true,
            durable: false,
        }
    }
}

impl Addresses {
    /// Where requests go.
    pub fn exchange(&self) -> Exchange {
        let name = format!("{}.pidbox", self.namespace);
        Exchange {
            durable: false,
            ..Exchange::new(name, ExchangeKind::Fanout)
        }
    }

    /// Where replies go.
    pub fn reply_exchange(&self) -> Exchange {
        reply_exchange(&format!("reply.{}.pidbox", self.namespace))
    }

    /// The queue of a node.
    pub fn node_queue(&self, hostname: &str) -> Queue {
        let exchange = self.exchange();
        Queue {
            durable: self.durable,
            auto_delete: !self.durable,
            ..self.queue(format!("{hostname}.{}", exchange.name), exchange, "")
        }
    }

    /// The queue that replies to the asker `oid` wait in; never longer than the asker does.
    pub fn reply_queue(&self, oid: &str) -> Queue {
        let exchange = self.reply_exchange();
        self.queue(format!("{oid}.{}", exchange.name), exchange, oid)
    }

    fn queue(&self, name: String, exchange: Exchange, routing_key: &str) -> Queue {
        Queue {
            durable: false,
            exclusive: self.exclusive,
            auto_delete: true,
            expires: self.queue_expires,
            message_ttl: self.queue_ttl,
            ..Queue::bound(name, exchange, routing_key)
        }
    }
}

impl CommandError {
    /// No such command: Python's dictionary says so with the name.
    pub fn unknown_command(method: &str) -> Self {
        Self(Exception::builtin("KeyError", method))
    }

    /// Arguments that do not fit the command.
    pub fn type_error(text: impl Into<String>) -> Self {
        Self(Exception::type_error(text))
    }

    /// A value that cannot be used.
    pub fn value_error(text: impl Into<String>) -> Self {
        Self(Exception::builtin("ValueError", text))
    }
}

fn reply_exchange(name: &str) -> Exchange {
    Exchange {
        durable: false,
        ..Exchange::new(name, ExchangeKind::Direct)
    }
}

/// The object that is the body of a message.
fn object(
    envelope: &crate::protocol::envelope::Envelope,
    accept: &serialization::Accept,
) -> Result<Map<String, Value>, Error> {
    // No request or reply is anywhere near as large; a `registered` of thousands of tasks is.
    let limits = crate::protocol::Limits {
        body: 16 << 20,
        depth: 64,
        values: 500_000,
    };
    let content_type = envelope.content_type.as_deref();
    match serialization::decode(content_type, &envelope.body, accept, &limits)? {
        Value::Object(object) => Ok(object),
        other => Err(Error::Shape(format!(
            "expected an object, got {}",
            crate::protocol::saferepr::saferepr(&other, 80, 1)
        ))),
    }
}

/// Seconds since 1970.
fn unix_time() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}
