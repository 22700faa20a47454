//! What a child does with a [`Job`]: fetch, blame, report.
//!
//! Knows the directory it was given and the git server, nothing else: no broker, no result
//! backend, no database. An error becomes a failure in the words of a Python exception, with
//! the stage it happened in, the repository, the causes, and what to do.

mod job;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use secrecy::SecretString;
use serde::Deserialize;
use serde_json::Value;

pub use job::{Answer, Job, Policy, Progress, Report, Stage, Work};

use crate::blame::{self, blame};
use crate::git::url::RepoUrl;
use crate::git::{self, Oid, Repository, fetch, url};
use crate::pool::child::Reporter;
use crate::pool::{self, Failure, Retry};

/// Why an analysis failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL is not one that may be fetched.
    #[error(transparent)]
    Url(#[from] url::Error),
    /// The file of trusted authorities cannot be used.
    #[error("read the trusted authorities in {} (REPO_CA_FILE): {detail}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The repository could not be fetched.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// The repository cannot be read.
    #[error(transparent)]
    Git(#[from] git::Error),
    /// The history could not be followed.
    #[error(transparent)]
    Blame(#[from] blame::Error),
}

/// Receives progress; called from several threads.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);

/// The handler of a pool child.
pub fn perform(job: &pool::Job, reporter: &Reporter) -> Result<Value, Failure> {
    let Work { job, known } = Work::deserialize(&job.payload).map_err(|error| Failure {
        exc_type: "ValueError".to_owned(),
        exc_message: vec![Value::from(format!("the job cannot be read: {error}"))],
        ..Failure::default()
    })?;
    let known = known.and_then(|digits| Oid::from_hex(digits.as_bytes()));
    let progress = |progress: Progress| {
        // Plain data always has a JSON form.
        if let Ok(value) = serde_json::to_value(progress) {
            reporter.progress(value);
        }
    };
    match answer(&job, known, &progress, reporter.interrupt()) {
        Ok(answer) => Ok(serde_json::to_value(answer).unwrap_or(Value::Null)),
        Err(_) if reporter.soft_limit_hit() => Err(soft_limit(&job)),
        Err((stage, error)) => Err(failure(&job, stage, &error)),
    }
}

/// Fetches and blames one repository, unless its HEAD is still the known commit.
pub fn answer(
    job: &Job,
    known: Option<Oid>,
    progress: OnProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<Answer, (Stage, Error)> {
    let began = Instant::now();
    let fetched = fetch_unless(job, known, progress, interrupt)?;
    if fetched.unchanged {
        return Ok(Answer::Unchanged);
    }
    let fetching = began.elapsed();
    let options = blame::Options {
        threads: job.threads.max(1),
        cache_bytes: usize::try_from(job.cache << 20).unwrap_or(usize::MAX),
        ..blame::Options::default()
    };
    let (mut report, _) = read(
        &fetched.repository,
        fetched.head,
        &options,
        progress,
        interrupt,
    )
    .map_err(|error| (Stage::Analyze, error))?;
    report.shallow |= fetched.shallow;
    report.received_bytes = fetched.received_bytes;
    report.seconds.0 = fetching.as_secs_f64();
    Ok(Answer::Found(report))
}

/// Brings one repository into the job's directory, or finds it on this machine.
pub fn fetch(
    job: &Job,
    progress: OnProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<fetch::Fetched, (Stage, Error)> {
    fetch_unless(job, None, progress, interrupt)
}

fn fetch_unless(
    job: &Job,
    known: Option<Oid>,
    progress: OnProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<fetch::Fetched, (Stage, Error)> {
    let mut policy = url_policy(&job.policy);
    let failed = |error: Error| (Stage::Clone, error);
    let url = RepoUrl::parse(&job.url, &policy).map_err(|error| failed(error.into()))?;
    if let Some(path) = &job.policy.authorities {
        policy.roots = authorities(path).map_err(failed)?;
    }
    let token = job.token.clone().map(SecretString::from);
    let request = fetch::Request {
        url: &url,
        token: token.as_ref(),
        branch: job.branch.as_deref(),
        depth: job.depth,
        directory: &job.directory,
        limits: limits(job),
        policy: &policy,
    };
    let told = |seen| progress(clone_progress(&seen));
    fetch::fetch_unless(&request, known, &told, interrupt).map_err(|error| failed(error.into()))
}

fn url_policy(policy: &Policy) -> url::Policy {
    url::Policy {
        allow_http: policy.allow_http,
        allow_local: policy.allow_local,
        hosts: policy.hosts.clone(),
        ..url::Policy::default()
    }
}

/// The certificates of a PEM file, at least one.
pub fn authorities(path: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let fault = |detail: String| Error::Authorities {
        path: path.to_owned(),
        detail,
    };
    let pem = std::fs::read(path).map_err(|error| fault(error.to_string()))?;
    git::http::certificates(&pem)
        .filter(|found| !found.is_empty())
        .ok_or_else(|| fault("it holds no certificates in PEM form".to_owned()))
}

/// One spelling for all spellings of a repository's URL; `None` when it may not be fetched.
pub fn canonical_url(text: &str, policy: &Policy) -> Option<String> {
    let url = RepoUrl::parse(text, &url_policy(policy)).ok()?;
    Some(url.to_string())
}

/// A name for a text that does not show it.
pub fn fingerprint(text: &str) -> Option<String> {
    Some(Oid::digest(text.as_bytes())?.to_string())
}

/// The name under which a stored token for this URL is kept: the host, and the port unless it
/// is that of https. A token is thus never sent over an unprotected connection, or to another
/// service of the same host, unless it was stored for exactly that.
pub fn token_host(text: &str, policy: &Policy) -> Option<String> {
    let url = RepoUrl::parse(text, &url_policy(policy)).ok()?;
    let http = url.http()?;
    let host = http.host_str()?;
    match http.port_or_known_default() {
        Some(443) if http.scheme() == "https" => Some(host.to_owned()),
        Some(port) => Some(format!("{host}:{port}")),
        None => None,
    }
}

/// Blames a repository on disk. Without a commit it is empty, and nobody wrote it.
pub fn read(
    path: &Path,
    commit: Option<Oid>,
    options: &blame::Options,
    progress: OnProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<(Report, Option<blame::Outcome>), Error> {
    let Some(commit) = commit else {
        return Ok((Report::default(), None));
    };
    let repository = Repository::open(path)?;
    let began = Instant::now();
    let on_progress = |seen: blame::Progress| progress(blame_progress(&seen));
    let outcome = blame(&repository, commit, options, &on_progress, interrupt)?;
    let report = Report {
        head: Some(commit.to_string()),
        shallow: !repository.shallow().is_empty(),
        seconds: (0.0, began.elapsed().as_secs_f64()),
        ..summarize(&outcome)
    };
    Ok((report, Some(outcome)))
}

/// An outcome in the words of a report: bytes become text here, at the edge.
pub fn summarize(outcome: &blame::Outcome) -> Report {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut contributors: Vec<(String, u64)> = Vec::with_capacity(outcome.totals.len());
    let mut places = std::collections::HashMap::new();
    for (email, lines) in &outcome.totals {
        // Two addresses may become one text when their bytes are no UTF-8.
        let email = text(email);
        match places.get(&email) {
            Some(&place) => {
                let entry: &mut (String, u64) = &mut contributors[place];
                entry.1 += lines;
            }
            None => {
                places.insert(email.clone(), contributors.len());
                contributors.push((email, *lines));
            }
        }
    }
    contributors.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    Report {
        contributors,
        files: outcome.files,
        lines: outcome.lines,
        binary_files: outcome.binary_files,
        skipped: outcome
            .skipped
            .iter()
            .map(|one| (text(&one.path), one.reason.clone()))
            .chain(outcome.bounded.iter().map(|one| {
                (
                    text(&one.path),
                    format!("before commit {}: {}", one.commit, one.reason),
                )
            }))
            .collect(),
        commits: outcome.statistics.commits,
        ..Report::default()
    }
}

fn limits(job: &Job) -> fetch::Limits {
    let mut limits = fetch::Limits::default();
    if job.policy.max_bytes > 0 {
        limits.max_bytes = job.policy.max_bytes;
    }
    if job.policy.max_objects > 0 {
        limits.max_objects = job.policy.max_objects;
    }
    if job.policy.max_object_size > 0 {
        limits.max_object_size = job.policy.max_object_size;
    }
    if job.policy.max_inflated > 0 {
        limits.max_inflated = job.policy.max_inflated;
    }
    if job.policy.disk_quota > 0 {
        limits.max_disk = job.policy.disk_quota;
    }
    limits.keep_free = job.policy.disk_reserve;
    limits.threads = Some(job.threads.max(1));
    limits
}

fn clone_progress(seen: &fetch::Progress) -> Progress {
    let (current, total) = match *seen {
        fetch::Progress::Connecting => (0, 0),
        fetch::Progress::Receiving { objects, total, .. } => (objects, total),
        fetch::Progress::Resolving { done, total } => (done, total),
    };
    Progress {
        stage: Stage::Clone,
        current,
        total,
        fraction: seen.fraction(),
    }
}

fn blame_progress(seen: &blame::Progress) -> Progress {
    Progress {
        stage: Stage::Analyze,
        current: seen.commits_done,
        total: seen.commits_total,
        fraction: seen.fraction(),
    }
}

fn soft_limit(job: &Job) -> Failure {
    Failure {
        exc_type: "SoftTimeLimitExceeded".to_owned(),
        exc_module: Some("billiard.exceptions".to_owned()),
        exc_message: Vec::new(),
        traceback: format!(
            "Traceback (most recent call last):\n  in analyze_repo_task, repository {}\n\
             billiard.exceptions.SoftTimeLimitExceeded: SoftTimeLimitExceeded()\n",
            shown(job)
        ),
        retry: None,
    }
}

fn failure(job: &Job, stage: Stage, error: &Error) -> Failure {
    let exc_type = match error {
        Error::Url(_) => "ValueError",
        Error::Authorities { .. } => "OSError",
        Error::Fetch(fetch::Error::DiskLow { .. } | fetch::Error::Disk { .. }) => "OSError",
        Error::Fetch(error) if error.is_transient() => "ConnectionError",
        Error::Fetch(_) => "RuntimeError",
        Error::Git(_) | Error::Blame(_) => "RuntimeError",
    };
    let retry = match error {
        Error::Fetch(error) if error.is_transient() => Some(Retry {
            after: error.retry_after().map(Duration::from_secs),
        }),
        _ => None,
    };
    let stage = match stage {
        Stage::Clone => "fetching",
        Stage::Analyze => "analysing",
    };
    let text = error.to_string();
    let mut traceback = format!(
        "Traceback (most recent call last):\n  in analyze_repo_task, {stage} {}\n",
        shown(job)
    );
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        traceback.push_str(&format!("  because of: {inner}\n"));
        cause = inner.source();
    }
    traceback.push_str(&format!("{exc_type}: {text}\n"));
    Failure {
        exc_type: exc_type.to_owned(),
        exc_module: Some("builtins".to_owned()),
        exc_message: vec![Value::from(text)],
        traceback,
        retry,
    }
}

/// The URL without whatever may be secret in it.
fn shown(job: &Job) -> String {
    crate::protocol::mask::mask_secrets(&job.url, &[]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_token_belongs_to_one_service_of_one_host() {
        let policy = Policy {
            allow_http: true,
            allow_local: true,
            ..Policy::default()
        };
        let host = |url: &str| token_host(url, &policy);
        assert_eq!(
            host("https://GitHub.com/o/r").as_deref(),
            Some("github.com")
        );
        assert_eq!(
            host("https://git.example.com:8443/o/r").as_deref(),
            Some("git.example.com:8443")
        );
        assert_eq!(
            host("http://git.example.com/o/r").as_deref(),
            Some("git.example.com:80")
        );
        assert_eq!(host("file:///srv/r"), None);
        assert_eq!(host("https://user:hunter2@github.com/o/r"), None);
    }
}
