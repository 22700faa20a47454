//! Settlements that the broker may not have heard of.
//!
//! Where the broker itself takes unsettled messages back (AMQP), an acknowledgement that was
//! written just before the connection broke, or that found no connection any more, is lost, and
//! the message comes again although its work is done. What was settled lately is therefore
//! remembered, and after a loss of the connection a redelivered message that is among it is
//! acknowledged without being run again. A retry has the id of its task and another count.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A dead connection is noticed after two heartbeats, of 60 seconds with RabbitMQ's defaults.
const UNNOTICED: Duration = Duration::from_secs(180);
/// A broker that was restarted has delivered everything again long before.
const LONGEST: Duration = Duration::from_secs(3600);
/// Most settlements that are remembered.
const MOST: usize = 20_000;

/// Task id and number of retries.
type Run = (String, i64);

/// See the module.
#[derive(Debug, Default)]
pub struct Doubts(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    lately: VecDeque<(Instant, Run)>,
    doubtful: HashMap<Run, Instant>,
}

impl Doubts {
    /// A message is about to be settled, for good.
    pub fn settling(&self, id: &str, retries: i64) {
        let mut inner = self.inner();
        if inner.lately.len() >= MOST {
            inner.lately.pop_front();
        }
        inner
            .lately
            .push_back((Instant::now(), (id.to_owned(), retries)));
    }

    /// A message was done whose delivery the broker took back: it will come again.
    pub fn disowned(&self, id: &str, retries: i64) {
        let mut inner = self.inner();
        if inner.doubtful.len() < MOST {
            inner
                .doubtful
                .insert((id.to_owned(), retries), Instant::now());
        }
    }

    /// The connection was lost: what was settled on it lately is in doubt.
    pub fn lost(&self) {
        let now = Instant::now();
        self.inner().doubt(now, now.checked_sub(UNNOTICED));
    }

    /// There is a connection again: what was settled without one is in doubt.
    pub fn found(&self) {
        self.inner().doubt(Instant::now(), None);
    }

    /// Whether a redelivered message was settled before.
    pub fn take(&self, id: &str, retries: i64) -> bool {
        let mut inner = self.inner();
        if inner.doubtful.is_empty() {
            return false;
        }
        let since = inner.doubtful.remove(&(id.to_owned(), retries));
        since.is_some_and(|since| since.elapsed() < LONGEST)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn doubt(&mut self, now: Instant, since: Option<Instant>) {
        self.doubtful
            .retain(|_, since| now.duration_since(*since) < LONGEST);
        for (moment, run) in std::mem::take(&mut self.lately) {
            if since.is_none_or(|since| moment >= since) && self.doubtful.len() < MOST {
                self.doubtful.insert(run, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_settled_around_a_loss_is_in_doubt() {
        let doubts = Doubts::default();
        doubts.settling("a", 0);
        assert!(!doubts.take("a", 0), "no connection was lost");
        doubts.lost();
        doubts.settling("b", 1);
        doubts.found();
        doubts.settling("c", 0);
        assert!(!doubts.take("a", 1), "that is its retry");
        assert!(doubts.take("a", 0) && doubts.take("b", 1));
        assert!(!doubts.take("a", 0), "once");
        assert!(!doubts.take("c", 0));
        doubts.disowned("d", 0);
        assert!(doubts.take("d", 0), "its connection was lost before");
    }
}
