//! Elections: one worker of all is to do something.
//!
//! Whoever gets the command `election` sends `worker-elect`, whose clock is its claim; all who
//! see a claim send `worker-elect-ack`. When as many acknowledgements are in as other workers
//! are alive, the lowest clock has won, and for the topic `task` the winner calls the action.
//!
//! Answers for the consensus of `celery.worker.consumer.gossip`. That one fails when only one
//! claim is in by then; here a second claim is waited for where there are others, and whatever
//! is still open after a few seconds is decided by the claims there are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Worker, canvas};
use crate::events::{Event, Received};
use crate::protocol::saferepr;
use crate::protocol::signature::Signature;

/// After this an election is decided by what is there.
const PATIENCE: Duration = Duration::from_secs(4);
/// Elections that are open at once; more are somebody's mistake.
const MOST: usize = 1000;

/// The elections that are not decided.
#[derive(Debug, Default)]
pub struct Elections(Mutex<HashMap<String, Open>>);

#[derive(Debug)]
struct Open {
    since: Instant,
    /// This worker was called to it, too.
    called: bool,
    acknowledged: usize,
    claims: Vec<Claim>,
}

#[derive(Debug, Clone, PartialEq)]
struct Claim {
    clock: u64,
    /// Node name, a dot, process id.
    node: String,
    topic: String,
    action: Value,
}

impl Open {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            called: false,
            acknowledged: 0,
            claims: Vec::new(),
        }
    }

    fn winner(&self) -> Option<&Claim> {
        self.claims
            .iter()
            .min_by_key(|claim| (claim.clock, &claim.node))
    }

    fn is_ripe(&self, others: usize) -> bool {
        self.called && self.acknowledged >= others && self.claims.len() >= (others + 1).min(2)
    }
}

impl Elections {
    /// The command `election`.
    pub fn call(&self, worker: &Worker, id: &str, topic: &str, action: Value) {
        {
            let mut open = self.open();
            if open.len() >= MOST {
                return;
            }
            open.entry(id.to_owned()).or_insert_with(Open::new).called = true;
        }
        let event = Event::new("worker-elect")
            .with("id", id)
            .with("topic", topic)
            .with("action", action)
            .with("cver", 1);
        worker.events.send(&event);
    }

    /// Somebody, perhaps this worker, claims.
    pub fn candidate(&self, worker: &Worker, event: &Received) {
        let text = |name: &str| event.fields.get(name).and_then(Value::as_str);
        let number = |name: &str| event.fields.get(name).and_then(Value::as_u64);
        let (Some(id), Some(clock)) = (text("id"), number("clock")) else {
            return;
        };
        let claim = Claim {
            clock,
            node: full_name(&event.hostname, number("pid").unwrap_or(0)),
            topic: text("topic").unwrap_or_default().to_owned(),
            action: event.fields.get("action").cloned().unwrap_or_default(),
        };
        {
            let mut open = self.open();
            if open.len() >= MOST && !open.contains_key(id) {
                return;
            }
            let claims = &mut open.entry(id.to_owned()).or_insert_with(Open::new).claims;
            if claims.len() < MOST && claims.iter().all(|known| known.node != claim.node) {
                claims.push(claim);
            }
        }
        worker
            .events
            .send(&Event::new("worker-elect-ack").with("id", id));
    }

    /// Somebody has seen a claim; `others` workers are alive beside this one. Without knowing
    /// them two workers could each decide by another set of claims, so `None` leaves it to time.
    pub fn acknowledged(&self, worker: &Arc<Worker>, event: &Received, others: Option<usize>) {
        let Some(id) = event.fields.get("id").and_then(Value::as_str) else {
            return;
        };
        let decided = {
            let mut open = self.open();
            let Some(election) = open.get_mut(id) else {
                return;
            };
            election.acknowledged += 1;
            if others.is_some_and(|others| election.is_ripe(others)) {
                open.remove(id)
            } else {
                None
            }
        };
        if let Some(election) = decided {
            decide(worker, id, &election);
        }
    }

    /// Ends what is open for too long.
    pub fn overdue(&self, worker: &Arc<Worker>) {
        let decided: Vec<(String, Open)> = self
            .open()
            .extract_if(|_, election| election.since.elapsed() > PATIENCE)
            .collect();
        for (id, election) in decided.iter().filter(|(_, election)| election.called) {
            decide(worker, id, election);
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn full_name(node: &str, pid: u64) -> String {
    format!("{node}.{pid}")
}

fn decide(worker: &Arc<Worker>, id: &str, election: &Open) {
    let shown = saferepr::repr_str(id);
    let Some(winner) = election.winner() else {
        log::warn!("the election {shown} ended without a claim: are worker events switched off?");
        return;
    };
    if winner.node != full_name(&worker.node, u64::from(std::process::id())) {
        log::info!("node {} elected for {shown}", winner.node);
        return;
    }
    log::info!("I won the election {shown}");
    if winner.topic != "task" {
        log::error!(
            "Unknown topic {} of the election {shown}",
            saferepr::repr_str(&winner.topic)
        );
        return;
    }
    let (worker, action) = (worker.clone(), winner.action.clone());
    tokio::spawn(async move {
        let called = match Signature::from_value(action) {
            Ok(signature) => canvas::call(&worker, &signature)
                .await
                .map_err(|error| error.repr()),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = called {
            log::error!("Cannot call the task of the election {shown}: {reason}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(clock: u64, node: &str) -> Claim {
        Claim {
            clock,
            node: node.to_owned(),
            topic: "task".to_owned(),
            action: Value::Null,
        }
    }

    fn election(acknowledged: usize, claims: &[Claim]) -> Open {
        Open {
            called: true,
            acknowledged,
            claims: claims.to_vec(),
            ..Open::new()
        }
    }

    #[test]
    fn the_lowest_clock_wins_and_the_name_decides_between_equals() {
        let claims = [claim(9, "a@h.1"), claim(7, "c@h.3"), claim(7, "b@h.2")];
        assert_eq!(
            election(3, &claims)
                .winner()
                .map(|claim| claim.node.as_str()),
            Some("b@h.2")
        );
        assert_eq!(election(3, &[]).winner(), None);
    }

    #[test]
    fn a_lone_worker_decides_by_its_own_claim() {
        assert!(election(1, &[claim(1, "a@h.1")]).is_ripe(0));
        assert!(!election(0, &[]).is_ripe(0));
    }

    #[test]
    fn two_workers_wait_for_the_second_claim_where_celery_fails() {
        assert!(!election(1, &[claim(1, "a@h.1")]).is_ripe(1));
        assert!(election(1, &[claim(1, "a@h.1"), claim(2, "b@h.2")]).is_ripe(1));
        let bystander = Open {
            called: false,
            ..election(9, &[claim(1, "a@h.1"), claim(2, "b@h.2")])
        };
        assert!(!bystander.is_ripe(1));
    }
}
