//! What the worker as a whole remembers: the requests it holds, what was revoked, totals.
//!
//! Read by remote control, heartbeats and shutdown; written by the consumer and the journeys.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Map, Value};
use tokio::sync::Notify;

use super::doubts::Doubts;
use super::request::{Phase, Request};
use super::scheduled::Scheduled;

/// Shared state of one worker.
#[derive(Debug)]
pub struct State {
    requests: Mutex<Requests>,
    totals: Mutex<BTreeMap<String, u64>>,
    processed: AtomicU64,
    active: AtomicU64,
    parked: AtomicU64,
    beside: AtomicU64,
    prefetch: AtomicU32,
    closed: AtomicBool,
    settled: Notify,
    /// What the broker may deliver again although it is done.
    pub doubts: Doubts,
    /// What waits for its ETA.
    pub scheduled: Scheduled,
    /// When the worker started.
    pub started: Instant,
}

/// Keyed by serial number: two messages may carry the same id, a retry and the run that asked
/// for it among them.
#[derive(Debug, Default)]
struct Requests {
    held: HashMap<u64, Arc<Request>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for State {
    fn default() -> Self {
        Self {
            requests: Mutex::default(),
            totals: Mutex::default(),
            processed: AtomicU64::new(0),
            active: AtomicU64::new(0),
            parked: AtomicU64::new(0),
            beside: AtomicU64::new(0),
            prefetch: AtomicU32::new(0),
            closed: AtomicBool::new(false),
            settled: Notify::new(),
            doubts: Doubts::default(),
            scheduled: Scheduled::default(),
            started: Instant::now(),
        }
    }
}

impl State {
    /// Takes a request in.
    pub fn hold(&self, request: &Arc<Request>) {
        lock(&self.requests)
            .held
            .insert(request.serial, request.clone());
    }

    /// Lets a request go that is not due; its message waits in `scheduled`.
    pub fn set_aside(&self, request: &Request) {
        lock(&self.requests).held.remove(&request.serial);
    }

    /// The running request whose delivery was lost and has come back as this one.
    pub fn disowned(&self, id: &str) -> Option<Arc<Request>> {
        let requests = lock(&self.requests);
        let lost = |request: &&Arc<Request>| {
            request.id() == id
                && request.tag().is_none()
                && !request.acknowledged()
                && request.cancelled().is_none()
        };
        requests.held.values().find(lost).cloned()
    }

    /// A slot is there for the request: shutdown waits for it from now on. `false`: it was
    /// withdrawn in the meantime.
    pub fn activate(&self, request: &Request) -> bool {
        let waits = request.activate();
        if waits {
            self.active.fetch_add(1, Ordering::Relaxed);
        }
        waits
    }

    /// Takes a request that does not run out of the worker; `false`: it runs.
    pub fn withdraw(&self, request: &Request) -> bool {
        let withdrawn = request.withdraw();
        if withdrawn {
            lock(&self.requests).held.remove(&request.serial);
        }
        withdrawn
    }

    /// The request takes no place among the messages fetched ahead any more; `true` the first
    /// time, when the prefetch count has to follow.
    pub fn step_aside(&self, request: &Request) -> bool {
        let first = request.step_aside();
        if first {
            self.beside.fetch_add(1, Ordering::Relaxed);
        }
        first
    }

    /// Held requests that take no place among the messages fetched ahead.
    pub fn beside(&self) -> u64 {
        self.beside.load(Ordering::Relaxed)
    }

    /// The slot accepted the request: it is counted.
    pub fn accept(&self, request: &Request, pid: u32) {
        request.start(pid);
        self.processed.fetch_add(1, Ordering::Relaxed);
        let mut totals = lock(&self.totals);
        match totals.get_mut(request.display_name()) {
            Some(count) => *count += 1,
            None => drop(totals.insert(request.display_name().to_owned(), 1)),
        }
    }

    /// Lets go of a request.
    pub fn release(&self, request: &Request) {
        if request.phase() == Phase::Active {
            self.active.fetch_sub(1, Ordering::Relaxed);
        }
        request.set_phase(Phase::Settled);
        if lock(&self.requests).held.remove(&request.serial).is_some() && request.beside() {
            self.beside.fetch_sub(1, Ordering::Relaxed);
        }
        self.settled.notify_waiters();
    }

    /// The request of this id, if it is held.
    pub fn get(&self, id: &str) -> Option<Arc<Request>> {
        lock(&self.requests)
            .held
            .values()
            .find(|request| request.id() == id)
            .cloned()
    }

    /// The requests in a phase, in the order of their arrival.
    pub fn in_phase(&self, phase: Phase) -> Vec<Arc<Request>> {
        let mut found: Vec<_> = lock(&self.requests)
            .held
            .values()
            .filter(|request| request.phase() == phase)
            .cloned()
            .collect();
        found.sort_by_key(|request| request.serial);
        found
    }

    /// Every request that is held.
    pub fn held(&self) -> Vec<Arc<Request>> {
        lock(&self.requests).held.values().cloned().collect()
    }

    /// Waits until no request is active.
    pub async fn idle(&self) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            // Registered before the check, so that no settlement falls in between.
            settled.as_mut().enable();
            if self.active() == 0 {
                return;
            }
            settled.await;
        }
    }

    /// Running tasks.
    pub fn active(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }

    /// The request waits for something that is not this worker's, and takes no place among the
    /// messages fetched ahead meanwhile. One that had stepped aside counts once all the same.
    pub fn park(&self, request: &Request) {
        self.parked.fetch_add(1, Ordering::Relaxed);
        if request.beside() {
            self.beside.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The end of [`State::park`].
    pub fn unpark(&self, request: &Request) {
        self.parked.fetch_sub(1, Ordering::Relaxed);
        if request.beside() {
            self.beside.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Requests that wait so.
    pub fn parked(&self) -> u64 {
        self.parked.load(Ordering::Relaxed)
    }

    /// The worker is down.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Whether the worker is down.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// The prefetch count in force.
    pub fn prefetch(&self) -> u32 {
        self.prefetch.load(Ordering::Relaxed)
    }

    /// The prefetch count changed.
    pub fn set_prefetch(&self, count: u32) {
        self.prefetch.store(count, Ordering::Relaxed);
    }

    /// Tasks accepted since the start.
    pub fn processed(&self) -> u64 {
        self.processed.load(Ordering::Relaxed)
    }

    /// Tasks accepted since the start, by shown name.
    pub fn totals(&self) -> Map<String, Value> {
        lock(&self.totals)
            .iter()
            .map(|(name, count)| (name.clone(), Value::from(*count)))
            .collect()
    }
}
