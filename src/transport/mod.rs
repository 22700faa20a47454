//! kombu's words over real brokers.
//!
//! A [`Transport`] is one broker, chosen by its URL; a [`Channel`] is one set of connections
//! to it. The worker opens one channel for tasks and another for remote control, so that a
//! busy worker still answers. A channel never reconnects by itself: its first fault ends it
//! ([`Channel::next`] and every pending call return the error), and the owner asks the
//! transport for a new one. One place, the consumer's loop, thus knows the state of things.
//!
//! What is published, acknowledged and rejected on one channel reaches the broker in the
//! order of the calls.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::protocol::envelope::Envelope;
use crate::protocol::permit;

pub mod amqp;
pub mod entity;
pub mod redis;
pub mod url;

pub use entity::{Exchange, ExchangeKind, Queue};

/// Names one delivery until it is settled. Opaque to all but the transport that made it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub Arc<str>);

/// A message that was handed to this consumer and waits to be settled.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// To be given back to [`Channel::ack`] or [`Channel::reject`].
    pub tag: Tag,
    /// The message.
    pub envelope: Envelope,
    /// The queue it was taken from.
    pub queue: String,
    /// The exchange it was published to.
    pub exchange: String,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Whether it may have been delivered before.
    pub redelivered: bool,
    /// How often its worker or child died on it, where the broker side knows; at
    /// [`MOST_DEATHS`] it is not to be tried again.
    pub deaths: u32,
}

/// A message that killed its worker or child this often is not tried again.
pub const MOST_DEATHS: u32 = 3;

/// What [`Channel::next`] yields.
#[derive(Debug)]
pub enum Incoming {
    /// A task message.
    Delivery(Box<Delivery>),
    /// A message whose headers name a task but whose body cannot be decoded, and why. It is
    /// held like a delivery: report the failure to whoever waits for it, then quarantine it.
    Undecodable(Box<Delivery>, String),
    /// The lease of a held delivery was lost: somebody else may be working on it, so its
    /// effects must not be committed.
    Lost(Tag),
    /// The broker ended consumption of this queue (deleted, or failed over).
    Cancelled(String),
}

/// A message on its way out.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Where to.
    pub exchange: Exchange,
    /// Routing key; the queue's name on the default exchange.
    pub routing_key: String,
    /// The message.
    pub envelope: Envelope,
}

/// Counts the broker gives for a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueStatus {
    /// Messages that wait.
    pub messages: u64,
    /// Consumers; 0 where the broker does not count them.
    pub consumers: u64,
}

/// How many revoked ids are shared, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notes {
    /// At most so many, the youngest.
    pub most: usize,
    /// Older ones are forgotten.
    pub keep: Duration,
}

/// How many slots are free right now.
pub type IdleSlots = Arc<dyn Fn() -> usize + Send + Sync>;

/// One broker.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Opens a channel, trying each URL of the failover list once.
    async fn connect(&self) -> Result<Arc<dyn Channel>, Error>;

    /// The URL currently used, password replaced by `**`, for logs and the banner.
    fn display_url(&self) -> String;

    /// The `broker` object of the `stats` command (no password in it).
    fn info(&self) -> Value;

    /// Whether a queue can be limited by prefetch for each consumer only (quorum queues), and
    /// the like, as the words `redis` or `amqp`.
    fn driver(&self) -> &'static str;
}

/// One set of connections to a broker.
#[async_trait]
pub trait Channel: Send + Sync {
    /// Makes a queue, its exchange and its binding, unless they are there; says how full it is.
    async fn declare(&self, queue: &Queue) -> Result<QueueStatus, Error>;

    /// Removes every waiting message of a queue; returns how many there were.
    async fn purge(&self, queue: &str) -> Result<u64, Error>;

    /// Deletes a queue with its messages and bindings.
    async fn delete(&self, queue: &Queue) -> Result<(), Error>;

    /// The bindings known for an exchange, as (routing key, queue).
    async fn bindings(&self, exchange: &str) -> Result<Vec<(String, String)>, Error>;

    /// Starts taking task messages from a declared queue.
    async fn consume(&self, queue: &Queue) -> Result<(), Error>;

    /// Stops taking messages from a queue; what was delivered stays with the consumer.
    async fn cancel(&self, queue: &str) -> Result<(), Error>;

    /// How many deliveries may be unsettled at once; 0 is without limit.
    async fn set_prefetch(&self, count: u32) -> Result<(), Error>;

    /// Tells how many slots are free whenever it is asked. What starts at once takes no place among
    /// the messages fetched ahead, so a channel that fetches by itself may take as many more.
    fn set_idle_slots(&self, idle: IdleSlots) {
        let _ = idle;
    }

    /// Whether [`Channel::set_prefetch`] counts over all queues and acts at once. Not on Redis
    /// and not where there are quorum queues, as Celery sees it.
    fn limits_globally(&self) -> bool {
        false
    }

    /// The next event of consumption. Cancel safe; one caller at a time. An error is final.
    async fn next(&self) -> Result<Incoming, Error>;

    /// Settles a delivery: it is done. Queued in order, not awaited; a fault shows in
    /// [`Channel::next`]. A tag of a channel that is gone is ignored where the broker has
    /// given the message back already.
    fn ack(&self, tag: &Tag);

    /// Settles a delivery: `requeue` puts it at the back of its queue, otherwise it is dropped
    /// (or dead-lettered by the broker).
    fn reject(&self, tag: &Tag, requeue: bool);

    /// Settles a delivery by moving it to the quarantine queue together with the reason, so
    /// that a message nobody can process is kept for a person to look at.
    fn quarantine(&self, tag: &Tag, reason: &str);

    /// Says that somebody has begun to work on a delivery, so that the death of this process
    /// counts against it ([`Delivery::deaths`]). Queued like [`Channel::ack`].
    fn started(&self, tag: &Tag) {
        let _ = tag;
    }

    /// Asks the broker whether a delivery is still ours. Where the broker takes a message back
    /// only with the connection, it is.
    async fn holds(&self, tag: &Tag) -> Result<bool, Error> {
        let _ = tag;
        Ok(true)
    }

    /// Publishes and waits until the broker has it.
    async fn publish(&self, publication: Publication) -> Result<(), Error>;

    /// Publishes to everybody who listens now, and says how many those are where the broker
    /// knows: whoever asks them all need not wait for more answers than that.
    async fn broadcast(&self, publication: Publication) -> Result<Option<u64>, Error> {
        self.publish(publication).await.map(|()| None)
    }

    /// Publishes without waiting, for messages that may be lost with the connection (events).
    fn cast(&self, publication: Publication);

    /// Consumes a queue of one's own without acknowledgement: remote control, replies, events.
    /// Declares the queue and binds it by every key of `routing_keys` (its own if empty). The
    /// stream ends with the channel; dropping it cancels the subscription and deletes an
    /// auto-delete queue.
    async fn subscribe(
        &self,
        queue: &Queue,
        routing_keys: &[String],
    ) -> Result<mpsc::Receiver<Delivery>, Error>;

    /// Asks whether one more task of a user may run, or one at a repository, counted over all
    /// workers of this broker.
    async fn take_permit(&self, ask: &permit::Ask<'_>) -> Result<permit::Answer, Error> {
        let _ = ask;
        Ok(permit::Answer::Unable)
    }

    /// Says that these permits, as (scope, holder), are still held.
    async fn renew_permits(&self, held: &[(permit::Scope, String)]) -> Result<(), Error> {
        let _ = held;
        Ok(())
    }

    /// Gives a permit back. Queued like [`Channel::ack`].
    fn release_permit(&self, scope: &permit::Scope, holder: &str) {
        let _ = (scope, holder);
    }

    /// Tells the workers of this broker, also those that start later, that tasks are revoked.
    /// Brokers without a place for such a note do nothing.
    async fn share_revoked(&self, ids: &[String], notes: Notes) -> Result<(), Error> {
        let _ = (ids, notes);
        Ok(())
    }

    /// The tasks that were revoked so, and how long ago, oldest first.
    async fn shared_revoked(&self, notes: Notes) -> Result<Vec<(String, Duration)>, Error> {
        let _ = notes;
        Ok(Vec::new())
    }

    /// Waits until everything queued so far has reached the broker.
    async fn flush(&self) -> Result<(), Error>;

    /// After a reconnect: takes over deliveries of an earlier channel that are still held in
    /// memory, and returns those whose lease could be proved. The others are somebody else's.
    async fn adopt(&self, held: &[Tag]) -> Result<Vec<Tag>, Error>;

    /// Hands every unsettled delivery except `keep` back to its queue, to be delivered next.
    async fn restore(&self, keep: &[Tag]) -> Result<u64, Error>;

    /// Ends the subscriptions and closes the connections. Unsettled deliveries are restored.
    async fn close(&self) -> Result<(), Error>;
}

/// Why the broker could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL cannot be understood; the text names the part and shows a correct one.
    #[error("{0}")]
    Url(String),
    /// The broker cannot be reached or the connection broke. Reconnecting may help.
    #[error("{operation}: {reason}")]
    Connection {
        /// What was being done.
        operation: &'static str,
        /// What the broker, the client library or the system said; without secrets.
        reason: String,
    },
    /// The broker refused; the connection is still good and trying again will not help.
    #[error("{operation}: {reason}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// What the broker said; without secrets.
        reason: String,
    },
    /// The channel was closed by [`Channel::close`].
    #[error("the channel is closed")]
    Closed,
}

impl Error {
    /// Whether a new channel may cure it.
    pub fn is_connection(&self) -> bool {
        matches!(self, Self::Connection { .. } | Self::Closed)
    }
}
