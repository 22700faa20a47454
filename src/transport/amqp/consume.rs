//! Which queues are consumed, and how many messages at once.
//!
//! Belongs to the task that settles ([`super::settle::run`]), so that consumers start and end in
//! order with acknowledgements and nobody else changes them.
//!
//! A limit is set for the whole channel, and can be changed at any time, where every queue is
//! classic. Quorum queues, and servers that refuse such a limit, know one for each consumer only,
//! fixed when it starts; more is allowed by starting further consumers of the same queues, and
//! less by cancelling them again. A quorum queue that comes later makes the change on a channel
//! that is in use.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;

use super::core::{Consuming, Core, is_quorum, lock};
use super::error::broken;
use super::message::short;
use crate::transport::Error;

/// What the limit in force counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    Channel,
    Consumer,
}

/// See the module.
#[derive(Default)]
pub(super) struct Consumption {
    scope: Option<Scope>,
    /// The limit of the channel, or of the first consumer of each queue; 0 is without limit.
    base: u32,
    /// What later consumers may take beyond that, and their tags; the last goes first.
    further: Vec<(u32, Vec<String>)>,
}

impl Consumption {
    /// Starts taking messages from a queue.
    pub(super) async fn start(
        &mut self,
        core: &Arc<Core>,
        side: &Consuming,
        queue: &str,
    ) -> Result<(), Error> {
        if is_static(core) {
            self.leave_channel(core, side).await?;
            limit(&side.channel, self.base, false).await?;
        }
        start_consumer(core, side, queue).await.map(drop)
    }

    /// Stops taking messages from a queue.
    pub(super) async fn cancel(
        &mut self,
        core: &Core,
        side: &Consuming,
        queue: &str,
    ) -> Result<(), Error> {
        for tag in tags(core, Some(queue)) {
            stop_consumer(core, side, &tag).await?;
        }
        Ok(())
    }

    /// Limits how many deliveries may be unsettled at once.
    pub(super) async fn limit(
        &mut self,
        core: &Arc<Core>,
        side: &Consuming,
        count: u32,
    ) -> Result<(), Error> {
        if self.scope.is_none() && !is_static(core) {
            core.ask_for_limits().await;
        }
        if !is_static(core) {
            self.scope = Some(Scope::Channel);
            self.base = count;
            let set = limit(&side.channel, count, true).await;
            return set.inspect_err(|error| core.shared.note_refusal(error));
        }
        if self.scope != Some(Scope::Consumer) || core.consumers().is_empty() {
            self.base = count;
            self.leave_channel(core, side).await?;
            return limit(&side.channel, count, false).await;
        }
        let mut allowed = self.base + self.further.iter().map(|(more, _)| more).sum::<u32>();
        if self.base == 0 || count == 0 {
            return Ok(());
        }
        if count > allowed {
            // Some more than asked for, so that many ETA tasks do not need as many consumers.
            let more = (count - allowed).max(allowed / 8);
            limit(&side.channel, more, false).await?;
            let mut tags = Vec::new();
            for queue in queues(core) {
                tags.push(start_consumer(core, side, &queue).await?);
            }
            self.further.push((more, tags));
        }
        while let Some((last, _)) = self.further.last()
            && allowed.saturating_sub(*last) >= count
        {
            allowed -= last;
            let tags = self.further.pop().map(|(_, tags)| tags);
            for tag in tags.unwrap_or_default() {
                if core.consumers().contains_key(&tag) {
                    stop_consumer(core, side, &tag).await?;
                }
            }
        }
        Ok(())
    }

    /// Lifts the limit of the channel, which would keep quorum queues from being consumed.
    /// Consumers that are there have none of their own and begin anew.
    async fn leave_channel(&mut self, core: &Arc<Core>, side: &Consuming) -> Result<(), Error> {
        let before = self.scope.replace(Scope::Consumer);
        if before == Some(Scope::Consumer) {
            return Ok(());
        }
        log::info!("Global QoS is disabled: each consumer has a prefetch count of its own.");
        if before.is_none() {
            return Ok(());
        }
        let queues = queues(core);
        for tag in tags(core, None) {
            stop_consumer(core, side, &tag).await?;
        }
        limit(&side.channel, 0, true).await?;
        limit(&side.channel, self.base, false).await?;
        for queue in queues {
            start_consumer(core, side, &queue).await?;
        }
        Ok(())
    }
}

/// Whether the limit counts for each consumer only.
pub(super) fn is_static(core: &Core) -> bool {
    core.shared.refuses_global.load(Ordering::Relaxed)
        || (core.shared.options.detect_quorum_queues && has_quorum(core))
}

/// Whether a quorum queue was declared to be consumed.
pub(super) fn has_quorum(core: &Core) -> bool {
    lock(&core.queues).iter().any(|(queue, _)| is_quorum(queue))
}

/// The queues that are consumed.
fn queues(core: &Core) -> BTreeSet<String> {
    core.consumers().values().cloned().collect()
}

/// The tags of the consumers of one queue, or of all.
fn tags(core: &Core, queue: Option<&str>) -> Vec<String> {
    let consumers = core.consumers();
    let wanted = consumers
        .iter()
        .filter(|(_, name)| queue.is_none_or(|queue| queue == *name));
    wanted.map(|(tag, _)| tag.clone()).collect()
}

async fn start_consumer(core: &Arc<Core>, side: &Consuming, queue: &str) -> Result<String, Error> {
    let tag = core.consumer_tag();
    core.consumers().insert(tag.clone(), queue.to_owned());
    let started = side
        .channel
        .basic_consume(
            short(queue)?,
            short(&tag)?,
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await;
    let consumer = started
        .map_err(|error| broken("consuming a queue", &error))
        .inspect_err(|error| core.shared.note_refusal(error))?;
    let forwarder = tokio::spawn(forward(
        core.clone(),
        queue.to_owned(),
        tag.clone(),
        consumer,
    ));
    lock(&core.forwarders).insert(tag.clone(), forwarder);
    Ok(tag)
}

async fn stop_consumer(core: &Core, side: &Consuming, tag: &str) -> Result<(), Error> {
    core.consumers().remove(tag);
    let cancelled = side
        .channel
        .basic_cancel(short(tag)?, BasicCancelOptions::default())
        .await;
    cancelled.map_err(|error| broken("cancelling a consumer", &error))?;
    // What was under way counts as delivered from here on.
    let forwarder = lock(&core.forwarders).remove(tag);
    if let Some(forwarder) = forwarder {
        drop(tokio::time::timeout(core.shared.options.request_timeout, forwarder).await);
    }
    Ok(())
}

/// Hands deliveries on until their consumer ends.
async fn forward(core: Arc<Core>, queue: String, tag: String, mut consumer: lapin::Consumer) {
    while let Some(delivery) = consumer.next().await {
        match delivery {
            Ok(delivery) => core.deliver(&queue, delivery),
            Err(error) => {
                core.life.fail(broken("consuming a queue", &error));
                return;
            }
        }
    }
    // A consumer that we cancel is forgotten before.
    if core.consumers().remove(&tag).is_some() && core.life.error().is_none() {
        core.cancelled(queue);
    }
}

/// Sets the prefetch limit.
pub(super) async fn limit(channel: &lapin::Channel, count: u32, global: bool) -> Result<(), Error> {
    // AMQP's count has 16 bits, and 0 means without limit.
    let count = u16::try_from(count).unwrap_or(0);
    let answer = channel.basic_qos(count, BasicQosOptions { global }).await;
    answer.map_err(|error| broken("setting the prefetch count", &error))
}
