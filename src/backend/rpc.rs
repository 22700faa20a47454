//! Results as messages: `rpc://`.
//!
//! Every stored state is a message to the queue the client named in `reply_to`, on the broker
//! the tasks come from. Nothing is kept, so nothing can be read back, a success is not
//! protected and a chord cannot be counted. Messages go through a channel of their own, opened
//! when first needed and again after a fault; the client makes the queue, never the worker.
//! Answers for `celery/backends/rpc.py`.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use serde_json::{Map, Value};

use super::retry::Retrier;
use super::{Backend, Codec, Error, Meta, Options, ReplyTo, RetryPolicy, Stored};
use crate::protocol::envelope::{Envelope, Properties};
use crate::transport::{self, Channel, Exchange, Publication, Transport};

const STORE: &str = "store the result";

/// A channel that is open or being opened; several results wait for the same one.
type Opening = Shared<BoxFuture<'static, Result<Arc<dyn Channel>, Arc<transport::Error>>>>;

/// The backend that answers by message.
pub struct Rpc {
    broker: Arc<dyn Transport>,
    channel: Mutex<(u64, Option<Opening>)>,
    codec: Codec,
    persistent: bool,
    retrier: Retrier,
}

impl Rpc {
    /// Answers over the broker the tasks come from.
    pub fn new(broker: Arc<dyn Transport>, options: &Options) -> Result<Self, Error> {
        // Replies are never compressed: the client's consumer would not look for the marker.
        let codec = Codec::new(&options.serializer, None)?;
        let retrier = Retrier::new(RetryPolicy::of(options), "broker");
        let channel = Mutex::new((0, None));
        Ok(Self {
            broker,
            channel,
            codec,
            persistent: options.persistent,
            retrier,
        })
    }

    /// The channel and its number.
    async fn channel(&self) -> Result<(u64, Arc<dyn Channel>), Error> {
        let (number, opening) = {
            let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
            let opening = held.1.get_or_insert_with(|| {
                let broker = Arc::clone(&self.broker);
                async move { broker.connect().await.map_err(Arc::new) }
                    .boxed()
                    .shared()
            });
            let opening = opening.clone();
            (held.0, opening)
        };
        match opening.await {
            Ok(channel) => Ok((number, channel)),
            Err(error) => {
                self.give_up(number);
                Err(Error::from_transport(STORE, &error))
            }
        }
    }

    /// Forgets a channel that failed, unless somebody else did already.
    fn give_up(&self, number: u64) {
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0 == number {
            *held = (number + 1, None);
        }
    }

    async fn publish(&self, publication: Publication) -> Result<(), Error> {
        let (number, channel) = self.channel().await?;
        channel.publish(publication).await.map_err(|error| {
            if error.is_connection() {
                self.give_up(number);
            }
            Error::from_transport(STORE, &error)
        })
    }
}

#[async_trait]
impl Backend for Rpc {
    async fn store(&self, meta: &Meta, to: &ReplyTo<'_>) -> Result<Stored, Error> {
        // A client that did not say where to answer does not want to know.
        let Some(queue) = to.reply_to.filter(|queue| !queue.is_empty()) else {
            return Ok(Stored::Written);
        };
        let encoded = self.codec.encode_message(&meta.to_value())?;
        let publication = Publication {
            exchange: Exchange::default_exchange(),
            routing_key: queue.to_owned(),
            envelope: Envelope {
                body: encoded.body,
                content_type: Some(encoded.content_type.to_owned()),
                content_encoding: Some(encoded.content_encoding.to_owned()),
                headers: Map::new(),
                properties: Properties {
                    correlation_id: Some(to.correlation_id.unwrap_or(&meta.task_id).to_owned()),
                    delivery_mode: Some(if self.persistent { 2 } else { 1 }),
                    priority: Some(0),
                    ..Properties::default()
                },
            },
        };
        self.retrier
            .run(|| self.publish(publication.clone()))
            .await?;
        Ok(Stored::Written)
    }

    async fn get(&self, _: &str) -> Result<Option<Meta>, Error> {
        Ok(None)
    }

    async fn forget(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    async fn save_group(&self, _: &str, _: &Value) -> Result<(), Error> {
        Err(Error::Unsupported(
            "the rpc result backend cannot save a group; use redis://",
        ))
    }

    async fn restore_group(&self, _: &str) -> Result<Option<Value>, Error> {
        Ok(None)
    }

    fn display_url(&self) -> String {
        "rpc://".to_owned()
    }

    fn driver(&self) -> &'static str {
        "rpc"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;
    use tokio::sync::mpsc;

    use super::*;
    use crate::transport::{Delivery, Error as Fault, Incoming, Queue, QueueStatus, Tag};

    /// A broker whose first channels break, and which remembers what is published.
    struct Broker {
        broken: usize,
        opened: AtomicUsize,
        published: Arc<Mutex<Vec<Publication>>>,
    }

    struct Line {
        broken: bool,
        published: Arc<Mutex<Vec<Publication>>>,
    }

    #[async_trait]
    impl Transport for Broker {
        async fn connect(&self) -> Result<Arc<dyn Channel>, Fault> {
            let broken = self.opened.fetch_add(1, Ordering::SeqCst) < self.broken;
            Ok(Arc::new(Line {
                broken,
                published: Arc::clone(&self.published),
            }))
        }

        fn display_url(&self) -> String {
            "test://".into()
        }

        fn info(&self) -> Value {
            Value::Null
        }

        fn driver(&self) -> &'static str {
            "redis"
        }
    }

    #[async_trait]
    impl Channel for Line {
        async fn publish(&self, publication: Publication) -> Result<(), Fault> {
            if self.broken {
                let reason = "connection reset".to_owned();
                return Err(Fault::Connection {
                    operation: "publish",
                    reason,
                });
            }
            self.published.lock().unwrap().push(publication);
            Ok(())
        }

        async fn declare(&self, _: &Queue) -> Result<QueueStatus, Fault> {
            panic!("the reply queue is the client's")
        }

        async fn purge(&self, _: &str) -> Result<u64, Fault> {
            unreachable!("only publish is used")
        }

        async fn delete(&self, _: &Queue) -> Result<(), Fault> {
            unreachable!("only publish is used")
        }

        async fn bindings(&self, _: &str) -> Result<Vec<(String, String)>, Fault> {
            unreachable!("only publish is used")
        }

        async fn consume(&self, _: &Queue) -> Result<(), Fault> {
            unreachable!("only publish is used")
        }

        async fn cancel(&self, _: &str) -> Result<(), Fault> {
            unreachable!("only publish is used")
        }

        async fn set_prefetch(&self, _: u32) -> Result<(), Fault> {
            unreachable!("only publish is used")
        }

        async fn next(&self) -> Result<Incoming, Fault> {
            unreachable!("only publish is used")
        }

        fn ack(&self, _: &Tag) {}

        fn reject(&self, _: &Tag, _: bool) {}

        fn quarantine(&self, _: &Tag, _: &str) {}

        fn cast(&self, _: Publication) {}

        async fn subscribe(
            &self,
            _: &Queue,
            _: &[String],
        ) -> Result<mpsc::Receiver<Delivery>, Fault> {
            unreachable!("only publish is used")
        }

        async fn flush(&self) -> Result<(), Fault> {
            unreachable!("only publish is used")
        }

        async fn adopt(&self, _: &[Tag]) -> Result<Vec<Tag>, Fault> {
            unreachable!("only publish is used")
        }

        async fn restore(&self, _: &[Tag]) -> Result<u64, Fault> {
            unreachable!("only publish is used")
        }

        async fn close(&self) -> Result<(), Fault> {
            Ok(())
        }
    }

    fn rpc(broken: usize) -> (Rpc, Arc<Mutex<Vec<Publication>>>) {
        let published = Arc::new(Mutex::new(Vec::new()));
        let opened = AtomicUsize::new(0);
        let broker = Broker {
            broken,
            opened,
            published: Arc::clone(&published),
        };
        (
            Rpc::new(Arc::new(broker), &Options::default()).unwrap(),
            published,
        )
    }

    #[tokio::test]
    async fn a_result_goes_to_the_clients_queue_in_celerys_form() {
        let (backend, published) = rpc(0);
        let meta = Meta::new("t-1", "SUCCESS", json!("echo: x"));
        let to = ReplyTo {
            reply_to: Some("oid"),
            correlation_id: Some("c-1"),
        };
        assert_eq!(backend.store(&meta, &to).await.unwrap(), Stored::Written);
        let sent = published.lock().unwrap().pop().unwrap();
        assert_eq!(
            (sent.exchange.name.as_str(), sent.routing_key.as_str()),
            ("", "oid")
        );
        let body: Value = serde_json::from_slice(&sent.envelope.body).unwrap();
        assert_eq!(body, meta.to_value());
        assert_eq!(
            sent.envelope.content_type.as_deref(),
            Some("application/json")
        );
        assert_eq!(sent.envelope.content_encoding.as_deref(), Some("utf-8"));
        let properties = sent.envelope.properties;
        assert_eq!(properties.correlation_id.as_deref(), Some("c-1"));
        assert_eq!(
            (properties.delivery_mode, properties.priority),
            (Some(1), Some(0))
        );
    }

    #[tokio::test]
    async fn a_result_nobody_asked_for_is_dropped() {
        let (backend, published) = rpc(0);
        let meta = Meta::new("t-1", "SUCCESS", Value::Null);
        for reply_to in [None, Some("")] {
            let to = ReplyTo {
                reply_to,
                correlation_id: None,
            };
            backend.store(&meta, &to).await.unwrap();
        }
        assert!(published.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_broken_channel_is_replaced_and_the_result_sent_again() {
        let (backend, published) = rpc(2);
        let meta = Meta::new("t-1", "SUCCESS", Value::Null);
        let to = ReplyTo {
            reply_to: Some("oid"),
            correlation_id: None,
        };
        backend.store(&meta, &to).await.unwrap();
        let sent = published.lock().unwrap();
        assert_eq!(sent.len(), 1);
        assert_eq!(
            sent[0].envelope.properties.correlation_id.as_deref(),
            Some("t-1")
        );
    }
}
