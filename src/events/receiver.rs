//! Takes the events of others: single ones and arrays, from any version, or any bytes.
//!
//! Answers for `celery.events.receiver.EventReceiver`; what to do with an event is the
//! caller's business.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::protocol::clock::Clock;
use crate::protocol::serialization::{self, Accept};
use crate::protocol::{Limits, json};
use crate::transport::{Channel, Delivery, Error, Exchange, Queue};

/// Clients do not take part in the logical clock: their `task-sent` counts as this much later
/// than what was seen last.
const CLIENT_CLOCK_SKEW: u64 = 200;

/// An event that came in.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Such as `worker-heartbeat`.
    pub kind: String,
    /// Node name of the sender.
    pub hostname: String,
    /// All fields, `local_received` included.
    pub fields: Map<String, Value>,
}

/// What the queue of a subscription is like.
#[derive(Debug, Clone, PartialEq)]
pub struct Ear {
    /// `event_queue_prefix`.
    pub prefix: String,
    /// `event_queue_ttl` in seconds.
    pub ttl: Option<f64>,
    /// `event_queue_expires` in seconds.
    pub expires: Option<f64>,
    /// `event_queue_exclusive`.
    pub exclusive: bool,
    /// `event_queue_durable`.
    pub durable: bool,
}

/// A subscription to events.
pub struct Receiver {
    deliveries: mpsc::Receiver<Delivery>,
    clock: Clock,
    own: Option<String>,
    pending: std::vec::IntoIter<Received>,
}

impl Receiver {
    /// Subscribes by patterns such as `#` or `worker.#`. Events of the node `own` are left out.
    pub async fn subscribe(
        channel: &Arc<dyn Channel>,
        exchange: Exchange,
        ear: &Ear,
        routing_keys: &[String],
        clock: Clock,
        own: Option<String>,
    ) -> Result<Self, Error> {
        let name = format!("{}.{}", ear.prefix, Uuid::new_v4());
        let key = routing_keys.first().map_or("#", String::as_str);
        let queue = Queue {
            durable: ear.durable,
            exclusive: ear.exclusive,
            auto_delete: !ear.durable,
            expires: ear.expires,
            message_ttl: ear.ttl,
            ..Queue::bound(name, exchange, key)
        };
        let deliveries = channel.subscribe(&queue, routing_keys).await?;
        Ok(Self {
            deliveries,
            clock,
            own,
            pending: Vec::new().into_iter(),
        })
    }

    /// The next event; `None` when the channel has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            if let Some(event) = self.pending.next() {
                return Some(event);
            }
            let delivery = self.deliveries.recv().await?;
            if self.is_own(&delivery) {
                continue;
            }
            let mut events = parse(&delivery, &self.clock);
            if let Some(own) = &self.own {
                events.retain(|event| event.hostname != *own);
            }
            self.pending = events.into_iter();
        }
    }

    fn is_own(&self, delivery: &Delivery) -> bool {
        let hostname = delivery
            .envelope
            .headers
            .get("hostname")
            .and_then(Value::as_str);
        hostname.is_some() && hostname == self.own.as_deref()
    }
}

/// Reads the events of a delivery and adjusts the clock. What is no event is left out.
pub fn parse(delivery: &Delivery, clock: &Clock) -> Vec<Received> {
    let envelope = &delivery.envelope;
    let limits = Limits {
        body: 4 << 20,
        depth: 32,
        values: 100_000,
    };
    let content_type = envelope.content_type.as_deref();
    let body =
        match serialization::decode(content_type, &envelope.body, &Accept::default(), &limits) {
            Ok(body) => body,
            Err(error) => {
                log::debug!("Ignored an event that cannot be read: {error}");
                return Vec::new();
            }
        };
    let sender = envelope.headers.get("hostname").and_then(Value::as_str);
    let events = match body {
        Value::Array(events) => events,
        single => vec![single],
    };
    events
        .into_iter()
        .filter_map(|event| received(event, sender, clock))
        .collect()
}

fn received(event: Value, sender: Option<&str>, clock: &Clock) -> Option<Received> {
    let Value::Object(mut fields) = event else {
        return None;
    };
    let kind = fields.get("type")?.as_str()?.to_owned();
    let hostname = fields
        .get("hostname")
        .and_then(Value::as_str)
        .or(sender)?
        .to_owned();
    let time = if kind == "task-sent" {
        let ahead = clock.value().max(1).saturating_add(CLIENT_CLOCK_SKEW);
        clock.adjust(ahead);
        ahead
    } else {
        match fields.get("clock").and_then(Value::as_u64) {
            Some(theirs) => {
                clock.adjust(theirs);
                theirs
            }
            None => clock.forward(),
        }
    };
    fields.insert("clock".to_owned(), time.into());
    fields.insert("hostname".to_owned(), hostname.clone().into());
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    fields.insert("local_received".to_owned(), json::float(now.as_secs_f64()));
    Some(Received {
        kind,
        hostname,
        fields,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Ear, Receiver, parse};
    use crate::events::{Dispatcher, Event, Options, exchange};
    use crate::protocol::clock::Clock;
    use crate::protocol::envelope::Envelope;
    use crate::transport::redis::server::Server;
    use crate::transport::{Delivery, Tag};

    fn delivery(body: &[u8]) -> Delivery {
        Delivery {
            tag: Tag("1".into()),
            envelope: Envelope {
                body: body.to_vec(),
                content_type: Some("application/json".to_owned()),
                headers: json!({"hostname": "w@h"})
                    .as_object()
                    .cloned()
                    .expect("object"),
                ..Envelope::default()
            },
            queue: String::new(),
            exchange: "celeryev".to_owned(),
            routing_key: "task.multi".to_owned(),
            redelivered: false,
            deaths: 0,
        }
    }

    #[test]
    fn single_events_and_arrays_are_read_and_set_the_clock() {
        let clock = Clock::new(10);
        let body = br#"[{"type":"task-started","uuid":"a","clock":50},{"type":"task-sent","clock":9},7,{"uuid":"x"}]"#;
        let events = parse(&delivery(body), &clock);
        assert_eq!(events.len(), 2);
        assert_eq!(
            (events[0].kind.as_str(), events[0].hostname.as_str()),
            ("task-started", "w@h")
        );
        assert_eq!(events[1].fields["clock"], 251, "far after what was seen");
        assert!(clock.value() > 251);
        let events = parse(
            &delivery(br#"{"type":"worker-online","hostname":"other@h"}"#),
            &clock,
        );
        assert_eq!(events[0].hostname, "other@h");
        assert!(events[0].fields["local_received"].is_number());
    }

    #[test]
    fn bytes_that_are_no_event_are_ignored() {
        for body in [
            &b""[..],
            b"\xff",
            b"[",
            b"null",
            b"[[]]",
            b"{\"type\":1}",
            b"{\"type\":\"x\",\"clock\":-1}",
        ] {
            parse(&delivery(body), &Clock::default());
        }
    }

    #[tokio::test]
    async fn a_receiver_gets_the_events_of_others() {
        let server = Server::start().await;
        let (ours, theirs) = (server.channel().await, server.channel().await);
        let exchange = exchange("celeryev", "redis");
        let mut receiver = Receiver::subscribe(
            &ours,
            exchange.clone(),
            &Ear {
                prefix: "celeryev".to_owned(),
                ttl: Some(5.0),
                expires: Some(60.0),
                exclusive: true,
                durable: false,
            },
            &["worker.#".to_owned()],
            Clock::default(),
            Some("me@h".to_owned()),
        )
        .await
        .expect("subscribes");
        for node in ["me@h", "other@h"] {
            let options = Options {
                task_events: true,
                ..Options::new(node, Clock::default(), exchange.clone())
            };
            let dispatcher = Dispatcher::new(options);
            dispatcher.connect(theirs.clone());
            dispatcher.send(&Event::task_started("t"));
            dispatcher.send(&Event::new("worker-online"));
            dispatcher.flush();
        }
        assert_eq!(receiver.next().await.expect("an event").hostname, "other@h");
        ours.close().await.expect("closes");
        assert_eq!(receiver.next().await, None);
    }
}
