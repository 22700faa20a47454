//! A canvas becomes messages: a task, a chain, a group or a chord.
//!
//! A [`Publisher`] sends what follows one task. Options work as in Celery: a call's options
//! override those that a signature stores, except its group and its stamps; what a compound
//! signature is called with reaches its parts in the ways told at each function.
//!
//! Answers for `apply_async` and `run` in `celery.canvas`, and for `send_task` as far as it
//! fills in what a call leaves open.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::freeze::{
    CHAIN_OPTIONS, Call, Freezer, Options, Place, fresh_id, group_of, header_group, is,
    unroll_chords, with_arguments,
};
use super::invalid;
use super::links::{link, link_error_to_body, push_link, strip_header_links};
use super::results::Handle;
use super::route::send;
use super::unlock::watch;
use crate::protocol::arguments::bind;
use crate::protocol::exception::Exception;
use crate::protocol::publish::TaskCall;
use crate::protocol::signature::Signature;
use crate::worker::Worker;
use crate::worker::request::Request;

/// The task on whose behalf something is published.
#[derive(Debug, Clone, Copy)]
pub(in crate::worker) struct Origin<'a> {
    /// Its id, the parent of what it publishes.
    pub id: &'a str,
    /// First task of its workflow.
    pub root_id: &'a str,
    /// The priority that what it publishes inherits.
    pub priority: Option<u8>,
}

impl<'a> Origin<'a> {
    /// What is called by no task.
    pub(super) const NOBODY: Self = Self {
        id: "",
        root_id: "",
        priority: None,
    };

    fn is_nobody(&self) -> bool {
        self.id.is_empty()
    }

    /// A request as origin.
    pub(in crate::worker) fn of(request: &'a Request) -> Self {
        Self {
            id: request.id(),
            root_id: request.message.root(),
            priority: request.inherited_priority,
        }
    }

    /// What a call says that follows from it.
    pub(super) fn options(&self) -> Options {
        let mut options = Options::new();
        if self.is_nobody() {
            return options;
        }
        options.insert("parent_id".to_owned(), self.id.into());
        options.insert("root_id".to_owned(), self.root_id.into());
        options.extend(
            self.priority
                .map(|priority| ("priority".to_owned(), priority.into())),
        );
        options
    }
}

/// Arguments of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given<'a> {
    pub args: &'a [Value],
    pub kwargs: &'a Map<String, Value>,
}

/// Sends what follows a task, and remembers its children.
pub(super) struct Publisher<'a> {
    worker: &'a Arc<Worker>,
    origin: Origin<'a>,
    freezer: Freezer<'a>,
    /// Result tuples of what was sent, as `children` has them.
    pub children: Vec<Value>,
}

impl<'a> Publisher<'a> {
    pub(super) fn new(worker: &'a Arc<Worker>, origin: Origin<'a>) -> Self {
        let backend = &worker.backend;
        let chords = if backend.supports_chords() || backend.driver() == "database" {
            Ok(())
        } else {
            let text = format!(
                "The result backend {} cannot join the parts of a chord; use redis:// or db+postgresql://",
                worker.backend.driver()
            );
            Err(Exception::builtin("NotImplementedError", text))
        };
        Self {
            worker,
            origin,
            freezer: Freezer::new(&worker.oid, chords),
            children: Vec::new(),
        }
    }

    /// Sends a signature of any kind. `trail`: it counts as a child.
    pub(super) fn apply<'b>(
        &'b mut self,
        signature: Signature,
        given: Given<'b>,
        options: Options,
        trail: bool,
    ) -> BoxFuture<'b, Result<Handle, Exception>> {
        Box::pin(async move {
            match signature.subtask_type() {
                Some("chain") => self.chain(&signature, given, options, trail).await,
                Some("group") => self.group(signature, given, options, trail).await,
                Some("chord") => self.chord(&signature, given, options, trail).await,
                _ => self.task(signature, given, options, trail).await,
            }
        })
    }

    /// The same with positional arguments only, as a child of the origin.
    pub(super) async fn call(
        &mut self,
        signature: &Signature,
        args: &[Value],
        options: Options,
    ) -> Result<(), Exception> {
        let kwargs = Map::new();
        let given = Given {
            args,
            kwargs: &kwargs,
        };
        self.apply(signature.clone(), given, options, true).await?;
        Ok(())
    }

    /// Calls signatures as a group made for the occasion.
    pub(super) async fn call_together(
        &mut self,
        signatures: Vec<Signature>,
        args: &[Value],
        options: Options,
    ) -> Result<(), Exception> {
        self.call(&group_of(signatures, None), args, options).await
    }

    async fn task(
        &mut self,
        signature: Signature,
        given: Given<'_>,
        options: Options,
        trail: bool,
    ) -> Result<Handle, Exception> {
        let mut signature = with_arguments(signature, given.args, Some(given.kwargs));
        merge(&mut signature, options);
        let now = self.worker.now();
        let mut call =
            TaskCall::from_signature(&signature, &[], fresh_id, &now).map_err(invalid)?;
        // A call of a task that we know is checked here, as Celery checks it: what can only
        // fail is not sent, and the caller is told.
        if let Some(entry) = self.worker.registry.get(&call.name)
            && let Some(parameters) = &entry.parameters
        {
            bind(parameters, &call.args, &call.kwargs).map_err(Exception::type_error)?;
        }
        if call.root_id.is_none() || call.parent_id.is_none() {
            call.priority = call.priority.or(self.origin.priority);
        }
        if self.origin.is_nobody() {
            call.root_id.get_or_insert_with(|| call.id.clone());
        } else {
            call.root_id
                .get_or_insert_with(|| self.origin.root_id.to_owned());
            call.parent_id
                .get_or_insert_with(|| self.origin.id.to_owned());
        }
        call.origin = self.worker.origin();
        if call.reply_to.is_empty() {
            call.reply_to.clone_from(&self.worker.oid);
        }
        send(self.worker, &call).await?;
        let result = self.freezer.results.task(&call.id);
        self.remember(result, trail);
        Ok(result)
    }

    fn remember(&mut self, result: Handle, trail: bool) {
        if trail {
            self.children.push(self.freezer.results.tuple(result));
        }
    }

    /// The first step is sent; the others travel in its message, the next one last.
    async fn chain(
        &mut self,
        signature: &Signature,
        given: Given<'_>,
        options: Options,
        trail: bool,
    ) -> Result<Handle, Exception> {
        let mut options = overriding_all(signature, options);
        let mut taken: Options = CHAIN_OPTIONS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), options.shift_remove(*name)?)))
            .filter(|(_, value)| !value.is_null())
            .collect();
        let mut text = |name: &str| match taken.shift_remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let mut last = Place {
            id: text("task_id"),
            group_id: text("group_id"),
            root_id: text("root_id"),
            ..Place::default()
        };
        last.group_index = taken.get("group_index").and_then(Value::as_i64);
        last.chord = taken.shift_remove("chord");
        let errbacks = links(taken.shift_remove("link_error"))?;
        let call = Call {
            args: given.args,
            kwargs: Some(given.kwargs),
            errbacks: &errbacks,
            run: true,
        };
        let tasks = signature.tasks().map_err(invalid)?;
        let mut steps = self.freezer.steps(tasks, &call, &last)?;
        let Some(result) = steps.result else {
            return Ok(self.freezer.results.task(&fresh_id()));
        };
        let callbacks = links(taken.shift_remove("link"))?;
        if let Some(last) = steps.tasks.first_mut()
            && !callbacks.is_empty()
        {
            let mut all = last.links("link").map_err(invalid)?;
            all.extend(callbacks);
            last.set_option(
                "link",
                all.into_iter()
                    .map(Signature::into_value)
                    .collect::<Value>(),
            );
        }
        let Some(first) = steps.tasks.pop() else {
            return Ok(result);
        };
        let is_single = steps.tasks.is_empty();
        // What the caller still has to do comes after what this chain brings.
        let mut rest = match options.shift_remove("chain") {
            Some(Value::Array(rest)) => rest,
            _ => Vec::new(),
        };
        rest.extend(steps.tasks.into_iter().map(Signature::into_value));
        options.insert("chain".to_owned(), Value::Array(rest));
        let nothing = Map::new();
        let none = Given {
            args: &[],
            kwargs: &nothing,
        };
        let sent = self.apply(first, none, options, trail).await?;
        Ok(if is_single { sent } else { result })
    }

    /// Members are sent in order. The size of a chord is told to the backend just before the
    /// last of them, for none can complete it earlier.
    async fn group(
        &mut self,
        mut signature: Signature,
        given: Given<'_>,
        mut options: Options,
        trail: bool,
    ) -> Result<Handle, Exception> {
        for name in ["link", "link_error"] {
            if options
                .shift_remove(name)
                .is_some_and(|value| !value.is_null())
            {
                let text = "Cannot add link to group: use a chord";
                return Err(Exception::type_error(text));
            }
        }
        let tasks = signature.tasks().map_err(invalid)?;
        if tasks.is_empty() {
            return self.freezer.freeze(&mut signature, &Place::default());
        }
        let mut options = overriding(&signature, options);
        let id = match options.shift_remove("task_id") {
            Some(Value::String(id)) => id,
            _ => fresh_id(),
        };
        options.insert("group_id".to_owned(), id.as_str().into());
        options.shift_remove("group_index");
        let root = options
            .get("root_id")
            .and_then(Value::as_str)
            .map(str::to_owned);
        let chord = options.shift_remove("chord").filter(|body| !body.is_null());
        let mut prepared = Vec::with_capacity(tasks.len());
        self.prepare(tasks, &id, root.as_deref(), &mut prepared)?;
        let mut size = 0;
        let (count, mut results) = (prepared.len(), Vec::with_capacity(prepared.len()));
        for (position, (member, result)) in prepared.into_iter().enumerate() {
            let chord = chord.clone().or_else(|| member.option("chord").cloned());
            size += parts(&member)?;
            let mut options = options.clone();
            if let Some(body) = chord {
                if position + 1 == count {
                    self.start_chord(&id, size).await?;
                }
                options.insert("chord".to_owned(), body);
            }
            self.apply(member, given, options, false).await?;
            results.push(result);
        }
        let result = match results[..] {
            // A group of one chain that ends in a group: the inner group stands for both.
            [only] if self.freezer.results.members(only).is_some() => only,
            _ => self.freezer.results.group(&id, results),
        };
        self.remember(result, trail);
        Ok(result)
    }

    async fn start_chord(&self, id: &str, size: u64) -> Result<(), Exception> {
        if !self.worker.backend.supports_chords() {
            return Ok(());
        }
        let started = self.worker.backend.chord_start(id, size).await;
        started.map_err(|error| {
            Exception::operational(format!("cannot start the chord {id}: {error}"))
        })
    }

    fn prepare(
        &mut self,
        tasks: Vec<Signature>,
        id: &str,
        root: Option<&str>,
        prepared: &mut Vec<(Signature, Handle)>,
    ) -> Result<(), Exception> {
        for (index, mut task) in tasks.into_iter().enumerate() {
            if is(&task, "group") {
                self.prepare(task.tasks().map_err(invalid)?, id, root, prepared)?;
                continue;
            }
            if is(&task, "chain") && task.tasks().map_err(invalid)?.is_empty() {
                continue;
            }
            let place = Place {
                group_id: Some(id.to_owned()),
                group_index: i64::try_from(index).ok(),
                root_id: root.map(str::to_owned),
                ..Place::default()
            };
            let result = self.freezer.freeze(&mut task, &place)?;
            prepared.push((task, result));
        }
        Ok(())
    }

    /// The header is sent; its parts carry the body, which gets nearly all options of the
    /// chord and of its call, the rest of a chain among them.
    async fn chord(
        &mut self,
        signature: &Signature,
        given: Given<'_>,
        mut options: Options,
        trail: bool,
    ) -> Result<Handle, Exception> {
        self.freezer.chords.clone()?;
        let args = if signature.is_immutable() || given.args.is_empty() {
            signature.args().to_vec()
        } else {
            signature.args_with(given.args)
        };
        let Some(mut body) = signature.body().map_err(invalid)? else {
            return Err(invalid("a chord without a body".to_owned()));
        };
        let mut kwargs = match signature.kwarg("kwargs") {
            Some(Value::Object(kwargs)) => kwargs.clone(),
            _ => Map::new(),
        };
        kwargs.extend(given.kwargs.clone());
        options.retain(|_, value| !value.is_null());
        // Callbacks of the call are added to those of the body; the other options replace.
        let mut added: Vec<(&str, Option<Value>)> = Vec::new();
        for name in ["link", "link_error"] {
            let own = signature.option(name).cloned();
            added.push((name, options.shift_remove(name).or(own)));
        }
        let mut replacing = options.clone();
        for name in ["countdown", "eta", "parent_id", "task_id"] {
            replacing.shift_remove(name);
        }
        merge(&mut body, replacing);
        let root = body.option_str("root_id").map(str::to_owned);
        let body_id = options.shift_remove("task_id");
        let body_id = body_id.or_else(|| signature.option("task_id").cloned());

        let mut options = overriding_all(signature, options);
        let mut delay = Options::new();
        for name in ["countdown", "eta"] {
            delay.extend(
                options
                    .shift_remove(name)
                    .map(|value| (name.to_owned(), value)),
            );
        }
        for name in ["task_id", "link", "link_error"] {
            options.shift_remove(name);
        }
        for (name, found) in added {
            let mut seen: Vec<Signature> = Vec::new();
            for mut one in links(found)? {
                if name == "link" && is(&body, "group") {
                    one.set("immutable", Value::Bool(true));
                }
                if seen.contains(&one) {
                    continue;
                }
                seen.push(one.clone());
                match name {
                    // Python finds no callback that the body came with equal to one it adds
                    // (a list is no tuple), so what is there twice is called twice.
                    "link" => link(&mut body, &one, push_link)?,
                    _ => link_error_to_body(&mut body, &one, true)?,
                }
            }
        }
        for (name, value) in &options {
            if name != "parent_id" {
                body.set_option(name, value.clone());
            }
        }
        if is(&body, "chain") {
            unroll_chords(&mut body)?;
        }
        let mut header = header_group(signature)?;
        let id = header.task_id().map_or_else(fresh_id, str::to_owned);
        header.set_option("task_id", id.as_str());
        let place = Place {
            id: body_id.and_then(|id| id.as_str().map(str::to_owned)),
            group_id: Some(id.clone()),
            root_id: root.clone(),
            ..Place::default()
        };
        let body_result = self.freezer.freeze(&mut body, &place)?;
        strip_header_links(&mut body)?;

        let place = Place {
            group_id: Some(id.clone()),
            root_id: root,
            ..Place::default()
        };
        let header_result = self.freezer.freeze_group(&mut header, &place)?;
        let members = self.freezer.results.members(header_result);
        let members = members.map(<[Handle]>::to_vec).unwrap_or_default();
        if members.is_empty() {
            let kwargs = Map::new();
            let given = Given {
                args: &[Value::Array(Vec::new())],
                kwargs: &kwargs,
            };
            self.apply(body, given, Options::new(), trail).await?;
        } else {
            let nested = |member: &Handle| self.freezer.results.members(*member).is_some();
            if members.iter().any(nested) {
                let tuple = self.freezer.results.tuple(header_result);
                let saved = self.worker.backend.save_group(&id, &tuple).await;
                saved.map_err(|error| {
                    Exception::operational(format!("cannot save the group {id}: {error}"))
                })?;
            }
            if !self.worker.backend.supports_chords() {
                let mut tuple = self.freezer.results.tuple(header_result);
                let parts = tuple.get_mut(1).map(Value::take).unwrap_or_default();
                watch(self.worker, self.origin, &id, &body, parts).await?;
            }
            options.shift_remove("chain");
            options.insert("chord".to_owned(), body.into_value());
            options.insert("task_id".to_owned(), id.into());
            options.extend(delay);
            let given = Given {
                args: &args,
                kwargs: &kwargs,
            };
            self.apply(header, given, options, trail).await?;
        }
        let results = &mut self.freezer.results;
        results.set_parent(body_result, Some(header_result));
        Ok(body_result)
    }
}

/// How many parts of its chord a signature makes up.
fn parts(signature: &Signature) -> Result<u64, Exception> {
    match signature.subtask_type() {
        Some("group") => signature.tasks().map_err(invalid)?.iter().map(parts).sum(),
        Some("chain") => {
            for task in signature.tasks().map_err(invalid)?.iter().rev() {
                match parts(task)? {
                    0 => {}
                    some => return Ok(some),
                }
            }
            Ok(0)
        }
        Some("chord") => match signature.body().map_err(invalid)? {
            Some(body) => parts(&body),
            None => Ok(0),
        },
        _ => Ok(1),
    }
}

fn links(value: Option<Value>) -> Result<Vec<Signature>, Exception> {
    let links = Signature::list(value.unwrap_or(Value::Null)).map_err(invalid)?;
    Ok(links.unwrap_or_default())
}

/// Whether an option of a signature cannot be overridden by a call: its group, for parts that
/// are counted elsewhere would be missed, and its stamps.
fn is_kept(signature: &Signature, name: &str) -> bool {
    let stored = signature
        .options()
        .is_some_and(|options| options.contains_key(name));
    let stamps = signature
        .option("stamped_headers")
        .and_then(Value::as_array);
    let is_stamp = stamps.is_some_and(|stamps| stamps.iter().any(|stamp| stamp == name));
    stored && (is_stamp || ["group_id", "stamped_headers"].contains(&name))
}

/// Stores the options of a call in the signature; null ones count as absent.
fn merge(signature: &mut Signature, options: Options) {
    for (name, value) in options {
        if !value.is_null() && !is_kept(signature, &name) {
            signature.set_option(&name, value);
        }
    }
}

/// The options of a signature, overridden by those of a call but for those that are kept.
fn overriding(signature: &Signature, call: Options) -> Options {
    let mut options = signature.options().cloned().unwrap_or_default();
    for (name, value) in call {
        if !is_kept(signature, &name) {
            options.insert(name, value);
        }
    }
    options
}

/// The same where nothing is kept.
fn overriding_all(signature: &Signature, call: Options) -> Options {
    let mut options = signature.options().cloned().unwrap_or_default();
    options.retain(|_, value| !value.is_null());
    options.extend(call);
    options
}

/// What a task that calls itself again, or is named by a later one, shows as its result.
pub(super) fn lone_tuple(id: &str) -> Value {
    json!([[id, null], null])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(value: Value) -> Signature {
        Signature::from_value(value).unwrap()
    }

    #[test]
    fn a_call_cannot_move_a_task_to_another_group_nor_replace_its_stamps() {
        let mut task = signature(json!({"task": "t", "options": {
            "group_id": "own", "stamped_headers": ["stage"], "stage": "prod", "priority": 1}}));
        let options = json!({"group_id": "other", "stage": "test", "priority": 2, "queue": null});
        let Value::Object(options) = options else {
            unreachable!()
        };
        merge(&mut task, options);
        assert_eq!(task.option_str("group_id"), Some("own"));
        assert_eq!(task.option_str("stage"), Some("prod"));
        assert_eq!(task.option_i64("priority"), Some(2));
        assert!(!task.options().unwrap().contains_key("queue"));
    }

    #[test]
    fn the_parts_of_a_chord_are_those_that_answer_to_it() {
        let task = json!({"task": "t"});
        let group = json!({"task": "celery.group", "subtask_type": "group",
            "kwargs": {"tasks": [task, task]}});
        let chain = json!({"task": "celery.chain", "subtask_type": "chain",
            "kwargs": {"tasks": [task, group]}});
        let chord = json!({"task": "celery.chord", "subtask_type": "chord",
            "kwargs": {"header": [task, task, task], "body": chain, "kwargs": {}}});
        for (value, expected) in [(task, 1), (group, 2), (chain, 2), (chord, 2)] {
            assert_eq!(
                parts(&signature(value.clone())).unwrap(),
                expected,
                "{value}"
            );
        }
    }
}
