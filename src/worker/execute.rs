//! What the crate's `Task::run` does for us: everything Celery's trace does with a request.
//!
//! [`perform`] is the journey of one request: accepted by a slot, carried out by its task,
//! ended with a [`Verdict`]; [`finish`] performs the effects of the verdict in their order.
//! Answers for `celery.app.trace` and the callbacks of `celery.worker.request`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::consumer::Command;
use super::effects::{Effect, Verdict};
use super::request::Request;
use super::{Worker, canvas, report};
use crate::backend::{Extended, Meta};
use crate::pool::Slot;
use crate::protocol::arguments::bind;
use crate::protocol::exception::Exception;
use crate::protocol::state::State;
use crate::tasks::{self, Kind, builtin};

/// A state that the next one replaces is not worth a long wait.
const PASSING_PATIENCE: Duration = Duration::from_secs(2);
/// A result is kept as long as a result backend may reasonably be away.
const FINAL_PATIENCE: Duration = Duration::from_secs(3600);

/// How a journey ends, as far as effects can still add to it.
pub struct Ending {
    /// How the request ended.
    pub verdict: Verdict,
    /// What was published because of it, as result tuples.
    pub children: Vec<Value>,
    /// Since a slot accepted it.
    pub runtime: Duration,
}

/// Carries out a request that a slot accepted, with all its effects.
pub async fn perform(worker: Arc<Worker>, request: Arc<Request>, slot: Slot) {
    if let Some(verdict) = super::strategy::discarded(&worker, &request) {
        drop(slot);
        finish(&worker, &request, verdict, Duration::ZERO).await;
        return;
    }
    if let Some(entry) = worker.registry.get(request.name) {
        request.fix_limits(&entry.options());
    }
    worker.state.accept(&request, slot.pid());
    let accepted = Instant::now();
    if request.rules.acks_late {
        if let Some(tag) = request.tag() {
            worker.link.started(&tag);
        }
        // Where late acknowledgement is our choice and not the user's, as many messages are
        // fetched ahead as with an early one.
        let settings = &worker.settings;
        if settings.task_acks_late.is_none() && !settings.worker_disable_prefetch {
            step_aside(&worker, &request);
        }
    }
    for effect in request.rules.begin() {
        match effect {
            Effect::Ack => acknowledge(&worker, &request),
            Effect::StoreStarted => {
                let started = json!({"pid": slot.pid(), "hostname": worker.node});
                store_state(&worker, &request, State::Started, started).await;
            }
            _ => report::started(&worker, &request),
        }
    }
    let verdict = match already_successful(&worker, &request).await {
        Some(verdict) => verdict,
        None => carry_out(&worker, &request, slot).await,
    };
    finish(&worker, &request, verdict, accepted.elapsed()).await;
}

/// The request no longer keeps the worker from fetching another message.
pub fn step_aside(worker: &Worker, request: &Request) {
    if request.tag().is_some() && worker.state.step_aside(request) {
        // Without a loop there is nothing to be fetched.
        drop(worker.commands.send(Command::Resized));
    }
}

/// `worker_deduplicate_successful_tasks`: what is left to do for a task that succeeded in an
/// earlier delivery. What it published is among its children; without any, what should have
/// been was not, as where somebody else stored the success.
async fn already_successful(worker: &Worker, request: &Request) -> Option<Verdict> {
    let wanted = worker.settings.worker_deduplicate_successful_tasks
        && request.rules.acks_late
        && request.redelivered;
    if !wanted {
        return None;
    }
    let meta = worker.backend.get(request.id()).await.ok().flatten()?;
    if !meta.is_success() {
        return None;
    }
    let embed = &request.message.embed;
    let due = [&embed.callbacks, &embed.chain];
    let published = meta
        .children
        .as_array()
        .is_some_and(|them| !them.is_empty());
    Some(
        if published || due.iter().all(|due| due.as_ref().is_none_or(Vec::is_empty)) {
            Verdict::Repeated(meta.result)
        } else {
            Verdict::Success(meta.result)
        },
    )
}

async fn carry_out(worker: &Arc<Worker>, request: &Arc<Request>, slot: Slot) -> Verdict {
    let message = &request.message;
    let entry = worker.registry.get(request.name);
    let entry = entry.expect("because requests are made for registered tasks");
    let bound = match &entry.parameters {
        Some(parameters) => bind(parameters, &message.args, &message.kwargs),
        None => Ok(Vec::new()),
    };
    let raised = |exception: Exception, stage| {
        let traceback = report::traceback(request, &exception, stage, None);
        Verdict::Failure(exception.with_traceback(traceback))
    };
    let arguments = match bound {
        Ok(arguments) => arguments,
        Err(text) => return raised(Exception::type_error(text), "binding the arguments"),
    };
    match request.kind {
        Kind::Test => {
            drop(slot);
            Verdict::Success(tasks::test::answer(&arguments[0]))
        }
        Kind::Accumulate => {
            drop(slot);
            match builtin::accumulate(&message.args, &message.kwargs) {
                Ok(value) => Verdict::Success(value),
                Err(text) => raised(Exception::builtin("IndexError", text), "accumulating"),
            }
        }
        Kind::BackendCleanup => {
            drop(slot);
            match Box::pin(worker.backend.cleanup()).await {
                Ok(_) => Verdict::Success(Value::Null),
                Err(error) => raised(Exception::operational(error.to_string()), "cleaning up"),
            }
        }
        Kind::ChordUnlock => {
            drop(slot);
            match Box::pin(canvas::unlock(worker, request)).await {
                Ok(verdict) => verdict,
                Err(exception) => raised(exception, "watching a chord"),
            }
        }
        // Boxed, as all that few tasks come to: every journey would carry the room for it.
        Kind::AnalyzeRepo => Box::pin(super::analyze::run(worker, request, &arguments, slot)).await,
    }
}

/// Performs every effect of the verdict and lets go of the request.
pub async fn finish(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    verdict: Verdict,
    runtime: Duration,
) {
    // A message that somebody else holds by now is theirs to report on.
    let verdict = if request.fenced() {
        Verdict::Fenced
    } else {
        verdict
    };
    let mut ending = Ending {
        verdict,
        children: Vec::new(),
        runtime,
    };
    let started = Instant::now();
    let mut effects = request.rules.end(&ending.verdict, request.acknowledged());
    let mut next = 0;
    while next < effects.len() {
        let effect = effects[next];
        next += 1;
        if let Err(exception) = apply(worker, request, &mut ending, effect, started).await {
            // What could not be published turns the outcome into a failure (Celery's
            // OperationalError); its effects take the place of the remaining ones.
            ending.verdict = Verdict::Failure(exception);
            effects = request.rules.end(&ending.verdict, request.acknowledged());
            next = 0;
        }
    }
    report::ended(request, &ending);
    worker.state.release(request);
    if request.counts_in_prefetch() {
        drop(worker.commands.send(Command::Resized));
    }
}

async fn apply(
    worker: &Arc<Worker>,
    request: &Arc<Request>,
    ending: &mut Ending,
    effect: Effect,
    started: Instant,
) -> Result<(), Exception> {
    match effect {
        Effect::FollowUps => {
            if let Verdict::Success(value) = &ending.verdict {
                let children = &mut ending.children;
                let published = canvas::follow_ups(worker, request, value, children).await;
                published.map_err(|exception| {
                    let stage = "publishing what follows";
                    let traceback = report::traceback(request, &exception, stage, None);
                    exception.with_traceback(traceback)
                })?;
            }
        }
        Effect::Republish => {
            if let Verdict::Retry { after, .. } = &ending.verdict {
                let published = canvas::republish(worker, request, *after);
                ending.children = Box::pin(published).await?;
            }
        }
        Effect::Store => store(worker, request, ending).await,
        Effect::StoreStarted => {}
        Effect::ChordPart => {
            let children = &ending.children;
            canvas::chord_part(worker, request, &ending.verdict, children).await;
        }
        Effect::FailChain => {
            let store = !request.rules.ignore_result || request.rules.store_errors;
            canvas::fail_chain(worker, request, &ending.verdict, store).await;
        }
        Effect::Errbacks => canvas::errbacks(worker, request).await,
        Effect::Ack => acknowledge(worker, request),
        Effect::Quarantine => {
            if let (Some(tag), Verdict::GivenUp(why)) = (request.settle(), &ending.verdict) {
                worker.link.quarantine(tag, why.repr());
            }
        }
        Effect::Reject { requeue } => {
            if let Some(tag) = request.settle() {
                worker.link.reject(tag, requeue);
            }
        }
        Effect::Event => {
            ending.runtime += started.elapsed();
            report::ended_event(worker, request, ending);
        }
        Effect::RejectedEvent { requeue } => report::rejected_event(worker, request, requeue),
    }
    Ok(())
}

fn acknowledge(worker: &Worker, request: &Request) {
    // Before it counts as settled: the message may be on its way to us again.
    if !request.acknowledged() && !request.fenced() {
        let (doubts, retries) = (&worker.state.doubts, request.message.retries);
        match request.tag() {
            Some(_) => doubts.settling(request.id(), retries),
            None => doubts.disowned(request.id(), retries),
        }
    }
    if let Some(tag) = request.settle() {
        worker.link.ack(tag);
    }
}

/// The state, result and traceback that a verdict is stored as.
pub fn record(verdict: &Verdict) -> Option<(State, Value, Option<String>)> {
    let raised = |state, exception: &Exception| {
        Some((state, exception.to_value(), exception.traceback.clone()))
    };
    match verdict {
        Verdict::Success(value) | Verdict::Repeated(value) => {
            Some((State::Success, value.clone(), None))
        }
        Verdict::Failure(exception)
        | Verdict::TimedOut(exception)
        | Verdict::WorkerLost(exception)
        | Verdict::GivenUp(exception) => raised(State::Failure, exception),
        Verdict::Retry { cause, .. } => raised(State::Retry, cause),
        Verdict::Revoked { reason, .. } => Some((
            State::Revoked,
            Exception::task_revoked(reason).to_value(),
            None,
        )),
        Verdict::Cancelled(_) => Some((State::Retry, Exception::cancelled().to_value(), None)),
        Verdict::Fenced => None,
    }
}

async fn store(worker: &Worker, request: &Request, ending: &Ending) {
    let Some((state, result, traceback)) = record(&ending.verdict) else {
        return;
    };
    let mut meta = meta(worker, request, state, result);
    meta.traceback = traceback;
    meta.children = Value::Array(ending.children.clone());
    write(worker, request, &meta).await;
}

/// Stores a state that is not final: STARTED or PROGRESS.
pub async fn store_state(worker: &Worker, request: &Request, state: State, result: Value) {
    if request.rules.ignore_result || request.fenced() {
        return;
    }
    let meta = meta(worker, request, state, result);
    let reply_to = request.reply_to();
    let stored = worker.backend.store(&meta, &reply_to);
    match tokio::time::timeout(PASSING_PATIENCE, stored).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => not_stored(worker, request, &meta, &error),
        Err(_) => log::warn!(
            "Task {}: the state {} was left out, for the result backend does not answer",
            request.label(),
            meta.status
        ),
    }
}

/// Stores a final state, for as long as a backend that is away may take: the message is settled
/// only afterwards, so the result is not lost even if this process ends first.
async fn write(worker: &Worker, request: &Request, meta: &Meta) {
    let began = Instant::now();
    while let Err(error) = worker.backend.store(meta, &request.reply_to()).await {
        not_stored(worker, request, meta, &error);
        if !error.is_transient() || request.fenced() || began.elapsed() > FINAL_PATIENCE {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn not_stored(worker: &Worker, request: &Request, meta: &Meta, error: &crate::backend::Error) {
    log::error!(
        "Cannot store the state {} of {}: {error}. Check that the result backend {} is up and \
         has room; the task itself is done.",
        meta.status,
        request.label(),
        worker.backend.display_url(),
    );
}

/// The stored document of a request in some state.
pub fn meta(worker: &Worker, request: &Request, status: State, result: Value) -> Meta {
    let message = &request.message;
    let date_done =
        matches!(status, State::Success | State::Failure | State::Revoked).then(|| worker.now());
    let extended = worker.settings.result_extended.then(|| Extended {
        name: Value::from(request.name),
        args: request.shown_args(),
        kwargs: request.shown_kwargs(),
        worker: Value::from(worker.node.as_str()),
        retries: Value::from(message.retries),
        queue: Value::from(request.routing_key.as_str()),
        stamped_headers: message.stamped_headers.clone(),
        stamps: message.stamps.clone(),
    });
    Meta {
        status: status.as_str().to_owned(),
        result,
        traceback: None,
        children: Value::Array(Vec::new()),
        date_done,
        group_id: message.group.clone(),
        parent_id: message.parent_id.clone(),
        task_id: message.id.clone(),
        extended,
    }
}
