//! When it is a task's turn to analyse its repository, and what is at hand by then.
//!
//! ```text
//! this worker:  first ─▶ all workers: lease ─▶ database: a stored analysis? ─▶ child ─▶ commit
//!                  │                    │ taken: wait, without a slot
//!                  └─ others wait for its report                 the lease ends here ──┘
//! ```
//!
//! Over all workers only the database carries what was found, so the lease is kept until it is
//! there. Without `RESULT_REUSE_TTL` only that answers which was stored while the task waited. The
//! lease saves work and guards nothing: where nobody can tell, the work is done.

use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::Worker;
use super::effects::Verdict;
use super::fairness::Parked;
use super::permits::{Leased, Permit};
use super::request::Request;
use super::reuse::{self, Flights, Followed, Known, LOOK, Lead, Place};
use crate::analysis::Report;
use crate::pool::Slot;
use crate::tasks::analyze_repo::Call;

/// A task's turn.
pub struct Turn {
    /// Where it runs.
    pub slot: Slot,
    /// What stands if HEAD has not moved.
    pub known: Option<Known>,
    /// Those of this worker who wait for the report.
    pub lead: Option<Lead>,
    /// Keeps the other workers waiting.
    pub lease: Option<Permit>,
}

/// Waits for the turn; the slot is free meanwhile. The error is how a task ends that has to end
/// while it waits.
pub async fn wait(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    call: &Call,
    slot: Slot,
) -> Result<Turn, Verdict> {
    let arrived = Utc::now();
    let mut slot = Some(slot);
    let (mut known, mut lead, mut lease) = (None, None, None);
    if let Some(repository) = call.repository(&worker.settings) {
        match join(worker, request, &repository, &mut slot).await? {
            Joined::First(first) => {
                lead = Some(first);
                (known, lease) = look(worker, request, call, &mut slot, arrived).await?;
            }
            Joined::Landed(report) => known = Known::of(report),
        }
    }
    let slot = match slot {
        Some(slot) => slot,
        None => tokio::select! {
            slot = worker.pool.acquire() => {
                request.start(slot.pid());
                slot
            }
            verdict = reuse::stopped(request) => return Err(verdict),
        },
    };
    Ok(Turn {
        slot,
        known,
        lead,
        lease,
    })
}

enum Joined {
    First(Lead),
    Landed(Arc<Report>),
}

/// Becomes the first in this worker, or has the report of the one who was.
async fn join(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    repository: &str,
    slot: &mut Option<Slot>,
) -> Result<Joined, Verdict> {
    loop {
        let landing = match Flights::join(worker, repository) {
            Place::Lead(lead) => return Ok(Joined::First(lead)),
            Place::Follow(landing) => landing,
        };
        // Others may use the slot meanwhile.
        drop(slot.take());
        let _parked = Parked::new(worker, request);
        log::info!(
            "Task {} waits for the analysis of the same repository that is under way",
            request.label()
        );
        match reuse::follow(request, landing).await {
            Followed::Landed(report) => return Ok(Joined::Landed(report)),
            Followed::Failed => {}
            Followed::Stopped(verdict) => return Err(verdict),
        }
    }
}

/// Tells databases apart that do not see each other's rows: a server is one for all workers,
/// however each of them spells its address; a file is one for those on its machine.
fn reach(worker: &Worker) -> String {
    let machine = worker.node.split_once('@').map_or("", |(_, host)| host);
    match worker.database.url().file() {
        Some(path) => format!("{machine} {}", path.display()),
        None => String::new(),
    }
}

/// Becomes the first of all workers where that can be of use, then looks into the database.
async fn look(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    call: &Call,
    slot: &mut Option<Slot>,
    arrived: DateTime<Utc>,
) -> Result<(Option<Known>, Option<Permit>), Verdict> {
    // What is cut off differs with the depth, which is not stored.
    if worker.settings.clone_depth.is_some() {
        return Ok((None, None));
    }
    let name = call.fingerprint(&worker.settings, &reach(worker));
    let mut waits = None;
    let lease = loop {
        let Some(name) = &name else { break None };
        match worker.permits.lease(worker, name, request).await {
            Leased::Granted(permit) => break Some(permit),
            Leased::Unknown => break None,
            Leased::Taken => {}
        }
        if waits.is_none() {
            drop(slot.take());
            waits = Some(Parked::new(worker, request));
            log::info!(
                "Task {} waits for the analysis of the same repository that is under way in \
                 another worker",
                request.label()
            );
        }
        if let Ok(verdict) = tokio::time::timeout(LOOK, reuse::stopped(request)).await {
            return Err(verdict);
        }
    };
    // Whoever waited, here or there, has let the slot go.
    let waited = slot.is_none().then_some(arrived);
    let Some(since) = reuse::since(&worker.settings)
        .into_iter()
        .chain(waited)
        .min()
    else {
        return Ok((None, lease));
    };
    let known = match reuse::stored(worker, request, call, since).await {
        Ok(known) => known,
        // Nobody would find what this task stores.
        Err(reuse::NotAsked) => return Ok((None, None)),
    };
    let stored = known.as_ref().and_then(|known| known.stored);
    let fresh = waited.is_some_and(|since| stored.is_some_and(|stored| stored >= since));
    // What others waited for is there: all of them may ask at once whether it stands.
    Ok((known, lease.filter(|_| !fresh)))
}
