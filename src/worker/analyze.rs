//! Carries out `analyze_repo_task`: the child computes, the parent speaks.
//!
//! The run is entered in the database, a child gets the job and a directory, its progress
//! becomes the state PROGRESS, its report is committed; only then is the outcome known. The
//! slot is free as soon as the child is done: a database that is away delays this task alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use serde_json::Value;
use tokio::sync::mpsc;

use super::effects::{Cancel, Verdict};
use super::permits::Permit;
use super::request::Request;
use super::turn::{self, Turn};
use super::{Worker, execute, report, strategy, token};
use crate::analysis::{Answer, Progress, Report, Stage, Work};
use crate::database::{Begun, Completed, Ended, Error, Run, State as RunState};
use crate::pool::{Event, Failure, Job, Outcome, Slot};
use crate::protocol::arguments::bind;
use crate::protocol::exception::Exception;
use crate::protocol::state::State;
use crate::tasks::Kind;
use crate::tasks::analyze_repo::{Call, completed, progress_meta};
use crate::transport::MOST_DEATHS;

/// At most so often is progress stored.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// How long a commit is tried while the database is away. The task's own time limit covers
/// the child's work, not this.
const COMMIT_PATIENCE: Duration = Duration::from_secs(300);
/// A lease cannot be lost in a shorter time.
const LEASE_PROVED: Duration = Duration::from_secs(2);
/// A database that is away must not delay the start of the work for long.
const ENTER_PATIENCE: Duration = Duration::from_secs(2);

/// One analysis from its bound arguments to its verdict.
pub async fn run(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    arguments: &[Value],
    slot: Slot,
) -> Verdict {
    let mut call = match Call::new(arguments) {
        Ok(call) => call,
        Err(exception) => {
            let traceback = report::traceback(request, &exception, "reading the arguments", None);
            return Verdict::Failure(exception.with_traceback(traceback));
        }
    };
    if request.redelivered && died(worker, request).await >= MOST_DEATHS {
        let verdict = strategy::given_up(request);
        given_up(worker, request, &verdict).await;
        return verdict;
    }
    let run = call.run(request.id(), &worker.settings, &worker.node);
    let start = Progress {
        stage: start_stage(&call),
        current: 0,
        total: 0,
        fraction: 0.0,
    };
    let (begun, ()) = tokio::join!(
        tokio::time::timeout(ENTER_PATIENCE, begin(worker, &run)),
        execute::store_state(
            worker,
            request,
            State::Custom("PROGRESS".to_owned()),
            progress_meta(&start)
        ),
    );
    match begun {
        // The message was delivered again after its commit: the stored result is the answer.
        Ok(Ok(Begun::AlreadySucceeded(row))) if row.result.is_some() => {
            return Verdict::Success(row.result.unwrap_or_default());
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => log::warn!(
            "Task {}: {error}; the analysis begins all the same",
            request.label()
        ),
        Err(_) => log::warn!(
            "Task {}: the database does not answer; the analysis begins all the same",
            request.label()
        ),
    }
    let began = Instant::now();
    let found = match token::provide(worker, request, &mut call).await {
        Ok(()) => work(worker, request, &call, slot).await,
        Err(unusable) => {
            drop(slot);
            Found::Ended(without_token(worker, request, unusable))
        }
    };
    // This process may have been stopped meanwhile, and its message given to somebody else.
    if began.elapsed() > LEASE_PROVED
        && let Some(tag) = request.tag()
        && !worker.link.holds(&tag).await
        && request.fence()
    {
        count_death(worker, request, -1);
    }
    let verdict = judge(worker, request, &call, &run, found).await;
    enter_end(worker, request, &run, &verdict).await;
    verdict
}

/// How many workers and children have died on a message that comes again: whoever is still entered
/// as being at it did, unless it said that it lost the message alone ([`count_death`]). Redis
/// counts workers by itself, RabbitMQ's classic queues do not.
async fn died(worker: &Worker, request: &Request) -> u32 {
    u32::try_from(add_deaths(worker, request, 1).await).unwrap_or(0)
}

/// For the next one who gets the message: -1 when this worker lost it and lives, which is made up
/// for when it is delivered again, or 1 when it was delivered to this worker itself.
pub fn count_death(worker: &Arc<Worker>, request: &Arc<Request>, count: i32) {
    if request.kind == Kind::AnalyzeRepo {
        let (worker, request) = (worker.clone(), request.clone());
        tokio::spawn(async move { add_deaths(&worker, &request, count).await });
    }
}

async fn add_deaths(worker: &Worker, request: &Request, count: i32) -> i32 {
    let added = async {
        worker
            .database()
            .await?
            .add_deaths(request.id(), count)
            .await
    };
    match tokio::time::timeout(ENTER_PATIENCE, added).await {
        Ok(Ok(deaths)) => return deaths,
        Ok(Err(error)) => log::warn!("Task {}: {error}", request.label()),
        Err(_) => log::warn!("Task {}: the database counts no deaths", request.label()),
    }
    0
}

/// Enters in the database that a task is not tried again, if it is an analysis.
pub async fn given_up(worker: &Worker, request: &Request, verdict: &Verdict) {
    let entry = worker.registry.get(request.name);
    let parameters = entry.and_then(|entry| entry.parameters.as_ref());
    let (Kind::AnalyzeRepo, Some(parameters)) = (request.kind, parameters) else {
        return;
    };
    // Arguments that make no call never came to a row.
    let message = &request.message;
    let call = bind(parameters, &message.args, &message.kwargs).map(|bound| Call::new(&bound));
    if let Ok(Ok(call)) = call {
        let run = call.run(request.id(), &worker.settings, &worker.node);
        enter_end(worker, request, &run, verdict).await;
    }
}

/// Enters how a run that did not succeed has ended.
async fn enter_end(worker: &Worker, request: &Request, run: &Run, verdict: &Verdict) {
    let rules = &request.rules;
    if matches!(verdict, Verdict::WorkerLost(_)) && rules.acks_late && rules.reject_on_worker_lost {
        // Its message goes back, and the next one counts this child as it counts a dead worker.
        return;
    }
    let Some(ended) = ended(verdict) else { return };
    let failed = fail(worker, run, &ended);
    match tokio::time::timeout(ENTER_PATIENCE, failed).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => log::warn!("Task {}: {error}", request.label()),
        Err(_) => log::warn!(
            "Task {}: the database did not take the failure",
            request.label()
        ),
    }
}

async fn begin(worker: &Worker, run: &Run) -> Result<Begun, Error> {
    worker.database().await?.begin(run).await
}

async fn succeed(worker: &Worker, run: &Run, found: &Completed) -> Result<(), Error> {
    worker.database().await?.succeed(run, found).await
}

async fn fail(worker: &Worker, run: &Run, ended: &Ended) -> Result<bool, Error> {
    worker.database().await?.fail(run, ended).await
}

/// A local repository is read in place.
fn start_stage(call: &Call) -> Stage {
    if call.repo_url.starts_with("http") {
        Stage::Clone
    } else {
        Stage::Analyze
    }
}

/// What the work came to.
enum Found {
    /// The answer, by a child's work or because it was at hand; and what keeps other workers
    /// waiting until it is stored.
    Report(Arc<Report>, Option<Permit>),
    /// The child ended otherwise.
    Otherwise(Outcome),
    /// There was nothing for a child to do.
    Ended(Verdict),
}

fn without_token(worker: &Worker, request: &Request, unusable: token::Unusable) -> Verdict {
    match unusable {
        token::Unusable::Later(cause)
            if request.message.retries < most_retries(worker, request) =>
        {
            Verdict::Retry {
                cause,
                after: backoff(worker, request),
            }
        }
        token::Unusable::Later(exception) | token::Unusable::Refused(exception) => {
            failure(request, exception, "reading the token")
        }
    }
}

/// Does the work, unless somebody does it already or it was done and nothing has changed.
async fn work(worker: &Arc<Worker>, request: &Arc<Request>, call: &Call, slot: Slot) -> Found {
    let Turn {
        slot,
        known,
        lead,
        lease,
    } = match turn::wait(worker, request, call, slot).await {
        Ok(turn) => turn,
        Err(verdict) => return Found::Ended(verdict),
    };
    let head = known.as_ref().map(|known| known.head.clone());
    let found = match compute(worker, request, call, slot, head).await {
        Outcome::Success(value) => match serde_json::from_value::<Answer>(value) {
            Ok(Answer::Found(report)) => Found::Report(Arc::new(report), lease),
            Ok(Answer::Unchanged) => match known {
                Some(known) => {
                    log::info!(
                        "Task {}: HEAD is still {}, so the analysis at hand stands",
                        request.label(),
                        known.head
                    );
                    Found::Report(known.report, lease)
                }
                None => Found::Ended(unreadable(request, "it knows what it was not told")),
            },
            Err(error) => Found::Ended(unreadable(request, &error.to_string())),
        },
        outcome => Found::Otherwise(outcome),
    };
    if let (Some(lead), Found::Report(report, _)) = (lead, &found) {
        lead.land(report);
    }
    found
}

fn unreadable(request: &Request, why: &str) -> Verdict {
    let text = format!("the child's report cannot be read: {why}");
    failure(
        request,
        Exception::builtin("RuntimeError", text),
        "reading the report",
    )
}

async fn compute(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    call: &Call,
    mut slot: Slot,
    known: Option<String>,
) -> Outcome {
    // A sandboxed child may write below its own directory only.
    let parent = slot.directory().unwrap_or(&worker.temporary).to_owned();
    let directory = match tempfile::Builder::new()
        .prefix("celeriac-")
        .tempdir_in(&parent)
    {
        Ok(directory) => directory,
        Err(error) => {
            let text = format!(
                "cannot make a directory for the clone below {}: {error}; free some space, or name \
                 another directory in TMPDIR",
                parent.display()
            );
            return Outcome::Failure(Failure {
                exc_type: "OSError".to_owned(),
                exc_module: Some("builtins".to_owned()),
                exc_message: vec![Value::from(text)],
                ..Failure::default()
            });
        }
    };
    let threads = worker.blame_threads();
    let job = call.job(&worker.settings, directory.path().to_owned(), threads);
    let payload = serde_json::to_value(Work { job, known }).expect("because a job is plain data");
    let [hard_limit, soft_limit] = request.time_left();
    let job = Job {
        id: request.id().to_owned(),
        name: request.name.to_owned(),
        payload,
        soft_limit,
        hard_limit,
        directory: Some(directory.path().to_owned()),
    };
    let (sender, mut events) = mpsc::unbounded_channel();
    let mut work = std::pin::pin!(slot.run(job, sender));
    let mut shown = Shown {
        percent: Value::Null,
        at: Instant::now(),
    };
    // A result backend that is slow must hold up neither the job nor its limits.
    let mut storing = None;
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => break outcome,
            Some(event) = events.recv() => {
                if let Some(meta) = on_event(worker, request, event, &mut shown, storing.is_none()) {
                    let state = State::Custom("PROGRESS".to_owned());
                    storing = Some(Box::pin(execute::store_state(worker, request, state, meta)));
                }
            }
            () = async { storing.as_mut().expect("because of the condition").await },
                if storing.is_some() => storing = None,
        }
    };
    // Removing a large clone takes a while and must not hold up the loop.
    drop(tokio::task::spawn_blocking(move || drop(directory)).await);
    outcome
}

struct Shown {
    percent: Value,
    at: Instant,
}

/// Deals with what a child tells; returns the progress that is to be stored.
fn on_event(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    event: Event,
    shown: &mut Shown,
    storable: bool,
) -> Option<Value> {
    match event {
        Event::Started { .. } => {
            // Terminated between acceptance and start: now there is something to end.
            if let Some(signal) = request.terminated() {
                worker.pool.terminate(request.id(), signal);
            }
        }
        Event::Progress(value) => {
            let progress = serde_json::from_value::<Progress>(value).ok()?;
            let meta = progress_meta(&progress);
            let news = meta["percent"] != shown.percent && shown.at.elapsed() >= PROGRESS_INTERVAL;
            if !news || !storable {
                return None;
            }
            *shown = Shown {
                percent: meta["percent"].clone(),
                at: Instant::now(),
            };
            report::progress(worker, request, &meta);
            return Some(meta);
        }
        Event::SoftLimit => report::soft_limit(request),
        Event::Log { level, text } => {
            log::log!(level, "Task {}: {}", request.label(), request.mask(&text))
        }
    }
    None
}

async fn judge(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    call: &Call,
    run: &Run,
    found: Found,
) -> Verdict {
    if request.fenced() {
        return Verdict::Fenced;
    }
    let outcome = match found {
        Found::Report(report, lease) => {
            return commit(worker, request, call, run, &report, lease).await;
        }
        Found::Ended(verdict) => return verdict,
        Found::Otherwise(outcome) => outcome,
    };
    match outcome {
        Outcome::Success(_) => unreadable(request, "nobody read it"),
        Outcome::Failure(failed) => failed_verdict(worker, request, failed),
        Outcome::HardTimeLimit(_) => timed_out(request),
        Outcome::Lost { reason } => {
            let exception = Exception::worker_lost(&reason);
            let retries = request.message.retries;
            if worker.settings.task_retry_on_worker_lost && retries < most_retries(worker, request)
            {
                Verdict::Retry {
                    cause: exception,
                    after: backoff(worker, request),
                }
            } else {
                Verdict::WorkerLost(exception)
            }
        }
        Outcome::Terminated { signal } => match request.cancelled() {
            Some(why) => {
                log::debug!("Task {} ended by signal {signal}", request.label());
                Verdict::Cancelled(why)
            }
            None => Verdict::Revoked {
                reason: "terminated",
                signal: Some(signal),
            },
        },
    }
}

/// The hard time limit is over.
pub fn timed_out(request: &Request) -> Verdict {
    let limit = request.hard_limit().unwrap_or_default();
    Verdict::TimedOut(Exception::time_limit(limit.as_secs_f64()))
}

/// The task failed in the worker's own hands.
pub fn failure(request: &Request, exception: Exception, stage: &str) -> Verdict {
    let traceback = report::traceback(request, &exception, stage, None);
    Verdict::Failure(exception.with_traceback(traceback))
}

fn failed_verdict(worker: &Worker, request: &Request, failed: Failure) -> Verdict {
    let mask = |value: &Value| match value {
        Value::String(text) => Value::String(request.mask(text)),
        other => other.clone(),
    };
    let exception = Exception {
        exc_type: failed.exc_type,
        exc_module: Some(failed.exc_module.unwrap_or_else(|| "builtins".to_owned())),
        exc_message: failed.exc_message.iter().map(mask).collect(),
        traceback: Some(request.mask(&failed.traceback)),
    };
    match failed.retry {
        Some(retry) if request.message.retries < most_retries(worker, request) => {
            let after = retry.after.unwrap_or_else(|| backoff(worker, request));
            Verdict::Retry {
                cause: exception,
                after,
            }
        }
        _ => Verdict::Failure(exception),
    }
}

/// How often the task may be tried again in all.
fn most_retries(worker: &Worker, request: &Request) -> i64 {
    let entry = worker.registry.get(request.name);
    entry.map_or(0, |entry| i64::from(entry.options().max_retries))
}

fn backoff(worker: &Worker, request: &Request) -> Duration {
    let entry = worker.registry.get(request.name);
    entry.map_or(Duration::ZERO, |entry| {
        entry.options().backoff.after(request.message.retries)
    })
}

/// Stores the report; a database that is away delays the success, up to a bound.
async fn commit(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    call: &Call,
    run: &Run,
    found: &Report,
    mut lease: Option<Permit>,
) -> Verdict {
    if found.shallow {
        log::warn!(
            "Task {}: the history was cut off by CLONE_DEPTH, so lines older than it are counted \
             for the oldest commits",
            request.label()
        );
    }
    for (path, reason) in &found.skipped {
        log::warn!("Task {}: {path} was left out: {reason}", request.label());
    }
    let value = call.value(found);
    let rows = completed(found, &value, Utc::now());
    let run = Run {
        shallow: found.shallow,
        ..run.clone()
    };
    let began = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        if request.fenced() {
            return Verdict::Fenced;
        }
        let error: Error = match succeed(worker, &run, &rows).await {
            Ok(()) => return Verdict::Success(value),
            Err(error) => error,
        };
        if !error.is_transient() || began.elapsed() > COMMIT_PATIENCE {
            let exception = Exception::operational(format!("{error}"));
            return failure(request, exception, "storing the analysis");
        }
        // Other tasks go on in the meantime, those for the same repository included.
        drop(lease.take());
        execute::step_aside(worker, request);
        log::warn!(
            "Task {}: {error}; trying again in {:.1} s",
            request.label(),
            pause.as_secs_f64()
        );
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(10));
    }
}

/// What the database is told of a run that did not succeed.
fn ended(verdict: &Verdict) -> Option<Ended> {
    let (state, error) = match verdict {
        Verdict::Failure(exception)
        | Verdict::TimedOut(exception)
        | Verdict::WorkerLost(exception)
        | Verdict::GivenUp(exception) => (RunState::Failure, exception.repr()),
        Verdict::Retry { cause, .. } => (RunState::Retry, cause.repr()),
        Verdict::Revoked { reason, .. } => (RunState::Revoked, (*reason).to_owned()),
        Verdict::Cancelled(Cancel::Shutdown) => {
            (RunState::Retry, "the worker was shut down".to_owned())
        }
        Verdict::Cancelled(Cancel::ConnectionLoss) => {
            (RunState::Retry, "the broker was lost".to_owned())
        }
        Verdict::Success(_) | Verdict::Repeated(_) | Verdict::Fenced => return None,
    };
    Some(Ended {
        state,
        error,
        finished_at: Utc::now(),
    })
}
