//! How far a fetch is: counters the workers bump, and what is told to the caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use gix::progress::{Id, MessageLevel, Step, StepShared, Unit};

/// Where a fetch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing of the pack has come.
    Connecting,
    /// Objects arrive.
    Receiving {
        /// So many.
        objects: u64,
        /// Of so many.
        total: u64,
        /// Bytes from the network so far.
        bytes: u64,
    },
    /// Everything is here; deltas are resolved and objects named.
    Resolving {
        /// So many objects.
        done: u64,
        /// Of so many.
        total: u64,
    },
}

impl Progress {
    /// From 0 to 1, never falling from one report to the next.
    pub fn fraction(&self) -> f64 {
        let part = |done: u64, total: u64| match total {
            0 => 0.0,
            _ => (done as f64 / total as f64).min(1.0),
        };
        match *self {
            Progress::Connecting => 0.0,
            Progress::Receiving { objects, total, .. } => 0.02 + 0.68 * part(objects, total),
            Progress::Resolving { done, total } => 0.70 + 0.30 * part(done, total),
        }
    }
}

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Steps {
    total: AtomicU64,
    received: AtomicU64,
    is_resolving: AtomicBool,
    resolved: Arc<AtomicUsize>,
}

impl Steps {
    pub(super) fn receiving_begins(&self, total: u64) {
        self.total.store(total.max(1), Ordering::Relaxed);
    }

    pub(super) fn object_received(&self) {
        self.received.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn resolving_begins(&self) {
        self.is_resolving.store(true, Ordering::Relaxed);
    }

    /// The report for the caller.
    pub(super) fn report(&self, bytes: u64) -> Progress {
        let total = self.total.load(Ordering::Relaxed);
        if total == 0 {
            Progress::Connecting
        } else if self.is_resolving.load(Ordering::Relaxed) {
            Progress::Resolving {
                done: (self.resolved.load(Ordering::Relaxed) as u64).min(total),
                total,
            }
        } else {
            Progress::Receiving {
                objects: self.received.load(Ordering::Relaxed),
                total,
                bytes,
            }
        }
    }
}

/// What gix-pack reports to: it keeps the count of resolved objects and drops the rest.
#[derive(Debug)]
pub(super) struct Resolving {
    resolved: Arc<AtomicUsize>,
    counter: StepShared,
}

impl Resolving {
    pub(super) fn new(steps: &Steps) -> Resolving {
        Resolving {
            resolved: Arc::clone(&steps.resolved),
            counter: StepShared::default(),
        }
    }
}

impl gix::Count for Resolving {
    fn set(&self, step: Step) {
        self.counter.store(step, Ordering::Relaxed);
    }

    fn step(&self) -> Step {
        self.counter.load(Ordering::Relaxed)
    }

    fn inc_by(&self, step: Step) {
        self.counter.fetch_add(step, Ordering::Relaxed);
    }

    fn counter(&self) -> StepShared {
        Arc::clone(&self.counter)
    }
}

impl gix::Progress for Resolving {
    fn init(&mut self, _max: Option<Step>, _unit: Option<Unit>) {}

    fn set_name(&mut self, _name: String) {}

    fn name(&self) -> Option<String> {
        None
    }

    fn id(&self) -> Id {
        gix::progress::UNKNOWN
    }

    fn message(&self, _level: MessageLevel, _message: String) {}

    fn show_throughput(&self, _start: std::time::Instant) {}
}

impl gix::NestedProgress for Resolving {
    type SubProgress = Resolving;

    fn add_child(&mut self, _name: impl Into<String>) -> Resolving {
        Resolving {
            resolved: Arc::clone(&self.resolved),
            counter: StepShared::default(),
        }
    }

    fn add_child_with_id(&mut self, _name: impl Into<String>, id: Id) -> Resolving {
        let resolving: Id = gix::odb::pack::index::write::ProgressId::ResolveObjects.into();
        Resolving {
            resolved: Arc::clone(&self.resolved),
            counter: match id == resolving {
                true => Arc::clone(&self.resolved),
                false => StepShared::default(),
            },
        }
    }
}
