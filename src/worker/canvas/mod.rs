//! What follows a task: callbacks, chains, groups, chords, errbacks, retries.
//!
//! [`apply`] turns a signature into messages, with the help of [`freeze`] (ids and places),
//! [`links`] (whose callbacks those of a compound become) and [`results`] (what the parts will
//! return); [`chord`] joins parts and tells bodies, [`unlock`] does so where parts are not
//! counted; [`failure`] tells those who wait for what will never run; [`route`] sends. Answers
//! for `celery.canvas` as far as a worker performs it, and for the follow-ups of
//! `celery.app.trace`. Everything published here is published before the result is stored.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::Worker;
use super::request::Request;
use crate::protocol::exception::Exception;
use crate::protocol::publish::TaskCall;
use crate::protocol::signature::Signature;

mod apply;
mod chord;
mod failure;
mod freeze;
mod join;
mod links;
mod results;
mod route;
mod unlock;

use apply::{Given, Origin, Publisher};

pub(in crate::worker) use chord::chord_part;
pub(in crate::worker) use failure::{errbacks, fail_chain};
pub use route::routed;
pub(in crate::worker) use unlock::unlock;

fn invalid(text: String) -> Exception {
    Exception::builtin("ValueError", format!("cannot call the signature: {text}"))
}

/// Calls a signature on behalf of no task.
pub(in crate::worker) async fn call(
    worker: &Arc<Worker>,
    signature: &Signature,
) -> Result<(), Exception> {
    let mut publisher = Publisher::new(worker, Origin::NOBODY);
    publisher.call(signature, &[], Map::new()).await
}

/// Publishes the callbacks and the next step of the chain. `children` gets what was published,
/// also where an error came in between.
pub(in crate::worker) async fn follow_ups(
    worker: &Arc<Worker>,
    request: &Request,
    value: &Value,
    children: &mut Vec<Value>,
) -> Result<(), Exception> {
    let embed = &request.message.embed;
    let callbacks = embed.callbacks.as_deref().unwrap_or_default();
    let chain = embed.chain.as_deref().unwrap_or_default();
    if callbacks.is_empty() && chain.is_empty() {
        return Ok(());
    }
    let mut publisher = Publisher::new(worker, Origin::of(request));
    let published = publish_follow_ups(&mut publisher, request, callbacks, chain, value);
    let outcome = Box::pin(published).await;
    children.append(&mut publisher.children);
    outcome
}

async fn publish_follow_ups(
    publisher: &mut Publisher<'_>,
    request: &Request,
    callbacks: &[Signature],
    chain: &[Signature],
    value: &Value,
) -> Result<(), Exception> {
    let options = Origin::of(request).options();
    let args = std::slice::from_ref(value);
    match callbacks {
        [] => {}
        [one] => publisher.call(one, args, options.clone()).await?,
        several => {
            let is_group = |callback: &&Signature| freeze::is(callback, "group");
            for callback in several.iter().filter(is_group) {
                publisher.call(callback, args, options.clone()).await?;
            }
            let plain = several.iter().filter(|one| !is_group(one)).cloned();
            let plain: Vec<Signature> = plain.collect();
            if !plain.is_empty() {
                publisher
                    .call_together(plain, args, options.clone())
                    .await?;
            }
        }
    }
    if let Some((next, rest)) = chain.split_last() {
        let mut options = options;
        let rest = rest.iter().map(Signature::to_value).collect();
        options.insert("chain".to_owned(), Value::Array(rest));
        let kwargs = Map::new();
        let given = Given {
            args,
            kwargs: &kwargs,
        };
        publisher.apply(next.clone(), given, options, true).await?;
    }
    Ok(())
}

/// Publishes the message again, to be run after a while; the child is the task itself.
pub(in crate::worker) async fn republish(
    worker: &Arc<Worker>,
    request: &Request,
    after: Duration,
) -> Result<Vec<Value>, Exception> {
    let eta = worker.now() + chrono::Duration::from_std(after).unwrap_or_default();
    let mut call = TaskCall::retry_of(&request.message, Some(eta));
    // As Celery, which copies what the first sender said of itself.
    if call.origin.is_empty() {
        call.origin = worker.origin();
    }
    if call.queue.is_some() {
        call.queue = Some(request.queue.clone());
    }
    if call.reply_to.is_empty() {
        call.reply_to.clone_from(&worker.oid);
    }
    call.ignore_result = Some(request.rules.ignore_result);
    // Unlike Celery's, it has no time in which the broker may drop it: a worker takes it in the
    // end and tells that it expired.
    route::send(worker, &call).await?;
    Ok(vec![apply::lone_tuple(request.id())])
}
