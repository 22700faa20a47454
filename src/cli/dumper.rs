//! Events as lines of text.
//!
//! Answers for `celery.events.dumper`: one line an event, the fields in the order of their
//! names; a task's events repeat its name and arguments from when it was received.

use std::collections::{HashMap, VecDeque};

use serde_json::Value;

use crate::events::Received;
use crate::protocol::saferepr;

/// How many tasks are remembered.
const REMEMBERED: usize = 4095;

/// Makes lines; remembers the tasks it has seen.
#[derive(Default)]
pub(super) struct Dumper {
    tasks: HashMap<String, String>,
    order: VecDeque<String>,
}

impl Dumper {
    /// The line of an event, without line break.
    pub(super) fn line(&mut self, event: Received) -> String {
        let Received {
            kind,
            hostname,
            mut fields,
        } = event;
        let mut text = |name: &str| fields.remove(name).map(|value| saferepr::str(&value));
        drop((text("type"), text("hostname")));
        let time = text("timestamp").and_then(|seconds| seconds.parse().ok());
        let kind = kind.to_lowercase();
        let task = kind.starts_with("task-").then(|| {
            let uuid = text("uuid").unwrap_or_default();
            if kind == "task-received" || kind == "task-sent" {
                let mut shown = |name| text(name).unwrap_or_default();
                let (name, args, kwargs) = (shown("name"), shown("args"), shown("kwargs"));
                let task = format!("{name}({uuid}) args={args} kwargs={kwargs}");
                self.remember(uuid, task)
            } else {
                self.tasks.get(&uuid).cloned().unwrap_or_default()
            }
        });
        let mut rest: Vec<(&String, &Value)> = fields.iter().collect();
        rest.sort_by_key(|(name, _)| *name);
        let rest: Vec<String> = rest
            .into_iter()
            .map(|(name, value)| format!("{name}={}", saferepr::str(value)))
            .collect();
        let rest = rest.join(", ");
        let colon = if rest.is_empty() { "" } else { ":" };
        let task = task.map(|task| format!("{task} ")).unwrap_or_default();
        format!(
            "{hostname} [{}] {}{colon} {task}{rest}",
            utc(time.unwrap_or(0.0)),
            human(&kind)
        )
    }

    fn remember(&mut self, uuid: String, task: String) -> String {
        if self.tasks.insert(uuid.clone(), task.clone()).is_none() {
            self.order.push_back(uuid);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.tasks.remove(&oldest);
            }
        }
        task
    }
}

/// What people call it.
fn human(kind: &str) -> String {
    match kind {
        "worker-offline" => "shutdown".to_owned(),
        "worker-online" => "started".to_owned(),
        "worker-heartbeat" => "heartbeat".to_owned(),
        other => other.replace('-', " "),
    }
}

/// A moment as Python's `str` shows a datetime in UTC.
fn utc(seconds: f64) -> String {
    // Whole seconds and the rest are rounded apart, as Python does it.
    let rest = (seconds.fract() * 1e6).round_ties_even() as i64;
    let micros = (seconds.trunc() as i64)
        .saturating_mul(1_000_000)
        .saturating_add(rest);
    let time = chrono::DateTime::from_timestamp_micros(micros).unwrap_or_default();
    let form = if micros % 1_000_000 == 0 {
        "%Y-%m-%d %H:%M:%S"
    } else {
        "%Y-%m-%d %H:%M:%S%.6f"
    };
    format!("{}+00:00", time.format(form))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(fields: Value) -> Received {
        let Value::Object(fields) = fields else {
            panic!("an object")
        };
        let text = |name: &str| fields[name].as_str().unwrap().to_owned();
        Received {
            kind: text("type"),
            hostname: text("hostname"),
            fields: fields.clone(),
        }
    }

    #[test]
    fn lines_are_celerys() {
        let mut dumper = Dumper::default();
        let line = dumper.line(event(
            json!({"type": "worker-heartbeat", "hostname": "py1@vm",
            "timestamp": 1795460117.30645, "freq": 2.0, "active": 0, "loadavg": [1.71, 1.7, 5.05]}),
        ));
        assert_eq!(
            line,
            "py1@vm [2026-11-23 18:55:17.306450+00:00] heartbeat: active=0, freq=2.0, \
             loadavg=[1.71, 1.7, 5.05]"
        );
        let line = dumper.line(event(json!({"type": "task-received", "hostname": "w@h", "uuid": "u-1",
            "timestamp": 1795460117, "name": "test_task", "args": "('a',)", "kwargs": "{}", "eta": null})));
        assert_eq!(
            line,
            "w@h [2026-11-23 18:55:17+00:00] task received: test_task(u-1) args=('a',) kwargs={} eta=None"
        );
        let line = dumper.line(event(
            json!({"type": "task-started", "hostname": "w@h", "uuid": "u-1",
            "timestamp": 1795460117}),
        ));
        assert_eq!(
            line,
            "w@h [2026-11-23 18:55:17+00:00] task started test_task(u-1) args=('a',) kwargs={} "
        );
    }

    #[test]
    fn an_event_without_its_fields_is_still_a_line() {
        let mut dumper = Dumper::default();
        let line = dumper.line(event(json!({"type": "task-sent", "hostname": "w@h"})));
        assert!(
            line.starts_with("w@h [1970-01-01 00:00:00+00:00] task sent"),
            "{line}"
        );
    }

    #[test]
    fn only_so_many_tasks_are_remembered() {
        let mut dumper = Dumper::default();
        for number in 0..REMEMBERED + 10 {
            dumper.line(event(
                json!({"type": "task-received", "hostname": "w", "uuid": number.to_string()}),
            ));
        }
        assert_eq!(
            (dumper.tasks.len(), dumper.order.len()),
            (REMEMBERED, REMEMBERED)
        );
        assert!(!dumper.tasks.contains_key("0"));
    }
}
