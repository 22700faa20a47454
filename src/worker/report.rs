//! What a request's life looks like from outside: Celery's log lines and task events.

use std::time::Duration;

use serde_json::Value;

use super::Worker;
use super::effects::{Cancel, Verdict};
use super::execute::Ending;
use super::request::Request;
use crate::events::Event;
use crate::protocol::exception::{Exception, Traceback};
use crate::protocol::saferepr::{MAX_LENGTH, MAX_LEVELS, saferepr};
use crate::protocol::time::format_iso;

fn send(worker: &Worker, request: &Request, event: &Event) {
    if request.send_events {
        worker.events.send(event);
    }
}

/// The message arrived and will run.
pub fn received(worker: &Worker, request: &Request) {
    let message = &request.message;
    match &message.eta {
        Some(eta) => {
            log::info!(
                "Task {} received, ETA: {}",
                request.label(),
                format_iso(eta)
            );
        }
        None => log::info!("Task {} received", request.label()),
    }
    if worker.events.sends_task_events() {
        let event = Event::task_received(message, &request.args_repr, &request.kwargs_repr);
        send(worker, request, &event);
    }
}

/// A slot accepted it.
pub fn started(worker: &Worker, request: &Request) {
    if worker.events.sends_task_events() {
        send(worker, request, &Event::task_started(request.id()));
    }
}

/// It waits for its user's limit: what Celery sends for a task that is to run again.
pub fn waits(worker: &Worker, request: &Request, why: &Exception) {
    send(
        worker,
        request,
        &Event::task_retried(request.id(), &why.repr(), ""),
    );
}

/// How far it is: an event of our own, which monitors tolerate.
pub fn progress(worker: &Worker, request: &Request, meta: &Value) {
    if !worker.events.sends_task_events() {
        return;
    }
    let event = Event::new("task-progress").with("uuid", request.id());
    let event = meta
        .as_object()
        .into_iter()
        .flatten()
        .fold(event, |event, (name, value)| {
            event.with(name.clone(), value.clone())
        });
    send(worker, request, &event);
}

/// It went back to its queue or was dropped.
pub fn rejected_event(worker: &Worker, request: &Request, requeue: bool) {
    send(
        worker,
        request,
        &Event::task_rejected(request.id(), requeue),
    );
}

/// The event that belongs to the end of a request.
pub fn ended_event(worker: &Worker, request: &Request, ending: &Ending) {
    if !worker.events.sends_task_events() {
        return;
    }
    let id = request.id();
    let event = match &ending.verdict {
        Verdict::Success(value) | Verdict::Repeated(value) => {
            let runtime = ending.runtime.as_secs_f64();
            Event::task_succeeded(id, &short_repr(request, value), Some(runtime))
        }
        Verdict::Failure(exception)
        | Verdict::TimedOut(exception)
        | Verdict::WorkerLost(exception)
        | Verdict::GivenUp(exception) => {
            Event::task_failed(id, &exception.repr(), Some(traceback_of(exception)))
        }
        Verdict::Retry { cause, .. } => Event::task_retried(id, &cause.repr(), traceback_of(cause)),
        Verdict::Revoked { reason, signal } => {
            Event::task_revoked(id, *reason == "terminated", *signal, *reason == "expired")
        }
        Verdict::Cancelled(_) => Event::task_cancelled(id),
        Verdict::Fenced => return,
    };
    send(worker, request, &event);
}

fn traceback_of(exception: &Exception) -> &str {
    exception.traceback.as_deref().unwrap_or_default()
}

fn short_repr(request: &Request, value: &Value) -> String {
    request.mask(&saferepr(value, MAX_LENGTH, MAX_LEVELS))
}

/// The soft time limit is over.
pub fn soft_limit(request: &Request) {
    let seconds = request.soft_limit().unwrap_or_default().as_secs_f64();
    log::warn!(
        "Soft time limit ({seconds}s) exceeded for {}",
        request.label()
    );
}

/// The log line that belongs to the end of a request.
pub fn ended(request: &Request, ending: &Ending) {
    let label = request.label();
    let seconds = ending.runtime.as_secs_f64();
    match &ending.verdict {
        Verdict::Success(value) => {
            if log::log_enabled!(log::Level::Info) {
                log::info!(
                    "Task {label} succeeded in {seconds}s: {}",
                    short_repr(request, value)
                );
            }
        }
        Verdict::Failure(exception) => log::error!(
            "Task {label} raised unexpected: {}\n{}",
            exception.repr(),
            exception
                .traceback
                .as_deref()
                .unwrap_or_default()
                .trim_end(),
        ),
        Verdict::TimedOut(exception) => {
            let limit = request.hard_limit().unwrap_or(Duration::ZERO).as_secs_f64();
            log::error!("Task handler raised error: {}", exception.repr());
            log::error!("Hard time limit ({limit}s) exceeded for {label}");
        }
        Verdict::WorkerLost(exception) => {
            log::error!("Task handler raised error: {} in {label}", exception.repr());
        }
        Verdict::GivenUp(exception) => {
            log::error!("{} (kept in quarantine)", exception.repr());
        }
        Verdict::Retry { cause, after } => {
            log::info!(
                "Task {label} retry: Retry in {}s: {}",
                after.as_secs_f64(),
                cause.repr()
            );
        }
        Verdict::Revoked {
            reason: "terminated",
            ..
        } => {}
        Verdict::Revoked { .. } => log::info!("Discarding revoked task: {label}"),
        Verdict::Repeated(_) => {
            log::info!("Task {label} ignored: Task already completed successfully.")
        }
        Verdict::Cancelled(Cancel::Shutdown) => {
            log::warn!("Task {label} cancelled: the worker shuts down")
        }
        // Told when it was ended.
        Verdict::Cancelled(Cancel::ConnectionLoss) => {}
        Verdict::Fenced => log::warn!(
            "Task {label} lost its lease: another worker has the message now, so this run has no \
             effect. Raise visibility_timeout if this happens without a fault of the network.",
        ),
    }
}

/// A traceback that helps: which stage failed, on what, and because of what.
pub fn traceback(
    request: &Request,
    exception: &Exception,
    stage: &str,
    causes: Option<&str>,
) -> String {
    let mut traceback = Traceback::new().step(request.name, stage);
    if let Some(causes) = causes {
        traceback = traceback.cause(causes);
    }
    request.mask(&traceback.build(exception))
}
