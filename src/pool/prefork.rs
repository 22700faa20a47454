//! The pool as its user sees it: acquire, terminate, grow, shrink, restart, stop.
//!
//! Answers for billiard's `Pool` and Celery's `TaskPool`. What happens behind it is told in
//! `places`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc as blocking};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::{Notify, Semaphore, mpsc};

use super::places::{Occupant, Place, Shared, State};
use super::process::{Blueprint, Handle, Keeper};
use super::slot::Slot;
use super::{Error, Options};

/// Between the signal of [`Pool::terminate`] and the one that cannot be ignored.
const GRACE: Duration = Duration::from_millis(100);

/// How the jobs were spread, for `inspect stats`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writes {
    /// Jobs given to children since the start.
    pub total: u64,
    /// The same for each place that exists now.
    pub each: Vec<u64>,
    /// Places that are held now.
    pub active: usize,
}

/// The pool of child processes. See [`super`].
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Starts the children; they get ready in the background, see [`Pool::ready`]. Must be called
    /// inside a tokio runtime.
    pub fn start(options: Options) -> Result<Arc<Pool>, Error> {
        let (exits, mut exited) = mpsc::unbounded_channel::<Arc<Handle>>();
        let blueprint = Blueprint {
            program: options.program.clone(),
            environment: options.whole_environment(),
            root: options.root.clone(),
        };
        let size = options.size.max(1);
        let shared = Arc::new(Shared {
            keeper: Keeper::start(blueprint, exits)?,
            sandbox: options.sandbox,
            log_level: options.log_level,
            name: options.name,
            free: Semaphore::new(0),
            changed: Notify::new(),
            max_tasks: AtomicU64::new(options.max_tasks_per_child.unwrap_or(0)),
            max_memory: AtomicU64::new(options.max_memory_per_child.unwrap_or(0)),
            state: Mutex::default(),
        });
        // The first children are started here, so that a program that cannot be started at all is
        // an error of the start.
        let (answer, answers) = blocking::channel();
        {
            let mut state = shared.state();
            state.add_places(size);
            state.starting = size;
            for _ in 0..size {
                let answer = answer.clone();
                shared
                    .keeper
                    .spawn(state.name(&shared.name), move |result| {
                        let _ = answer.send(result);
                    });
            }
        }
        drop(answer);
        for result in answers {
            let spawned = result?;
            shared.state().enlist(&spawned);
            tokio::spawn(Arc::clone(&shared).raise(Some(spawned)));
        }
        let watcher = Arc::downgrade(&shared);
        tokio::spawn(async move {
            while let Some(handle) = exited.recv().await {
                let Some(shared) = watcher.upgrade() else {
                    return;
                };
                shared.bury(handle);
            }
        });
        Ok(Arc::new(Pool { shared }))
    }

    /// Waits until every place has a child that is ready.
    pub async fn ready(&self) {
        self.until(|state| {
            let vacant = |place: &Place| matches!(place.occupant, Occupant::Vacant);
            state.stopping || !state.places.values().any(vacant)
        })
        .await;
    }

    /// Waits for a free place. Never comes back once the pool is stopped.
    pub async fn acquire(&self) -> Slot {
        loop {
            match self.shared.free.acquire().await {
                Ok(permit) => permit.forget(),
                Err(_) => return std::future::pending().await,
            }
            if let Some(slot) = self.shared.take() {
                return slot;
            }
        }
    }

    /// A free place if there is one now.
    pub fn try_acquire(&self) -> Option<Slot> {
        self.shared.free.try_acquire().ok()?.forget();
        self.shared.take()
    }

    /// Kills the child that runs this job: the signal first, and what cannot be ignored 0.1 s
    /// later. Children ignore `INT`, `TERM` and `HUP` (those from a terminal or service manager
    /// are for the parent to decide), so for these there is nothing to wait for. The job's
    /// [`Slot::run`] returns [`super::Outcome::Terminated`]. `false` when no such job runs.
    pub fn terminate(&self, job_id: &str, signal: i32) -> bool {
        let mut found = Vec::new();
        for place in self.shared.state().places.values() {
            if let Occupant::Held {
                handle,
                job,
                terminated,
            } = &place.occupant
                && job.as_deref() == Some(job_id)
            {
                terminated.store(signal, Ordering::Release);
                found.push(Arc::clone(handle));
            }
        }
        let ignored = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .iter()
            .any(|ignored| *ignored as i32 == signal);
        for handle in &found {
            if ignored || !handle.signal_number(signal) {
                handle.signal(Signal::SIGKILL);
            } else {
                let handle = Arc::clone(handle);
                tokio::spawn(async move {
                    let mut exit = handle.exit.clone();
                    let gone = exit.wait_for(Option::is_some);
                    if tokio::time::timeout(GRACE, gone).await.is_err() {
                        handle.signal(Signal::SIGKILL);
                    }
                });
            }
        }
        !found.is_empty()
    }

    /// Adds places.
    pub fn grow(&self, count: usize) {
        self.shared.state().add_places(count);
        self.shared.replenish();
    }

    /// Removes idle places, all or none; the last place stays.
    pub fn shrink(&self, count: usize) -> Result<(), Error> {
        let mut gone = Vec::new();
        {
            let mut state = self.shared.state();
            let count = count.min(state.places.len().saturating_sub(1));
            // A vacant place is no less idle than one whose child waits.
            let mut chosen: Vec<usize> = state
                .places
                .iter()
                .filter(|(_, place)| !matches!(place.occupant, Occupant::Held { .. }))
                .map(|(number, _)| *number)
                .collect();
            if chosen.len() < count {
                return Err(Error::Busy);
            }
            for number in chosen.split_off(chosen.len() - count) {
                state.free.retain(|free| *free != number);
                if let Some(place) = state.places.remove(&number)
                    && let Occupant::Idle(child) = place.occupant
                {
                    self.shared.forget_permit();
                    gone.push(child);
                }
            }
        }
        // Their sockets end here, and so do they.
        drop(gone);
        Ok(())
    }

    /// Replaces every child: idle ones now, the others when their job is done.
    pub fn restart(&self) {
        let mut gone = Vec::new();
        {
            let mut state = self.shared.state();
            state.generation += 1;
            gone.extend(state.spare.take());
            for number in std::mem::take(&mut state.free) {
                self.shared.forget_permit();
                if let Some(place) = state.places.get_mut(&number)
                    && let Occupant::Idle(child) =
                        std::mem::replace(&mut place.occupant, Occupant::Vacant)
                {
                    gone.push(child);
                }
            }
        }
        drop(gone);
        self.shared.replenish();
    }

    /// How many places there are.
    pub fn size(&self) -> usize {
        self.shared.state().places.len()
    }

    /// How many places are held.
    pub fn busy(&self) -> usize {
        self.shared.state().busy()
    }

    /// How many places would take a job at once.
    pub fn idle(&self) -> usize {
        self.shared.state().idle()
    }

    /// The process ids of the children that have a place; the spare is not among them.
    pub fn processes(&self) -> Vec<u32> {
        let state = self.shared.state();
        let pid = |place: &Place| match &place.occupant {
            Occupant::Vacant => None,
            Occupant::Idle(child) => Some(child.handle.pid),
            Occupant::Held { handle, .. } => Some(handle.pid),
        };
        let pids = state.places.values().filter_map(pid);
        pids.map(|pid| pid.as_raw().cast_unsigned()).collect()
    }

    /// Changes how many jobs a child may run; `None` = any number.
    pub fn set_max_tasks_per_child(&self, limit: Option<u64>) {
        self.shared
            .max_tasks
            .store(limit.unwrap_or(0), Ordering::Relaxed);
    }

    /// Changes the memory after which a child is replaced, KiB; `None` = no limit.
    pub fn set_max_memory_per_child(&self, limit: Option<u64>) {
        self.shared
            .max_memory
            .store(limit.unwrap_or(0), Ordering::Relaxed);
    }

    /// How the jobs were spread over the places.
    pub fn writes(&self) -> Writes {
        let state = self.shared.state();
        Writes {
            total: state.total,
            each: state.places.values().map(|place| place.writes).collect(),
            active: state.busy(),
        }
    }

    /// Waits for the jobs that run, ends all children, and comes back when the last one is
    /// reaped. No place is given out any more. A caller with less patience wraps it in a
    /// time-out and calls [`Pool::kill`].
    pub async fn stop(&self) {
        self.close();
        self.until(|state| state.alive.is_empty() && state.starting == 0 && state.busy() == 0)
            .await;
    }

    /// Kills all children now, running jobs included, and comes back when the last one is
    /// reaped. Jobs that run end as [`super::Outcome::Terminated`].
    pub async fn kill(&self) {
        self.close();
        let killed = Signal::SIGKILL as i32;
        let handles: Vec<_> = {
            let state = self.shared.state();
            for place in state.places.values() {
                if let Occupant::Held { terminated, .. } = &place.occupant {
                    // An earlier terminate() keeps its signal.
                    let _ =
                        terminated.compare_exchange(0, killed, Ordering::AcqRel, Ordering::Relaxed);
                }
            }
            state.alive.values().cloned().collect()
        };
        for handle in handles {
            handle.signal(Signal::SIGKILL);
        }
        self.until(|state| state.alive.is_empty() && state.starting == 0)
            .await;
    }

    fn close(&self) {
        let mut gone = Vec::new();
        self.shared.free.close();
        let mut state = self.shared.state();
        state.stopping = true;
        gone.extend(state.spare.take());
        state.free.clear();
        for place in state.places.values_mut() {
            if matches!(place.occupant, Occupant::Idle(_))
                && let Occupant::Idle(child) =
                    std::mem::replace(&mut place.occupant, Occupant::Vacant)
            {
                gone.push(child);
            }
        }
        drop(state);
        drop(gone);
        self.shared.changed.notify_waiters();
    }

    async fn until(&self, condition: impl Fn(&State) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            if condition(&self.shared.state()) {
                return;
            }
            changed.await;
        }
    }
}
