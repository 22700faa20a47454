//! `USER_MAX_RUNNING` and `USER_RATE_LIMIT`: whether one more task of a user may run now; and
//! whether an analysis of a repository may, of which one runs at a time.
//!
//! Counted by the broker where it can count, else by the database, which all workers share
//! ([`crate::protocol::permit`]); in this worker alone where both refuse, which is said once. A
//! granted [`Permit`] is held by the journey and given back when it ends, however it ends.
//! [`keep`] says every second what is held.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Worker;
use super::rate_limit::parse_count;
use super::request::Request;
use crate::analysis::fingerprint;
use crate::config::Settings;
use crate::database::{Database, DatabaseUrl, Error};
use crate::protocol::permit::{Allowance, Answer, Ask, RENEWAL, Scope};
use crate::protocol::saferepr::one_line;

/// Whoever counts and does not answer within this time is asked again later.
const PATIENCE: Duration = Duration::from_secs(2);

/// What has ended is removed from the database after so many renewals.
const PRUNED: u32 = 60;

/// Beyond so many users those are forgotten whose limits are not touched.
const MANY_USERS: usize = 4096;

/// The permits of one worker.
#[derive(Debug)]
pub struct Permits {
    allowance: Allowance,
    /// How the limits were written, for the reason that is shown.
    rate: String,
    counter: Mutex<Counter>,
    /// With connections of its own: a long commit must not keep a lease from being renewed.
    database: Database,
    held: Mutex<HashSet<(Scope, String)>>,
    /// The starts of each user that only this worker knows of.
    started: Mutex<HashMap<String, VecDeque<(Instant, String)>>>,
    /// Permits that the database is still to be told are free.
    returned: Mutex<Vec<(Scope, String)>>,
    returns: Notify,
    freed: Mutex<Vec<String>>,
    changed: Notify,
}

/// Who counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counter {
    /// The broker, as long as it has not said that it cannot.
    Broker,
    /// The database.
    Database,
    /// The database, which does not answer: nobody knows.
    Away,
    /// This worker, for the database refuses.
    Alone,
}

/// What came of asking.
pub enum Asked {
    /// It may run, as long as this is kept.
    Granted(Permit),
    /// It has to wait.
    Refused(Refusal),
    /// The broker did not answer.
    Unknown,
}

/// What came of asking for a repository.
pub enum Leased {
    /// It is this task's, as long as this is kept.
    Granted(Permit),
    /// Another task has it.
    Taken,
    /// Nobody can tell.
    Unknown,
}

/// Why a task has to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub reason: String,
    /// When the limit allows it by itself; `None`: when another task ends.
    pub after: Option<Duration>,
}

/// A place among a user's running tasks, or the one at a repository.
pub struct Permit {
    worker: Arc<Worker>,
    scope: Scope,
    holder: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Permits {
    /// The limits of the settings; their form was checked when they were read.
    pub fn new(settings: &Settings, database: DatabaseUrl) -> Self {
        let rate = settings.user_rate_limit.clone().unwrap_or_default();
        let (starts, window) = parse_count(&rate).ok().flatten().unwrap_or_default();
        Self {
            allowance: Allowance {
                running: settings.user_max_running,
                starts,
                window,
            },
            rate,
            counter: Mutex::new(Counter::Broker),
            database: Database::new(database),
            held: Mutex::default(),
            started: Mutex::default(),
            returned: Mutex::default(),
            returns: Notify::new(),
            freed: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Whether there is any limit.
    pub fn limited(&self) -> bool {
        self.allowance.running > 0 || self.allowance.starts > 0
    }

    /// Waits until permits were given back; returns whose. Cancel safe.
    pub async fn freed(&self) -> Vec<String> {
        loop {
            let changed = self.changed.notified();
            let users = std::mem::take(&mut *lock(&self.freed));
            if !users.is_empty() {
                return users;
            }
            changed.await;
        }
    }

    /// Asks for a permit for one task of a user.
    pub async fn ask(&self, worker: &Arc<Worker>, user: &str, request: &Request) -> Asked {
        let scope = Scope::User(user.to_owned());
        // Two messages of one task are two tasks here, as a retry is that starts while the run
        // before it still ends, or what two workers were given.
        let holder = format!("{}:{}", worker.oid, request.serial);
        let ask = Ask {
            scope: &scope,
            holder: &holder,
            task: request.id(),
            allowance: self.allowance,
        };
        match self.count(worker, &ask).await {
            Some(Answer::Granted) => {}
            Some(Answer::TooMany(running)) => {
                return Asked::Refused(self.too_many(user, running));
            }
            Some(Answer::TooSoon(after)) => return Asked::Refused(self.too_soon(user, after)),
            Some(Answer::Unable) => {
                if let Err(refusal) = self.ask_alone(user, request.id(), Instant::now()) {
                    return Asked::Refused(refusal);
                }
            }
            None if self.counter() == Counter::Away => {
                return Asked::Refused(Refusal {
                    reason: format!(
                        "the database that counts the tasks of user {} is not available",
                        one_line(user)
                    ),
                    after: None,
                });
            }
            None => return Asked::Unknown,
        }
        // Without a limit nothing was entered that could end.
        if self.allowance.running > 0 {
            lock(&self.held).insert((scope.clone(), holder.clone()));
        }
        Asked::Granted(Permit {
            worker: worker.clone(),
            scope,
            holder,
        })
    }

    /// Asks to be the one that analyses a repository. A task whose worker died is the one still when
    /// it is delivered again.
    pub async fn lease(&self, worker: &Arc<Worker>, repository: &str, request: &Request) -> Leased {
        let scope = Scope::Repository(repository.to_owned());
        let holder = key("task", request.id());
        let ask = Ask {
            scope: &scope,
            holder: &holder,
            task: "",
            allowance: Allowance {
                running: 1,
                ..Allowance::default()
            },
        };
        match self.count(worker, &ask).await {
            Some(Answer::Granted) => {
                lock(&self.held).insert((scope.clone(), holder.clone()));
                Leased::Granted(Permit {
                    worker: worker.clone(),
                    scope,
                    holder,
                })
            }
            Some(Answer::TooMany(_)) => Leased::Taken,
            Some(Answer::TooSoon(_) | Answer::Unable) | None => Leased::Unknown,
        }
    }

    fn counter(&self) -> Counter {
        *lock(&self.counter)
    }

    /// Asks whoever counts; `None`: there was no answer. One that comes too late costs nothing: the
    /// permit is taken again, or ends.
    async fn count(&self, worker: &Worker, ask: &Ask<'_>) -> Option<Answer> {
        if self.counter() == Counter::Broker {
            let channel = worker.link.channel()?;
            match tokio::time::timeout(PATIENCE, channel.take_permit(ask)).await {
                Ok(Ok(Answer::Unable)) => self.use_database(),
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => {
                    log::warn!("Cannot count what runs: {error}");
                    return None;
                }
                Err(_) => return None,
            }
        }
        match self.counter() {
            Counter::Alone => return Some(Answer::Unable),
            // [`keep`] asks whether it is back, so that nobody else has to wait for that.
            Counter::Away => return None,
            Counter::Broker | Counter::Database => {}
        }
        let scope = stored(ask.scope);
        let task = key("task", ask.task);
        let ask = Ask {
            scope: &scope,
            task: &task,
            ..*ask
        };
        let asked = async {
            worker.database().await?;
            self.database.take_permit(&ask).await
        };
        match self.reach(asked).await {
            Some(answer) => Some(answer),
            None if self.counter() == Counter::Alone => Some(Answer::Unable),
            None => None,
        }
    }

    /// The broker cannot count.
    fn use_database(&self) {
        *lock(&self.counter) = Counter::Database;
        let url = self.database.url();
        if self.limited() && url.kind() == "sqlite" {
            log::warn!(
                "USER_MAX_RUNNING and USER_RATE_LIMIT count over the workers that share {url} \
                 only: this broker cannot count (Redis with scripts can); give all workers one \
                 PostgreSQL in DATABASE_URL"
            );
        } else {
            log::info!("What runs is counted by {url}, for this broker cannot count");
        }
    }

    /// Waits for the database's answer and remembers how it is.
    async fn reach<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Option<T> {
        let (counter, why) = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => {
                let before = std::mem::replace(&mut *lock(&self.counter), Counter::Database);
                if before != Counter::Database {
                    log::info!("The database counts again what runs");
                }
                return Some(answer);
            }
            Ok(Err(error)) if error.is_transient() => (Counter::Away, error.to_string()),
            Ok(Err(error)) => (Counter::Alone, error.to_string()),
            Err(_) => (Counter::Away, "the database does not answer".to_owned()),
        };
        if std::mem::replace(&mut *lock(&self.counter), counter) == counter {
            return None;
        }
        match counter {
            Counter::Alone if self.limited() => log::warn!(
                "USER_MAX_RUNNING and USER_RATE_LIMIT count in this worker only: neither broker \
                 nor database can count over all workers: {why}"
            ),
            _ => log::warn!("Cannot count what runs: {why}"),
        }
        None
    }

    fn ask_alone(&self, user: &str, task: &str, now: Instant) -> Result<(), Refusal> {
        let Allowance {
            running,
            starts,
            window,
        } = self.allowance;
        let is_theirs =
            |held: &&(Scope, String)| matches!(&held.0, Scope::User(name) if name == user);
        let theirs = lock(&self.held).iter().filter(is_theirs).count() as u64;
        if running > 0 && theirs >= running {
            return Err(self.too_many(user, theirs));
        }
        if starts == 0 {
            return Ok(());
        }
        let mut users = lock(&self.started);
        if users.len() > MANY_USERS {
            let last = |started: &VecDeque<(Instant, String)>| started.back().map(|last| last.0);
            users.retain(|_, started| last(started).is_some_and(|at| at + window > now));
        }
        let started = users.entry(user.to_owned()).or_default();
        while started.front().is_some_and(|(at, _)| *at + window <= now) {
            started.pop_front();
        }
        if !started.iter().any(|(_, id)| id == task) {
            let most = usize::try_from(starts).unwrap_or(usize::MAX);
            if let Some((first, _)) = started.get(started.len().wrapping_sub(most)) {
                return Err(self.too_soon(user, *first + window - now));
            }
            started.push_back((now, task.to_owned()));
        }
        Ok(())
    }

    fn too_many(&self, user: &str, running: u64) -> Refusal {
        let user = one_line(user);
        Refusal {
            reason: format!(
                "user {user} has {running} running (USER_MAX_RUNNING={}); this one starts when \
                 one of them ends",
                self.allowance.running
            ),
            after: None,
        }
    }

    fn too_soon(&self, user: &str, after: Duration) -> Refusal {
        let user = one_line(user);
        Refusal {
            reason: format!(
                "user {user} has started as many as USER_RATE_LIMIT={} allows",
                self.rate
            ),
            after: Some(after),
        }
    }

    fn release(&self, permit: &Permit) {
        let held = (permit.scope.clone(), permit.holder.clone());
        if lock(&self.held).remove(&held) {
            match self.counter() {
                Counter::Broker => {
                    if let Some(channel) = permit.worker.link.channel() {
                        channel.release_permit(&permit.scope, &permit.holder);
                    }
                }
                Counter::Database | Counter::Away => {
                    lock(&self.returned).push(held);
                    self.returns.notify_one();
                    return;
                }
                Counter::Alone => {}
            }
        }
        self.tell_freed([&permit.scope]);
    }

    fn tell_freed<'a>(&self, scopes: impl IntoIterator<Item = &'a Scope>) {
        let users = scopes.into_iter().filter_map(|scope| match scope {
            Scope::User(user) => Some(user.clone()),
            Scope::Repository(_) => None,
        });
        lock(&self.freed).extend(users);
        self.changed.notify_one();
    }

    /// Tells the database what is free. What it does not take ends by itself.
    pub async fn give_back(&self) {
        let returned = std::mem::take(&mut *lock(&self.returned));
        if returned.is_empty() {
            return;
        }
        if self.counter() == Counter::Database {
            let names = as_stored(&returned);
            self.reach(self.database.release_permits(&names)).await;
        }
        self.tell_freed(returned.iter().map(|(scope, _)| scope));
    }

    /// Says what is held; the database is asked also whether it is back.
    async fn renew(&self, worker: &Worker, prune: bool) {
        let held: Vec<(Scope, String)> = lock(&self.held).iter().cloned().collect();
        let counter = self.counter();
        if counter == Counter::Broker {
            let Some(channel) = worker.link.channel().filter(|_| !held.is_empty()) else {
                return;
            };
            match tokio::time::timeout(PATIENCE, channel.renew_permits(&held)).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => log::warn!("Cannot renew the permits of running tasks: {error}"),
            }
            return;
        }
        if counter == Counter::Database && held.is_empty() && !prune {
            return;
        }
        let names = as_stored(&held);
        let asked = async {
            worker.database().await?;
            self.database.renew_permits(&names).await?;
            if prune {
                self.database.prune_permits().await?;
            }
            Ok(())
        };
        self.reach(asked).await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.worker.permits.release(self);
    }
}

/// A name as a key of the database's, which bears no long ones. Those few that somebody made to
/// collide share one.
fn key(kind: &str, name: &str) -> String {
    fingerprint(&format!("{kind} {name}")).unwrap_or_default()
}

fn stored(scope: &Scope) -> Scope {
    match scope {
        Scope::User(user) => Scope::User(key("user", user)),
        Scope::Repository(digest) => Scope::Repository(digest.clone()),
    }
}

fn as_stored(held: &[(Scope, String)]) -> Vec<(Scope, String)> {
    let stored = |(scope, holder): &(Scope, String)| (stored(scope), holder.clone());
    held.iter().map(stored).collect()
}

/// Says every second what this worker holds and what it does not hold any longer, until it is gone.
pub async fn keep(worker: Arc<Worker>) {
    let permits = &worker.permits;
    let mut tick = tokio::time::interval(RENEWAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut renewals: u32 = 0;
    while !worker.state.closed() {
        // One after the other: what was given back is not to be entered again.
        tokio::select! {
            _ = tick.tick() => {
                renewals = renewals.wrapping_add(1);
                permits.renew(&worker, renewals.is_multiple_of(PRUNED)).await;
            }
            () = permits.returns.notified() => {}
        }
        permits.give_back().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(running: u64, rate: &str) -> Permits {
        let settings = Settings {
            user_max_running: running,
            user_rate_limit: Some(rate.to_owned()),
            ..Settings::default()
        };
        Permits::new(&settings, DatabaseUrl::sqlite("nobody-opens-it"))
    }

    #[test]
    fn a_window_holds_so_many_starts_and_no_more() {
        let permits = permits(0, "2/m");
        let start = Instant::now();
        let second = Duration::from_secs(1);
        assert!(permits.ask_alone("u", "a", start).is_ok());
        assert!(permits.ask_alone("u", "b", start + second).is_ok());
        let refused = permits.ask_alone("u", "c", start + second * 2).unwrap_err();
        assert_eq!(refused.after, Some(second * 58));
        assert!(refused.reason.contains("USER_RATE_LIMIT=2/m"));
        assert!(
            permits.ask_alone("u", "a", start + second * 3).is_ok(),
            "its start is used already"
        );
        assert!(permits.ask_alone("other", "d", start + second * 3).is_ok());
        assert!(permits.ask_alone("u", "c", start + second * 60).is_ok());
    }

    #[test]
    fn so_many_run_at_once_and_no_more() {
        let permits = permits(1, "");
        let now = Instant::now();
        assert!(permits.ask_alone("u", "a", now).is_ok());
        lock(&permits.held).insert((Scope::User("u".to_owned()), "holder".to_owned()));
        let refused = permits.ask_alone("u", "b", now).unwrap_err();
        assert_eq!(refused.after, None);
        assert!(refused.reason.contains("USER_MAX_RUNNING=1"), "{refused:?}");
        assert!(permits.ask_alone("v", "c", now).is_ok());
    }
}
