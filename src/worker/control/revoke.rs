//! `revoke`, `terminate`, `revoke_by_stamped_headers`.

use std::collections::BTreeMap;
use std::str::FromStr;

use nix::sys::signal::Signal;
use serde_json::{Map, Value};

use super::{Arguments, Control, Outcome, is_truthy, ok, type_name};
use crate::backend::{Meta, ReplyTo};
use crate::pidbox::CommandError;
use crate::protocol::exception::Exception;
use crate::protocol::saferepr;
use crate::protocol::state::State;
use crate::transport::{Channel, Error, Notes};
use crate::worker::Worker;
use crate::worker::request::{Phase, Request};

/// A Python set of texts, in the order given.
fn set_repr(ids: &[String]) -> String {
    if ids.is_empty() {
        return "set()".to_owned();
    }
    let shown: Vec<String> = ids.iter().map(|id| saferepr::repr_str(id)).collect();
    format!("{{{}}}", shown.join(", "))
}

/// The ids of tasks, with Python's words for what cannot be one.
fn task_ids(value: Value) -> Result<Vec<String>, CommandError> {
    let items = match value {
        Value::Array(items) => items,
        Value::Null => Vec::new(),
        one => vec![one],
    };
    let ids = items.into_iter().enumerate().map(|(at, item)| match item {
        Value::String(id) => Ok(id),
        Value::Array(_) | Value::Object(_) => Err(CommandError::type_error(format!(
            "unhashable type: '{}'",
            type_name(&item)
        ))),
        other => Err(CommandError::type_error(format!(
            "sequence item {at}: expected str instance, {} found",
            type_name(&other)
        ))),
    });
    ids.collect()
}

/// `SIGTERM`, `TERM` or 15; TERM where nothing is said. Numbers that are no signal are refused,
/// which Celery hands to the system.
fn signal(value: Option<Value>) -> Result<i32, CommandError> {
    let number = match value {
        None => return Ok(Signal::SIGTERM as i32),
        Some(value) if !is_truthy(&value) => return Ok(Signal::SIGTERM as i32),
        Some(Value::Bool(_)) => Some(1),
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
            let known = number
                .as_i64()
                .and_then(|number| i32::try_from(number).ok());
            return known
                .and_then(|number| Signal::try_from(number).ok())
                .map(|known| known as i32)
                .ok_or_else(|| CommandError::value_error(format!("{number} is no signal")));
        }
        Some(Value::String(name)) if is_uppercase(&name) => {
            let full = if name.starts_with("SIG") {
                name
            } else {
                format!("SIG{name}")
            };
            let known = Signal::from_str(&full).map_err(|_| {
                CommandError(Exception::builtin(
                    "AttributeError",
                    format!("module 'signal' has no attribute '{full}'"),
                ))
            })?;
            Some(known as i32)
        }
        Some(_) => None,
    };
    number.ok_or_else(|| CommandError::type_error("signal name must be uppercase string."))
}

/// Python's `str.isupper`: letters, all of them capitals.
fn is_uppercase(name: &str) -> bool {
    name.chars().any(char::is_uppercase) && !name.chars().any(char::is_lowercase)
}

impl Control {
    pub(super) async fn revoke(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [ids] = arguments.required(["task_id"])?;
        let ids = task_ids(ids)?;
        if arguments.truthy("terminate") {
            let signal = signal(arguments.take("signal"))?;
            return Ok(self.terminate_ids(&ids, signal));
        }
        log::info!("Tasks flagged as revoked: {}", ids.join(", "));
        self.flag(&ids);
        Ok(ok(format!("tasks {} flagged as revoked", set_repr(&ids))))
    }

    pub(super) async fn terminate(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [signal_value, ids] = arguments.required(["signal", "task_id"])?;
        let ids = task_ids(ids)?;
        Ok(self.terminate_ids(&ids, signal(Some(signal_value))?))
    }

    /// Ends what runs, and keeps what does not run yet from running.
    fn terminate_ids(&self, ids: &[String], signal: i32) -> Value {
        // Before looking at what runs: what is about to start will see it.
        self.flag(ids);
        let mut found = Vec::new();
        for request in self.worker.state.held() {
            if ids.iter().any(|id| id == request.id()) {
                found.push(request.id().to_owned());
                if request.phase() == Phase::Active {
                    self.end(&request, signal);
                }
            }
        }
        let waits = |id: &&String| self.find_scheduled(id).is_some();
        found.extend(ids.iter().filter(waits).cloned());
        if found.is_empty() {
            return ok("terminate: tasks unknown");
        }
        ok(format!("terminate: {}", found.join(", ")))
    }

    /// Keeps tasks from being started, here and by workers that start later.
    fn flag(&self, ids: &[String]) {
        let worker = self.worker.clone();
        worker.revoked.add(ids.iter().cloned());
        let ids = ids.to_vec();
        tokio::spawn(async move {
            if let Some(channel) = worker.link.channel()
                && let Err(error) = channel.share_revoked(&ids, notes(&worker)).await
            {
                log::warn!("Workers that start later are not told what was revoked: {error}");
            }
            tell_clients(&worker, ids).await;
        });
    }

    pub(super) async fn revoke_by_stamped_headers(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [headers] = arguments.required(["headers"])?;
        let terminate = arguments.truthy("terminate");
        let signal = match arguments.take("signal") {
            value if terminate => signal(value)?,
            _ => Signal::SIGTERM as i32,
        };
        let (headers, shown) = stamps(headers)?;
        for (name, values) in &headers {
            self.worker.revoked.add_stamp(name, values);
        }
        if !terminate {
            return Ok(ok(format!(
                "headers {shown} flagged as revoked, but not terminated"
            )));
        }
        let mut ended: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for request in self.worker.state.in_phase(Phase::Active) {
            let hits = matches(&headers, &request.message.stamps);
            if hits.is_empty() {
                continue;
            }
            self.end(&request, signal);
            for (name, value) in hits {
                let values = ended.entry(name).or_default();
                let value = saferepr::repr(value);
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
        if ended.is_empty() {
            return Ok(ok(format!("headers {shown} were not terminated")));
        }
        let sets: Vec<String> = ended
            .iter()
            .map(|(name, values)| {
                format!("{}: {{{}}}", saferepr::repr_str(name), values.join(", "))
            })
            .collect();
        Ok(ok(format!(
            "headers defaultdict(<class 'set'>, {{{}}}) revoked",
            sets.join(", ")
        )))
    }

    /// Ends a running request.
    fn end(&self, request: &Request, signal: i32) {
        log::info!("Terminating {} ({signal})", request.id());
        request.terminate(signal);
        // A job that has no child yet is ended by its journey as soon as it starts.
        self.worker.pool.terminate(request.id(), signal);
    }
}

/// Takes up what was revoked while this worker was not there. Only a lost broker is an error.
pub async fn recall_revoked(worker: &Worker, channel: &dyn Channel) -> Result<(), Error> {
    match channel.shared_revoked(notes(worker)).await {
        Ok(ids) => worker.revoked.recall(ids),
        Err(error) if error.is_connection() => return Err(error),
        Err(error) => {
            log::warn!("What was revoked while this worker was away is not known: {error}")
        }
    }
    Ok(())
}

fn notes(worker: &Worker) -> Notes {
    let most = usize::try_from(worker.settings.worker_revokes_max).unwrap_or(usize::MAX);
    Notes {
        most,
        keep: worker.revoked.keep(),
    }
}

/// Whoever waits for a task that does not run is told at once, although it may be listed as
/// reserved or scheduled until its turn comes.
async fn tell_clients(worker: &Worker, ids: Vec<String>) {
    let active = worker.state.in_phase(Phase::Active);
    for id in ids {
        if active.iter().any(|request| request.id() == id) {
            continue;
        }
        let open = match &worker.backend.get(&id).await {
            Ok(None) => true,
            Ok(Some(meta)) => {
                matches!(
                    meta.status.as_str(),
                    "PENDING" | "RECEIVED" | "RETRY" | "REJECTED"
                )
            }
            Err(_) => false,
        };
        if !open {
            continue;
        }
        let result = Exception::task_revoked("revoked").to_value();
        let mut meta = Meta::new(id, State::Revoked.as_str(), result);
        meta.children = Value::Null;
        meta.date_done = Some(worker.now());
        if let Err(error) = worker.backend.store(&meta, &ReplyTo::default()).await {
            log::warn!("Cannot store that {} was revoked: {error}", meta.task_id);
        }
    }
}

/// The revoked stamps of a message.
fn matches<'headers, 'stamps>(
    headers: &'headers BTreeMap<String, Vec<Value>>,
    stamps: &'stamps Map<String, Value>,
) -> Vec<(&'headers str, &'stamps Value)> {
    let hits = headers.iter().flat_map(|(name, values)| {
        let found = match stamps.get(name) {
            Some(Value::Array(found)) => found.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        found
            .iter()
            .filter(|stamp| values.contains(stamp))
            .map(|stamp| (name.as_str(), stamp))
    });
    hits.collect()
}

/// `{name: value or list}`, or a list of `name=value`; and the same as Python shows it, where
/// of several pairs of one name the last is left (here all of them count).
fn stamps(headers: Value) -> Result<(BTreeMap<String, Vec<Value>>, String), CommandError> {
    let mut stamps: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    let mut shown = Map::new();
    match headers {
        Value::Object(map) => {
            for (name, value) in &map {
                let values = match value {
                    Value::Array(values) => values.clone(),
                    Value::Null => {
                        return Err(CommandError::type_error(
                            "'NoneType' object is not iterable",
                        ));
                    }
                    one => vec![one.clone()],
                };
                stamps.entry(name.clone()).or_default().extend(values);
            }
            shown = map;
        }
        Value::Array(items) => {
            for item in &items {
                let pair = item.as_str().and_then(|pair| pair.split_once('='));
                let (name, value) = pair.ok_or_else(|| {
                    CommandError(Exception::builtin("IndexError", "list index out of range"))
                })?;
                stamps
                    .entry(name.to_owned())
                    .or_default()
                    .push(value.into());
                shown.insert(name.to_owned(), value.into());
            }
        }
        other => {
            let kind = type_name(&other);
            return Err(CommandError(Exception::builtin(
                "AttributeError",
                format!("'{kind}' object has no attribute 'items'"),
            )));
        }
    }
    Ok((stamps, saferepr::repr(&Value::Object(shown))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn signals_are_names_with_or_without_sig_or_numbers() {
        assert_eq!(signal(None).unwrap(), 15);
        assert_eq!(signal(Some(json!("KILL"))).unwrap(), 9);
        assert_eq!(signal(Some(json!("SIGUSR1"))).unwrap(), 10);
        assert_eq!(signal(Some(json!(9))).unwrap(), 9);
        for nothing in [json!(0), json!(""), json!([])] {
            assert_eq!(signal(Some(nothing)).unwrap(), 15);
        }
        for wrong in [json!("sigkill"), json!("SIGNOPE"), json!(4711), json!([1])] {
            assert!(signal(Some(wrong.clone())).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_id_is_told_in_pythons_words() {
        assert_eq!(task_ids(json!("a")).unwrap(), ["a"]);
        assert_eq!(task_ids(json!(["a", "b"])).unwrap(), ["a", "b"]);
        let repr = |value| task_ids(value).unwrap_err().0.repr();
        assert_eq!(
            repr(json!(["a", 1])),
            "TypeError('sequence item 1: expected str instance, int found')"
        );
        assert_eq!(
            repr(json!({"a": 1})),
            "TypeError(\"unhashable type: 'dict'\")"
        );
    }

    #[test]
    fn stamps_come_as_an_object_or_as_pairs() {
        let expected = BTreeMap::from([("a".to_owned(), vec![json!("1"), json!("2")])]);
        let (found, shown) = stamps(json!({"a": ["1", "2"]})).unwrap();
        assert_eq!(
            (found, shown.as_str()),
            (expected.clone(), "{'a': ['1', '2']}")
        );
        let (found, shown) = stamps(json!(["a=1", "a=2"])).unwrap();
        assert_eq!((found, shown.as_str()), (expected, "{'a': '2'}"));
        for wrong in [
            json!("a=1"),
            json!(["junk"]),
            json!({"a": null}),
            json!(null),
        ] {
            assert!(stamps(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_stamp_matches_by_value_or_by_one_of_its_values() {
        let (headers, _) = stamps(json!({"a": ["1", "2"], "b": 3})).unwrap();
        let hits = |message: Value| {
            let Value::Object(message) = message else {
                panic!("an object")
            };
            matches(&headers, &message).len()
        };
        assert_eq!(hits(json!({"a": ["2", "9"], "b": 3})), 2);
        assert_eq!(hits(json!({"a": "1"})), 1);
        assert_eq!(hits(json!({"a": "9", "c": 3})), 0);
    }
}
