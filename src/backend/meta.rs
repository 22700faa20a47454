//! The document stored for a task: what a client's `AsyncResult` reads.
//!
//! Keys and their order are those Celery writes. Knows nothing of serializers or of where the
//! document is kept. Answers for `Backend._get_result_meta` in `celery/backends/base.py`.

use chrono::{DateTime, NaiveDateTime};
use serde_json::{Map, Value};

use crate::protocol::time::{Timestamp, format_iso};

/// The state no later state may replace.
pub const SUCCESS: &str = "SUCCESS";

/// A task's state and result as stored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Meta {
    /// State name, such as `PROGRESS`.
    pub status: String,
    /// Return value, encoded exception, or what `update_state` was given.
    pub result: Value,
    /// Text of the traceback of a failure or retry.
    pub traceback: Option<String>,
    /// Result tuples of what the task published; null when stored outside a task.
    pub children: Value,
    /// When it ended, in the zone in which it is written; only for SUCCESS, FAILURE and REVOKED.
    pub date_done: Option<Timestamp>,
    /// Header `group`.
    pub group_id: Option<String>,
    /// Header `parent_id`.
    pub parent_id: Option<String>,
    /// The task.
    pub task_id: String,
    /// What `result_extended` adds.
    pub extended: Option<Extended>,
}

/// The keys `result_extended` adds, null for an unknown task.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Extended {
    /// Task name.
    pub name: Value,
    /// Positional arguments as JSON values; secrets are the caller's to mask.
    pub args: Value,
    /// Keyword arguments as JSON values; secrets are the caller's to mask.
    pub kwargs: Value,
    /// Node name of the worker.
    pub worker: Value,
    /// How often it was retried.
    pub retries: Value,
    /// Routing key it came by.
    pub queue: Value,
    /// Names of the stamps, when the message has any.
    pub stamped_headers: Option<Vec<String>>,
    /// The stamps by name.
    pub stamps: Map<String, Value>,
}

impl Meta {
    /// A document that says only a state and its result.
    pub fn new(task_id: impl Into<String>, status: impl Into<String>, result: Value) -> Self {
        Self {
            task_id: task_id.into(),
            status: status.into(),
            result,
            children: Value::Array(Vec::new()),
            ..Self::default()
        }
    }

    /// Whether nothing may replace it.
    pub fn is_success(&self) -> bool {
        self.status == SUCCESS
    }

    /// The document with Celery's keys in Celery's order.
    pub fn to_value(&self) -> Value {
        let mut document = Map::with_capacity(16);
        let mut put = |key: &str, value: Value| {
            document.insert(key.to_owned(), value);
        };
        put("status", self.status.as_str().into());
        put("result", self.result.clone());
        put("traceback", self.traceback.clone().into());
        put("children", self.children.clone());
        put("date_done", self.date_done.as_ref().map(format_iso).into());
        if let Some(group) = &self.group_id {
            put("group_id", group.as_str().into());
        }
        if let Some(parent) = &self.parent_id {
            put("parent_id", parent.as_str().into());
        }
        if let Some(extended) = &self.extended {
            put("name", extended.name.clone());
            put("args", extended.args.clone());
            put("kwargs", extended.kwargs.clone());
            put("worker", extended.worker.clone());
            put("retries", extended.retries.clone());
            put("queue", extended.queue.clone());
            if let Some(names) = &extended.stamped_headers {
                put("stamped_headers", names.clone().into());
                for (name, stamp) in &extended.stamps {
                    put(name, stamp.clone());
                }
            }
        }
        put("task_id", self.task_id.as_str().into());
        Value::Object(document)
    }

    /// Reads a document of any Celery version; `None` when it is not one.
    pub fn from_value(value: Value) -> Option<Self> {
        let Value::Object(mut document) = value else {
            return None;
        };
        let Some(Value::String(status)) = document.remove("status") else {
            return None;
        };
        let mut text = |key| match document.remove(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let (traceback, task_id) = (text("traceback"), text("task_id").unwrap_or_default());
        let (group_id, parent_id) = (text("group_id"), text("parent_id"));
        let date_done = text("date_done").as_deref().and_then(parse_iso);
        let mut take = |key| document.remove(key).unwrap_or(Value::Null);
        let (result, children) = (take("result"), take("children"));
        let extended = document.contains_key("name").then(|| {
            let mut take = |key| document.remove(key).unwrap_or(Value::Null);
            let mut extended = Extended {
                name: take("name"),
                args: take("args"),
                kwargs: take("kwargs"),
                worker: take("worker"),
                retries: take("retries"),
                queue: take("queue"),
                ..Extended::default()
            };
            if let Value::Array(names) = take("stamped_headers") {
                let names = names.iter().filter_map(Value::as_str).map(str::to_owned);
                extended.stamped_headers = Some(names.collect());
                extended.stamps = std::mem::take(&mut document);
            }
            extended
        });
        Some(Self {
            status,
            result,
            traceback,
            children,
            date_done,
            group_id,
            parent_id,
            task_id,
            extended,
        })
    }
}

/// Reads it back; Celery 5.3 writes no offset and means UTC.
fn parse_iso(text: &str) -> Option<Timestamp> {
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) => Some(time),
        Err(_) => text
            .parse::<NaiveDateTime>()
            .ok()
            .map(|time| time.and_utc().fixed_offset()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_in_celerys_order() {
        let mut meta = Meta::new("t-1", SUCCESS, json!({"b": 1, "a": 2}));
        meta.date_done = Some("2026-11-22T23:37:39.760962Z".parse().unwrap());
        assert_eq!(
            meta.to_value().to_string(),
            r#"{"status":"SUCCESS","result":{"b":1,"a":2},"traceback":null,"children":[],"date_done":"2026-11-22T23:37:39.760962+00:00","task_id":"t-1"}"#
        );
        meta.group_id = Some("g".into());
        meta.parent_id = Some("p".into());
        meta.extended = Some(Extended {
            name: json!("celery_app.add"),
            args: json!([1]),
            kwargs: json!({}),
            worker: json!("w@h"),
            retries: json!(0),
            queue: json!("celery"),
            stamped_headers: Some(vec!["id".into()]),
            stamps: json!({"id": "s"}).as_object().unwrap().clone(),
        });
        let value = meta.to_value();
        let keys: Vec<_> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys.join(" "),
            "status result traceback children date_done group_id parent_id name args kwargs worker \
             retries queue stamped_headers id task_id"
        );
        assert_eq!(Meta::from_value(value), Some(meta));
    }

    #[test]
    fn times_of_every_celery_version_are_read() {
        let expected = "2026-11-22T23:37:39.760962Z".parse().ok();
        for text in [
            "2026-11-22T23:37:39.760962+00:00",
            "2026-11-22T23:37:39.760962",
            "2026-11-23T00:37:39.760962+01:00",
        ] {
            assert_eq!(parse_iso(text), expected, "{text}");
        }
        assert_eq!(parse_iso("yesterday"), None);
    }

    #[test]
    fn what_is_not_a_document_is_none() {
        for value in [json!(null), json!([1]), json!({}), json!({"status": 3})] {
            assert_eq!(Meta::from_value(value), None);
        }
    }
}
