//! Callbacks and errbacks of compound signatures: whose they become.
//!
//! A compound signature is no task, so what is to be called after it is called after one of its
//! parts, or after each. Answers for `link` and `link_error` of `celery.canvas`.

use serde_json::Value;

use super::freeze::{is, set_kwarg};
use super::invalid;
use crate::protocol::exception::Exception;
use crate::protocol::signature::Signature;

/// How a callback joins those that are there.
pub(super) type Append = fn(&mut Signature, &str, &Signature) -> Result<(), Exception>;

/// Adds a callback unless it is there already.
pub(super) fn append_link(
    signature: &mut Signature,
    option: &str,
    new: &Signature,
) -> Result<(), Exception> {
    let mut links = signature.links(option).map_err(invalid)?;
    if !links.contains(new) {
        links.push(new.clone());
    }
    let links = links.into_iter().map(Signature::into_value).collect();
    signature.set_option(option, Value::Array(links));
    Ok(())
}

/// Adds a callback, whatever is there.
pub(super) fn push_link(
    signature: &mut Signature,
    option: &str,
    new: &Signature,
) -> Result<(), Exception> {
    let mut links = signature.links(option).map_err(invalid)?;
    links.push(new.clone());
    let links = links.into_iter().map(Signature::into_value).collect();
    signature.set_option(option, Value::Array(links));
    Ok(())
}

/// Applies a change to every task of a group.
fn each_task(
    signature: &mut Signature,
    change: impl Fn(&mut Signature) -> Result<(), Exception>,
) -> Result<(), Exception> {
    let mut tasks = signature.tasks().map_err(invalid)?;
    tasks.iter_mut().try_for_each(change)?;
    let tasks = tasks.into_iter().map(Signature::into_value).collect();
    set_kwarg(signature, "tasks", Value::Array(tasks));
    Ok(())
}

fn change_body(
    signature: &mut Signature,
    change: impl FnOnce(&mut Signature) -> Result<(), Exception>,
) -> Result<(), Exception> {
    if let Some(mut body) = signature.body().map_err(invalid)? {
        change(&mut body)?;
        set_kwarg(signature, "body", body.into_value());
    }
    Ok(())
}

/// Adds a callback: to the body of a chord, to the first task of a group (which cannot hand
/// over what its siblings return, so without arguments), else to the signature.
pub(super) fn link(
    signature: &mut Signature,
    callback: &Signature,
    append: Append,
) -> Result<(), Exception> {
    if is(signature, "chord") {
        return change_body(signature, |body| link(body, callback, append));
    }
    if !is(signature, "group") {
        return append(signature, "link", callback);
    }
    let mut callback = callback.clone();
    callback.set("immutable", Value::Bool(true));
    let mut tasks = signature.tasks().map_err(invalid)?;
    match tasks.first_mut() {
        Some(first) => link(first, &callback, append)?,
        None => return append_link(signature, "link", &callback),
    }
    let tasks = tasks.into_iter().map(Signature::into_value).collect();
    set_kwarg(signature, "tasks", Value::Array(tasks));
    Ok(())
}

/// Adds an errback: to all tasks of a group, to the body of a chord and of the chords in its
/// header, else to the signature.
pub(super) fn link_error(signature: &mut Signature, errback: &Signature) -> Result<(), Exception> {
    if is(signature, "group") {
        return each_task(signature, |task| link_error(task, errback));
    }
    if !is(signature, "chord") {
        return append_link(signature, "link_error", errback);
    }
    let mut header = signature.header().map_err(invalid)?;
    if header.iter().any(|task| is(task, "chord")) {
        for task in header.iter_mut().filter(|task| is(task, "chord")) {
            link_error(task, errback)?;
        }
        let header = header.into_iter().map(Signature::into_value).collect();
        set_kwarg(signature, "header", Value::Array(header));
    }
    change_body(signature, |body| link_error(body, errback))
}

/// Adds the errbacks of a chord to its body. A group for body passes them to its tasks, unless
/// it has errbacks of its own, which would take their place when it runs.
pub(super) fn link_error_to_body(
    body: &mut Signature,
    errback: &Signature,
    runs_as_group: bool,
) -> Result<(), Exception> {
    match body.subtask_type() {
        Some("group") if runs_as_group && body.option("link_error").is_some() => {
            append_link(body, "link_error", errback)
        }
        // Here as well what a task has of its own counts as different.
        Some("group") => each_task(body, |task| match task.subtask_type() {
            Some("group" | "chord") => link_error_to_body(task, errback, false),
            _ => push_link(task, "link_error", errback),
        }),
        Some("chord") => change_body(body, |body| link_error_to_body(body, errback, true)),
        _ => append_link(body, "link_error", errback),
    }
}

/// Header tasks get their chord's body when they are sent; a copy that a client froze into
/// each of them only makes the message large.
pub(super) fn strip_header_links(signature: &mut Signature) -> Result<(), Exception> {
    match signature.subtask_type() {
        Some("chord") => {
            let mut header = signature.header().map_err(invalid)?;
            for task in &mut header {
                clear_chord(task)?;
                strip_header_links(task)?;
            }
            let header = header.into_iter().map(Signature::into_value).collect();
            set_kwarg(signature, "header", Value::Array(header));
            change_body(signature, strip_header_links)
        }
        Some("group" | "chain") => each_task(signature, strip_header_links),
        _ => Ok(()),
    }
}

fn clear_chord(signature: &mut Signature) -> Result<(), Exception> {
    signature.take_option("chord");
    match signature.subtask_type() {
        Some("group") => each_task(signature, clear_chord),
        Some("chain") => {
            let mut tasks = signature.tasks().map_err(invalid)?;
            let Some(last) = tasks.last_mut() else {
                return Ok(());
            };
            clear_chord(last)?;
            let tasks = tasks.into_iter().map(Signature::into_value).collect();
            set_kwarg(signature, "tasks", Value::Array(tasks));
            Ok(())
        }
        Some("chord") => change_body(signature, clear_chord),
        _ => Ok(()),
    }
}
