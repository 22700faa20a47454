//! Doing the same work once: analyses under way in this worker, and stored ones. [`super::turn`]
//! puts them in order.
//!
//! What is at hand counts only if the repository's server, asked with the task's own token,
//! still names the same commit: that is asked by the child as the first step of a fetch, so it
//! costs nothing when the answer is no, and proves when it is yes that whoever asks may read
//! the repository. Without that proof nobody learns what somebody else's token could see.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::sync::watch;

use super::effects::Verdict;
use super::request::Request;
use super::{Worker, analyze, report};
use crate::analysis::Report;
use crate::config::Settings;
use crate::database::Analysis;
use crate::protocol::exception::Exception;
use crate::tasks::analyze_repo::Call;
use crate::tasks::registry::seconds;

/// The database is asked as a favour; without an answer the work is done.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often somebody who waits looks whether the wait is over for another reason.
pub(super) const LOOK: Duration = Duration::from_millis(100);

type Landing = watch::Receiver<Option<Arc<Report>>>;

/// Analyses under way, by repository.
#[derive(Debug, Default)]
pub struct Flights(Mutex<HashMap<String, Landing>>);

/// What somebody is who wants a repository analysed.
pub enum Place {
    /// The first: does the work.
    Lead(Lead),
    /// Somebody is at it.
    Follow(Landing),
}

/// The first of those who want a repository analysed. Dropped without [`Lead::land`], the
/// others do it themselves.
pub struct Lead {
    worker: Arc<Worker>,
    repository: String,
    report: watch::Sender<Option<Arc<Report>>>,
}

/// An analysis that is at hand.
pub struct Known {
    /// Its commit.
    pub head: String,
    /// What was found.
    pub report: Arc<Report>,
    /// When it was stored, if it was.
    pub stored: Option<DateTime<Utc>>,
}

/// The database did not say whether it knows the repository.
pub struct NotAsked;

/// How waiting for somebody else's analysis ended.
pub enum Followed {
    /// It is done.
    Landed(Arc<Report>),
    /// It came to nothing.
    Failed,
    /// The waiting task itself is to end.
    Stopped(Verdict),
}

impl Flights {
    fn under_way(&self) -> MutexGuard<'_, HashMap<String, Landing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins those who want this repository, in the one spelling for all.
    pub fn join(worker: &Arc<Worker>, repository: &str) -> Place {
        let mut under_way = worker.flights.under_way();
        if let Some(landing) = under_way.get(repository) {
            return Place::Follow(landing.clone());
        }
        let (report, landing) = watch::channel(None);
        under_way.insert(repository.to_owned(), landing);
        Place::Lead(Lead {
            worker: worker.clone(),
            repository: repository.to_owned(),
            report,
        })
    }
}

impl Lead {
    /// Gives the others the report.
    pub fn land(self, report: &Arc<Report>) {
        self.report.send_replace(Some(report.clone()));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.worker.flights.under_way().remove(&self.repository);
    }
}

/// Waits for somebody else's analysis.
pub async fn follow(request: &Request, mut landing: Landing) -> Followed {
    tokio::select! {
        landed = landing.wait_for(Option::is_some) => match landed.as_deref() {
            Ok(Some(report)) => Followed::Landed(report.clone()),
            _ => Followed::Failed,
        },
        verdict = stopped(request) => Followed::Stopped(verdict),
    }
}

/// Waits until the request is to end although no child works on it: by its time limits, too.
pub async fn stopped(request: &Request) -> Verdict {
    loop {
        if request.fenced() {
            return Verdict::Fenced;
        }
        if let Some(why) = request.cancelled() {
            return Verdict::Cancelled(why);
        }
        if let Some(signal) = request.terminated() {
            return Verdict::Revoked {
                reason: "terminated",
                signal: Some(signal),
            };
        }
        let [hard, soft] = request.time_left();
        if hard.is_some_and(|left| left.is_zero()) {
            return analyze::timed_out(request);
        }
        if soft.is_some_and(|left| left.is_zero()) {
            report::soft_limit(request);
            let stage = "waiting for the analysis of the same repository";
            return analyze::failure(request, Exception::soft_time_limit(), stage);
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Known {
    /// A report of this worker's, or of another for the whole history; an empty repository has
    /// none that could stay the same.
    pub fn of(report: Arc<Report>) -> Option<Self> {
        Some(Self {
            head: report.head.clone()?,
            report,
            stored: None,
        })
    }
}

/// `RESULT_REUSE_TTL`: since when an analysis may have been stored to answer. `None`: none answers
/// that is done when it is asked for.
pub fn since(settings: &Settings) -> Option<DateTime<Utc>> {
    let age = chrono::Duration::from_std(seconds(settings.result_reuse_ttl)?).ok()?;
    Utc::now().checked_sub_signed(age)
}

/// The stored analysis that answers if HEAD has not moved, or that the database cannot be asked.
pub async fn stored(
    worker: &Worker,
    request: &Request,
    call: &Call,
    since: DateTime<Utc>,
) -> Result<Option<Known>, NotAsked> {
    let find = async {
        let database = worker.database().await?;
        let branch = worker.settings.clone_branch.as_deref();
        database.newest_for(&call.repo_url, branch, since).await
    };
    match tokio::time::timeout(PATIENCE, find).await {
        Ok(Ok(row)) => Ok(row.as_ref().and_then(known)),
        Ok(Err(error)) => {
            log::warn!("Task {}: {error}; nothing is reused", request.label());
            Err(NotAsked)
        }
        Err(_) => Err(NotAsked),
    }
}

fn known(row: &Analysis) -> Option<Known> {
    Some(Known {
        stored: row.finished_at,
        ..Known::of(Arc::new(report(row)?))?
    })
}

/// A stored row in the words of a report.
fn report(row: &Analysis) -> Option<Report> {
    let count = |number: Option<i64>| u64::try_from(number.unwrap_or(0)).unwrap_or(0);
    let lines = row.result.as_ref()?.get("result")?.as_object()?;
    let contributors = lines
        .iter()
        .map(|(email, lines)| Some((email.clone(), Value::as_u64(lines)?)))
        .collect::<Option<Vec<_>>>()?;
    Some(Report {
        head: row.head_commit.clone(),
        contributors,
        files: count(row.total_files),
        lines: count(row.total_lines),
        binary_files: count(row.skipped_files),
        shallow: row.shallow,
        ..Report::default()
    })
}
