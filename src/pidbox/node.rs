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
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use async_trait::async_trait;
    use serde_json::{Map, Value, json};

    use super::{Answer, Handler, Node, serve};
    use crate::pidbox::{Addresses, CommandError, Mailbox, Reply, Request};
    use crate::protocol::clock::Clock;
    use crate::protocol::envelope::Envelope;
    use crate::protocol::serialization::Accept;
    use crate::transport::memory::Memory;
    use crate::transport::{Channel, Delivery, Publication, Tag};

    struct Table;

    #[async_trait]
    impl Handler for Table {
        async fn handle(
            &self,
            method: &str,
            arguments: Map<String, Value>,
            _: u64,
        ) -> Result<Answer, CommandError> {
            match method {
                "ping" => Ok(Answer::Value(json!({"ok": "pong"}))),
                "echo" => Ok(Answer::Value(Value::Object(arguments))),
                "heartbeat" => Ok(Answer::Value(Value::Null)),
                "shutdown" => Ok(Answer::Silence),
                "panic" => panic!("on purpose"),
                "slow" => std::future::pending().await,
                "autoscale" => Err(CommandError::value_error("Autoscale not enabled")),
                other => Err(CommandError::unknown_command(other)),
            }
        }
    }

    /// A broker with two nodes, and a mailbox to ask them.
    async fn cluster() -> (Memory, Mailbox) {
        let memory = Memory::default();
        for name in ["worker1@example", "worker2@example"] {
            let channel = memory.channel();
            tokio::spawn(async move {
                let patience = Duration::from_millis(50);
                let node = Node {
                    patience,
                    ..Node::new(name, Clock::default())
                };
                serve(&node, channel, &Table).await
            });
        }
        while memory
            .channel()
            .bindings("celery.pidbox")
            .await
            .expect("bindings")
            .len()
            < 2
        {
            tokio::task::yield_now().await;
        }
        let mailbox = Mailbox::new(memory.channel(), Addresses::default(), Accept::default());
        (memory, mailbox)
    }

    /// A request to all, which waits for its whole time.
    fn brief(method: &str) -> Request {
        Request {
            timeout: Duration::from_millis(100),
            ..Request::new(method)
        }
    }

    async fn one(mailbox: &Mailbox, request: Request) -> Value {
        let request = Request {
            destination: Some(vec!["worker1@example".to_owned()]),
            ..request
        };
        let replies = mailbox.call(&request).await.expect("asks");
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].node, "worker1@example");
        replies[0].value.clone()
    }

    #[tokio::test]
    async fn all_nodes_answer_a_broadcast_until_the_timeout() {
        let (memory, mailbox) = cluster().await;
        let mut replies = mailbox.call(&brief("ping")).await.expect("asks");
        replies.sort_by(|one, other| one.node.cmp(&other.node));
        let pong = |node: &str| Reply {
            node: node.to_owned(),
            value: json!({"ok": "pong"}),
        };
        assert_eq!(replies, [pong("worker1@example"), pong("worker2@example")]);
        let published = memory.take_published();
        let request: Value = serde_json::from_slice(&published[0].envelope.body).expect("JSON");
        let keys: Vec<&String> = request.as_object().expect("object").keys().collect();
        assert_eq!(
            keys,
            [
                "method",
                "arguments",
                "destination",
                "pattern",
                "matcher",
                "ticket",
                "reply_to"
            ]
        );
        assert_eq!(request["reply_to"]["exchange"], "reply.celery.pidbox");
        assert_eq!(published[0].envelope.headers["clock"], 1);
        let reply = &published[1];
        assert_eq!(reply.envelope.headers["ticket"], request["ticket"]);
        assert_eq!(
            reply.envelope.headers["clock"], 3,
            "adjusted to 1, then forwarded"
        );
        assert_eq!(
            reply.routing_key,
            request["reply_to"]["routing_key"].as_str().expect("text")
        );
    }

    #[tokio::test]
    async fn destination_pattern_and_limit_choose_who_answers() {
        let (_memory, mailbox) = cluster().await;
        assert_eq!(
            one(&mailbox, Request::new("ping")).await,
            json!({"ok": "pong"})
        );
        for (pattern, matcher, expected) in [
            ("*2@*", "glob", 1),
            ("worker", "pcre", 2),
            ("nobody", "glob", 0),
            ("x", "soundex", 0),
        ] {
            let pattern = Some((pattern.to_owned(), matcher.to_owned()));
            let request = Request {
                pattern,
                ..brief("ping")
            };
            assert_eq!(mailbox.call(&request).await.expect("asks").len(), expected);
        }
        let request = Request {
            limit: Some(1),
            timeout: Duration::from_secs(60),
            ..Request::new("ping")
        };
        assert_eq!(mailbox.call(&request).await.expect("asks").len(), 1);
    }

    #[tokio::test]
    async fn commands_that_fail_answer_with_pythons_repr() {
        let (_memory, mailbox) = cluster().await;
        for (method, expected) in [
            ("heartbeat", json!(null)),
            (
                "no_such_command",
                json!({"error": "KeyError('no_such_command')"}),
            ),
            (
                "autoscale",
                json!({"error": "ValueError('Autoscale not enabled')"}),
            ),
            ("panic", json!({"error": "RuntimeError('panic panicked')"})),
            ("ping", json!({"ok": "pong"})),
        ] {
            assert_eq!(
                one(&mailbox, Request::new(method)).await,
                expected,
                "{method}"
            );
        }
        let slow = Request {
            timeout: Duration::from_secs(60),
            ..Request::new("slow")
        };
        assert_eq!(
            one(&mailbox, slow).await["error"],
            "TimeoutError('slow took longer than 50ms')"
        );
        assert_eq!(
            one(&mailbox, Request::new("echo").with("a", 1)).await,
            json!({"a": 1})
        );
        assert_eq!(mailbox.call(&brief("shutdown")).await.expect("asks"), []);
    }

    fn delivery(body: &[u8], headers: Value) -> Delivery {
        Delivery {
            tag: Tag("1".into()),
            envelope: Envelope {
                body: body.to_vec(),
                content_type: Some("application/json".to_owned()),
                headers: headers.as_object().cloned().expect("object"),
                ..Envelope::default()
            },
            queue: String::new(),
            exchange: "celery.pidbox".to_owned(),
            routing_key: String::new(),
            redelivered: false,
            deaths: 0,
        }
    }

    async fn replies(body: &str, headers: Value) -> Vec<Publication> {
        let memory = Memory::default();
        let channel: Arc<dyn Channel> = memory.channel();
        let node = Node::new("worker1@example", Clock::default());
        node.answer(&*channel, &delivery(body.as_bytes(), headers), &Table)
            .await;
        assert_eq!(node.clock.value(), 1, "every request advances the clock");
        memory.take_published()
    }

    #[tokio::test]
    async fn a_stale_request_is_not_executed() {
        let body =
            r#"{"method":"ping","reply_to":{"exchange":"reply.celery.pidbox","routing_key":"r"}}"#;
        let now = super::unix_time();
        assert_eq!(replies(body, json!({"expires": now + 1.0})).await.len(), 1);
        assert_eq!(replies(body, json!({"expires": 0})).await.len(), 1);
        assert_eq!(
            replies(body, json!({"expires": now - 2.0})).await.len(),
            1,
            "clocks differ"
        );
        assert_eq!(
            replies(body, json!({"expires": now - 300.0})).await.len(),
            0
        );
    }

    #[tokio::test]
    async fn no_request_can_make_a_worker_write_into_a_task_queue() {
        for exchange in ["", "celery", "celery.pidbox"] {
            let body = json!({"method": "ping", "reply_to": {"exchange": exchange, "routing_key": "celery"}});
            assert_eq!(
                replies(&body.to_string(), json!({})).await.len(),
                0,
                "{exchange}"
            );
        }
    }

    #[tokio::test]
    async fn bytes_that_are_no_request_do_no_harm() {
        for body in [
            "",
            "\u{0}",
            "[",
            "null",
            "[]",
            "{}",
            r#"{"method":1}"#,
            r#"{"method":"ping","arguments":[]}"#,
            r#"{"method":"ping","destination":{},"reply_to":7}"#,
            r#"{"method":"ping","pattern":1,"matcher":2}"#,
            r#"{"method":"ping","destination":[1,null,[]]}"#,
            r#"{"method":"ping","reply_to":{"exchange":1}}"#,
        ] {
            assert_eq!(
                replies(body, json!({"clock": "x", "expires": []}))
                    .await
                    .len(),
                0,
                "{body}"
            );
        }
    }
    /// Requests with random damage, from a fixed seed.
    #[tokio::test]
    async fn damaged_requests_never_stop_the_node() {
        let memory = Memory::default();
        let channel: Arc<dyn Channel> = memory.channel();
        let node = Node::new("worker1@example", Clock::default());
        let reply_to = json!({"exchange": "reply.celery.pidbox", "routing_key": "r"});
        let valid = json!({"method": "echo", "arguments": {"a": [1, {"b": null}]},
            "destination": ["worker1@example"], "pattern": "w*", "matcher": "glob",
            "ticket": "t", "reply_to": reply_to})
        .to_string()
        .into_bytes();
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            usize::try_from(random % below as u64).expect("below fits")
        };
        let mut answered = 0;
        for _ in 0..5000 {
            let mut body = valid.clone();
            for _ in 0..=next(4) {
                let at = next(body.len());
                match next(3) {
                    0 => body[at] = u8::try_from(next(256)).expect("a byte"),
                    1 => drop(body.remove(at)),
                    _ => body.insert(at, b"[]{}\":,*?0e-\\n"[next(14)]),
                }
            }
            node.answer(&*channel, &delivery(&body, json!({"clock": 1})), &Table)
                .await;
            answered += memory.take_published().len();
        }
        assert!(answered > 100, "{answered} answered");
        assert_eq!(node.clock.value(), 5000);
    }
}
