//! The answering side: takes requests, lets the worker execute them, sends the replies.
//!
//! Requests are executed one after the other, as Celery does: a client that turns events on
//! and then asks for a heartbeat gets both in that order. No request stops the node: one that
//! cannot be read is logged, a command that panics or takes too long answers with an error.
//!
//! Answers for `kombu.pidbox.Node` and `celery.worker.pidbox.Pidbox`.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use serde_json::{Map, Value};

use super::{Addresses, CommandError, Error, object, pattern, reply_exchange, unix_time};
use crate::protocol::clock::Clock;
use crate::protocol::envelope::{Envelope, Properties};
use crate::protocol::exception::Exception;
use crate::protocol::serialization::{Accept, Encoded, Serializer};
use crate::transport::{Channel, Delivery, Publication};

/// A request this much past its time is not executed: it waited in a queue while the worker
/// was away. Less may be the difference of two clocks.
const GRACE: f64 = 60.0;

/// What a command answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// This value; null for a command that returns nothing.
    Value(Value),
    /// Nothing at all is sent, as for `shutdown`.
    Silence,
}

/// Executes commands.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Executes one; `clock` is the time of the request on the worker's event clock.
    async fn handle(
        &self,
        method: &str,
        arguments: Map<String, Value>,
        clock: u64,
    ) -> Result<Answer, CommandError>;
}

/// Who answers, and how requests are read.
#[derive(Debug, Clone)]
pub struct Node {
    /// Node name of this worker.
    pub hostname: String,
    /// Exchanges and queues.
    pub addresses: Addresses,
    /// Content types that are read.
    pub accept: Accept,
    /// The worker's event clock; every request advances it.
    pub clock: Clock,
    /// The clock of the mailbox, which goes into replies.
    pub mailbox_clock: Clock,
    /// A command that takes longer is given up, so that the next one can be answered.
    pub patience: Duration,
}

/// A request that is for this node.
#[derive(Debug, Clone, PartialEq)]
struct Call {
    method: String,
    arguments: Map<String, Value>,
    /// Exchange, routing key and ticket of the reply, if one is wanted.
    reply_to: Option<(String, String, Value)>,
}

impl Node {
    /// A node that accepts JSON, with Celery's addresses.
    pub fn new(hostname: impl Into<String>, clock: Clock) -> Self {
        Self {
            hostname: hostname.into(),
            addresses: Addresses::default(),
            accept: Accept::default(),
            clock,
            mailbox_clock: Clock::default(),
            patience: Duration::from_secs(30),
        }
    }

    /// Executes one delivery and sends the reply.
    pub async fn answer(&self, channel: &dyn Channel, delivery: &Delivery, handler: &dyn Handler) {
        // Clients have no clock worth adjusting to; their message is an event all the same.
        let clock = self.clock.forward();
        let call = match self.read(delivery) {
            Ok(Some(call)) => call,
            Ok(None) => return,
            Err(error) => {
                log::error!("Control command error: {error}");
                return;
            }
        };
        let Call {
            method,
            arguments,
            reply_to,
        } = call;
        let running = AssertUnwindSafe(handler.handle(&method, arguments, clock)).catch_unwind();
        let outcome = match tokio::time::timeout(self.patience, running).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(CommandError(Exception::builtin(
                "RuntimeError",
                format!("{method} panicked"),
            ))),
            Err(_) => {
                let text = format!("{method} took longer than {:?}", self.patience);
                Err(CommandError(Exception::builtin("TimeoutError", text)))
            }
        };
        let value = match outcome {
            Ok(Answer::Value(value)) => value,
            Ok(Answer::Silence) => return,
            Err(CommandError(exception)) => {
                if reply_to.is_none() {
                    log::error!("pidbox command error: {}", exception.repr());
                }
                serde_json::json!({"error": exception.repr()})
            }
        };
        let Some((exchange, routing_key, ticket)) = reply_to else {
            return;
        };
        match self.reply(value, &exchange, routing_key, ticket) {
            Ok(publication) => channel.cast(publication),
            Err(error) => log::error!("pidbox command error: reply to {method}: {error}"),
        }
    }

    /// Reads a request; `None` when it is not for this node.
    fn read(&self, delivery: &Delivery) -> Result<Option<Call>, Error> {
        let envelope = &delivery.envelope;
        let number = |name: &str| envelope.headers.get(name).and_then(Value::as_f64);
        if let Some(clock) = envelope.headers.get("clock").and_then(Value::as_u64) {
            self.mailbox_clock.adjust(clock);
        }
        let mut body = object(envelope, &self.accept)?;
        if !self.is_addressed(&body)? {
            return Ok(None);
        }
        let Some(Value::String(method)) = body.remove("method") else {
            return Err(Error::Shape("the request names no method".to_owned()));
        };
        if number("expires").is_some_and(|at| at > 0.0 && unix_time() > at + GRACE) {
            log::warn!("Ignored the control command {method}: it expired before it came here");
            return Ok(None);
        }
        let arguments = match body.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            None | Some(Value::Null) => Map::new(),
            Some(_) => {
                return Err(Error::Shape(format!(
                    "the arguments of {method} are not an object"
                )));
            }
        };
        let ticket = body.remove("ticket").unwrap_or_default();
        let reply_to = body.remove("reply_to").and_then(|reply_to| {
            let text = |name: &str| {
                reply_to
                    .get(name)
                    .and_then(Value::as_str)
                    .map(str::to_owned)
            };
            let exchange = text("exchange").filter(|name| self.is_reply_exchange(name))?;
            Some((exchange, text("routing_key")?, ticket))
        });
        Ok(Some(Call {
            method,
            arguments,
            reply_to,
        }))
    }

    /// Replies go to an exchange for replies: nobody can make a worker write into a task queue.
    fn is_reply_exchange(&self, name: &str) -> bool {
        name.starts_with("reply.") && name.ends_with(".pidbox")
    }

    fn is_addressed(&self, body: &Map<String, Value>) -> Result<bool, Error> {
        let is_set = |value: &&Value| !matches!(value, Value::Null) && value.as_str() != Some("");
        match body.get("destination") {
            Some(Value::Array(nodes)) if !nodes.is_empty() => {
                return Ok(nodes
                    .iter()
                    .any(|node| node.as_str() == Some(&self.hostname)));
            }
            Some(Value::String(node)) if !node.is_empty() => return Ok(*node == self.hostname),
            _ => {}
        }
        match (
            body.get("pattern").filter(is_set),
            body.get("matcher").filter(is_set),
        ) {
            (Some(Value::String(pattern)), Some(Value::String(matcher))) => {
                pattern::matches(&self.hostname, pattern, matcher).map_err(Error::Shape)
            }
            (Some(_), Some(_)) => Err(Error::Shape("pattern and matcher are not texts".to_owned())),
            _ => Ok(true),
        }
    }

    fn reply(
        &self,
        value: Value,
        exchange: &str,
        routing_key: String,
        ticket: Value,
    ) -> Result<Publication, Error> {
        let mut answer = Map::new();
        answer.insert(self.hostname.clone(), value);
        let Encoded {
            body,
            content_type,
            content_encoding,
        } = Serializer::Json.encode(&Value::Object(answer))?;
        let mut headers = Map::new();
        headers.insert("ticket".to_owned(), ticket);
        headers.insert("clock".to_owned(), self.mailbox_clock.forward().into());
        Ok(Publication {
            exchange: reply_exchange(exchange),
            routing_key,
            envelope: Envelope {
                body,
                content_type: Some(content_type.to_owned()),
                content_encoding: Some(content_encoding.to_owned()),
                headers,
                properties: Properties {
                    delivery_mode: Some(1),
                    priority: Some(0),
                    ..Properties::default()
                },
            },
        })
    }
}

/// Answers requests until the channel ends. To be run on a channel of its own, and spawned, so
/// that a busy worker still answers.
pub async fn serve(
    node: &Node,
    channel: Arc<dyn Channel>,
    handler: &dyn Handler,
) -> Result<(), Error> {
    let queue = node.addresses.node_queue(&node.hostname);
    let mut deliveries = channel.subscribe(&queue, &[]).await?;
    while let Some(delivery) = deliveries.recv().await {
        node.answer(&*channel, &delivery, handler).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
