//! `USER_MAX_RUNNING` and `USER_RATE_LIMIT`: whether one more task of a user may run now; and
//! whether an analysis of a repository may, of which one runs at a time.
//!
//! Counted by the broker where it can count ([`crate::transport::permit`]), else in this worker
//! alone, which is said once for users. A granted [`Permit`] is held by the journey and given back
//! when it ends, however it ends.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Worker;
use super::rate_limit::parse_count;
use super::request::Request;
use crate::config::Settings;
use crate::protocol::saferepr::one_line;
use crate::transport::permit::{Allowance, Answer, Ask, RENEWAL, Scope};

/// A broker that does not answer within this time is asked again later.
const PATIENCE: Duration = Duration::from_secs(2);

/// Beyond so many users those are forgotten whose limits are not touched.
const MANY_USERS: usize = 4096;

/// The permits of one worker.
#[derive(Debug)]
pub struct Permits {
    allowance: Allowance,
    /// How the limits were written, for the reason that is shown.
    rate: String,
    held: Mutex<HashSet<(Scope, String)>>,
    alone: Mutex<HashMap<String, Alone>>,
    /// The broker cannot count; said once.
    unable: AtomicBool,
    freed: Mutex<Vec<String>>,
    changed: Notify,
}

/// What a worker knows by itself of a user.
#[derive(Debug, Default)]
struct Alone {
    running: u64,
    started: VecDeque<(Instant, String)>,
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
    shared: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Permits {
    /// The limits of the settings; their form was checked when they were read.
    pub fn new(settings: &Settings) -> Self {
        let rate = settings.user_rate_limit.clone().unwrap_or_default();
        let (starts, window) = parse_count(&rate).ok().flatten().unwrap_or_default();
        Self {
            allowance: Allowance {
                running: settings.user_max_running,
                starts,
                window,
            },
            rate,
            held: Mutex::default(),
            alone: Mutex::default(),
            unable: AtomicBool::new(false),
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
        let (holder, task) = (holder(worker, request), request.id());
        let scope = Scope::User(user.to_owned());
        if !self.unable.load(Ordering::Relaxed) {
            let Some(channel) = worker.link.channel() else {
                return Asked::Unknown;
            };
            let ask = Ask {
                scope: &scope,
                holder: &holder,
                task,
                allowance: self.allowance,
            };
            // An answer that comes too late costs nothing: the lease is taken again or ends.
            match tokio::time::timeout(PATIENCE, channel.take_permit(&ask)).await {
                Ok(Ok(Answer::Granted)) => {
                    // Without a limit nothing was entered that could end.
                    if self.allowance.running > 0 {
                        lock(&self.held).insert((scope.clone(), holder.clone()));
                    }
                    return Asked::Granted(Permit {
                        worker: worker.clone(),
                        scope,
                        holder,
                        shared: true,
                    });
                }
                Ok(Ok(Answer::TooMany(running))) => {
                    return Asked::Refused(self.too_many(user, running));
                }
                Ok(Ok(Answer::TooSoon(after))) => {
                    return Asked::Refused(self.too_soon(user, after));
                }
                Ok(Ok(Answer::Unable)) => {
                    if !self.unable.swap(true, Ordering::Relaxed) {
                        log::warn!(
                            "USER_MAX_RUNNING and USER_RATE_LIMIT count in this worker only: this \
                             broker cannot count over all workers (Redis with scripts can)"
                        );
                    }
                }
                Ok(Err(error)) => {
                    log::warn!("Cannot count the tasks of a user: {error}");
                    return Asked::Unknown;
                }
                Err(_) => return Asked::Unknown,
            }
        }
        match self.ask_alone(user, task, Instant::now()) {
            Ok(()) => Asked::Granted(Permit {
                worker: worker.clone(),
                scope,
                holder,
                shared: false,
            }),
            Err(refusal) => Asked::Refused(refusal),
        }
    }

    /// Asks to be the one that analyses a repository.
    pub async fn lease(&self, worker: &Arc<Worker>, repository: &str, request: &Request) -> Leased {
        let Some(channel) = worker.link.channel() else {
            return Leased::Unknown;
        };
        let holder = holder(worker, request);
        let scope = Scope::Repository(repository.to_owned());
        let ask = Ask {
            scope: &scope,
            holder: &holder,
            task: request.id(),
            allowance: Allowance {
                running: 1,
                ..Allowance::default()
            },
        };
        match tokio::time::timeout(PATIENCE, channel.take_permit(&ask)).await {
            Ok(Ok(Answer::Granted)) => {
                lock(&self.held).insert((scope.clone(), holder.clone()));
                Leased::Granted(Permit {
                    worker: worker.clone(),
                    scope,
                    holder,
                    shared: true,
                })
            }
            Ok(Ok(Answer::TooMany(_))) => Leased::Taken,
            Ok(Ok(Answer::TooSoon(_) | Answer::Unable)) | Err(_) => Leased::Unknown,
            Ok(Err(error)) => {
                log::debug!("Cannot tell who else analyses the repository: {error}");
                Leased::Unknown
            }
        }
    }

    fn ask_alone(&self, user: &str, task: &str, now: Instant) -> Result<(), Refusal> {
        let Allowance {
            running,
            starts,
            window,
        } = self.allowance;
        let mut users = lock(&self.alone);
        if users.len() > MANY_USERS {
            let recent = |known: &Alone| {
                let last = known.started.back();
                last.is_some_and(|(at, _)| *at + window > now)
            };
            users.retain(|_, known| known.running > 0 || recent(known));
        }
        let known = users.entry(user.to_owned()).or_default();
        if running > 0 && known.running >= running {
            return Err(self.too_many(user, known.running));
        }
        if starts > 0 {
            while known
                .started
                .front()
                .is_some_and(|(at, _)| *at + window <= now)
            {
                known.started.pop_front();
            }
            if !known.started.iter().any(|(_, id)| id == task) {
                let most = usize::try_from(starts).unwrap_or(usize::MAX);
                if let Some((first, _)) = known.started.get(known.started.len().wrapping_sub(most))
                {
                    return Err(self.too_soon(user, *first + window - now));
                }
                known.started.push_back((now, task.to_owned()));
            }
        }
        known.running += 1;
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
        if lock(&self.held).remove(&held)
            && let Some(channel) = permit.worker.link.channel()
        {
            channel.release_permit(&permit.scope, &permit.holder);
        }
        let Scope::User(user) = &permit.scope else {
            return;
        };
        if !permit.shared {
            let mut users = lock(&self.alone);
            if let Some(known) = users.get_mut(user) {
                known.running = known.running.saturating_sub(1);
                if known.running == 0 && known.started.is_empty() {
                    users.remove(user);
                }
            }
        }
        lock(&self.freed).push(user.clone());
        self.changed.notify_one();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.worker.permits.release(self);
    }
}

/// Names a permit: two messages of one task are two tasks here, as a retry is that starts while
/// the run before it still ends, or what two workers were given.
fn holder(worker: &Worker, request: &Request) -> String {
    format!("{}:{}:{}", worker.oid, request.serial, request.id())
}

/// Says every second what this worker holds, until the worker is gone.
pub async fn renew(worker: Arc<Worker>) {
    let mut tick = tokio::time::interval(RENEWAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !worker.state.closed() {
        tick.tick().await;
        let held: Vec<(Scope, String)> = lock(&worker.permits.held).iter().cloned().collect();
        let Some(channel) = worker.link.channel().filter(|_| !held.is_empty()) else {
            continue;
        };
        match tokio::time::timeout(PATIENCE, channel.renew_permits(&held)).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => log::warn!("Cannot renew the permits of running tasks: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(running: u64, rate: &str) -> Permits {
        Permits::new(&Settings {
            user_max_running: running,
            user_rate_limit: Some(rate.to_owned()),
            ..Settings::default()
        })
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
        let refused = permits.ask_alone("u", "b", now).unwrap_err();
        assert_eq!(refused.after, None);
        assert!(refused.reason.contains("USER_MAX_RUNNING=1"), "{refused:?}");
        assert!(permits.ask_alone("v", "c", now).is_ok());
    }
}
