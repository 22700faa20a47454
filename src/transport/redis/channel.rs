//! The channel: every word of [`Channel`] said in Redis.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Cmd, Value};
use tokio::sync::{OnceCell, mpsc, oneshot};

use super::core::{Arrival, Binding, Core, Fault, Op, Outgoing, Route, Settlement, Source, until};
use super::fanout::{self, Hub, Order};
use super::fetch::{Popper, Tracker};
use super::publish::outgoing;
use super::reply::{texts, transaction};
use super::{keys, mailbox, message, permits, revoked};
use crate::protocol::permit::{Answer, Ask, Scope};
use crate::transport::{
    Channel, Delivery, Error, ExchangeKind, IdleSlots, Incoming, Notes, Publication, Queue,
    QueueStatus, Tag,
};

/// See [`Channel`].
pub(super) struct RedisChannel {
    core: Arc<Core>,
    hub: OnceCell<mpsc::UnboundedSender<Order>>,
}

impl RedisChannel {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            hub: OnceCell::new(),
        }
    }

    /// The bindings a queue needs, by each of the keys or by its own.
    fn bindings_of(&self, queue: &Queue, routing_keys: &[String]) -> Vec<Binding> {
        let own = [queue.routing_key.clone()];
        let routing_keys = if routing_keys.is_empty() {
            &own
        } else {
            routing_keys
        };
        if queue.exchange.name.is_empty() {
            return Vec::new();
        }
        routing_keys
            .iter()
            .map(|routing_key| {
                let pattern = match queue.exchange.kind {
                    ExchangeKind::Topic => keys::topic_pattern(routing_key),
                    _ => String::new(),
                };
                Binding {
                    exchange: queue.exchange.name.clone(),
                    member: self.core.keys.member(routing_key, &pattern, &queue.name),
                    queue: queue.name.clone(),
                    expires: queue
                        .expires
                        .map(|seconds| (seconds * 1000.0).max(1.0) as u64),
                }
            })
            .collect()
    }

    async fn bind(&self, bindings: Vec<Binding>) -> Result<(), Error> {
        let commands: Vec<Cmd> = bindings
            .iter()
            .flat_map(|binding| self.core.bind_commands(binding))
            .collect();
        self.core.call("declaring a queue", commands).await?;
        let mut known = self.core.bindings();
        for binding in bindings {
            if !known.contains(&binding) {
                known.push(binding);
            }
        }
        Ok(())
    }
}

/// Commands that remove a queue and what is bound to it.
fn removal(core: &Core, queue: &str, bindings: &[Binding]) -> Vec<Cmd> {
    let mut commands = Vec::new();
    for binding in bindings {
        for key in [
            core.keys.binding(&binding.exchange),
            core.keys.permanent(&binding.exchange),
        ] {
            let mut cmd = redis::cmd("SREM");
            cmd.arg(key).arg(&binding.member);
            commands.push(cmd);
        }
    }
    let mut cmd = redis::cmd("DEL");
    for list in core.keys.lists(queue) {
        cmd.arg(list);
    }
    commands.push(cmd);
    commands
}

/// Waits until a stream is dropped, then removes its queue.
async fn remove_when_dropped(
    core: Arc<Core>,
    hub: Option<mpsc::UnboundedSender<Order>>,
    sender: mpsc::Sender<Delivery>,
    queue: Queue,
    bindings: Vec<Binding>,
) {
    let mut ended = core.ended();
    tokio::select! {
        () = sender.closed() => {}
        // The stream ends with the channel; this was its last sender.
        () = until(&mut ended) => return,
    }
    drop(sender);
    if let Some(hub) = hub {
        let (done, pruned) = oneshot::channel();
        if hub.send(Order::Prune(done)).is_ok() {
            // An error means that the channel has ended.
            drop(pruned.await);
        }
    }
    core.bindings()
        .retain(|binding| !bindings.contains(binding));
    core.subscriptions().retain(|(name, _)| *name != queue.name);
    if queue.auto_delete
        && let Err(error) = core
            .call("deleting a queue", removal(&core, &queue.name, &bindings))
            .await
    {
        log::debug!("queue {} was not deleted: {error}", queue.name);
    }
}

#[async_trait]
impl Channel for RedisChannel {
    async fn declare(&self, queue: &Queue) -> Result<QueueStatus, Error> {
        self.bind(self.bindings_of(queue, &[])).await?;
        let lengths = self
            .core
            .keys
            .lists(&queue.name)
            .into_iter()
            .map(|list| {
                let mut cmd = redis::cmd("LLEN");
                cmd.arg(list);
                cmd
            })
            .collect();
        let replies = self.core.call("declaring a queue", lengths).await?;
        Ok(QueueStatus {
            messages: sum(&replies),
            consumers: 0,
        })
    }

    async fn purge(&self, queue: &str) -> Result<u64, Error> {
        let mut commands = Vec::new();
        let mut delete = redis::cmd("DEL");
        for list in self.core.keys.lists(queue) {
            let mut cmd = redis::cmd("LLEN");
            cmd.arg(&list);
            commands.push(cmd);
            delete.arg(list);
        }
        commands.push(delete);
        let replies = self
            .core
            .call("purging a queue", transaction(commands))
            .await?;
        Ok(match replies.last() {
            Some(Value::Array(lengths)) => sum(&lengths[..lengths.len().saturating_sub(1)]),
            _ => 0,
        })
    }

    async fn delete(&self, queue: &Queue) -> Result<(), Error> {
        let bindings = self.bindings_of(queue, &[]);
        self.core
            .bindings()
            .retain(|binding| binding.queue != queue.name);
        self.core
            .call(
                "deleting a queue",
                removal(&self.core, &queue.name, &bindings),
            )
            .await
            .map(drop)
    }

    async fn bindings(&self, exchange: &str) -> Result<Vec<(String, String)>, Error> {
        let mut cmd = redis::cmd("SMEMBERS");
        cmd.arg(self.core.keys.binding(exchange));
        let members = self
            .core
            .call("reading bindings", vec![cmd])
            .await?
            .pop()
            .map(texts);
        Ok(members
            .unwrap_or_default()
            .iter()
            .filter_map(|member| self.core.keys.parse_member(member))
            .map(|(routing_key, _, queue)| (routing_key.to_owned(), queue.to_owned()))
            .collect())
    }

    async fn consume(&self, queue: &Queue) -> Result<(), Error> {
        if queue.exchange.kind == ExchangeKind::Fanout && !queue.exchange.name.is_empty() {
            return Err(Error::Refused {
                operation: "consuming a queue",
                reason: format!(
                    "queue {} belongs to a fan-out exchange, which Redis cannot acknowledge; \
                     subscribe to it instead",
                    queue.name
                ),
            });
        }
        let core = &self.core;
        core.count_consumer();
        if !core.watching.swap(true, Ordering::Relaxed) {
            // Nothing may be held by an owner nobody knows.
            core.beat().await?;
            match if core.scripted {
                Tracker::open(&core.link).await
            } else {
                Err(Error::Closed)
            } {
                Ok(tracker) => core.spawn(tracker.run(Arc::clone(core))),
                Err(error) => {
                    log::warn!(
                        "this Redis cannot announce new messages ({error}); waiting with BRPOP, \
                         so a worker killed at the wrong moment can lose one message"
                    );
                    core.blocking.store(true, Ordering::Relaxed);
                    let popper = Popper::open(&core.link).await?;
                    core.spawn(popper.run(Arc::clone(core)));
                }
            }
        }
        {
            let mut state = core.state();
            if let Some(fault) = &state.fault {
                return Err(fault.error());
            }
            if !state
                .sources
                .iter()
                .any(|source| *source.queue == *queue.name)
            {
                let lists = core
                    .keys
                    .lists(&queue.name)
                    .into_iter()
                    .map(Arc::from)
                    .collect();
                state.sources.push(Source {
                    queue: queue.name.as_str().into(),
                    lists,
                });
                if core.options.queue_order_strategy == super::options::QueueOrder::Sorted {
                    state.sources.sort_by(|a, b| a.queue.cmp(&b.queue));
                }
            }
            state.promising = true;
        }
        core.work.notify_one();
        core.idle.notify_one();
        Ok(())
    }

    async fn cancel(&self, queue: &str) -> Result<(), Error> {
        self.core
            .state()
            .sources
            .retain(|source| *source.queue != *queue);
        self.core.idle.notify_one();
        self.settle_intake().await
    }

    async fn set_prefetch(&self, count: u32) -> Result<(), Error> {
        self.core.state().prefetch = count;
        self.core.work.notify_one();
        self.core.idle.notify_one();
        Ok(())
    }

    fn set_idle_slots(&self, idle: IdleSlots) {
        self.core.state().idle_slots = Some(idle);
    }

    async fn next(&self) -> Result<Incoming, Error> {
        loop {
            let arrival = {
                let mut state = self.core.state();
                if let Some(fault) = &state.fault {
                    return Err(fault.error());
                }
                let arrival = state.inbound.pop_front();
                if arrival.is_some() && state.prefetch == 0 {
                    self.core.work.notify_one();
                }
                arrival
            };
            let Some(arrival) = arrival else {
                self.core.arrived.notified().await;
                continue;
            };
            let (tag, queue, raw) = match arrival {
                Arrival::Event(event) => return Ok(event),
                Arrival::Raw { tag, queue, raw } => (tag, queue, raw),
            };
            let decoded = match message::decode(&raw) {
                Ok(decoded) => decoded,
                Err(reason) => {
                    self.set_aside(&tag, &queue, &reason);
                    continue;
                }
            };
            let named = decoded
                .envelope
                .headers
                .get("id")
                .is_some_and(serde_json::Value::is_string);
            if let Some(reason) = decoded.damage.as_ref().filter(|_| !named) {
                self.set_aside(&tag, &queue, reason);
                continue;
            }
            let delivery = Box::new(Delivery {
                tag,
                envelope: decoded.envelope,
                exchange: decoded.exchange,
                routing_key: decoded.routing_key.unwrap_or_else(|| queue.to_string()),
                queue: queue.to_string(),
                redelivered: decoded.redelivered,
                deaths: decoded.deaths,
            });
            return Ok(match decoded.damage {
                None => Incoming::Delivery(delivery),
                Some(reason) => Incoming::Undecodable(delivery, reason),
            });
        }
    }

    fn ack(&self, tag: &Tag) {
        self.core.settle(tag, Settlement::Ack);
    }

    fn reject(&self, tag: &Tag, requeue: bool) {
        self.core.settle(
            tag,
            if requeue {
                Settlement::Requeue
            } else {
                Settlement::Ack
            },
        );
    }

    fn quarantine(&self, tag: &Tag, reason: &str) {
        self.core
            .settle(tag, Settlement::Quarantine(reason.to_owned()));
    }

    fn started(&self, tag: &Tag) {
        self.core.started(tag);
    }

    async fn holds(&self, tag: &Tag) -> Result<bool, Error> {
        self.core.prove(tag).await
    }

    async fn publish(&self, publication: Publication) -> Result<(), Error> {
        let mut waiting = Vec::new();
        for outgoing in outgoing(&self.core, &publication) {
            let (done, sent) = oneshot::channel();
            self.core.push(Op::Publish(outgoing, Some(done)))?;
            waiting.push(sent);
        }
        for sent in waiting {
            sent.await.unwrap_or_else(|_| Err(self.core.fault()))?;
        }
        Ok(())
    }

    async fn broadcast(&self, publication: Publication) -> Result<Option<u64>, Error> {
        let mut all = outgoing(&self.core, &publication);
        let only = all.pop().filter(|_| all.is_empty());
        let Some(Outgoing {
            route: Route::Channel(channel),
            payload,
            ..
        }) = only
        else {
            // Told on two channels, so that nobody can be counted.
            return self.publish(publication).await.map(|()| None);
        };
        let mut cmd = redis::cmd("PUBLISH");
        cmd.arg(channel).arg(payload);
        let replies = self.core.call("publishing a message", vec![cmd]).await?;
        Ok(Some(sum(&replies)))
    }

    fn cast(&self, publication: Publication) {
        for outgoing in outgoing(&self.core, &publication) {
            // May be lost with the connection, by contract.
            drop(self.core.push(Op::Publish(outgoing, None)));
        }
    }

    async fn subscribe(
        &self,
        queue: &Queue,
        routing_keys: &[String],
    ) -> Result<mpsc::Receiver<Delivery>, Error> {
        let core = &self.core;
        let bindings = self.bindings_of(queue, routing_keys);
        self.bind(bindings.clone()).await?;
        let (sender, receiver) = mpsc::channel(fanout::BACKLOG);
        let mut hub = None;
        if queue.exchange.kind == ExchangeKind::Fanout && !queue.exchange.name.is_empty() {
            let orders = self.hub.get_or_try_init(|| Hub::start(core)).await?;
            let own = [queue.routing_key.clone()];
            let routing_keys = if routing_keys.is_empty() {
                &own
            } else {
                routing_keys
            };
            let mut patterns = Vec::new();
            for keys in [Some(&core.keys), core.old_keys.as_ref()]
                .into_iter()
                .flatten()
            {
                for routing_key in routing_keys {
                    let pattern = keys.subscription(&queue.exchange.name, routing_key);
                    if !patterns.contains(&pattern) {
                        patterns.push(pattern);
                    }
                }
            }
            let (done, subscribed) = oneshot::channel();
            let order = Order::Subscribe {
                patterns,
                queue: queue.name.clone(),
                sender: sender.clone(),
                done,
            };
            orders.send(order).map_err(|_| core.fault())?;
            subscribed.await.map_err(|_| core.fault())?;
            hub = Some(orders.clone());
        } else {
            let connection = core.link.open_blocking().await?;
            core.spawn(mailbox::run(
                Arc::clone(core),
                connection,
                queue.name.clone(),
                sender.clone(),
            ));
        }
        if queue.auto_delete {
            core.subscriptions()
                .push((queue.name.clone(), bindings.clone()));
        }
        core.spawn(remove_when_dropped(
            Arc::clone(core),
            hub,
            sender,
            queue.clone(),
            bindings,
        ));
        Ok(receiver)
    }

    async fn take_permit(&self, ask: &Ask<'_>) -> Result<Answer, Error> {
        permits::take(&self.core, ask).await
    }

    async fn renew_permits(&self, held: &[(Scope, String)]) -> Result<(), Error> {
        permits::renew(&self.core, held).await
    }

    fn release_permit(&self, scope: &Scope, holder: &str) {
        let (done, _) = oneshot::channel();
        let release = permits::release(&self.core, scope, holder);
        // On a channel that has ended the permit ends by itself.
        drop(self.core.push(Op::Call(vec![release], done)));
    }

    async fn share_revoked(&self, ids: &[String], notes: Notes) -> Result<(), Error> {
        revoked::share(&self.core, ids, notes).await
    }

    async fn shared_revoked(&self, notes: Notes) -> Result<Vec<(String, Duration)>, Error> {
        revoked::shared(&self.core, notes).await
    }

    async fn flush(&self) -> Result<(), Error> {
        self.core
            .call("waiting for Redis", vec![redis::cmd("PING")])
            .await
            .map(drop)
    }

    async fn adopt(&self, held: &[Tag]) -> Result<Vec<Tag>, Error> {
        self.core.adopt(held).await
    }

    async fn restore(&self, keep: &[Tag]) -> Result<u64, Error> {
        self.core.restore(keep).await
    }

    async fn close(&self) -> Result<(), Error> {
        let core = &self.core;
        let result = self.close_in_order().await;
        core.uncount_consumer();
        core.fail(Fault::Closed, Vec::new());
        core.abort();
        match result {
            // Closing what is closed is no error.
            Err(Error::Closed) => Ok(()),
            other => other,
        }
    }
}

impl RedisChannel {
    /// Keeps a message that is none for a person to look at.
    fn set_aside(&self, tag: &Tag, queue: &str, reason: &str) {
        log::error!(
            "a message in queue {queue} cannot be decoded and was moved to {}: {reason}",
            self.core.keys.quarantine
        );
        self.core
            .settle(tag, Settlement::Quarantine(reason.to_owned()));
    }

    /// Waits until what is on its way from a queue no longer consumed has arrived.
    async fn settle_intake(&self) -> Result<(), Error> {
        if self.core.blocking.load(Ordering::Relaxed) {
            let (mut popping, mut ended) = (self.core.popping.subscribe(), self.core.ended());
            tokio::select! {
                // An error means that the channel is going away.
                popped = popping.wait_for(|popping| !popping) => drop(popped),
                () = until(&mut ended) => return Err(self.core.fault()),
            }
        }
        self.flush().await
    }

    async fn close_in_order(&self) -> Result<(), Error> {
        let core = &self.core;
        core.state().sources.clear();
        self.settle_intake().await?;
        let subscriptions = std::mem::take(&mut *core.subscriptions());
        for (queue, bindings) in subscriptions {
            core.call("deleting a queue", removal(core, &queue, &bindings))
                .await?;
        }
        core.restore(&[]).await?;
        // Others must not wait for the sign of life of somebody who is not there.
        if core.uncount_consumer() {
            core.adopt(&[]).await?;
            core.forget_owner().await?;
        }
        Ok(())
    }
}

impl Drop for RedisChannel {
    fn drop(&mut self) {
        self.core.uncount_consumer();
        self.core.fail(Fault::Closed, Vec::new());
        self.core.abort();
    }
}

fn sum(replies: &[Value]) -> u64 {
    replies
        .iter()
        .map(|reply| match reply {
            Value::Int(count) => u64::try_from(*count).unwrap_or(0),
            _ => 0,
        })
        .sum()
}
