//! Chords on result backends that cannot count: a task looks until all parts have returned.
//!
//! Whoever publishes such a chord publishes `celery.chord_unlock` with it; the task is retried
//! each `result_chord_retry_interval` until every part is ready, joins their results and
//! publishes the body, or tells who waits for it that a part failed. Python workers and this
//! one may take turns. Whoever finds the parts ready claims the end of the chord first, for the
//! message may be delivered again and may have become two. Answers for `unlock_chord` in
//! `celery/app/builtins.py` and `Backend.fallback_chord_unlock`.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::apply::{Origin, Publisher};
use super::chord::body_is_known;
use super::failure::fail_body;
use super::freeze::{Options, fresh_id};
use super::route::{routed, send};
use super::{invalid, join};
use crate::backend::{Claim, Taken};
use crate::protocol::exception::Exception;
use crate::protocol::publish::TaskCall;
use crate::protocol::signature::Signature;
use crate::protocol::time;
use crate::tasks::{ChordUnlock, Definition};
use crate::worker::Worker;
use crate::worker::effects::Verdict;
use crate::worker::request::Request;

/// From the publication of a chord to the first look at its parts, in seconds.
const FIRST_LOOK: f64 = 1.0;

/// Several fit into the length of a claim.
const RENEWAL: Duration = Duration::from_secs(15);

/// Publishes the task that will watch a chord, before the first part is published.
pub(super) async fn watch(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    group: &str,
    body: &Signature,
    parts: Value,
) -> Result<(), Exception> {
    let args = vec![group.into(), body.to_value()];
    let mut kwargs = Map::new();
    kwargs.insert("interval".to_owned(), Value::Null);
    kwargs.insert("max_retries".to_owned(), Value::Null);
    kwargs.insert("result".to_owned(), parts);
    let mut call = TaskCall::new(fresh_id(), ChordUnlock::NAME, args, kwargs);
    let text = |name| body.option_str(name).map(str::to_owned);
    call.queue = text("queue").or_else(|| routed(&worker.settings.task_routes, body.task()));
    call.exchange = text("exchange");
    call.routing_key = text("routing_key");
    let priority = body.option("priority").and_then(Value::as_u64);
    call.priority = Some(priority.and_then(|it| u8::try_from(it).ok()).unwrap_or(0));
    call.eta = Some(time::add_seconds(&worker.now(), FIRST_LOOK));
    call.ignore_result = Some(true);
    if let [Some(id), Some(root)] = ["parent_id", "root_id"].map(|name| {
        let options = origin.options();
        options.get(name).and_then(Value::as_str).map(str::to_owned)
    }) {
        (call.parent_id, call.root_id) = (Some(id), Some(root));
    }
    call.origin = worker.origin();
    call.reply_to.clone_from(&worker.oid);
    send(worker, &call).await
}

/// What the task was called with.
struct Watched {
    group: String,
    body: Signature,
    parts: Value,
    interval: Duration,
    max_retries: Option<i64>,
}

impl Watched {
    fn new(worker: &Worker, request: &Request) -> Result<Self, Exception> {
        let message = &request.message;
        let names = ["group_id", "callback", "interval", "max_retries", "result"];
        let [group, body, interval, max_retries, parts] = std::array::from_fn(|position| {
            let found = message.args.get(position);
            found
                .or_else(|| message.kwargs.get(names[position]))
                .cloned()
        });
        let missing = |name: &str| {
            Exception::type_error(format!(
                "unlock_chord() missing a required argument: '{name}'"
            ))
        };
        let group = group.ok_or_else(|| missing("group_id"))?;
        let body = body.ok_or_else(|| missing("callback"))?;
        let interval = interval.as_ref().and_then(Value::as_f64);
        let interval = interval.unwrap_or(worker.settings.result_chord_retry_interval);
        Ok(Self {
            group: group.as_str().unwrap_or_default().to_owned(),
            body: Signature::from_value(body).map_err(invalid)?,
            parts: json!([null, parts.unwrap_or_else(|| json!([]))]),
            interval: Duration::try_from_secs_f64(interval).unwrap_or(Duration::from_secs(1)),
            max_retries: max_retries.as_ref().and_then(Value::as_i64),
        })
    }
}

/// One look at a chord.
pub(in crate::worker) async fn unlock(
    worker: &Arc<Worker>,
    request: &Request,
) -> Result<Verdict, Exception> {
    let watched = Watched::new(worker, request)?;
    let again = match first_open(worker, &watched.parts).await {
        Ok(None) => None,
        Ok(Some(_)) => Some(None),
        Err(error) => Some(Some(Exception::operational(error.to_string()))),
    };
    if let Some(cause) = again {
        let retries = request.message.retries;
        if watched.max_retries.is_none_or(|most| retries < most) {
            let when = format!("in {}s", watched.interval.as_secs_f64());
            return Ok(Verdict::Retry {
                cause: Exception::retry(&when, cause.as_ref()),
                after: watched.interval,
            });
        }
        let error = cause.unwrap_or_else(|| {
            let text = format!("Can't retry {}", request.label());
            Exception::new(
                "celery.exceptions",
                "MaxRetriesExceededError",
                vec![text.into()],
            )
        });
        let text = format!("chord_unlock could not be retried: {}", error.repr());
        let ending = Ending::Failed(Exception::chord_error(text), None);
        return match end(worker, request, &watched, ending).await {
            Verdict::Success(_) => Err(error),
            verdict => Ok(verdict),
        };
    }
    let ending = match join::group(worker, &watched.parts).await {
        Ok(values) => Ending::Joined(values),
        Err(cause) => {
            let culprit = first_failed(worker, &watched.parts).await;
            let error = match culprit {
                Some(id) => Exception::chord_dependency(&id, &cause),
                None => Exception::chord_error(cause.repr()),
            };
            Ending::Failed(error, Some(cause))
        }
    };
    Ok(end(worker, request, &watched, ending).await)
}

/// What became of the header.
enum Ending {
    Joined(Vec<Value>),
    Failed(Exception, Option<Exception>),
}

/// Ends a chord, unless somebody else does.
async fn end(
    worker: &Arc<Worker>,
    request: &Request,
    watched: &Watched,
    ending: Ending,
) -> Verdict {
    let origin = Origin::of(request);
    let body = &watched.body;
    let later = |cause: Option<Exception>| {
        let when = format!("in {}s", watched.interval.as_secs_f64());
        Verdict::Retry {
            cause: Exception::retry(&when, cause.as_ref()),
            after: watched.interval,
        }
    };
    let (claim, was_left) = match worker.backend.chord_take(&watched.group).await {
        Ok(Taken::First(claim)) => (claim, false),
        Ok(Taken::Left(claim)) => (claim, true),
        Ok(Taken::Done) => return Verdict::Success(Value::Null),
        // Its owner may die before it is through.
        Ok(Taken::Claimed) => return later(None),
        Err(error) => return later(Some(Exception::operational(error.to_string()))),
    };
    // A worker that died, maybe Python's, may have come as far as this.
    let may_be_known = was_left || request.redelivered;
    let work = async {
        if may_be_known && body_is_known(worker, body).await {
            return;
        }
        let failed = match ending {
            Ending::Failed(error, cause) => Some((error, cause)),
            Ending::Joined(values) => {
                let args = [Value::Array(values)];
                let mut publisher = Publisher::new(worker, origin);
                let published = publisher.call(body, &args, Options::new()).await;
                published.err().map(|error| {
                    let text = format!("Callback error: {}", error.repr());
                    (Exception::chord_error(text), None)
                })
            }
        };
        if let Some((error, cause)) = failed {
            fail(worker, origin, watched, error, cause.as_ref()).await;
        }
    };
    match while_kept(worker, &watched.group, &claim, work).await {
        Ok(true) => {}
        Ok(false) => return later(None),
        Err(error) => return later(Some(Exception::operational(error.to_string()))),
    }
    if let Err(error) = worker.backend.chord_done(&watched.group, &claim).await {
        log::warn!("Chord {}: {error}", watched.group);
    }
    Verdict::Success(Value::Null)
}

/// Does what ends a chord and renews its claim meanwhile: a broker or a result backend that is
/// away holds it up for longer than a claim lasts. False when the claim was lost.
async fn while_kept(
    worker: &Worker,
    group: &str,
    claim: &Claim,
    work: impl Future<Output = ()>,
) -> Result<bool, crate::backend::Error> {
    let mut work = std::pin::pin!(work);
    loop {
        if !worker.backend.chord_keep(group, claim).await? {
            return Ok(false);
        }
        if tokio::time::timeout(RENEWAL, work.as_mut()).await.is_ok() {
            return Ok(true);
        }
    }
}

async fn fail(
    worker: &Arc<Worker>,
    origin: Origin<'_>,
    watched: &Watched,
    error: Exception,
    cause: Option<&Exception>,
) {
    log::error!("Chord {} raised: {}", watched.group, error.repr());
    let traceback = format!(
        "Traceback (most recent call last):\n  chord {}\n{}\n",
        watched.group,
        error.last_line()
    );
    let error = error.with_traceback(traceback);
    fail_body(worker, origin, &watched.body, &error, cause, &[]).await;
}

/// The first part that has not returned.
async fn first_open(
    worker: &Worker,
    tuple: &Value,
) -> Result<Option<String>, crate::backend::Error> {
    find(worker, tuple, |status| {
        !status.is_some_and(|status| ["SUCCESS", "FAILURE", "REVOKED"].contains(&status))
    })
    .await
}

async fn first_failed(worker: &Worker, tuple: &Value) -> Option<String> {
    let is_failed = |status: Option<&str>| {
        status.is_some_and(|status| ["FAILURE", "REVOKED"].contains(&status))
    };
    find(worker, tuple, is_failed).await.ok().flatten()
}

/// The first task of a result tuple whose state is like that.
fn find<'a>(
    worker: &'a Worker,
    tuple: &'a Value,
    is_like: impl Fn(Option<&str>) -> bool + Copy + Send + 'a,
) -> BoxFuture<'a, Result<Option<String>, crate::backend::Error>> {
    Box::pin(async move {
        if let Some(members) = tuple.get(1).and_then(Value::as_array) {
            for member in members {
                if let Some(id) = find(worker, member, is_like).await? {
                    return Ok(Some(id));
                }
            }
            return Ok(None);
        }
        let id = tuple
            .pointer("/0/0")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let meta = worker.backend.get(id).await?;
        let status = meta.as_ref().map(|meta| meta.status.as_str());
        Ok(is_like(status).then(|| id.to_owned()))
    })
}
