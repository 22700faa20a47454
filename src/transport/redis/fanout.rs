//! Subscriptions to fan-out exchanges: one pub/sub connection per channel.
//!
//! Nothing is stored and nothing acknowledged. A subscriber that does not keep up loses
//! messages, not its neighbours: a full stream is skipped. Answers for kombu's
//! `_subscribe`/`_receive` and its health check of that connection.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use futures::StreamExt as _;
use redis::aio::{PubSubSink, PubSubStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::core::{Core, until};
use super::message;
use crate::transport::{Delivery, Error, Tag};

/// How many messages wait in a stream.
pub(super) const BACKLOG: usize = 4096;
/// How many tags are remembered to tell duplicates of old kombu channels.
const REMEMBERED: usize = 1000;

/// What the hub is told.
pub(super) enum Order {
    Subscribe {
        patterns: Vec<String>,
        queue: String,
        sender: mpsc::Sender<Delivery>,
        done: oneshot::Sender<()>,
    },
    /// The subscribers that went away are to be forgotten.
    Prune(oneshot::Sender<()>),
}

struct Subscriber {
    queue: String,
    sender: mpsc::Sender<Delivery>,
    /// It has been told that messages were skipped.
    skipping: bool,
}

/// Owns the connection; see the module's page.
pub(super) struct Hub {
    core: Arc<Core>,
    sink: PubSubSink,
    stream: PubSubStream,
    subscribers: HashMap<String, Vec<Subscriber>>,
    remembered: VecDeque<String>,
}

impl Hub {
    /// Connects and starts.
    pub(super) async fn start(core: &Arc<Core>) -> Result<mpsc::UnboundedSender<Order>, Error> {
        let (sink, stream) = core.link.open_pubsub().await?.split();
        let (sender, orders) = mpsc::unbounded_channel();
        let hub = Self {
            core: Arc::clone(core),
            sink,
            stream,
            subscribers: HashMap::new(),
            remembered: VecDeque::new(),
        };
        core.spawn(hub.run(orders));
        Ok(sender)
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut health = interval(self.core.options.health_check_interval);
        health.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ended = self.core.ended();
        loop {
            let result = tokio::select! {
                message = self.stream.next() => match message {
                    Some(message) => {
                        self.deliver(&message);
                        Ok(())
                    }
                    None => Err("the server closed the connection".to_owned()),
                },
                order = orders.recv() => match order {
                    Some(order) => self.execute(order).await,
                    None => return,
                },
                _ = health.tick() => self.ping().await,
                () = until(&mut ended) => return,
            };
            if let Err(reason) = result {
                self.core.fail_with(Error::Connection {
                    operation: "listening to broadcasts",
                    reason,
                });
                return;
            }
        }
    }

    async fn ping(&mut self) -> Result<(), String> {
        let deadline = self.core.options.command_timeout;
        match timeout(deadline, self.sink.ping::<redis::Value>()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {deadline:?}")),
        }
    }

    async fn execute(&mut self, order: Order) -> Result<(), String> {
        let deadline = self.core.options.command_timeout;
        match order {
            Order::Subscribe {
                patterns,
                queue,
                sender,
                done,
            } => {
                for pattern in patterns {
                    let subscribers = self.subscribers.entry(pattern.clone()).or_default();
                    let first = subscribers.is_empty();
                    subscribers.push(Subscriber {
                        queue: queue.clone(),
                        sender: sender.clone(),
                        skipping: false,
                    });
                    if first {
                        timeout(deadline, self.sink.psubscribe(pattern))
                            .await
                            .map_err(|_| format!("no answer within {deadline:?}"))?
                            .map_err(|error| error.to_string())?;
                    }
                }
                // Whoever subscribed may have gone.
                let _ = done.send(());
            }
            Order::Prune(done) => {
                let mut deserted = Vec::new();
                self.subscribers.retain(|pattern, subscribers| {
                    subscribers.retain(|subscriber| !subscriber.sender.is_closed());
                    if subscribers.is_empty() {
                        deserted.push(pattern.clone());
                    }
                    !subscribers.is_empty()
                });
                for pattern in deserted {
                    timeout(deadline, self.sink.punsubscribe(pattern))
                        .await
                        .map_err(|_| format!("no answer within {deadline:?}"))?
                        .map_err(|error| error.to_string())?;
                }
                let _ = done.send(());
            }
        }
        Ok(())
    }

    fn deliver(&mut self, message: &redis::Msg) {
        let channel: String = message.get_channel().unwrap_or_default();
        let pattern: String = message.get_pattern().unwrap_or_default();
        let decoded = match message::decode(message.get_payload_bytes()) {
            Ok(decoded) if decoded.damage.is_none() => decoded,
            Ok(decoded) => {
                let reason = decoded.damage.unwrap_or_default();
                log::warn!("a broadcast on {channel} cannot be decoded: {reason}");
                return;
            }
            Err(reason) => {
                log::warn!("a broadcast on {channel} cannot be decoded: {reason}");
                return;
            }
        };
        if self.core.options.sentinel_fanout_compat
            && let Some(tag) = &decoded.delivery_tag
        {
            if self.remembered.contains(tag) {
                return;
            }
            self.remembered.push_back(tag.clone());
            if self.remembered.len() > REMEMBERED {
                self.remembered.pop_front();
            }
        }
        let (exchange, key) = self.core.keys.parse_channel(&channel);
        let Some(subscribers) = self.subscribers.get_mut(&pattern) else {
            return;
        };
        for subscriber in subscribers {
            let delivery = Delivery {
                tag: Tag("".into()),
                envelope: decoded.envelope.clone(),
                queue: subscriber.queue.clone(),
                exchange: exchange.to_owned(),
                routing_key: match &decoded.routing_key {
                    Some(routing_key) => routing_key.clone(),
                    None => key.to_owned(),
                },
                redelivered: false,
                deaths: 0,
            };
            match subscriber.sender.try_send(delivery) {
                Ok(()) => subscriber.skipping = false,
                Err(mpsc::error::TrySendError::Full(_)) if !subscriber.skipping => {
                    subscriber.skipping = true;
                    log::warn!(
                        "{} does not keep up; broadcasts are skipped",
                        subscriber.queue
                    );
                }
                Err(_) => {}
            }
        }
    }
}
