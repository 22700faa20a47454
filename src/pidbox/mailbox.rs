//! The asking side: broadcasts a request and gathers the replies.
//!
//! Answers for `kombu.pidbox.Mailbox`. The reply queue lives as long as one request.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;
use uuid::Uuid;

use super::{Addresses, Error, object, unix_time};
use crate::protocol::clock::Clock;
use crate::protocol::envelope::{Envelope, Properties};
use crate::protocol::serialization::{Accept, Encoded, Serializer};
use crate::transport::{Channel, Publication};

/// A request to nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Name of the command.
    pub method: String,
    /// Its keyword arguments.
    pub arguments: Map<String, Value>,
    /// Names of the nodes it is for; all when absent.
    pub destination: Option<Vec<String>>,
    /// Pattern for the names of the nodes it is for, and `glob` or `pcre`.
    pub pattern: Option<(String, String)>,
    /// How long replies are awaited.
    pub timeout: Duration,
    /// How many replies are enough; the number of destinations when absent.
    pub limit: Option<usize>,
}

/// What a node answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Its name.
    pub node: String,
    /// Its answer.
    pub value: Value,
}

/// Asks nodes over a channel.
#[derive(Clone)]
pub struct Mailbox {
    channel: Arc<dyn Channel>,
    addresses: Addresses,
    accept: Accept,
    clock: Clock,
}

impl Request {
    /// A request to all nodes, waiting a second, as `celery inspect` does.
    pub fn new(method: impl Into<String>) -> Self {
        Self {
            method: method.into(),
            arguments: Map::new(),
            destination: None,
            pattern: None,
            timeout: Duration::from_secs(1),
            limit: None,
        }
    }

    /// Adds an argument.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.arguments.insert(name.to_owned(), value.into());
        self
    }
}

impl Mailbox {
    /// A mailbox over `channel`.
    pub fn new(channel: Arc<dyn Channel>, addresses: Addresses, accept: Accept) -> Self {
        Self {
            channel,
            addresses,
            accept,
            clock: Clock::default(),
        }
    }

    /// Sends a request nobody is to answer.
    pub async fn cast(&self, request: &Request) -> Result<(), Error> {
        Ok(self
            .channel
            .publish(self.publication(request, None)?)
            .await?)
    }

    /// Sends a request and returns the replies in the order they came.
    pub async fn call(&self, request: &Request) -> Result<Vec<Reply>, Error> {
        let mut replies = Vec::new();
        self.call_each(request, |reply, _| replies.push(reply))
            .await?;
        Ok(replies)
    }

    /// Sends a request and hands out each reply as it comes, with the clock of its sender.
    pub async fn call_each(
        &self,
        request: &Request,
        mut on_reply: impl FnMut(Reply, u64),
    ) -> Result<(), Error> {
        let oid = Uuid::new_v4().to_string();
        let ticket = Uuid::new_v4().to_string();
        let queue = self.addresses.reply_queue(&oid);
        let mut deliveries = self.channel.subscribe(&queue, &[]).await?;
        let publication = self.publication(request, Some((&oid, &ticket)))?;
        let reached = self.channel.broadcast(publication).await?;
        let deadline = Instant::now() + request.timeout;
        let mut wanted = request
            .limit
            .or_else(|| {
                request
                    .destination
                    .as_ref()
                    .map(Vec::len)
                    .filter(|count| *count > 0)
            })
            .unwrap_or(usize::MAX);
        // Whom the request did not reach will not answer.
        if let Some(reached) = reached {
            wanted = wanted.min(usize::try_from(reached).unwrap_or(usize::MAX));
        }
        while wanted > 0 {
            let delivery = match tokio::time::timeout_at(deadline, deliveries.recv()).await {
                Ok(Some(delivery)) => delivery,
                Ok(None) => return Err(Error::Ended),
                Err(_) => break,
            };
            let headers = &delivery.envelope.headers;
            let clock = headers.get("clock").and_then(Value::as_u64).unwrap_or(0);
            self.clock.adjust(clock);
            match headers.get("ticket").and_then(Value::as_str) {
                Some(other) if other != ticket => continue,
                _ => {}
            }
            match object(&delivery.envelope, &self.accept) {
                Ok(answers) => {
                    for (node, value) in answers {
                        on_reply(Reply { node, value }, clock);
                    }
                    wanted -= 1;
                }
                Err(error) => log::warn!("Ignored a reply to {}: {error}", request.method),
            }
        }
        Ok(())
    }

    fn publication(
        &self,
        request: &Request,
        reply: Option<(&str, &str)>,
    ) -> Result<Publication, Error> {
        let (pattern, matcher) = match &request.pattern {
            Some((pattern, matcher)) => {
                (Value::from(pattern.as_str()), Value::from(matcher.as_str()))
            }
            None => (Value::Null, Value::Null),
        };
        let mut body = Map::new();
        body.insert("method".to_owned(), request.method.clone().into());
        body.insert(
            "arguments".to_owned(),
            Value::Object(request.arguments.clone()),
        );
        body.insert("destination".to_owned(), request.destination.clone().into());
        body.insert("pattern".to_owned(), pattern);
        body.insert("matcher".to_owned(), matcher);
        let mut expires = Value::from(0);
        if let Some((oid, ticket)) = reply {
            let exchange = self.addresses.reply_exchange().name;
            body.insert("ticket".to_owned(), ticket.into());
            body.insert(
                "reply_to".to_owned(),
                serde_json::json!({"exchange": exchange, "routing_key": oid}),
            );
            expires = (unix_time() + request.timeout.as_secs_f64()).into();
        }
        let Encoded {
            body,
            content_type,
            content_encoding,
        } = Serializer::Json.encode(&Value::Object(body))?;
        let mut headers = Map::new();
        headers.insert("clock".to_owned(), self.clock.forward().into());
        headers.insert("expires".to_owned(), expires);
        Ok(Publication {
            exchange: self.addresses.exchange(),
            routing_key: String::new(),
            envelope: Envelope {
                body,
                content_type: Some(content_type.to_owned()),
                content_encoding: Some(content_encoding.to_owned()),
                headers,
                properties: Properties {
                    delivery_mode: Some(2),
                    priority: Some(0),
                    ..Properties::default()
                },
            },
        })
    }
}
