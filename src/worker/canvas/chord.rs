//! The end of a chord: parts are counted, the last one publishes the body.
//!
//! The backend counts, and gives one worker the claim to finish the chord. A worker that dies
//! with the claim in its hands leaves it to expire; the part that is delivered again because of
//! that death waits for it here, so that no chord stays open. A Python worker that gets the part
//! instead does not wait, and the chord stays open as it would between Python workers.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::apply::{Origin, Publisher};
use super::failure::fail_body;
use super::freeze::Options;
use super::join;
use crate::backend::{ChordPart, ChordStatus, Claim, PartResult};
use crate::protocol::exception::Exception;
use crate::protocol::signature::Signature;
use crate::protocol::state::State;
use crate::worker::Worker;
use crate::worker::effects::Verdict;
use crate::worker::execute;
use crate::worker::request::Request;

/// How often a part asks whether the claim of another worker has ended.
const CLAIM_PAUSE: Duration = Duration::from_millis(500);

/// A part that returned.
pub(super) struct Part<'a> {
    /// The chord's group.
    pub group: &'a str,
    /// The part's task.
    pub task_id: &'a str,
    /// Its place in the header.
    pub index: Option<i64>,
    /// How it ended.
    pub state: State,
    /// Its value or exception.
    pub result: Value,
    /// What the running task has published so far.
    pub children: &'a [Value],
}

/// Why a chord failed.
struct Failed {
    error: Exception,
    cause: Option<Exception>,
}

/// Counts a request as part of its chord, if it is one.
pub(in crate::worker) async fn chord_part(
    worker: &Arc<Worker>,
    request: &Request,
    verdict: &Verdict,
    children: &[Value],
) {
    let message = &request.message;
    let (Some(body), Some(group)) = (&message.embed.chord, &message.group) else {
        return;
    };
    let Some((state, result, _)) = execute::record(verdict) else {
        return;
    };
    let part = Part {
        group,
        task_id: request.id(),
        index: message.group_index,
        state,
        result,
        children,
    };
    Box::pin(part_return(worker, Origin::of(request), &part, body)).await;
}

/// Counts a part; the last one finishes the chord.
pub(super) async fn part_return(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    part: &Part<'_>,
    body: &Signature,
) {
    if !worker.backend.supports_chords() {
        // `unlock` looks for it.
        return;
    }
    let counted = ChordPart {
        group_id: part.group,
        task_id: part.task_id,
        group_index: part.index,
        state: part.state.as_str(),
        result: &part.result,
    };
    let mut waited = false;
    let (claim, parts, group) = loop {
        match worker.backend.chord_part(&counted).await {
            Ok(ChordStatus::Waiting | ChordStatus::Done) => return,
            Ok(ChordStatus::Claimed) => {
                waited = true;
                tokio::time::sleep(CLAIM_PAUSE).await;
            }
            Ok(ChordStatus::Ready { claim, parts }) => break (claim, parts, None),
            Ok(ChordStatus::ReadyNested {
                claim,
                group,
                parts,
            }) => break (claim, parts, Some(group)),
            Err(error) => {
                log::error!(
                    "Chord {}: part {} cannot be counted: {error}. Check that the result backend \
                     is up; the body of the chord will not run.",
                    part.group,
                    part.task_id
                );
                return;
            }
        }
    };
    if waited && body_is_known(worker, body).await {
        // The worker that died had published the body.
        forget(worker, part.group, &claim).await;
        return;
    }
    let joined = match group {
        Some(group) => join::group(worker, &group).await.map_err(|error| {
            Box::new(Failed {
                error: Exception::chord_error(format!("Join error: {}", error.repr())),
                cause: None,
            })
        }),
        None => join_parts(parts),
    };
    let failed = match joined {
        Ok(values) => match publish_body(worker, origin, part, body, &claim, values).await {
            Ok(()) => return,
            Err(error) => Failed {
                error: Exception::chord_error(format!("Callback error: {}", error.repr())),
                cause: None,
            },
        },
        Err(failed) => *failed,
    };
    let Failed { error, cause } = failed;
    log::error!("Chord {} raised: {}", part.group, error.repr());
    let text = format!(
        "Traceback (most recent call last):\n  chord {}\n{}\n",
        part.group,
        error.last_line()
    );
    let error = error.with_traceback(text);
    fail_body(worker, origin, body, &error, cause.as_ref(), part.children).await;
    if let Err(error) = worker.backend.chord_fail(part.group).await {
        log::warn!("Chord {}: {error}", part.group);
    }
}

/// The values of the parts in their order, or the first failure among them.
fn join_parts(parts: Vec<PartResult>) -> Result<Vec<Value>, Box<Failed>> {
    let failed = |part: &&PartResult| part.state != State::Success.as_str();
    if let Some(part) = parts.iter().find(failed) {
        let cause = Exception::from_value(&part.result)
            .unwrap_or_else(|| Exception::builtin("Exception", part.state.clone()));
        return Err(Box::new(Failed {
            error: Exception::chord_dependency(&part.task_id, &cause),
            cause: Some(cause),
        }));
    }
    Ok(parts.into_iter().map(|part| part.result).collect())
}

pub(super) async fn body_is_known(worker: &Worker, body: &Signature) -> bool {
    match body.task_id() {
        Some(id) => worker.backend.get(id).await.ok().flatten().is_some(),
        None => false,
    }
}

async fn publish_body(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    part: &Part<'_>,
    body: &Signature,
    claim: &Claim,
    values: Vec<Value>,
) -> Result<(), Exception> {
    match worker.backend.chord_extend(part.group, claim).await {
        Ok(true) => {}
        Ok(false) => {
            log::warn!(
                "Chord {}: another worker has the claim by now and publishes the body",
                part.group
            );
            return Ok(());
        }
        Err(error) => log::warn!("Chord {}: {error}", part.group),
    }
    let args = [Value::Array(values)];
    let mut publisher = Publisher::new(worker, origin);
    let published = publisher.call(body, &args, Options::new()).await;
    forget(worker, part.group, claim).await;
    published
}

async fn forget(worker: &Worker, group: &str, claim: &Claim) {
    if let Err(error) = worker.backend.chord_done(group, claim).await {
        log::warn!("Chord {group}: {error}");
    }
}
