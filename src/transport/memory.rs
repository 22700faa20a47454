//! A broker inside of this process, for the tests of what is built on channels.
//!
//! Fan-out, topic and direct exchanges with subscriptions only; task queues are not there.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{
    Channel, Delivery, Error, ExchangeKind, Incoming, Publication, Queue, QueueStatus, Tag,
};

/// One broker; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<State>);

/// A queue, its binding keys, and who reads it.
type Subscription = (Queue, Vec<String>, mpsc::Sender<Delivery>);

#[derive(Default)]
struct State {
    subscriptions: Mutex<Vec<Subscription>>,
    published: Mutex<Vec<Publication>>,
}

impl Memory {
    /// A channel to it.
    pub(crate) fn channel(&self) -> Arc<dyn Channel> {
        Arc::new(self.clone())
    }

    /// What was published since the last call.
    pub(crate) fn take_published(&self) -> Vec<Publication> {
        std::mem::take(&mut *self.0.published.lock().expect("not poisoned"))
    }

    fn deliver(&self, publication: &Publication) {
        let exchange = &publication.exchange;
        for (queue, keys, sender) in self.0.subscriptions.lock().expect("not poisoned").iter() {
            let is_bound = queue.exchange.name == exchange.name
                && (keys
                    .iter()
                    .any(|key| matches(key, &publication.routing_key))
                    || (exchange.kind == ExchangeKind::Fanout
                        && keys.iter().all(String::is_empty)));
            if is_bound {
                let delivery = Delivery {
                    tag: Tag("memory".into()),
                    envelope: publication.envelope.clone(),
                    queue: queue.name.clone(),
                    exchange: exchange.name.clone(),
                    routing_key: publication.routing_key.clone(),
                    redelivered: false,
                    deaths: 0,
                };
                // A receiver that is gone or full misses it, as on a real broker.
                let _ = sender.try_send(delivery);
            }
        }
    }
}

fn matches(key: &str, routing_key: &str) -> bool {
    key == "#"
        || key == routing_key
        || key
            .strip_suffix('#')
            .is_some_and(|head| routing_key.starts_with(head))
}

#[async_trait]
impl Channel for Memory {
    async fn declare(&self, _: &Queue) -> Result<QueueStatus, Error> {
        Ok(QueueStatus::default())
    }

    async fn purge(&self, _: &str) -> Result<u64, Error> {
        Ok(0)
    }

    async fn delete(&self, _: &Queue) -> Result<(), Error> {
        Ok(())
    }

    async fn bindings(&self, exchange: &str) -> Result<Vec<(String, String)>, Error> {
        let subscriptions = self.0.subscriptions.lock().expect("not poisoned");
        let bound = subscriptions
            .iter()
            .filter(|(queue, _, _)| queue.exchange.name == exchange);
        Ok(bound
            .map(|(queue, _, _)| (queue.routing_key.clone(), queue.name.clone()))
            .collect())
    }

    async fn consume(&self, _: &Queue) -> Result<(), Error> {
        Ok(())
    }

    async fn cancel(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    async fn set_prefetch(&self, _: u32) -> Result<(), Error> {
        Ok(())
    }

    async fn next(&self) -> Result<Incoming, Error> {
        std::future::pending().await
    }

    fn ack(&self, _: &Tag) {}

    fn reject(&self, _: &Tag, _: bool) {}

    fn quarantine(&self, _: &Tag, _: &str) {}

    async fn publish(&self, publication: Publication) -> Result<(), Error> {
        self.cast(publication);
        Ok(())
    }

    fn cast(&self, publication: Publication) {
        self.deliver(&publication);
        self.0
            .published
            .lock()
            .expect("not poisoned")
            .push(publication);
    }

    async fn subscribe(
        &self,
        queue: &Queue,
        routing_keys: &[String],
    ) -> Result<mpsc::Receiver<Delivery>, Error> {
        let (sender, receiver) = mpsc::channel(100);
        let keys = if routing_keys.is_empty() {
            vec![queue.routing_key.clone()]
        } else {
            routing_keys.to_vec()
        };
        self.0
            .subscriptions
            .lock()
            .expect("not poisoned")
            .push((queue.clone(), keys, sender));
        Ok(receiver)
    }

    async fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn adopt(&self, _: &[Tag]) -> Result<Vec<Tag>, Error> {
        Ok(Vec::new())
    }

    async fn restore(&self, _: &[Tag]) -> Result<u64, Error> {
        Ok(0)
    }

    async fn close(&self) -> Result<(), Error> {
        self.0.subscriptions.lock().expect("not poisoned").clear();
        Ok(())
    }
}
