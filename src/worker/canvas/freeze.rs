//! Freezing: every task of a canvas gets its id before any of it is published.
//!
//! That is how the last step of a chain, the body of a chord and the members of a group can be
//! named by those who come before them. Ids that are fixed already (a client froze the canvas)
//! stay. A group that something follows becomes the header of a chord here.
//!
//! Answers for `freeze` of `celery.canvas` and for `prepare_steps` of its chain.

use std::collections::{HashSet, VecDeque};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::invalid;
use super::links::{append_link, link, link_error, strip_header_links};
use super::results::{Handle, Results};
use crate::protocol::exception::Exception;
use crate::protocol::signature::Signature;

/// Options of a signature or a call.
pub(super) type Options = Map<String, Value>;

/// What freezing tells a signature about its place. Absent: as the signature has it.
#[derive(Debug, Clone, Default)]
pub(super) struct Place {
    /// Id, unless one is fixed.
    pub id: Option<String>,
    /// Group, unless one is fixed.
    pub group_id: Option<String>,
    /// Position in the group.
    pub group_index: Option<i64>,
    /// Body of the chord it is a part of.
    pub chord: Option<Value>,
    /// First task of the workflow.
    pub root_id: Option<String>,
}

impl Place {
    fn rooted(root_id: Option<&str>) -> Self {
        Self {
            root_id: root_id.map(str::to_owned),
            ..Self::default()
        }
    }
}

/// A chain ready to be sent.
pub(super) struct Steps {
    /// The steps, the first one last, as the message has them.
    pub tasks: Vec<Signature>,
    /// Each of them as the chain was written: a group and what follows it, where the step is
    /// their chord. Arguments do not reach such a group, but would reach the chord.
    pub written: Vec<Vec<Signature>>,
    /// What the chain as a whole returns.
    pub result: Option<Handle>,
}

/// Fixes ids and remembers the results they stand for.
pub(super) struct Freezer<'a> {
    /// The graph of results.
    pub results: Results,
    /// Queue for replies, where a signature names none.
    pub oid: &'a str,
    /// Whether the result backend can join the parts of a chord; else why not.
    pub chords: Result<(), Exception>,
    /// Ids that it gave to headers. Others stand for an earlier run of a chord, and a chord
    /// that runs again must not be counted with it.
    headers: HashSet<String>,
}

pub(super) fn fresh_id() -> String {
    Uuid::new_v4().to_string()
}

pub(super) fn is(signature: &Signature, kind: &str) -> bool {
    signature.subtask_type() == Some(kind)
}

impl<'a> Freezer<'a> {
    /// With an empty graph.
    pub(super) fn new(oid: &'a str, chords: Result<(), Exception>) -> Self {
        Self {
            results: Results::default(),
            oid,
            chords,
            headers: HashSet::new(),
        }
    }

    /// Fixes the ids of a canvas and of everything in it.
    pub(super) fn freeze(
        &mut self,
        signature: &mut Signature,
        place: &Place,
    ) -> Result<Handle, Exception> {
        match signature.subtask_type() {
            Some("chain") => self.freeze_chain(signature, place),
            Some("group") => self.freeze_group(signature, place),
            Some("chord") => self.freeze_chord(signature, place),
            _ => Ok(self.freeze_task(signature, place)),
        }
    }

    fn freeze_task(&mut self, signature: &mut Signature, place: &Place) -> Handle {
        let id = fixed_id(signature, place.id.as_deref());
        if let Some(root) = &place.root_id {
            signature.set_option("root_id", root.as_str());
        }
        if signature.option("reply_to").is_none() {
            signature.set_option("reply_to", self.oid);
        }
        if let Some(group) = &place.group_id
            && signature.option("group_id").is_none()
        {
            signature.set_option("group_id", group.as_str());
        }
        set_membership(signature, place);
        self.results.task(&id)
    }

    fn freeze_chain(
        &mut self,
        signature: &mut Signature,
        place: &Place,
    ) -> Result<Handle, Exception> {
        let tasks = signature.tasks().map_err(invalid)?;
        let call = Call {
            run: false,
            ..Call::default()
        };
        let steps = self.steps(tasks, &call, place)?;
        let Some(result) = steps.result else {
            let id = place.id.clone().unwrap_or_else(fresh_id);
            return Ok(self.results.task(&id));
        };
        signature.set_option("task_id", self.results.id(result));
        let tasks = steps.written.into_iter().rev().flatten();
        let tasks = tasks.map(Signature::into_value).collect();
        set_kwarg(signature, "tasks", Value::Array(tasks));
        Ok(result)
    }

    /// Fixes the id of a group and those of its members, groups among them dissolved.
    pub(super) fn freeze_group(
        &mut self,
        signature: &mut Signature,
        place: &Place,
    ) -> Result<Handle, Exception> {
        // What the group is told to be is its own id; `place.id` is meant for tasks.
        let id = fixed_id(signature, None);
        if let Some(group) = &place.group_id {
            signature.set_option("group_id", group.as_str());
        }
        set_membership(signature, place);
        let root = signature.option_str("root_id").map(str::to_owned);
        let root = root.or_else(|| place.root_id.clone());
        if let Some(root) = &root {
            signature.set_option("root_id", root.as_str());
        }
        let mut waiting: VecDeque<Signature> = signature.tasks().map_err(invalid)?.into();
        let (mut tasks, mut members) = (Vec::new(), Vec::new());
        while let Some(mut task) = waiting.pop_front() {
            if is(&task, "group") {
                // In reverse, as Celery has it: the order decides the indices.
                for inner in task.tasks().map_err(invalid)? {
                    waiting.push_front(inner);
                }
                continue;
            }
            if is(&task, "chain") && task.tasks().map_err(invalid)?.is_empty() {
                continue;
            }
            let inner = Place {
                group_id: place.group_id.clone(),
                group_index: i64::try_from(members.len()).ok(),
                ..Place::rooted(root.as_deref())
            };
            // The body is not copied into every member: whoever sends them adds it.
            members.push(self.freeze(&mut task, &inner)?);
            tasks.push(task.into_value());
        }
        set_kwarg(signature, "tasks", Value::Array(tasks));
        Ok(self.results.group(&id, members))
    }

    fn freeze_chord(
        &mut self,
        signature: &mut Signature,
        place: &Place,
    ) -> Result<Handle, Exception> {
        if signature
            .task_id()
            .is_none_or(|id| !self.headers.contains(id))
        {
            let id = fresh_id();
            signature.set_option("task_id", id.as_str());
            self.headers.insert(id);
        }
        let mut header = header_group(signature)?;
        let root = Place::rooted(place.root_id.as_deref());
        let header_result = self.freeze_group(&mut header, &root)?;
        signature.set_option("task_id", self.results.id(header_result));
        set_kwarg(signature, "header", header.into_value());
        let Some(mut body) = signature.body().map_err(invalid)? else {
            return Ok(header_result);
        };
        let result = self.freeze(&mut body, place)?;
        set_kwarg(signature, "body", body.into_value());
        let oldest = self.results.oldest(result);
        self.results.set_parent(oldest, Some(header_result));
        Ok(result)
    }

    /// The steps of a chain with chains among them spliced in, groups that something follows
    /// made headers, and ids fixed from the last step to the first.
    pub(super) fn steps(
        &mut self,
        tasks: Vec<Signature>,
        call: &Call<'_>,
        last: &Place,
    ) -> Result<Steps, Exception> {
        let mut waiting = first_real_step_first(tasks)?;
        let mut tasks: Vec<Signature> = Vec::new();
        let mut written: Vec<Vec<Signature>> = Vec::new();
        let mut results: Vec<Handle> = Vec::new();
        // The earliest result so far that has nothing before it yet.
        let mut open: Option<Handle> = None;
        while let Some(task) = waiting.pop_back() {
            let is_first = waiting.is_empty();
            let mut task = unrolled(task)?;
            if is_empty_group(&task)? && !(is_first && tasks.is_empty()) {
                continue;
            }
            if call.run && is_chord_with_chain(&task)? {
                waiting.extend(unroll_body(&task)?);
                continue;
            }
            if is_first {
                task = with_arguments(task, call.args, call.kwargs);
            }
            if is(&task, "chain") {
                waiting.extend(task.tasks().map_err(invalid)?);
                continue;
            }
            let is_last = results.is_empty();
            let mut header_of: Option<(Signature, Vec<Signature>)> = None;
            if is(&task, "group")
                && let (Some(body), Some(body_result)) = (tasks.pop(), results.pop())
            {
                let id = open.filter(|node| self.results.members(*node).is_none());
                let id = id.map(|node| self.results.id(node).to_owned());
                let chord = chord_of(&task, body, id, last.root_id.as_deref())?;
                header_of = Some((task, written.pop().unwrap_or_default()));
                task = chord;
                // The body's result stands in the graph again as the chord's.
                let later = results.last().copied();
                if let Some(node) = later.and_then(|from| self.results.child_of(from, body_result))
                {
                    self.results.set_parent(node, None);
                    open = Some(node);
                }
            }
            let result = if is_last {
                self.freeze(&mut task, last)?
            } else {
                self.freeze(&mut task, &Place::rooted(last.root_id.as_deref()))?
            };
            if !tasks.is_empty()
                && let Some(node) = open
                && self.results.parent(node).is_none()
            {
                self.results.set_parent(node, Some(result));
            }
            for errback in call.errbacks {
                link_error(&mut task, errback)?;
            }
            open = Some(result);
            if is(&task, "chord") {
                self.chords.clone()?;
                open = Some(self.results.oldest(result));
            }
            if !call.run {
                written.push(match header_of {
                    None => vec![task.clone()],
                    Some((mut group, body)) => {
                        let header = task.header().map_err(invalid)?;
                        let header = header.into_iter().map(Signature::into_value).collect();
                        set_kwarg(&mut group, "tasks", Value::Array(header));
                        std::iter::once(group).chain(body).collect()
                    }
                });
            }
            tasks.push(task);
            results.push(result);
        }
        if call.run {
            for task in &mut tasks {
                strip_header_links(task)?;
            }
        }
        Ok(Steps {
            tasks,
            written,
            result: results.first().copied(),
        })
    }
}

/// What a chain is called with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    /// Arguments of the first step.
    pub args: &'a [Value],
    /// Keyword arguments of the first step.
    pub kwargs: Option<&'a Map<String, Value>>,
    /// Errbacks of every step.
    pub errbacks: &'a [Signature],
    /// It is about to be sent, not only to be named.
    pub run: bool,
}

impl Default for Call<'_> {
    fn default() -> Self {
        Self {
            args: &[],
            kwargs: None,
            errbacks: &[],
            run: true,
        }
    }
}

/// Chains at the head are spliced in and empty groups before something else dropped, so that
/// arguments reach the first task that there really is.
fn first_real_step_first(tasks: Vec<Signature>) -> Result<VecDeque<Signature>, Exception> {
    let mut waiting: VecDeque<Signature> = tasks.into();
    let mut dropped = None;
    while let Some(head) = waiting.pop_front() {
        if is(&head, "chain") {
            for inner in head.tasks().map_err(invalid)?.into_iter().rev() {
                waiting.push_front(inner);
            }
            continue;
        }
        let head = unrolled(head)?;
        if is_empty_group(&head)? && !waiting.is_empty() {
            dropped = Some(head);
            continue;
        }
        waiting.push_front(head);
        break;
    }
    if waiting.is_empty() {
        waiting.extend(dropped);
    }
    Ok(waiting)
}

fn fixed_id(signature: &mut Signature, wanted: Option<&str>) -> String {
    if let Some(id) = signature.task_id() {
        return id.to_owned();
    }
    let id = wanted.map_or_else(fresh_id, str::to_owned);
    signature.set_option("task_id", id.as_str());
    id
}

fn set_membership(signature: &mut Signature, place: &Place) {
    if let Some(body) = &place.chord {
        signature.set_option("chord", body.clone());
    }
    if let Some(index) = place.group_index {
        signature.set_option("group_index", index);
    }
}

/// Sets one stored keyword argument.
pub(super) fn set_kwarg(signature: &mut Signature, name: &str, value: Value) {
    let mut kwargs = signature.kwargs();
    kwargs.insert(name.to_owned(), value);
    signature.set("kwargs", Value::Object(kwargs));
}

/// Arguments before a signature's own, unless it is immutable. Groups and chains have none of
/// their own and keep none.
pub(super) fn with_arguments(
    signature: Signature,
    args: &[Value],
    kwargs: Option<&Map<String, Value>>,
) -> Signature {
    if signature.is_immutable() || is(&signature, "group") || is(&signature, "chain") {
        return signature;
    }
    let mut signature = if args.is_empty() {
        signature
    } else {
        signature.with_prepended(args)
    };
    if let Some(kwargs) = kwargs.filter(|kwargs| !kwargs.is_empty()) {
        let mut all = signature.kwargs();
        all.extend(kwargs.clone());
        signature.set("kwargs", Value::Object(all));
    }
    signature
}

/// A group of these tasks.
pub(super) fn group_of(tasks: Vec<Signature>, id: Option<&str>) -> Signature {
    let mut group = Signature::new("celery.group", Vec::new(), Map::new());
    group.set("subtask_type", Value::from("group"));
    let tasks = tasks.into_iter().map(Signature::into_value).collect();
    set_kwarg(&mut group, "tasks", Value::Array(tasks));
    if let Some(id) = id {
        group.set_option("task_id", id);
    }
    group
}

/// The header of a chord as a group under the chord's id.
pub(super) fn header_group(chord: &Signature) -> Result<Signature, Exception> {
    let tasks = match chord.kwarg("header") {
        Some(one) if one.is_object() => {
            let one = Signature::from_value(one.clone()).map_err(invalid)?;
            if is(&one, "group") || is(&one, "chain") {
                one.tasks().map_err(invalid)?
            } else {
                vec![one]
            }
        }
        _ => chord.header().map_err(invalid)?,
    };
    Ok(group_of(tasks, chord.task_id()))
}

fn chord_of(
    group: &Signature,
    body: Signature,
    id: Option<String>,
    root_id: Option<&str>,
) -> Result<Signature, Exception> {
    let tasks = group.tasks().map_err(invalid)?;
    let header: Vec<Value> = tasks.into_iter().map(Signature::into_value).collect();
    let mut chord = Signature::new("celery.chord", Vec::new(), Map::new());
    chord.set("subtask_type", Value::from("chord"));
    chord.set(
        "kwargs",
        json!({"kwargs": {}, "header": header, "body": body.into_value()}),
    );
    if let Some(id) = id {
        chord.set_option("task_id", id);
    }
    if let Some(root) = root_id {
        chord.set_option("root_id", root);
    }
    Ok(chord)
}

/// A group of one is that one.
fn unrolled(signature: Signature) -> Result<Signature, Exception> {
    if !is(&signature, "group") {
        return Ok(signature);
    }
    let tasks = signature.tasks().map_err(invalid)?;
    match <[Signature; 1]>::try_from(tasks) {
        Ok([only]) => Ok(only),
        Err(_) => Ok(signature),
    }
}

fn is_empty_group(signature: &Signature) -> Result<bool, Exception> {
    Ok(is(signature, "group") && signature.tasks().map_err(invalid)?.is_empty())
}

/// Whether the body of a chord is a chain that begins with anything but a group.
fn is_chord_with_chain(signature: &Signature) -> Result<bool, Exception> {
    if !is(signature, "chord") {
        return Ok(false);
    }
    let Some(body) = signature.body().map_err(invalid)? else {
        return Ok(false);
    };
    let led_by = |tasks: Vec<Signature>| tasks.first().is_some_and(|first| !is(first, "group"));
    Ok(is(&body, "chain") && led_by(body.tasks().map_err(invalid)?))
}

/// Options that a chain keeps for itself when it runs; the others go to its first task.
pub(super) const CHAIN_OPTIONS: [&str; 8] = [
    "chord",
    "group_id",
    "group_index",
    "link",
    "link_error",
    "parent_id",
    "root_id",
    "task_id",
];

/// A chord whose body is a chain, as the chord with the chain's first task for body, and the
/// rest of the chain after it: else each header task would carry all of it.
fn unroll_body(chord: &Signature) -> Result<Vec<Signature>, Exception> {
    let Some(body) = chord.body().map_err(invalid)? else {
        return Ok(vec![chord.clone()]);
    };
    let mut tasks = body.tasks().map_err(invalid)?;
    for callback in body.links("link").map_err(invalid)? {
        if let Some(last) = tasks.last_mut() {
            link(last, &callback, append_link)?;
        }
    }
    for errback in body.links("link_error").map_err(invalid)? {
        for task in &mut tasks {
            link_error(task, &errback)?;
        }
    }
    let mut tasks = tasks.into_iter();
    let mut chord = chord.clone();
    if let Some(mut first) = tasks.next() {
        for (name, value) in body.options().into_iter().flatten() {
            let kept = name == "stamped_headers" && first.option("stamped_headers").is_some();
            if !CHAIN_OPTIONS.contains(&name.as_str()) && !value.is_null() && !kept {
                first.set_option(name, value.clone());
            }
        }
        set_kwarg(&mut chord, "body", first.into_value());
    }
    Ok(std::iter::once(chord).chain(tasks).collect())
}

/// Unrolls the bodies of all chords in a chain.
pub(super) fn unroll_chords(chain: &mut Signature) -> Result<(), Exception> {
    let mut waiting: VecDeque<Signature> = chain.tasks().map_err(invalid)?.into();
    let mut tasks = Vec::new();
    while let Some(mut task) = waiting.pop_front() {
        if is(&task, "chain") {
            unroll_chords(&mut task)?;
        }
        if is_chord_with_chain(&task)? {
            for part in unroll_body(&task)?.into_iter().rev() {
                waiting.push_front(part);
            }
        } else {
            tasks.push(task.into_value());
        }
    }
    set_kwarg(chain, "tasks", Value::Array(tasks));
    Ok(())
}
