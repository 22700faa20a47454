//! What outlives a channel: who we are, what a broken channel held, and what it had not sent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::keys;
use crate::transport::Tag;

/// A delivery this process has to settle.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// Microseconds of its score in the index: the proof that the lease is ours.
    pub(super) score: u64,
    /// Place in the order of delivery.
    pub(super) sequence: u64,
    /// The list it was taken from.
    pub(super) list: Arc<str>,
    /// The queue it was taken from.
    pub(super) queue: Arc<str>,
    /// Somebody works on it, so a death of this process counts against it.
    pub(super) started: bool,
}

impl Held {
    /// Its value in the hash of what we own: the score, and a mark when somebody works on it.
    pub(super) fn owned_value(&self) -> String {
        let mut value = keys::score(self.score);
        if self.started {
            value.push('!');
        }
        value
    }
}

/// How a delivery ends.
#[derive(Debug, Clone)]
pub(super) enum Settlement {
    /// Done, or dropped.
    Ack,
    /// Back of the queue.
    Requeue,
    /// Kept aside for a person, with the reason.
    Quarantine(String),
}

/// Outlives the channels of a transport: who we are, and what a broken channel left behind.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Names this process in the keys of ours.
    pub(super) owner: String,
    sequence: AtomicU64,
    left: Mutex<Left>,
}

#[derive(Debug, Default)]
pub(super) struct Left {
    /// Held by a channel that is gone.
    pub(super) orphans: HashMap<Tag, Held>,
    /// Settled, and perhaps not known to the server.
    pub(super) unsent: Vec<(Tag, Held, Settlement)>,
    /// Channels that consume.
    pub(super) consumers: usize,
    /// A channel has consumed before.
    pub(super) consumed: bool,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            owner: uuid::Uuid::new_v4().to_string(),
            sequence: AtomicU64::new(1),
            left: Mutex::default(),
        }
    }

    /// The first of `count` sequence numbers.
    pub(super) fn sequence(&self, count: usize) -> u64 {
        self.sequence.fetch_add(count as u64, Ordering::Relaxed)
    }

    /// Whether an earlier channel of this process has consumed.
    pub(super) fn is_reconnect(&self) -> bool {
        self.left().consumed
    }

    pub(super) fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
