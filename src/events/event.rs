//! What happened: a type and the fields of that type, in Celery's order.
//!
//! Fields that all events have (who, when, clock) are added by the dispatcher. Texts that may
//! hold secrets are masked by the caller before they come here.

use std::borrow::Cow;

use serde_json::Value;

use crate::protocol::json;
use crate::protocol::message::Message;
use crate::protocol::time::format_iso;

/// An event before it is sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as `task-received`; the group is what stands before the first dash.
    pub kind: Cow<'static, str>,
    /// Fields of this type.
    pub fields: Vec<(Cow<'static, str>, Value)>,
}

/// Which software a worker says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Software {
    /// `sw_ident`.
    pub ident: String,
    /// `sw_ver`.
    pub version: String,
    /// `sw_sys`.
    pub system: String,
}

/// The figures of a heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WorkerStatus {
    /// Running tasks.
    pub active: u64,
    /// Tasks the pool accepted since the start.
    pub processed: u64,
    /// Load over 1, 5 and 15 minutes.
    pub loadavg: [f64; 3],
}

impl Default for Software {
    /// This crate, on this kernel.
    fn default() -> Self {
        let system = match std::env::consts::OS {
            "linux" => "Linux",
            "macos" => "Darwin",
            other => other,
        };
        Self {
            ident: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            system: system.to_owned(),
        }
    }
}

/// The load of this machine, as far as it says.
pub fn load_average() -> [f64; 3] {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut numbers = text
        .split_whitespace()
        .map(|word| word.parse().unwrap_or(0.0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0.0))
}

impl Event {
    /// An event without fields.
    pub fn new(kind: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind: kind.into(),
            fields: Vec::new(),
        }
    }

    /// Adds a field.
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> Self {
        self.fields.push((name.into(), value.into()));
        self
    }

    /// The group that turns it on and off.
    pub fn group(&self) -> &str {
        self.kind.split('-').next().unwrap_or_default()
    }

    /// `worker-online`, `worker-heartbeat` and `worker-offline`; `freq` is the real interval of
    /// heartbeats, after twice of which monitors call a silent worker offline.
    pub fn worker(
        kind: &'static str,
        freq: f64,
        status: Option<WorkerStatus>,
        software: &Software,
    ) -> Self {
        let mut event = Self::new(kind).with("freq", json::float(freq));
        if let Some(WorkerStatus {
            active,
            processed,
            loadavg,
        }) = status
        {
            let load: Vec<Value> = loadavg
                .iter()
                .map(|load| json::float((load * 100.0).round() / 100.0))
                .collect();
            event = event
                .with("active", active)
                .with("processed", processed)
                .with("loadavg", Value::Array(load));
        }
        event
            .with("sw_ident", software.ident.clone())
            .with("sw_ver", software.version.clone())
            .with("sw_sys", software.system.clone())
    }

    /// The heartbeat that answers the `heartbeat` command: without figures, with a `freq` of 5.
    pub fn requested_heartbeat(software: &Software) -> Self {
        let mut event = Self::worker("worker-heartbeat", 5.0, None, software);
        if let Some((_, freq)) = event.fields.first_mut() {
            *freq = Value::from(5);
        }
        event
    }

    /// A message became a request. `args` and `kwargs` are shown as they are given.
    pub fn task_received(message: &Message, args: &str, kwargs: &str) -> Self {
        Self::task("task-received", &message.id)
            .with("name", message.display_name())
            .with("args", args)
            .with("kwargs", kwargs)
            .with("root_id", message.root_id.clone())
            .with("parent_id", message.parent_id.clone())
            .with("retries", message.retries)
            .with("eta", message.eta.as_ref().map(format_iso))
            .with("expires", message.expires.as_ref().map(format_iso))
    }

    /// A child began to run it.
    pub fn task_started(id: &str) -> Self {
        Self::task("task-started", id)
    }

    /// It returned; `runtime` in seconds is null when its end was not seen.
    pub fn task_succeeded(id: &str, result: &str, runtime: Option<f64>) -> Self {
        Self::task("task-succeeded", id)
            .with("result", result)
            .with("runtime", runtime.map_or(Value::Null, json::float))
    }

    /// It raised. An unknown task has no traceback.
    pub fn task_failed(id: &str, exception: &str, traceback: Option<&str>) -> Self {
        let event = Self::task("task-failed", id).with("exception", exception);
        match traceback {
            Some(traceback) => event.with("traceback", traceback),
            None => event,
        }
    }

    /// It will be run again, because of `exception`.
    pub fn task_retried(id: &str, exception: &str, traceback: &str) -> Self {
        Self::task("task-retried", id)
            .with("exception", exception)
            .with("traceback", traceback)
    }

    /// It was revoked or has expired.
    pub fn task_revoked(id: &str, terminated: bool, signum: Option<i32>, expired: bool) -> Self {
        Self::task("task-revoked", id)
            .with("terminated", terminated)
            .with("signum", signum)
            .with("expired", expired)
    }

    /// Its message was rejected.
    pub fn task_rejected(id: &str, requeue: bool) -> Self {
        Self::task("task-rejected", id).with("requeue", requeue)
    }

    /// It was killed by a cold shutdown or a lost connection.
    pub fn task_cancelled(id: &str) -> Self {
        Self::task("task-cancelled", id)
    }

    fn task(kind: &'static str, id: &str) -> Self {
        Self::new(kind).with("uuid", id)
    }
}
