//! Who is next: requests that may run, user by user in turn, and those whose user is at a limit.
//!
//! ```text
//! consumer ─▶ Line: one queue for each user ─ a slot is free ─▶ the next user's first
//!                        ▲                                        │ permit? ── yes ─▶ journey
//!                        └── all of this user's wait: state RETRY, no slot, no prefetch ◀─ no
//! ```
//!
//! A user's thousand tasks thus delay another user's first by one turn at most: as soon as the
//! limit is reached they are set aside, and the worker fetches on behind them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::app::{Dispatcher, Journey};
use super::consumer::{Command, stopped};
use super::permits::{Asked, Permit, Refusal};
use super::request::{Phase, Request};
use super::{Worker, controller, execute, report, strategy};
use crate::pool::Slot;
use crate::protocol::exception::Exception;
use crate::protocol::state::State;
use crate::protocol::time::format_iso;

/// How often those that wait for somebody else's end ask again.
const LOOK_AGAIN: Duration = Duration::from_millis(400);
/// How often those that wait are looked through for revoked and expired ones.
const SWEEP: Duration = Duration::from_millis(500);

/// Whose a request is; `None` for requests without a user, which have no limits.
type User = Option<String>;

/// Items by user; each user's in order, the users in turn.
#[derive(Debug)]
struct Line<T> {
    turns: VecDeque<User>,
    users: HashMap<User, Waiting<T>>,
}

#[derive(Debug)]
struct Waiting<T> {
    items: VecDeque<T>,
    blocked: Option<Instant>,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            turns: VecDeque::new(),
            users: HashMap::new(),
        }
    }
}

impl<T> Line<T> {
    /// Puts an item behind its user's others; returns whether the user is blocked now.
    fn push(&mut self, user: User, item: T, now: Instant) -> bool {
        match self.users.get_mut(&user) {
            Some(waiting) => {
                waiting.items.push_back(item);
                waiting.blocked.is_some_and(|until| until > now)
            }
            None => {
                self.turns.push_back(user.clone());
                let items = VecDeque::from([item]);
                let blocked = None;
                self.users.insert(user, Waiting { items, blocked });
                false
            }
        }
    }

    /// The first user in turn who is not blocked.
    fn next(&self, now: Instant) -> Option<User> {
        let free = |user: &&User| {
            self.users
                .get(*user)
                .is_some_and(|waiting| waiting.blocked.is_none_or(|until| until <= now))
        };
        self.turns.iter().find(free).cloned()
    }

    fn first(&self, user: &User) -> Option<&T> {
        self.users.get(user)?.items.front()
    }

    /// Takes a user's first item; the user's next turn comes after everybody else's.
    fn take(&mut self, user: &User) -> Option<T> {
        let waiting = self.users.get_mut(user)?;
        let item = waiting.items.pop_front();
        waiting.blocked = None;
        self.turns.retain(|other| other != user);
        if waiting.items.is_empty() {
            self.users.remove(user);
        } else {
            self.turns.push_back(user.clone());
        }
        item
    }

    /// Lets a user wait; returns the user's items.
    fn block(&mut self, user: &User, until: Instant) -> impl Iterator<Item = &mut T> {
        let waiting = self.users.get_mut(user);
        waiting.into_iter().flat_map(move |waiting| {
            waiting.blocked = Some(until);
            waiting.items.iter_mut()
        })
    }

    fn unblock(&mut self, user: &User) {
        if let Some(waiting) = self.users.get_mut(user) {
            waiting.blocked = None;
        }
    }

    /// Whether any user is blocked, or was and has not had a turn since.
    fn has_blocked(&self) -> bool {
        let mut users = self.users.values();
        users.any(|waiting| waiting.blocked.is_some())
    }

    /// When the next blocked user may be asked for again.
    fn wake(&self, now: Instant) -> Option<Instant> {
        let blocked = self.users.values().filter_map(|waiting| waiting.blocked);
        blocked.filter(|until| *until > now).min()
    }

    /// Takes out what does not satisfy `keep`.
    fn extract(&mut self, keep: impl Fn(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for waiting in self.users.values_mut() {
            if waiting.items.iter().all(&keep) {
                continue;
            }
            for item in std::mem::take(&mut waiting.items) {
                if keep(&item) {
                    waiting.items.push_back(item);
                } else {
                    out.push(item);
                }
            }
        }
        let users = &mut self.users;
        self.turns.retain(|user| {
            let left = users
                .get(user)
                .is_some_and(|waiting| !waiting.items.is_empty());
            if !left {
                users.remove(user);
            }
            left
        });
        out
    }
}

/// A request in line.
struct Entry {
    request: Arc<Request>,
    aside: Option<Aside>,
}

/// A request that waits for its user's limit.
struct Aside {
    /// Its state is being stored.
    told: JoinHandle<()>,
    _parked: Parked,
}

/// Somebody who holds a message but neither a slot nor a place in the prefetch count.
pub(super) struct Parked {
    worker: Arc<Worker>,
    request: Arc<Request>,
}

impl Parked {
    pub(super) fn new(worker: &Arc<Worker>, request: &Arc<Request>) -> Self {
        worker.state.park(request);
        // The consumer is gone only when the worker is going down.
        drop(worker.commands.send(Command::Resized));
        Self {
            worker: worker.clone(),
            request: request.clone(),
        }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.worker.state.unpark(&self.request);
        drop(self.worker.commands.send(Command::Resized));
    }
}

/// Gives requests to slots and their journeys to the app, until the worker stops.
pub async fn dispatch(
    worker: Arc<Worker>,
    mut ready: mpsc::UnboundedReceiver<Arc<Request>>,
    dispatcher: Dispatcher,
    mut stopping: watch::Receiver<bool>,
) {
    let mut line = Line::default();
    let mut reasons = BTreeMap::new();
    let mut sweep = Instant::now();
    loop {
        let now = Instant::now();
        let eligible = line.next(now).is_some();
        let next_sweep = line.has_blocked().then_some(sweep + SWEEP);
        let wake = line.wake(now).into_iter().chain(next_sweep).min();
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            request = ready.recv() => match request {
                Some(request) => enter(&worker, &mut line, &reasons, request),
                None => return,
            },
            slot = worker.pool.acquire(), if eligible => {
                start_next(&worker, &mut line, &mut reasons, &dispatcher, slot).await;
            }
            users = worker.permits.freed() => {
                for user in users {
                    line.unblock(&Some(user));
                }
            }
            () = until(wake) => if sweep + SWEEP <= Instant::now() {
                sweep = Instant::now();
                clear(&worker, &mut line);
                reasons.retain(|user, _| line.users.contains_key(&Some(user.clone())));
            }
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn enter(
    worker: &Arc<Worker>,
    line: &mut Line<Entry>,
    reasons: &BTreeMap<String, Refusal>,
    request: Arc<Request>,
) {
    let user = request.user();
    let reason = user.as_ref().and_then(|user| reasons.get(user)).cloned();
    let entry = Entry {
        request,
        aside: None,
    };
    let blocked = line.push(user.clone(), entry, Instant::now());
    if let Some(reason) = reason.filter(|_| blocked)
        && let Some(waiting) = line.users.get_mut(&user)
        && let Some(last) = waiting.items.back_mut()
    {
        set_aside(worker, last, &reason);
    }
}

/// Uses a free slot for the next request that may have it.
async fn start_next(
    worker: &Arc<Worker>,
    line: &mut Line<Entry>,
    reasons: &mut BTreeMap<String, Refusal>,
    dispatcher: &Dispatcher,
    slot: Slot,
) {
    while let Some(user) = line.next(Instant::now()) {
        let Some(entry) = line.first(&user) else {
            return;
        };
        let request = entry.request.clone();
        if request.phase() == Phase::Settled {
            line.take(&user);
            continue;
        }
        let mut permit = None;
        if let Some(name) = &user
            && worker.permits.limited()
        {
            match worker.permits.ask(worker, name, &request).await {
                Asked::Granted(granted) => permit = Some(granted),
                Asked::Refused(refusal) => {
                    let after = refusal.after.unwrap_or(LOOK_AGAIN);
                    for entry in line.block(&user, Instant::now() + after) {
                        set_aside(worker, entry, &refusal);
                    }
                    reasons.insert(name.clone(), refusal);
                    continue;
                }
                Asked::Unknown => {
                    drop(line.block(&user, Instant::now() + LOOK_AGAIN));
                    continue;
                }
            }
            reasons.remove(name);
        }
        let Some(entry) = line.take(&user) else {
            return;
        };
        start(worker, entry, permit, dispatcher, slot);
        return;
    }
}

fn start(
    worker: &Arc<Worker>,
    entry: Entry,
    permit: Option<Permit>,
    dispatcher: &Dispatcher,
    slot: Slot,
) {
    let Entry { request, aside } = entry;
    // From here on the request is the journey's, also for a shutdown.
    if !worker.state.activate(&request) {
        return;
    }
    let id = request.id().to_owned();
    let name = request.name;
    let abandoned = controller::abandoned(worker.clone(), request.clone());
    let worker = worker.clone();
    let run = Box::pin(async move {
        if let Some(aside) = aside {
            // What is stored from now on must not be overtaken.
            drop(aside.told.await);
        }
        execute::perform(worker, request, slot).await;
        drop(permit);
    });
    dispatcher.submit(Journey {
        id,
        name,
        run,
        abandoned,
    });
}

/// The request waits for its user's limit: whoever waits for it is told, once.
fn set_aside(worker: &Arc<Worker>, entry: &mut Entry, refusal: &Refusal) {
    if entry.aside.is_some() {
        return;
    }
    let request = entry.request.clone();
    let at = chrono::Utc::now() + refusal.after.unwrap_or(LOOK_AGAIN);
    let when = format_iso(&at.fixed_offset());
    let text = request.mask(&format!("{}; not before {when}", refusal.reason));
    log::info!("Task {} waits: {text}", request.label());
    let parked = Parked::new(worker, &request);
    let worker = worker.clone();
    let told = tokio::spawn(async move {
        let waits = Exception::retry(&format!("later: {text}"), None);
        execute::store_state(&worker, &request, State::Retry, waits.to_value()).await;
        report::waits(&worker, &request, &waits);
    });
    entry.aside = Some(Aside {
        told,
        _parked: parked,
    });
}

/// Ends what was revoked, expired or lost while it waited.
fn clear(worker: &Arc<Worker>, line: &mut Line<Entry>) {
    let waits = |entry: &Entry| {
        entry.aside.is_none()
            || (entry.request.phase() != Phase::Settled
                && strategy::discarded(worker, &entry.request).is_none())
    };
    for Entry { request, aside } in line.extract(waits) {
        if request.phase() == Phase::Settled {
            continue;
        }
        let Some(verdict) = strategy::discarded(worker, &request) else {
            continue;
        };
        let worker = worker.clone();
        tokio::spawn(async move {
            if let Some(aside) = aside {
                drop(aside.told.await);
            }
            execute::finish(&worker, &request, verdict, Duration::ZERO).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> User {
        Some(name.to_owned())
    }

    #[test]
    fn users_take_turns_and_each_users_items_keep_their_order() {
        let mut line = Line::default();
        let now = Instant::now();
        for number in 0..1000 {
            line.push(user("many"), format!("many {number}"), now);
        }
        line.push(user("one"), "one".to_owned(), now);
        line.push(None, "nobody".to_owned(), now);
        let mut taken = Vec::new();
        for _ in 0..5 {
            let next = line.next(now).unwrap();
            taken.extend(line.take(&next));
        }
        assert_eq!(taken, ["many 0", "one", "nobody", "many 1", "many 2"]);
    }

    #[test]
    fn a_blocked_user_is_passed_over_until_the_time_or_the_end_of_a_task() {
        let mut line = Line::default();
        let now = Instant::now();
        assert!(!line.push(user("a"), 1, now));
        line.push(user("b"), 2, now);
        let until = now + Duration::from_secs(1);
        assert_eq!(line.block(&user("a"), until).count(), 1);
        assert!(
            line.push(user("a"), 3, now),
            "who comes later is blocked too"
        );
        assert_eq!(line.next(now), Some(user("b")));
        assert_eq!(line.wake(now), Some(until));
        assert_eq!(line.next(until), Some(user("a")));
        line.unblock(&user("a"));
        assert_eq!(line.next(now), Some(user("a")));
    }

    #[test]
    fn what_is_extracted_leaves_no_empty_turn() {
        let mut line = Line::default();
        let now = Instant::now();
        line.push(user("a"), 1, now);
        line.push(user("b"), 2, now);
        line.push(user("b"), 3, now);
        assert_eq!(line.extract(|item| *item == 3).len(), 2);
        assert_eq!(line.next(now), Some(user("b")));
        assert_eq!(line.take(&user("b")), Some(3));
        assert_eq!(line.next(now), None);
    }
}
