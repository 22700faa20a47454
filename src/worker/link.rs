//! The worker's current channel to the broker, which comes and goes.
//!
//! The consumer's loop sets it; journeys use it without knowing whether a reconnect lies in
//! between. Settlements that find no channel wait here for the next one, so that a message
//! whose work is done is not delivered again because the broker was away for a moment.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Settings;
use crate::transport::{Channel, Error, Publication, Tag};

/// How a delivery is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Settlement {
    Ack(Tag),
    Reject(Tag, bool),
    Quarantine(Tag, String),
}

/// How long a message of ours waits for a broker that is away. Its task could do nothing more
/// sensible: without a broker its own message cannot be settled either.
const AWAY: Duration = Duration::from_secs(120);

/// How long the broker may take to say whether a delivery is ours.
const ANSWER: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Debug)]
pub struct Link {
    current: watch::Sender<Option<Held>>,
    connected: AtomicBool,
    waiting: Mutex<VecDeque<Settlement>>,
    policy: Policy,
}

#[derive(Clone)]
struct Held(Arc<dyn Channel>);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a channel")
    }
}

/// `task_publish_retry_policy`.
#[derive(Debug, Clone, Copy)]
struct Policy {
    retries: u32,
    start: Duration,
    step: Duration,
    most: Duration,
}

impl Link {
    /// A link without a channel yet.
    pub fn new(settings: &Settings) -> Self {
        let given = &settings.task_publish_retry_policy;
        let seconds = |key: &str, default: f64| {
            let number = given
                .get(key)
                .and_then(serde_json::Value::as_f64)
                .unwrap_or(default);
            Duration::try_from_secs_f64(number).unwrap_or(Duration::ZERO)
        };
        let retries = given
            .get("max_retries")
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(3);
        let retries = if settings.task_publish_retry {
            retries
        } else {
            0
        };
        let policy = Policy {
            retries: u32::try_from(retries).unwrap_or(u32::MAX),
            start: seconds("interval_start", 0.0),
            step: seconds("interval_step", 0.2),
            most: seconds("interval_max", 1.0),
        };
        Self {
            current: watch::Sender::new(None),
            connected: AtomicBool::new(false),
            waiting: Mutex::default(),
            policy,
        }
    }

    /// A new channel is up: waiting settlements go out on it first.
    pub fn connect(&self, channel: Arc<dyn Channel>) {
        // Under the lock, so that no settlement begins to wait after the others have left.
        let mut waiting = self.waiting();
        for settlement in waiting.drain(..) {
            perform(&*channel, &settlement);
        }
        self.connected.store(true, Ordering::Relaxed);
        self.current.send_replace(Some(Held(channel)));
    }

    /// Waits for a channel where there has been one before.
    pub async fn back(&self) {
        if self.connected.load(Ordering::Relaxed) {
            // An error would mean that this link is gone.
            drop(self.current.subscribe().wait_for(Option::is_some).await);
        }
    }

    /// The channel is gone.
    pub fn disconnect(&self) {
        self.current.send_replace(None);
    }

    /// The channel, if there is one.
    pub fn channel(&self) -> Option<Arc<dyn Channel>> {
        self.current.borrow().as_ref().map(|held| held.0.clone())
    }

    /// Somebody works on a delivery from now on, so a death of this process counts against it.
    pub fn started(&self, tag: &Tag) {
        if let Some(channel) = self.channel() {
            channel.started(tag);
        }
    }

    /// Settles: done.
    pub fn ack(&self, tag: Tag) {
        self.settle(Settlement::Ack(tag));
    }

    /// Settles: dropped, or back to its queue.
    pub fn reject(&self, tag: Tag, requeue: bool) {
        self.settle(Settlement::Reject(tag, requeue));
    }

    /// Settles: kept aside for a person, with the reason.
    pub fn quarantine(&self, tag: Tag, reason: String) {
        self.settle(Settlement::Quarantine(tag, reason));
    }

    /// Whether a delivery is still ours. Where the broker does not say, it is: what follows has
    /// to bear a second run anyway.
    pub async fn holds(&self, tag: &Tag) -> bool {
        let Some(channel) = self.channel() else {
            return true;
        };
        let answer = tokio::time::timeout(ANSWER, channel.holds(tag)).await;
        !matches!(answer, Ok(Ok(false)))
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<Settlement>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, settlement: Settlement) {
        let mut waiting = self.waiting();
        match self.channel() {
            Some(channel) => perform(&*channel, &settlement),
            None => waiting.push_back(settlement),
        }
    }

    /// Publishes, waiting for a channel and trying again by `task_publish_retry_policy`, which
    /// counts the tries at a broker that is there.
    pub async fn publish(&self, publication: Publication) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            let mut watcher = self.current.subscribe();
            let up = watcher.wait_for(Option::is_some);
            if !matches!(tokio::time::timeout(AWAY, up).await, Ok(Ok(_))) {
                return Err(Error::Connection {
                    operation: "publish",
                    reason: format!("the broker was away for {} s", AWAY.as_secs()),
                });
            }
            let Some(channel) = self.channel() else {
                continue;
            };
            let error = match channel.publish(publication.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) if !error.is_connection() => return Err(error),
                Err(error) => error,
            };
            if tries == self.policy.retries {
                return Err(error);
            }
            let pause = (self.policy.start + self.policy.step * tries).min(self.policy.most);
            tries += 1;
            // A channel that comes up earlier ends the pause.
            let mut watcher = self.current.subscribe();
            watcher.mark_unchanged();
            drop(tokio::time::timeout(pause, watcher.changed()).await);
        }
    }
}

fn perform(channel: &dyn Channel, settlement: &Settlement) {
    match settlement {
        Settlement::Ack(tag) => channel.ack(tag),
        Settlement::Reject(tag, requeue) => channel.reject(tag, *requeue),
        Settlement::Quarantine(tag, reason) => channel.quarantine(tag, reason),
    }
}
