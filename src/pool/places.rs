//! The places of a pool, their children, and the spare: everything that happens to them.
//!
//! A *place* is what concurrency counts. It is vacant (its child is being started), idle (its
//! child waits) or held (a [`Slot`] has its child). One child more than places is kept ready, the
//! spare: a place whose child is worn or gone gets it in the same moment, and a new spare is
//! started in the background. Children that die while starting are tried again with growing
//! pauses, so a broken machine is not flooded.
//!
//! ```text
//! raise ─▶ bring_up ─▶ adopt ─▶ idle ⇄ take, release ─▶ (socket closed) ─▶ bury ─▶ replenish
//! ```
//!
//! Knows nothing of what runs in a child, nor how processes are made.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::process::{Handle, Keeper, Spawned, reason};
use super::slot::{Child, Slot};
use super::{Error, Sandbox, limits};

/// First and longest pause after a child died while starting.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What pool, slots and background tasks share.
pub(super) struct Shared {
    pub keeper: Keeper,
    pub sandbox: Sandbox,
    pub log_level: log::LevelFilter,
    pub name: String,
    /// One permit for each entry of [`State::free`]; an entry may be taken away between permit
    /// and lock, therefore whoever finds none waits again.
    pub free: Semaphore,
    /// Rung whenever a child or a slot is gone, or a child is ready.
    pub changed: Notify,
    /// 0 = no limit, for both.
    pub max_tasks: AtomicU64,
    pub max_memory: AtomicU64,
    pub state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub places: BTreeMap<usize, Place>,
    /// Idle places; the last one to become idle is the first to be used, its caches are warm.
    pub free: Vec<usize>,
    pub spare: Option<Child>,
    /// Children being started.
    pub starting: usize,
    /// Every child that has not been buried, by name; unlike a process id it never comes back.
    pub alive: HashMap<String, Arc<Handle>>,
    next_place: usize,
    next_name: u64,
    /// Counts restarts; a child of an older generation is not used again.
    pub generation: u64,
    /// Children that died while starting, since the last that did not.
    stillborn: u32,
    /// A warning of the sandbox is the same for all children and said once.
    warned: bool,
    pub stopping: bool,
    pub total: u64,
}

pub(super) struct Place {
    pub occupant: Occupant,
    /// Jobs this place has run.
    pub writes: u64,
}

pub(super) enum Occupant {
    /// No child yet.
    Vacant,
    Idle(Child),
    /// A slot has the child.
    Held {
        handle: Arc<Handle>,
        /// The id of the job that runs, if one does.
        job: Option<String>,
        /// Told to the slot before the child is killed.
        terminated: Arc<AtomicI32>,
    },
}

impl State {
    pub(super) fn add_places(&mut self, count: usize) {
        for _ in 0..count {
            let place = Place {
                occupant: Occupant::Vacant,
                writes: 0,
            };
            self.places.insert(self.next_place, place);
            self.next_place += 1;
        }
    }

    pub(super) fn name(&mut self, prefix: &str) -> String {
        self.next_name += 1;
        format!("{prefix}-{}", self.next_name)
    }

    pub(super) fn enlist(&mut self, spawned: &Spawned) {
        let handle = Arc::clone(&spawned.handle);
        // It may have been buried before it was enlisted; the keeper is faster than we are.
        if handle.exit.borrow().is_none() {
            self.alive.insert(handle.name.clone(), handle);
        }
    }

    pub(super) fn busy(&self) -> usize {
        let held = |place: &&Place| matches!(place.occupant, Occupant::Held { .. });
        self.places.values().filter(held).count()
    }

    pub(super) fn idle(&self) -> usize {
        let idle = |place: &&Place| matches!(place.occupant, Occupant::Idle(_));
        self.places.values().filter(idle).count()
    }

    /// How many children are missing: one for each vacant place, and the spare after these.
    fn missing(&self) -> usize {
        if self.stopping {
            return 0;
        }
        let vacant = |place: &&Place| matches!(place.occupant, Occupant::Vacant);
        let wanted =
            self.places.values().filter(vacant).count() + usize::from(self.spare.is_none());
        wanted.saturating_sub(self.starting)
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the permit of an idle place that is taken away. When there is none, somebody in
    /// [`Pool::acquire`] holds it already, will find no place, and wait again.
    pub(super) fn forget_permit(&self) {
        if let Ok(permit) = self.free.try_acquire() {
            permit.forget();
        }
    }

    pub(super) fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut state = self.state();
        while let Some(number) = state.free.pop() {
            let Some(place) = state.places.get_mut(&number) else {
                continue;
            };
            let terminated = Arc::new(AtomicI32::new(0));
            let Occupant::Idle(child) = std::mem::replace(&mut place.occupant, Occupant::Vacant)
            else {
                continue;
            };
            place.occupant = Occupant::Held {
                handle: Arc::clone(&child.handle),
                job: None,
                terminated: Arc::clone(&terminated),
            };
            drop(state);
            return Some(Slot::new(Arc::clone(self), number, child, terminated));
        }
        None
    }

    /// A job begins in a held place.
    pub(super) fn begin(&self, number: usize, id: &str) {
        let mut state = self.state();
        state.total += 1;
        if let Some(place) = state.places.get_mut(&number) {
            place.writes += 1;
            if let Occupant::Held { job, .. } = &mut place.occupant {
                *job = Some(id.to_owned());
            }
        }
    }

    /// The job is over.
    pub(super) fn finish(&self, number: usize) {
        if let Some(place) = self.state().places.get_mut(&number)
            && let Occupant::Held { job, .. } = &mut place.occupant
        {
            *job = None;
        }
    }

    /// A slot is given back.
    pub(super) fn release(self: &Arc<Self>, number: usize, child: Child) {
        let over = |limit: &AtomicU64, value: &dyn Fn() -> u64| {
            let limit = limit.load(Ordering::Relaxed);
            limit > 0 && value() > limit
        };
        let pid = child.handle.pid.as_raw().cast_unsigned();
        // `tasks` have been run, one more would be `tasks + 1`.
        let worn = over(&self.max_tasks, &|| child.tasks + 1)
            || over(&self.max_memory, &|| limits::resident_kib(pid).unwrap_or(0));
        if child.is_spent() {
            // Either it is gone already, or it is about to go, or nobody waits for its job.
            child.handle.signal(Signal::SIGKILL);
        }
        let mut state = self.state();
        let usable = !worn && !state.stopping && child.generation == state.generation;
        let mut old = Some(child);
        let next = if usable && old.as_ref().is_some_and(Child::is_sound) {
            old.take()
        } else {
            None
        };
        self.occupy(&mut state, number, next);
        drop(state);
        // The old child's socket ends here, and so does it.
        drop(old);
        self.changed.notify_waiters();
        self.replenish();
    }

    /// Puts a child, or else the spare, into a place that has none.
    fn occupy(&self, state: &mut State, number: usize, child: Option<Child>) {
        let child = child.or_else(|| state.spare.take()).filter(Child::is_sound);
        let Some(place) = state.places.get_mut(&number) else {
            return;
        };
        match child {
            Some(child) if !state.stopping => {
                place.occupant = Occupant::Idle(child);
                state.free.push(number);
                self.free.add_permits(1);
            }
            _ => place.occupant = Occupant::Vacant,
        }
    }

    /// Starts as many children as are missing.
    pub(super) fn replenish(self: &Arc<Self>) {
        let missing = {
            let mut state = self.state();
            let missing = state.missing();
            state.starting += missing;
            missing
        };
        for _ in 0..missing {
            tokio::spawn(Arc::clone(self).raise(None));
        }
    }

    /// Brings one child up and gives it a place; tries until one lives or the pool stops.
    pub(super) async fn raise(self: Arc<Self>, mut spawned: Option<Spawned>) {
        loop {
            let (stillborn, generation, stopping) = {
                let state = self.state();
                (state.stillborn, state.generation, state.stopping)
            };
            if stopping && spawned.is_none() {
                break;
            }
            if spawned.is_none() && stillborn > 0 {
                let (first, longest) = PAUSES;
                let pause = first.saturating_mul(1 << stillborn.min(10)).min(longest);
                tokio::time::sleep(pause).await;
            }
            match self.bring_up(spawned.take(), generation).await {
                Ok(child) => {
                    self.adopt(child);
                    self.replenish();
                    return;
                }
                Err(Error::Stopped) => break,
                Err(error) => {
                    let mut state = self.state();
                    if state.stopping {
                        break;
                    }
                    state.stillborn = state.stillborn.saturating_add(1);
                    drop(state);
                    log::error!("pool: failed to {error}. Trying again.");
                }
            }
        }
        self.state().starting -= 1;
        self.changed.notify_waiters();
    }

    async fn bring_up(&self, spawned: Option<Spawned>, generation: u64) -> Result<Child, Error> {
        let spawned = match spawned {
            Some(spawned) => spawned,
            None => {
                let (answer, answered) = oneshot::channel();
                let name = self.state().name(&self.name);
                self.keeper.spawn(name, move |result| {
                    let _ = answer.send(result);
                });
                let spawned = answered.await.map_err(|_| Error::Stopped)??;
                self.state().enlist(&spawned);
                spawned
            }
        };
        let (child, warnings) =
            Child::prepare(spawned, &self.sandbox, self.log_level, generation).await?;
        if !warnings.is_empty() && !std::mem::replace(&mut self.state().warned, true) {
            log::warn!("pool: the sandbox is incomplete: {}", warnings.join("; "));
        }
        Ok(child)
    }

    /// A child is ready: the first vacant place gets it, else it is the spare, else it goes.
    fn adopt(&self, child: Child) {
        let mut state = self.state();
        state.starting -= 1;
        state.stillborn = 0;
        let mut surplus = None;
        let vacant = state
            .places
            .iter()
            .find(|(_, place)| matches!(place.occupant, Occupant::Vacant))
            .map(|(number, _)| *number);
        if state.stopping || child.generation != state.generation || !child.is_sound() {
            surplus = Some(child);
        } else if let Some(number) = vacant {
            self.occupy(&mut state, number, Some(child));
        } else if state.spare.is_none() {
            state.spare = Some(child);
        } else {
            surplus = Some(child);
        }
        drop(state);
        drop(surplus);
        self.changed.notify_waiters();
    }

    /// A child has been reaped: its directory goes, and an idle one's place gets another.
    pub(super) fn bury(self: &Arc<Self>, handle: Arc<Handle>) {
        let pid = handle.pid;
        let unexpected = {
            let mut state = self.state();
            let place = state.places.iter_mut().find_map(|(number, place)| {
                let idle =
                    matches!(&place.occupant, Occupant::Idle(child) if Arc::ptr_eq(&child.handle, &handle));
                idle.then_some((*number, place))
            });
            if let Some((number, place)) = place {
                place.occupant = Occupant::Vacant;
                state.free.retain(|free| *free != number);
                self.forget_permit();
                self.occupy(&mut state, number, None);
                true
            } else if state
                .spare
                .as_ref()
                .is_some_and(|spare| Arc::ptr_eq(&spare.handle, &handle))
            {
                state.spare = None;
                true
            } else {
                false
            }
        };
        if unexpected {
            let status = handle.exit.borrow().map_or_else(String::new, reason);
            log::warn!(
                "pool: idle process {} pid:{pid} exited: {status}",
                handle.name
            );
        }
        if handle.directory.is_some() {
            // A clone may be large; nobody waits for its removal but the end of the pool.
            let shared = Arc::clone(self);
            tokio::task::spawn_blocking(move || {
                handle.remove_directory();
                shared.forget(&handle);
            });
        } else {
            self.forget(&handle);
        }
        self.replenish();
    }

    fn forget(&self, handle: &Handle) {
        self.state().alive.remove(&handle.name);
        self.changed.notify_waiters();
    }
}
