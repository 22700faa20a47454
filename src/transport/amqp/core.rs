//! What the tasks of one channel share: its connections, what it holds, and its end.
//!
//! There are two connections, one for consuming and one for publishing, each opened when first
//! needed: RabbitMQ stops reading from a connection that publishes while it is short of memory
//! or disk, and acknowledgements must not wait behind that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::connect::{Connector, Line};
use super::life::Life;
use super::message::{self, short};
use super::options::Options;
use super::publish::Cast;
use crate::protocol::envelope::Envelope;
use crate::transport::{
    Delivery, Error, Exchange, ExchangeKind, Incoming, Queue, QueueStatus, Tag,
};

/// What all channels of one transport share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connector: Connector,
    pub(super) options: Options,
    /// Index of the address in use.
    pub(super) current: AtomicU32,
    /// The server refuses a prefetch limit for a whole channel.
    pub(super) refuses_global: AtomicBool,
    /// The server refuses queues that are neither durable nor exclusive.
    pub(super) refuses_transient: AtomicBool,
    /// Quorum queues are consumed: the server delays messages.
    pub(super) delays: AtomicBool,
    /// Exchanges declared with their queues: a publication that only knows a name finds the
    /// kind here.
    pub(super) exchanges: Mutex<HashMap<String, Exchange>>,
}

impl Shared {
    /// Remembers what RabbitMQ 4 no longer does, which it says by ending the connection: the next
    /// one asks otherwise.
    pub(super) fn note_refusal(&self, error: &Error) {
        let Error::Connection { reason, .. } = error else {
            return;
        };
        let text = reason.to_ascii_lowercase();
        if text.contains("global_qos") || text.contains("global qos") || text.starts_with("540") {
            self.refuses_global.store(true, Ordering::Relaxed);
        }
        if text.contains("transient_nonexcl_queues") {
            self.refuses_transient.store(true, Ordering::Relaxed);
        }
    }
}

/// What is to be said on the channel of the task consumers, in order.
pub(super) enum Op {
    Ack(u64),
    Reject(u64, bool),
    Quarantine(u64, Box<Held>, String),
    Consume(String, oneshot::Sender<Result<(), Error>>),
    Cancel(String, oneshot::Sender<Result<(), Error>>),
    Prefetch(u32, oneshot::Sender<Result<(), Error>>),
    /// Answered when everything before it has reached the broker.
    Flush(oneshot::Sender<()>),
}

/// A delivery that is not settled.
pub(super) struct Held {
    pub(super) envelope: Envelope,
    pub(super) queue: String,
    pub(super) exchange: String,
    pub(super) routing_key: String,
}

/// The side that consumes tasks.
pub(super) struct Consuming {
    pub(super) line: Arc<Line>,
    /// The channel of the task consumers; delivery tags are its.
    pub(super) channel: lapin::Channel,
}

/// See the module.
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) life: Life,
    /// Tells this channel's tags from those of others.
    identity: String,
    index: usize,
    /// The connection made at first, until one side takes it.
    spare: Mutex<Option<Arc<Line>>>,
    consuming: OnceCell<Consuming>,
    publishing: OnceCell<Arc<Line>>,
    inbound: mpsc::UnboundedSender<Incoming>,
    pub(super) ops: mpsc::UnboundedSender<Op>,
    pub(super) casts: mpsc::Sender<Cast>,
    pub(super) lost_casts: AtomicU64,
    unsettled: Mutex<BTreeMap<u64, Held>>,
    /// Queue by consumer tag.
    consumers: Mutex<HashMap<String, String>>,
    /// The tasks that hand deliveries on, by consumer tag.
    pub(super) forwarders: Mutex<HashMap<String, JoinHandle<()>>>,
    next_consumer: AtomicU64,
    /// Names that need not be declared again.
    pub(super) declared: Mutex<HashSet<String>>,
    /// Queues declared to be consumed, and whether delayed messages reach them.
    pub(super) queues: Mutex<Vec<(Queue, bool)>>,
    pub(super) confirming: Mutex<Option<lapin::Channel>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(super) fn new(
        shared: Arc<Shared>,
        life: Life,
        (index, line): (usize, Line),
        inbound: mpsc::UnboundedSender<Incoming>,
        ops: mpsc::UnboundedSender<Op>,
        casts: mpsc::Sender<Cast>,
    ) -> Self {
        Self {
            shared,
            life,
            identity: uuid::Uuid::new_v4().simple().to_string(),
            index,
            spare: Mutex::new(Some(Arc::new(line))),
            consuming: OnceCell::new(),
            publishing: OnceCell::new(),
            inbound,
            ops,
            casts,
            lost_casts: AtomicU64::new(0),
            unsettled: Mutex::default(),
            consumers: Mutex::default(),
            forwarders: Mutex::default(),
            next_consumer: AtomicU64::new(1),
            declared: Mutex::default(),
            queues: Mutex::default(),
            confirming: Mutex::default(),
        }
    }

    /// The connection that is there already, or one more.
    async fn line(&self) -> Result<Arc<Line>, Error> {
        if let Some(error) = self.life.error() {
            return Err(error);
        }
        if let Some(line) = lock(&self.spare).take() {
            return Ok(line);
        }
        let options = &self.shared.options;
        let line = self
            .shared
            .connector
            .connect_to(self.index, options, &self.life)
            .await;
        match line {
            Ok(line) => Ok(Arc::new(line)),
            Err(error) => {
                // Half a channel is of no use; its owner makes a new one.
                self.life.fail(copy(&error));
                Err(error)
            }
        }
    }

    /// The side that consumes.
    pub(super) async fn consuming(&self) -> Result<&Consuming, Error> {
        let open = || async {
            let line = self.line().await?;
            let channel = line.channel().await?;
            Ok(Consuming { line, channel })
        };
        self.consuming.get_or_try_init(open).await
    }

    /// Finds out whether the server limits prefetch for a whole channel.
    pub(super) async fn ask_for_limits(&self) {
        let shared = &self.shared;
        if !shared
            .connector
            .limits_channels(self.index, &shared.options)
            .await
        {
            shared.refuses_global.store(true, Ordering::Relaxed);
        }
    }

    /// The side that consumes, if it was needed so far.
    pub(super) fn consuming_now(&self) -> Option<&Consuming> {
        self.consuming.get()
    }

    /// The side that publishes.
    pub(super) async fn publishing(&self) -> Result<&Arc<Line>, Error> {
        self.publishing.get_or_try_init(|| self.line()).await
    }

    /// Closes every connection.
    pub(super) async fn close(&self) {
        self.life.fail(Error::Closed);
        let spare = lock(&self.spare).take();
        let consuming = self.consuming.get().map(|side| side.line.clone());
        let publishing = self.publishing.get().cloned();
        for line in [spare, consuming, publishing].into_iter().flatten() {
            line.close().await;
        }
    }

    /// A name for a consumer.
    pub(super) fn consumer_tag(&self) -> String {
        format!(
            "celeriac{}",
            self.next_consumer.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// Queue by consumer tag, of the task consumers.
    pub(super) fn consumers(&self) -> MutexGuard<'_, HashMap<String, String>> {
        lock(&self.consumers)
    }

    /// Hands a message that was delivered to whoever calls `next`.
    pub(super) fn deliver(&self, queue: &str, delivered: lapin::message::Delivery) {
        let number = delivered.delivery_tag;
        let tag = Tag(format!("{}:{number}", self.identity).into());
        let limit = if delivered.redelivered {
            self.delivery_limit(queue)
        } else {
            None
        };
        let delivery = delivery(queue, tag, delivered, limit);
        let held = Held {
            envelope: delivery.envelope.clone(),
            queue: delivery.queue.clone(),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
        };
        lock(&self.unsettled).insert(number, held);
        // Nobody listens only when the channel is gone, and then the broker takes it back.
        drop(self.inbound.send(Incoming::Delivery(Box::new(delivery))));
    }

    /// How often a queue was declared to deliver a message again before it is dropped.
    fn delivery_limit(&self, name: &str) -> Option<u64> {
        let queues = lock(&self.queues);
        let (queue, _) = queues.iter().find(|(queue, _)| queue.name == name)?;
        queue.arguments.get("x-delivery-limit")?.as_u64()
    }

    /// The broker ended a consumer.
    pub(super) fn cancelled(&self, queue: String) {
        drop(self.inbound.send(Incoming::Cancelled(queue)));
    }

    /// Takes an unsettled delivery, to settle it. Tags of other channels are not found.
    pub(super) fn take(&self, tag: &Tag) -> Option<(u64, Held)> {
        let (identity, number) = tag.0.split_once(':')?;
        if identity != self.identity {
            return None;
        }
        let number = number.parse().ok()?;
        Some((number, lock(&self.unsettled).remove(&number)?))
    }

    /// Takes every unsettled delivery but some, in the order of delivery.
    pub(super) fn take_all_but(&self, keep: &[Tag]) -> Vec<u64> {
        let kept: HashSet<u64> = keep
            .iter()
            .filter_map(|tag| {
                let (identity, number) = tag.0.split_once(':')?;
                (identity == self.identity).then(|| number.parse().ok())?
            })
            .collect();
        let mut unsettled = lock(&self.unsettled);
        let numbers: Vec<u64> = unsettled
            .keys()
            .copied()
            .filter(|number| !kept.contains(number))
            .collect();
        for number in &numbers {
            unsettled.remove(number);
        }
        numbers
    }

    /// Queues something for the channel of the task consumers.
    pub(super) fn push(&self, op: Op) {
        // The writer ends with the channel, and then there is nothing to settle.
        drop(self.ops.send(op));
    }
}

/// A message as the transport hands it on; the limit is that of its queue's redeliveries.
pub(super) fn delivery(
    queue: &str,
    tag: Tag,
    delivered: lapin::message::Delivery,
    limit: Option<u64>,
) -> Delivery {
    let envelope = message::envelope(&delivered.properties, delivered.data);
    let deaths = message::deaths(&envelope.headers, delivered.redelivered, limit);
    Delivery {
        tag,
        queue: queue.to_owned(),
        exchange: delivered.exchange.to_string(),
        routing_key: delivered.routing_key.to_string(),
        redelivered: delivered.redelivered,
        deaths,
        envelope,
    }
}

/// The same error once more; it is told to more than one.
fn copy(error: &Error) -> Error {
    match error {
        Error::Url(text) => Error::Url(text.clone()),
        Error::Connection { operation, reason } => Error::Connection {
            operation,
            reason: reason.clone(),
        },
        Error::Refused { operation, reason } => Error::Refused {
            operation,
            reason: reason.clone(),
        },
        Error::Closed => Error::Closed,
    }
}

/// Makes an exchange, unless it is the broker's own.
pub(super) async fn declare_exchange(line: &Line, exchange: &Exchange) -> Result<(), Error> {
    if exchange.name.is_empty() || exchange.name.starts_with("amq.") {
        return Ok(());
    }
    let name = short(&exchange.name)?;
    let kind = match exchange.kind {
        ExchangeKind::Direct => lapin::ExchangeKind::Direct,
        ExchangeKind::Topic => lapin::ExchangeKind::Topic,
        ExchangeKind::Fanout => lapin::ExchangeKind::Fanout,
    };
    let options = ExchangeDeclareOptions {
        durable: exchange.durable,
        auto_delete: exchange.auto_delete,
        ..ExchangeDeclareOptions::default()
    };
    line.ask("declaring an exchange", |channel| async move {
        channel
            .exchange_declare(name, kind, options, FieldTable::default())
            .await
    })
    .await
}

/// Makes a queue, its exchange and its bindings by each of the keys, unless they are there.
pub(super) async fn declare_queue(
    line: &Line,
    queue: &Queue,
    routing_keys: &[String],
) -> Result<QueueStatus, Error> {
    declare_exchange(line, &queue.exchange).await?;
    let name = short(&queue.name)?;
    let exchange = short(&queue.exchange.name)?;
    let keys = routing_keys
        .iter()
        .map(|key| short(key))
        .collect::<Result<Vec<_>, _>>()?;
    let arguments = arguments(queue)?;
    let options = QueueDeclareOptions {
        durable: queue.durable,
        exclusive: queue.exclusive,
        auto_delete: queue.auto_delete,
        ..QueueDeclareOptions::default()
    };
    line.ask("declaring a queue", |channel| async move {
        let declared = channel
            .queue_declare(name.clone(), options, arguments)
            .await?;
        if !exchange.as_str().is_empty() {
            for key in keys {
                let options = QueueBindOptions::default();
                let table = FieldTable::default();
                channel
                    .queue_bind(name.clone(), exchange.clone(), key, options, table)
                    .await?;
            }
        }
        Ok(QueueStatus {
            messages: declared.message_count().into(),
            consumers: declared.consumer_count().into(),
        })
    })
    .await
}

/// The `x-` arguments as kombu writes them.
fn arguments(queue: &Queue) -> Result<FieldTable, Error> {
    let mut arguments = message::table(&queue.arguments)?;
    let mut milliseconds = |name: &str, seconds: Option<f64>| {
        if let Some(seconds) = seconds {
            let value = AMQPValue::LongLongInt((seconds * 1000.0) as i64);
            arguments.insert(name.into(), value);
        }
    };
    milliseconds("x-expires", queue.expires);
    milliseconds("x-message-ttl", queue.message_ttl);
    if let Some(most) = queue.max_priority {
        arguments.insert("x-max-priority".into(), AMQPValue::LongInt(most.into()));
    }
    Ok(arguments)
}

/// Whether a queue is replicated by Raft, which changes what prefetch means.
pub(super) fn is_quorum(queue: &Queue) -> bool {
    queue
        .arguments
        .get("x-queue-type")
        .and_then(|kind| kind.as_str())
        == Some("quorum")
}
