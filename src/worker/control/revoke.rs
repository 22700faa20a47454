//! `revoke`, `terminate`, `revoke_by_stamped_headers`.

use std::collections::BTreeMap;
use std::str::FromStr;

use nix::sys::signal::Signal;
use serde_json::{Map, Value};

use super::{Arguments, Control, Outcome, ok};
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

fn texts(value: Value) -> Vec<String> {
    match value {
        Value::Array(items) => items.iter().map(saferepr::str).collect(),
        Value::Null => Vec::new(),
        one => vec![saferepr::str(&one)],
    }
}

/// `SIGTERM`, `TERM` or 15.
fn signal(value: Option<Value>) -> Result<i32, CommandError> {
    let wrong = |shown: String| {
        CommandError::type_error(format!(
            "signal argument must be a valid signal name or number, not {shown}"
        ))
    };
    match value {
        None => Ok(Signal::SIGTERM as i32),
        Some(Value::String(name)) => {
            let full = if name.starts_with("SIG") {
                name.clone()
            } else {
                format!("SIG{name}")
            };
            let known = Signal::from_str(&full).map_err(|_| wrong(saferepr::repr_str(&name)))?;
            Ok(known as i32)
        }
        Some(other) => {
            let number = other.as_i64().and_then(|number| i32::try_from(number).ok());
            let known = number.and_then(|number| Signal::try_from(number).ok());
            known
                .map(|known| known as i32)
                .ok_or_else(|| wrong(saferepr::repr(&other)))
        }
    }
}

impl Control {
    pub(super) async fn revoke(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [ids] = arguments.required(["task_id"])?;
        let ids = texts(ids);
        let terminate = arguments.truthy("terminate");
        let signal = signal(arguments.take("signal"))?;
        if terminate {
            return Ok(self.terminate_ids(&ids, signal));
        }
        log::info!("Tasks flagged as revoked: {}", ids.join(", "));
        self.flag(&ids);
        Ok(ok(format!("tasks {} flagged as revoked", set_repr(&ids))))
    }

    pub(super) async fn terminate(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [signal_value, ids] = arguments.required(["signal", "task_id"])?;
        let signal = signal(Some(signal_value).filter(|value| !value.is_null()))?;
        Ok(self.terminate_ids(&texts(ids), signal))
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
        let signal = signal(arguments.take("signal"))?;
        let (headers, shown) = stamps(headers);
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
        meta.date_done = Some(chrono::Utc::now());
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
fn stamps(headers: Value) -> (BTreeMap<String, Vec<Value>>, String) {
    let mut stamps: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    let mut shown = Map::new();
    match headers {
        Value::Object(map) => {
            for (name, value) in &map {
                let values = match value {
                    Value::Array(values) => values.clone(),
                    one => vec![one.clone()],
                };
                stamps.entry(name.clone()).or_default().extend(values);
            }
            shown = map;
        }
        Value::Array(items) => {
            let pairs = items
                .iter()
                .filter_map(|item| item.as_str()?.split_once('='));
            for (name, value) in pairs {
                stamps
                    .entry(name.to_owned())
                    .or_default()
                    .push(value.into());
                shown.insert(name.to_owned(), value.into());
            }
        }
        _ => {}
    }
    (stamps, saferepr::repr(&Value::Object(shown)))
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
        for wrong in [json!("sigkill"), json!("SIGNOPE"), json!(4711), json!([1])] {
            assert!(signal(Some(wrong.clone())).is_err(), "{wrong}");
        }
    }

    #[test]
    fn stamps_come_as_an_object_or_as_pairs() {
        let expected = BTreeMap::from([("a".to_owned(), vec![json!("1"), json!("2")])]);
        let (found, shown) = stamps(json!({"a": ["1", "2"]}));
        assert_eq!(
            (found, shown.as_str()),
            (expected.clone(), "{'a': ['1', '2']}")
        );
        let (found, shown) = stamps(json!(["a=1", "a=2", "junk"]));
        assert_eq!((found, shown.as_str()), (expected, "{'a': '2'}"));
        assert!(stamps(json!("a=1")).0.is_empty());
    }

    #[test]
    fn a_stamp_matches_by_value_or_by_one_of_its_values() {
        let (headers, _) = stamps(json!({"a": ["1", "2"], "b": 3}));
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
