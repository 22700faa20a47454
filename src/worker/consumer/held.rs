//! What becomes of held requests when their channel is lost, and when consumption ends.
//!
//! After a reconnect whatever is held has to be proved anew; at the end what waits is handed
//! back, and what runs keeps a channel for as long as it takes.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use super::super::analyze;
use super::super::effects::Cancel;
use super::super::request::{Phase, Request};
use super::{Consumer, SIGKILL, SIGTERM, SLOWEST, connect};
use crate::transport::{Channel, Error, Incoming, Tag};

impl Consumer {
    /// Keeps a channel for the tasks that still run when consumption has ended: connects again
    /// when it is lost, and ends tasks whose lease is. Runs until it is dropped.
    pub async fn drain(mut self) {
        loop {
            if let Some(channel) = self.worker.link.channel() {
                let error = loop {
                    match channel.next().await {
                        Ok(Incoming::Lost(tag)) => self.lease_lost(&tag),
                        // Fetched before the queue was cancelled: handed back with the rest.
                        Ok(_) => {}
                        Err(error) => break error,
                    }
                };
                self.lost(&error);
            }
            let channel = match connect(&self.worker, &*self.transport, false).await {
                Ok(channel) => channel,
                Err(fatal) => {
                    log::error!("{fatal}");
                    return;
                }
            };
            match self.take_up(&channel).await {
                Ok(()) => self.hand_back(&channel).await,
                Err(error) => {
                    self.lost(&error);
                    tokio::time::sleep(SLOWEST).await;
                }
            }
        }
    }

    pub(super) fn lost(&self, error: &Error) {
        self.worker.link.disconnect();
        if self.transport.driver() == "amqp" {
            self.worker.state.doubts.lost();
            for request in self.worker.state.in_phase(Phase::Active) {
                if request.disown() {
                    analyze::count_death(&self.worker, &request, -1);
                }
            }
        }
        self.worker.events.disconnect();
        log::warn!(
            "consumer: Connection to broker lost. Trying to re-establish the connection... ({error})"
        );
    }

    /// `worker_cancel_long_running_tasks_on_connection_loss`: what runs and cannot be acknowledged
    /// any more is ended; its message comes again.
    pub(super) fn cancel_unacknowledged(&self) {
        if !(self.worker.settings).worker_cancel_long_running_tasks_on_connection_loss {
            return;
        }
        for request in self.worker.state.in_phase(Phase::Active) {
            if !request.rules.acks_late || request.acknowledged() || request.fenced() {
                continue;
            }
            log::warn!(
                "Task {} cannot be acknowledged after a connection loss since late \
                 acknowledgement is enabled for it.\nTerminating it instead.",
                request.label()
            );
            request.cancel(Cancel::ConnectionLoss);
            self.worker.pool.terminate(request.id(), SIGTERM);
        }
    }

    /// `worker_enable_prefetch_count_reduction`: the broker gives what runs to us again, or to
    /// others, so until it is done less is fetched ahead. Where prefetch is counted for each
    /// consumer, as on Redis, Celery leaves this out.
    pub(super) fn reduce_prefetch(&mut self, channel: &dyn Channel) {
        let settings = &self.worker.settings;
        if !settings.worker_enable_prefetch_count_reduction {
            return;
        }
        if !channel.limits_globally() {
            self.overlap.clear();
            log::info!(
                "Skipping prefetch count reduction after connection restart because per-consumer \
                 QoS (apply_global=False) is in effect and broker-side prefetch updates would not \
                 reach the running consumer."
            );
            return;
        }
        let active = self.worker.state.in_phase(Phase::Active);
        let most = self.worker.slots() as u64 * settings.worker_prefetch_multiplier;
        self.overlap = active.iter().map(Arc::downgrade).collect();
        for request in &active {
            request.tell_end();
        }
        let reduced = self.base();
        if reduced < most {
            log::info!(
                "Temporarily reducing the prefetch count to {reduced} to avoid over-fetching since \
                 {} tasks are currently being processed.\nThe prefetch count will be gradually \
                 restored to {most} as the tasks complete processing.",
                active.len()
            );
        }
    }

    /// What prefetch starts from.
    pub(super) fn base(&self) -> u64 {
        let multiplier = self.worker.settings.worker_prefetch_multiplier;
        let most = self.worker.slots() as u64 * multiplier;
        let overlap = self.overlap.len() as u64 * multiplier;
        most.saturating_sub(overlap).max(multiplier).min(most)
    }

    pub(super) fn forget_overlap(&mut self) {
        if self.overlap.is_empty() {
            return;
        }
        let runs = |request: &Weak<Request>| {
            (request.upgrade()).is_some_and(|request| request.phase() == Phase::Active)
        };
        self.overlap.retain(runs);
        if self.overlap.is_empty() {
            let most = self.base();
            log::info!("Prefetch count has been restored to the maximum of {most}");
        }
    }

    /// Hands what does not run back to its queue, for others to take.
    pub(super) async fn hand_back(&mut self, channel: &Arc<dyn Channel>) {
        self.worker.state.scheduled.retain(|_| false);
        let held = self.worker.state.held();
        let running = held
            .iter()
            .filter(|request| !self.worker.state.withdraw(request));
        let keep: Vec<_> = running.filter_map(|request| request.tag()).collect();
        self.forget_settled();
        match channel.restore(&keep).await {
            Ok(0) => {}
            Ok(count) => log::info!("Restoring {count} unacknowledged message(s)"),
            Err(error) => log::warn!("While handing messages back: {error}"),
        }
    }

    /// Gives the rest of the worker a new channel, and proves that what is held is ours.
    pub(super) async fn take_up(&mut self, channel: &Arc<dyn Channel>) -> Result<(), Error> {
        // First of all, so that what was settled in the meantime is not handed back.
        self.worker.link.connect(channel.clone());
        self.worker.events.connect(channel.clone());
        self.reclaim(channel).await
    }

    /// After a reconnect: deliveries whose lease is proved are kept, waiting ones whose lease is
    /// lost are forgotten, for they come again. A running one goes on where the broker itself
    /// took the message back (it will be adopted when it comes, and the commit is idempotent);
    /// where somebody else holds the lease, it is ended without effect.
    async fn reclaim(&mut self, channel: &Arc<dyn Channel>) -> Result<(), Error> {
        let held = self.worker.state.held();
        let scheduled = &self.worker.state.scheduled;
        let running = held.iter().filter_map(|request| request.tag());
        let tags: Vec<_> = running.chain(scheduled.tags()).collect();
        // Also without any: what the earlier channel fetched and never handed out goes back.
        let kept: HashSet<Tag> = channel.adopt(&tags).await?.into_iter().collect();
        scheduled.retain(|tag| kept.contains(tag));
        if self.transport.driver() == "amqp" {
            self.worker.state.doubts.found();
        }
        let ended = |request: &&Arc<Request>| request.cancelled() == Some(Cancel::ConnectionLoss);
        if held.iter().any(|request| ended(&request)) {
            // Another worker may have them at once, as if the broker had taken them back.
            let stays = held.iter().filter(|request| !ended(request));
            let stays = stays.filter_map(|request| request.tag());
            let keep: Vec<_> = stays.chain(scheduled.tags()).collect();
            channel.restore(&keep).await?;
            held.iter()
                .filter(ended)
                .for_each(|request| _ = request.disown());
        }
        for request in held {
            let Some(tag) = request.tag() else { continue };
            if kept.contains(&tag) {
                continue;
            }
            match request.phase() {
                Phase::Active if self.transport.driver() == "amqp" => _ = request.disown(),
                _ => self.lose(&request),
            }
        }
        self.forget_settled();
        Ok(())
    }

    fn forget_settled(&mut self) {
        let scheduled = &self.worker.state.scheduled;
        self.timer.retain(|serial| scheduled.contains(serial));
        for limited in self.limited.values_mut() {
            limited
                .waiting
                .retain(|request| request.phase() != Phase::Settled);
        }
    }

    /// Somebody else holds the message of this request.
    fn lose(&self, request: &Arc<Request>) {
        if !self.worker.state.withdraw(request) {
            if request.fence() {
                analyze::count_death(&self.worker, request, -1);
            }
            // The work has become useless; the slot is better used otherwise.
            self.worker.pool.terminate(request.id(), SIGKILL);
        }
    }

    pub(super) fn lease_lost(&mut self, tag: &Tag) {
        if self.worker.state.scheduled.retain(|held| held != tag) > 0 {
            // The timer finds that out by itself.
            return;
        }
        let held = self.worker.state.held();
        if let Some(request) = held
            .iter()
            .find(|request| request.tag().as_ref() == Some(tag))
        {
            self.lose(request);
            self.forget_settled();
        }
    }
}
