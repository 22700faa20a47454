//! Those who wait for what will never run are told: later steps of a failed chain, the body of
//! a chord that cannot be joined, and errbacks.
//!
//! Answers for `_fail_chain`, `_call_task_errbacks` and `chord_error_from_stack` of
//! `celery.backends.base`. Errbacks are always published ("old style"): the ones that Python
//! calls in the worker itself are Python functions, which this worker does not have.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;

use super::apply::{Origin, Publisher};
use super::chord::{Part, part_return};
use super::freeze::{Freezer, Place, fresh_id, is};
use crate::backend::{Meta, ReplyTo};
use crate::pidbox::{self, Mailbox};
use crate::protocol::exception::Exception;
use crate::protocol::serialization::Accept;
use crate::protocol::signature::Signature;
use crate::protocol::state::State;
use crate::worker::Worker;
use crate::worker::effects::Verdict;
use crate::worker::request::Request;

/// Calls the errbacks of a request: each a task with the failed task's id as first argument.
pub(in crate::worker) async fn errbacks(worker: &Arc<Worker>, request: &Request) {
    let errbacks = request.message.embed.errbacks.as_deref();
    let mut children = Vec::new();
    let origin = Origin::of(request);
    let called = call_errbacks(
        worker,
        origin.root_id,
        request.id(),
        errbacks.unwrap_or_default().to_vec(),
        &mut children,
    );
    if let Err(error) = Box::pin(called).await {
        log::error!(
            "Cannot call the errbacks of {}: {}",
            request.label(),
            error.repr()
        );
    }
}

async fn call_errbacks(
    worker: &Arc<Worker>,
    root_id: &str,
    failed: &str,
    errbacks: Vec<Signature>,
    children: &mut Vec<Value>,
) -> Result<(), Exception> {
    if errbacks.is_empty() {
        return Ok(());
    }
    let origin = Origin {
        id: failed,
        root_id,
        priority: None,
    };
    let mut publisher = Publisher::new(worker, origin);
    let args = [Value::from(failed)];
    let outcome = publisher
        .call_together(errbacks, &args, origin.options())
        .await;
    children.append(&mut publisher.children);
    outcome
}

/// Stores the failure under the ids of the chain's later steps, so that whoever waits for the
/// end of the chain is told. `store` is off where results are ignored.
pub(in crate::worker) async fn fail_chain(
    worker: &Arc<Worker>,
    request: &Request,
    verdict: &Verdict,
    store: bool,
) {
    let (Verdict::Failure(exception)
    | Verdict::TimedOut(exception)
    | Verdict::WorkerLost(exception)
    | Verdict::GivenUp(exception)) = verdict
    else {
        return;
    };
    let steps = request.message.embed.chain.clone().unwrap_or_default();
    let failed = fail_steps(worker, Origin::of(request), steps, exception, store);
    Box::pin(failed).await;
}

/// Later steps of a failed chain: their own ids, their chords, and the bodies of chord steps,
/// for a chord is done when its body is.
async fn fail_steps(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    steps: Vec<Signature>,
    exception: &Exception,
    store: bool,
) {
    let mut waiting: VecDeque<Signature> = steps.into();
    while let Some(step) = waiting.pop_front() {
        let chord = step.option("chord").cloned().map(Signature::from_value);
        let id = step.task_id();
        let mut counts = false;
        if let (Some(Ok(_)), Some(id)) = (&chord, id) {
            // What failed before has returned its part already.
            counts = !has_failed(worker, id).await;
        }
        if let Some(id) = id
            && store
        {
            let mut meta = failure(worker, id, exception);
            meta.group_id = step.option_str("group_id").map(str::to_owned);
            meta.parent_id = step.option_str("parent_id").map(str::to_owned);
            write(worker, &meta, step.option_str("reply_to")).await;
        }
        if let (true, Some(Ok(body)), Some(id), Some(group)) =
            (counts, chord, id, step.option_str("group_id"))
        {
            let part = Part {
                group,
                task_id: id,
                index: step.option_i64("group_index"),
                state: State::Failure,
                result: exception.to_value(),
                children: &[],
            };
            Box::pin(part_return(worker, origin, &part, &body)).await;
        }
        if is(&step, "chord")
            && let Ok(Some(body)) = step.body()
        {
            waiting.push_back(body);
        }
    }
}

async fn has_failed(worker: &Worker, id: &str) -> bool {
    let stored = worker.backend.get(id).await.ok().flatten();
    stored.is_some_and(|meta| ["FAILURE", "REVOKED"].contains(&meta.status.as_str()))
}

/// A chord that failed: the errbacks of its body are called, and whoever waits for the body is
/// told. `cause` is the exception of the part that failed, where there is one.
pub(super) async fn fail_body(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    body: &Signature,
    error: &Exception,
    cause: Option<&Exception>,
    children: &[Value],
) {
    let mut children = children.to_vec();
    if is(body, "group") {
        let mut cause = cause.unwrap_or(error).clone();
        if cause.traceback.is_none() {
            cause.traceback.clone_from(&error.traceback);
        }
        fail_group(worker, body, &cause, &mut children).await;
    } else {
        let id = body.task_id().map_or_else(fresh_id, str::to_owned);
        let errbacks = body.links("link_error").unwrap_or_default();
        let called = call_errbacks(worker, &id, &id, errbacks, &mut children).await;
        let error = called.err().unwrap_or_else(|| error.clone());
        let mut meta = failure(worker, &id, &error);
        meta.children = Value::Array(children);
        write(worker, &meta, body.option_str("reply_to")).await;
    }
    let chain = body.option("chain").cloned().unwrap_or(Value::Null);
    let steps = Signature::list(chain).ok().flatten().unwrap_or_default();
    fail_steps(worker, origin, steps, error, true).await;
}

/// Each task of a group that is the body fails with the exception of the part.
async fn fail_group(
    worker: &Arc<Worker>,
    body: &Signature,
    cause: &Exception,
    children: &mut Vec<Value>,
) {
    let mut group = body.clone();
    let mut freezer = Freezer::new(&worker.oid, Ok(()));
    let Ok(result) = freezer.freeze(&mut group, &Place::default()) else {
        return;
    };
    let tasks = group.tasks().unwrap_or_default();
    let known: Vec<(Option<String>, Vec<Signature>)> = tasks.iter().map(result_errbacks).collect();
    let shared = group.links("link_error").unwrap_or_default();
    let members = freezer.results.members(result).unwrap_or_default();
    let ids: Vec<String> = members
        .iter()
        .map(|member| freezer.results.id(*member).to_owned())
        .collect();
    for id in ids.clone() {
        let own = known.iter().find(|(task, _)| task.as_deref() == Some(&id));
        let own = own.map(|(_, errbacks)| errbacks.as_slice());
        let mut errbacks: Vec<Signature> = Vec::new();
        for errback in own.unwrap_or_default().iter().chain(&shared) {
            if !errbacks.contains(errback) {
                errbacks.push(errback.clone());
            }
        }
        if let Err(error) = call_errbacks(worker, &id, &id, errbacks, children).await {
            log::error!("Cannot call the errbacks of {id}: {}", error.repr());
        }
        let mut meta = failure(worker, &id, cause);
        meta.children = Value::Array(children.clone());
        write(worker, &meta, group.option_str("reply_to")).await;
    }
    let mut meta = failure(worker, freezer.results.id(result), cause);
    meta.children = Value::Array(children.clone());
    write(worker, &meta, group.option_str("reply_to")).await;
    revoke(worker, ids);
}

/// Those of a group that are out already must not run; every worker is told.
fn revoke(worker: &Arc<Worker>, ids: Vec<String>) {
    worker.revoked.add(ids.iter().cloned());
    let Some(channel) = worker.link.channel() else {
        return;
    };
    let addresses = crate::worker::heart::addresses(&worker.settings);
    tokio::spawn(async move {
        let mailbox = Mailbox::new(channel, addresses, Accept::default());
        let request = pidbox::Request::new("revoke")
            .with("task_id", ids)
            .with("terminate", false)
            .with("signal", "SIGTERM");
        if let Err(error) = mailbox.cast(&request).await {
            log::warn!("Cannot revoke the other tasks of a group: {error}");
        }
    });
}

/// The id of what a signature returns, and the errbacks linked to it.
fn result_errbacks(signature: &Signature) -> (Option<String>, Vec<Signature>) {
    let mut errbacks = Vec::new();
    let mut current = signature.clone();
    while is(&current, "chord")
        && let Ok(Some(body)) = current.body()
    {
        errbacks.extend(current.links("link_error").unwrap_or_default());
        current = body;
    }
    errbacks.extend(current.links("link_error").unwrap_or_default());
    if is(&current, "group") {
        for task in current.tasks().unwrap_or_default() {
            errbacks.extend(result_errbacks(&task).1);
        }
    }
    (current.task_id().map(str::to_owned), errbacks)
}

fn failure(worker: &Worker, id: &str, exception: &Exception) -> Meta {
    let mut meta = Meta::new(id, State::Failure.as_str(), exception.to_value());
    meta.traceback.clone_from(&exception.traceback);
    meta.date_done = Some(worker.now());
    meta
}

/// Stores FAILURE for a task that never ran.
async fn write(worker: &Worker, meta: &Meta, reply_to: Option<&str>) {
    let id = meta.task_id.as_str();
    let to = ReplyTo {
        reply_to,
        correlation_id: Some(id),
    };
    if let Err(error) = worker.backend.store(meta, &to).await {
        log::error!("Cannot store the failure of task {id}: {error}");
    }
}
