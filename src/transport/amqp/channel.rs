//! The channel: every word of [`Channel`] said in AMQP.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueDeleteOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::core::{Consuming, Core, Op, declare_queue, delivery, lock};
use super::error::broken;
use super::message::short;
use super::publish::{self, Cast};
use super::{consume, delayed};
use crate::transport::{Channel, Delivery, Error, Incoming, Publication, Queue, QueueStatus, Tag};

/// Deliveries of a subscription that wait to be read.
const MAILBOX: usize = 256;

/// See [`Channel`].
pub(super) struct AmqpChannel {
    core: Arc<Core>,
    inbound: Mutex<mpsc::UnboundedReceiver<Incoming>>,
}

impl AmqpChannel {
    pub(super) fn new(core: Arc<Core>, inbound: mpsc::UnboundedReceiver<Incoming>) -> Self {
        Self {
            core,
            inbound: Mutex::new(inbound),
        }
    }

    /// Asks the task that owns the consumers, and waits for its answer.
    async fn order(
        &self,
        order: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Op,
    ) -> Result<(), Error> {
        // Also where nothing was consumed before.
        self.core.consuming().await?;
        let (done, answer) = oneshot::channel();
        self.core.push(order(done));
        tokio::select! {
            biased;
            answer = answer => match answer {
                Ok(answer) => answer,
                Err(_) => Err(self.core.life.end().await),
            },
            error = self.core.life.end() => Err(error),
        }
    }

    /// Makes the queues that delay messages and lets them reach every queue declared so far.
    /// Without them ETA tasks are held here, so a failure is only told.
    async fn delay(&self, side: &Consuming) {
        let options = &self.core.shared.options;
        if !self.core.shared.delays.load(Ordering::Relaxed) {
            if let Err(error) = delayed::declare(&side.line, &options.delayed_queue_type).await {
                log::warn!("Native delayed delivery will not be available: {error}");
                return;
            }
            self.core.shared.delays.store(true, Ordering::Relaxed);
        }
        let unbound: Vec<Queue> = {
            let mut queues = lock(&self.core.queues);
            let unbound = queues.iter_mut().filter(|(_, bound)| !*bound);
            unbound
                .map(|(queue, bound)| {
                    *bound = true;
                    queue.clone()
                })
                .collect()
        };
        for queue in unbound {
            if let Err(error) = delayed::bind(&side.line, &queue).await {
                log::warn!(
                    "Delayed messages will not reach queue {}: {error}",
                    queue.name
                );
            }
        }
    }

    /// Declares a queue of one's own. A name that is taken (by a connection that is not gone
    /// yet, or by a queue of an older release with other attributes) is made unique; a server
    /// that refuses transient queues unless they are exclusive ends the connection over it, so
    /// the next attempt asks for an exclusive one; where that is not allowed either, it becomes a
    /// durable one that expires by itself.
    async fn declare_own(
        &self,
        side: &Consuming,
        queue: &Queue,
        routing_keys: &[String],
    ) -> Result<Queue, Error> {
        let mut wanted = queue.clone();
        wanted.exclusive |=
            !queue.durable && self.core.shared.refuses_transient.load(Ordering::Relaxed);
        let unique = Queue {
            name: format!("{}.{}", queue.name, uuid::Uuid::new_v4().simple()),
            ..wanted.clone()
        };
        let durable = Queue {
            durable: true,
            exclusive: false,
            ..unique.clone()
        };
        let mut refused = Error::Closed;
        for candidate in [wanted, unique, durable] {
            match declare_queue(&side.line, &candidate, routing_keys).await {
                Ok(_) => return Ok(candidate),
                Err(error) if error.is_connection() => {
                    self.core.shared.note_refusal(&error);
                    return Err(error);
                }
                Err(error) => {
                    log::debug!("queue {}: {error}", candidate.name);
                    refused = error;
                }
            }
        }
        Err(refused)
    }

    async fn flush_casts(&self) -> Result<(), Error> {
        let (done, flushed) = oneshot::channel();
        if self.core.casts.send(Cast::Flush(done)).await.is_err() || flushed.await.is_err() {
            return Err(self.core.life.end().await);
        }
        Ok(())
    }
}

/// Hands the deliveries of a subscription on until either side is gone.
async fn forward_own(
    core: Arc<Core>,
    queue: String,
    channel: lapin::Channel,
    mut consumer: lapin::Consumer,
    sender: mpsc::Sender<Delivery>,
) {
    loop {
        let delivered = tokio::select! {
            () = core.life.over() => return,
            () = sender.closed() => break,
            delivered = consumer.next() => delivered,
        };
        let Some(Ok(delivered)) = delivered else {
            return;
        };
        let delivery = delivery(&queue, Tag("".into()), delivered, None);
        if sender.send(delivery).await.is_err() {
            break;
        }
    }
    // Without its consumer an auto-delete queue is gone.
    if let Err(error) = channel.close(200, "OK".into()).await {
        log::debug!("While ending the subscription to {queue}: {error}");
    }
}

#[async_trait]
impl Channel for AmqpChannel {
    async fn declare(&self, queue: &Queue) -> Result<QueueStatus, Error> {
        let side = self.core.consuming().await?;
        let status =
            declare_queue(&side.line, queue, std::slice::from_ref(&queue.routing_key)).await?;
        lock(&self.core.shared.exchanges)
            .insert(queue.exchange.name.clone(), queue.exchange.clone());
        {
            let mut queues = lock(&self.core.queues);
            if !queues.iter().any(|(known, _)| known.name == queue.name) {
                queues.push((queue.clone(), false));
            }
        }
        lock(&self.core.declared).insert(format!("queue {}", queue.name));
        if consume::has_quorum(&self.core) {
            self.delay(side).await;
        }
        Ok(status)
    }

    async fn purge(&self, queue: &str) -> Result<u64, Error> {
        let side = self.core.consuming().await?;
        let name = short(queue)?;
        let purge = |channel: lapin::Channel| async move {
            channel
                .queue_purge(name, QueuePurgeOptions::default())
                .await
        };
        Ok(side.line.ask("purging a queue", purge).await?.into())
    }

    async fn delete(&self, queue: &Queue) -> Result<(), Error> {
        let side = self.core.consuming().await?;
        let name = short(&queue.name)?;
        lock(&self.core.queues).retain(|(known, _)| known.name != queue.name);
        let delete = |channel: lapin::Channel| async move {
            channel
                .queue_delete(name, QueueDeleteOptions::default())
                .await
        };
        side.line.ask("deleting a queue", delete).await.map(drop)
    }

    /// AMQP has no question for it; these are the bindings made on this channel.
    async fn bindings(&self, exchange: &str) -> Result<Vec<(String, String)>, Error> {
        let queues = lock(&self.core.queues);
        let bound = queues
            .iter()
            .filter(|(queue, _)| queue.exchange.name == exchange);
        Ok(bound
            .map(|(queue, _)| (queue.routing_key.clone(), queue.name.clone()))
            .collect())
    }

    async fn consume(&self, queue: &Queue) -> Result<(), Error> {
        let name = queue.name.clone();
        self.order(|done| Op::Consume(name, done)).await
    }

    async fn cancel(&self, queue: &str) -> Result<(), Error> {
        let name = queue.to_owned();
        self.order(|done| Op::Cancel(name, done)).await
    }

    fn limits_globally(&self) -> bool {
        !consume::is_static(&self.core)
    }

    async fn set_prefetch(&self, count: u32) -> Result<(), Error> {
        self.order(|done| Op::Prefetch(count, done)).await
    }

    async fn next(&self) -> Result<Incoming, Error> {
        let mut inbound = self.inbound.lock().await;
        tokio::select! {
            // What was delivered before the end cannot be settled any more.
            biased;
            error = self.core.life.end() => Err(error),
            Some(incoming) = inbound.recv() => Ok(incoming),
        }
    }

    fn ack(&self, tag: &Tag) {
        if let Some((number, _)) = self.core.take(tag) {
            self.core.push(Op::Ack(number));
        }
    }

    fn reject(&self, tag: &Tag, requeue: bool) {
        if let Some((number, _)) = self.core.take(tag) {
            self.core.push(Op::Reject(number, requeue));
        }
    }

    fn quarantine(&self, tag: &Tag, reason: &str) {
        if let Some((number, held)) = self.core.take(tag) {
            self.core
                .push(Op::Quarantine(number, Box::new(held), reason.to_owned()));
        }
    }

    async fn publish(&self, publication: Publication) -> Result<(), Error> {
        tokio::select! {
            biased;
            error = self.core.life.end() => Err(error),
            outcome = publish::publish(&self.core, publication) => outcome,
        }
    }

    fn cast(&self, publication: Publication) {
        publish::cast(&self.core, publication);
    }

    async fn subscribe(
        &self,
        queue: &Queue,
        routing_keys: &[String],
    ) -> Result<mpsc::Receiver<Delivery>, Error> {
        let side = self.core.consuming().await?;
        let own = [queue.routing_key.clone()];
        let keys = if routing_keys.is_empty() {
            &own
        } else {
            routing_keys
        };
        let declared = self.declare_own(side, queue, keys).await?;
        // A channel of its own: closing it ends the subscription and nothing else.
        let channel = side.line.channel().await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consumer = channel
            .basic_consume(
                short(&declared.name)?,
                short(&self.core.consumer_tag())?,
                options,
                FieldTable::default(),
            )
            .await
            .map_err(|error| broken("subscribing to a queue", &error))?;
        let (sender, receiver) = mpsc::channel(MAILBOX);
        let core = self.core.clone();
        tokio::spawn(forward_own(core, declared.name, channel, consumer, sender));
        Ok(receiver)
    }

    async fn flush(&self) -> Result<(), Error> {
        let (done, flushed) = oneshot::channel();
        self.core.push(Op::Flush(done));
        tokio::select! {
            biased;
            answer = flushed => if answer.is_err() {
                return Err(self.core.life.end().await);
            },
            error = self.core.life.end() => return Err(error),
        }
        tokio::select! {
            biased;
            outcome = self.flush_casts() => outcome,
            error = self.core.life.end() => Err(error),
        }
    }

    /// None: the broker took every delivery back when the earlier channel ended.
    async fn adopt(&self, _: &[Tag]) -> Result<Vec<Tag>, Error> {
        Ok(Vec::new())
    }

    async fn restore(&self, keep: &[Tag]) -> Result<u64, Error> {
        let numbers = self.core.take_all_but(keep);
        let count = numbers.len() as u64;
        for number in numbers {
            self.core.push(Op::Reject(number, true));
        }
        if count > 0 {
            self.flush().await?;
        }
        Ok(count)
    }

    async fn close(&self) -> Result<(), Error> {
        self.core.close().await;
        Ok(())
    }
}

impl Drop for AmqpChannel {
    fn drop(&mut self) {
        // Ends the tasks that share the core; the last one drops the connections.
        self.core.life.fail(Error::Closed);
    }
}
