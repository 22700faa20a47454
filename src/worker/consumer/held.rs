//! What becomes of held requests when their channel is lost, and when consumption ends.
//!
//! After a reconnect whatever is held has to be proved anew; at the end what waits is handed
//! back, and what runs keeps a channel for as long as it takes.

use std::sync::Arc;

use super::super::request::{Phase, Request};
use super::{Consumer, SIGKILL, SLOWEST, connect};
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
        }
        self.worker.events.disconnect();
        log::warn!(
            "consumer: Connection to broker lost. Trying to re-establish the connection... ({error})"
        );
    }

    /// Hands what does not run back to its queue, for others to take.
    pub(super) async fn hand_back(&mut self, channel: &Arc<dyn Channel>) {
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
        let tags: Vec<_> = held.iter().filter_map(|request| request.tag()).collect();
        // Also without any: what the earlier channel fetched and never handed out goes back.
        let kept = channel.adopt(&tags).await?;
        if self.transport.driver() == "amqp" {
            self.worker.state.doubts.found();
        }
        for request in held {
            let Some(tag) = request.tag() else { continue };
            if kept.contains(&tag) {
                continue;
            }
            match request.phase() {
                Phase::Active if self.transport.driver() == "amqp" => request.disown(),
                _ => self.lose(&request),
            }
        }
        self.forget_settled();
        Ok(())
    }

    fn forget_settled(&mut self) {
        self.timer
            .retain(|request| request.phase() != Phase::Settled);
        for limited in self.limited.values_mut() {
            limited
                .waiting
                .retain(|request| request.phase() != Phase::Settled);
        }
    }

    /// Somebody else holds the message of this request.
    fn lose(&self, request: &Arc<Request>) {
        if !self.worker.state.withdraw(request) {
            request.fence();
            // The work has become useless; the slot is better used otherwise.
            self.worker.pool.terminate(request.id(), SIGKILL);
        }
    }

    pub(super) fn lease_lost(&mut self, tag: &Tag) {
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
