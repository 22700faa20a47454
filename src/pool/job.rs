//! The vocabulary of the pool: what is asked of a child, and what comes back.
//!
//! Plain data, spoken by both sides of the socket. A [`Job`]'s payload may hold a secret (a
//! repository token), so it never shows itself in `Debug` and is wiped when it is dropped.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::zeroize::Zeroize;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One piece of work for a child.
#[derive(Clone, Serialize, Deserialize)]
pub struct Job {
    /// The task id; [`super::Pool::terminate`] finds the job by it.
    pub id: String,
    /// The task name; the handler chooses by it.
    pub name: String,
    /// The handler's input. May hold secrets: never shown, wiped on drop.
    pub payload: Value,
    /// After this time the child's interrupt flag is set.
    pub soft_limit: Option<Duration>,
    /// After this time the child is killed.
    pub hard_limit: Option<Duration>,
    /// Where the job may write; the caller makes and removes it.
    pub directory: Option<PathBuf>,
}

impl fmt::Debug for Job {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Job")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("soft_limit", &self.soft_limit)
            .field("hard_limit", &self.hard_limit)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        wipe(&mut self.payload);
    }
}

fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(members) => members.values_mut().for_each(wipe),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// What is heard of a job while it runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The child has the job. Without this event the job never ran.
    Started {
        /// The child's process id.
        pid: u32,
    },
    /// Whatever the handler reports.
    Progress(Value),
    /// The soft limit is over and the child was told.
    SoftLimit,
    /// A line for the parent's log.
    Log {
        /// How loud.
        level: log::Level,
        /// The text, one or more lines.
        text: String,
    },
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The handler returned this value.
    Success(Value),
    /// The handler failed, or panicked.
    Failure(Failure),
    /// The child was killed because this limit was over.
    HardTimeLimit(Duration),
    /// The child died by itself or by another's hand.
    Lost {
        /// In Celery's words: `signal 9 (SIGKILL)`, `exitcode 3`.
        reason: String,
    },
    /// The child was killed by [`super::Pool::terminate`] or [`super::Pool::kill`].
    Terminated {
        /// The signal that was asked for.
        signal: i32,
    },
}

/// A failed job, in the form of a Python exception.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Failure {
    /// The exception's class name.
    pub exc_type: String,
    /// The module that has the class; `None` for a builtin.
    pub exc_module: Option<String>,
    /// The exception's arguments.
    pub exc_message: Vec<Value>,
    /// What a person reads to understand the failure.
    pub traceback: String,
    /// The handler asks for another try.
    pub retry: Option<Retry>,
}

/// The wish to be run again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Retry {
    /// How long to wait; `None` leaves it to the caller.
    pub after: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn debug_of_a_job_does_not_show_its_payload() {
        let job = Job {
            id: "1".into(),
            name: "n".into(),
            payload: json!({"token": "hunter2"}),
            soft_limit: None,
            hard_limit: None,
            directory: None,
        };
        let text = format!("{job:?}");
        assert!(
            text.contains("\"n\"") && !text.contains("hunter2"),
            "{text}"
        );
    }

    #[test]
    fn wiping_reaches_every_string_of_a_payload() {
        let mut value = json!({"a": ["secret", {"b": "secret"}], "n": 1});
        wipe(&mut value);
        assert_eq!(value, json!({"a": ["", {"b": ""}], "n": 1}));
    }
}
