//! `--autoscale MAX[,MIN]`: the pool follows the load.
//!
//! Looked at every second and whenever a task is received: as many processes as there are
//! tasks to run, within the range. It grows at once and shrinks when nothing made it grow for
//! `AUTOSCALE_KEEPALIVE` seconds. The prefetch count goes by the largest size all the time.
//! Answers for `celery.worker.autoscale`.

use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use super::Worker;
use super::request::Phase;
use crate::pool::Pool;

/// Between two looks without a reason.
const PERIOD: Duration = Duration::from_secs(1);
/// More processes than this are a mistake, or mischief, on any machine.
pub const MOST_PROCESSES: usize = 512;

/// How small and how large the pool may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Processes that always stay, at least one.
    pub min: usize,
    /// Processes at most.
    pub max: usize,
}

impl FromStr for Range {
    type Err = String;

    /// Reads `MAX[,MIN]`; of two numbers the larger one is the maximum.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> = text
            .split(',')
            .map(|word| word.trim().parse().ok())
            .collect();
        let (one, other) = match numbers.as_deref() {
            Some(&[max]) => (max, 1),
            Some(&[one, other]) => (one, other),
            _ => return Err(format!("'{text}' is no range; example: --autoscale=8,2")),
        };
        let range = Self {
            min: one.min(other).max(1),
            max: one.max(other).max(1),
        };
        if range.max > MOST_PROCESSES {
            return Err(format!(
                "{} processes are more than {MOST_PROCESSES}",
                range.max
            ));
        }
        Ok(range)
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{{min={}, max={}}}", self.min, self.max)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Autoscaler {
    state: Mutex<State>,
    keepalive: Duration,
    look: Notify,
}

#[derive(Debug)]
struct State {
    range: Range,
    grown: Option<Instant>,
}

impl Autoscaler {
    /// An autoscaler of a pool that has the smallest size of the range.
    pub fn new(range: Range, keepalive: Duration) -> Self {
        let state = Mutex::new(State { range, grown: None });
        Self {
            state,
            keepalive,
            look: Notify::new(),
        }
    }

    /// The range as it is now.
    pub fn range(&self) -> Range {
        self.state().range
    }

    /// There may be more to do than a moment ago.
    pub fn look(&self) {
        self.look.notify_one();
    }

    /// The `autoscale` command: changes one or both ends. An end that is not named gives way.
    pub fn update(&self, max: Option<usize>, min: Option<usize>, pool: &Pool) -> Range {
        let range = {
            let mut state = self.state();
            let mut range = state.range;
            if let Some(max) = max {
                range = Range {
                    max: max.max(1),
                    min: range.min.min(max.max(1)),
                };
            }
            if let Some(min) = min {
                range = Range {
                    min: min.max(1),
                    max: range.max.max(min.max(1)),
                };
            }
            state.range = range;
            range
        };
        resize(pool, pool.size().clamp(range.min, range.max));
        range
    }

    /// The `autoscaler` object of the `stats` command.
    pub fn info(&self, pool: &Pool, load: usize) -> Value {
        let Range { min, max } = self.range();
        json!({"max": max, "min": min, "current": pool.size(), "qty": load})
    }

    /// The size that fits the load, given the size there is.
    fn wanted(&self, size: usize, load: usize, now: Instant) -> usize {
        let mut state = self.state();
        let wanted = load.clamp(state.range.min, state.range.max);
        if wanted >= size {
            if load >= size {
                // Also a pool that is just large enough is in use.
                state.grown = Some(now);
            }
            return wanted;
        }
        let resting = state
            .grown
            .is_none_or(|grown| now.duration_since(grown) > self.keepalive);
        if resting {
            wanted
        } else {
            size.min(state.range.max)
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tasks that run or could: what waits for its ETA needs no process yet.
pub fn load(worker: &Worker) -> usize {
    let waits = |request: &&Arc<super::request::Request>| {
        matches!(request.phase(), Phase::Reserved | Phase::Active)
    };
    worker.state.held().iter().filter(waits).count()
}

/// Brings the pool as near to a size as its busy processes allow.
fn resize(pool: &Pool, wanted: usize) {
    let size = pool.size();
    if wanted > size {
        log::info!("Scaling up {} processes.", wanted - size);
        pool.grow(wanted - size);
    } else if wanted < size {
        // One by one: those that are busy stay, until the next look.
        let gone = (wanted..size)
            .take_while(|_| pool.shrink(1).is_ok())
            .count();
        if gone > 0 {
            log::info!("Scaling down {gone} processes.");
        }
    }
}

/// Follows the load until the worker stops.
pub async fn run(worker: Arc<Worker>, mut stopping: watch::Receiver<bool>) {
    let Some(autoscaler) = &worker.autoscaler else {
        return;
    };
    loop {
        tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => return,
            () = autoscaler.look.notified() => {}
            () = tokio::time::sleep(PERIOD) => {}
        }
        let wanted = autoscaler.wanted(worker.pool.size(), load(&worker), Instant::now());
        resize(&worker.pool, wanted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_in_any_order() {
        let range = |text: &str| text.parse::<Range>();
        assert_eq!(range("4,1"), Ok(Range { min: 1, max: 4 }));
        assert_eq!(range(" 1 , 4 "), Ok(Range { min: 1, max: 4 }));
        assert_eq!(range("4"), Ok(Range { min: 1, max: 4 }));
        assert_eq!(range("0"), Ok(Range { min: 1, max: 1 }));
        assert_eq!(range("4,1").unwrap().to_string(), "{min=1, max=4}");
        for wrong in ["", "x", "1,2,3", "4,", "-1", "100000"] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn it_grows_at_once_and_shrinks_after_a_while_of_rest() {
        let keepalive = Duration::from_secs(30);
        let autoscaler = Autoscaler::new(Range { min: 1, max: 4 }, keepalive);
        let start = Instant::now();
        assert_eq!(autoscaler.wanted(1, 0, start), 1);
        assert_eq!(autoscaler.wanted(1, 3, start), 3);
        assert_eq!(autoscaler.wanted(3, 9, start), 4);
        assert_eq!(autoscaler.wanted(4, 4, start + keepalive), 4);
        assert_eq!(
            autoscaler.wanted(4, 1, start + keepalive * 2),
            4,
            "in use until then"
        );
        let later = start + keepalive * 2 + Duration::from_secs(1);
        assert_eq!(autoscaler.wanted(4, 2, later), 2);
        assert_eq!(autoscaler.wanted(2, 0, later + keepalive * 2), 1);
    }
}
