//! Remote control: the command table, with Celery's names, aliases and answers.
//!
//! [`inspect`] looks, [`revoke`], [`pool`] and [`consumer`] act. What is common to them is how
//! arguments are taken: by keyword, with Python's words when they do not fit. Answers for
//! `celery.worker.control`.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::Worker;
use super::shutdown::Wish;
use crate::pidbox::{Answer, CommandError, Handler};
use crate::protocol::exception::Exception;
use crate::transport::{Queue, Transport};

mod consumer;
mod inspect;
mod pool;
mod revoke;

pub use inspect::report;
pub use revoke::recall_revoked;

/// Executes the commands of one worker.
pub struct Control {
    /// The worker.
    pub worker: Arc<Worker>,
    /// The queues it consumes.
    pub queues: watch::Sender<Vec<Queue>>,
    /// Its broker.
    pub transport: Arc<dyn Transport>,
}

/// The name of a command that may be called by another.
fn command(name: &str) -> &str {
    match name {
        "dump_active" => "active",
        "dump_reserved" => "reserved",
        "dump_schedule" => "scheduled",
        "dump_revoked" => "revoked",
        "dump_tasks" => "registered",
        "dump_conf" => "conf",
        other => other,
    }
}

/// What a command comes to.
pub(crate) type Outcome = Result<Value, CommandError>;

/// `{"ok": text}`.
fn ok(text: impl Into<String>) -> Value {
    json!({"ok": text.into()})
}

/// `{"error": text}`.
fn error(text: impl Into<String>) -> Value {
    json!({"error": text.into()})
}

/// What Python makes of a value where it wants a yes or a no.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// The name of a value's type in Python.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "NoneType",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_i64() || number.is_u64() => "int",
        Value::Number(_) => "float",
        Value::String(_) => "str",
        Value::Array(_) => "list",
        Value::Object(_) => "dict",
    }
}

/// The keyword arguments of one call, taken one by one.
pub(crate) struct Arguments<'a> {
    command: &'a str,
    given: Map<String, Value>,
}

impl Arguments<'_> {
    /// An optional argument; null is as good as absent.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.given.remove(name).filter(|value| !value.is_null())
    }

    /// Arguments that must be there, with Python's words when they are not.
    fn required<const N: usize>(&mut self, names: [&str; N]) -> Result<[Value; N], CommandError> {
        let missing: Vec<String> = names
            .iter()
            .filter(|name| !self.given.contains_key(**name))
            .map(|name| format!("'{name}'"))
            .collect();
        if missing.is_empty() {
            return Ok(names.map(|name| self.given.remove(name).unwrap_or_default()));
        }
        let (plural, list) = match missing.as_slice() {
            [one] => ("", one.clone()),
            [one, two] => ("s", format!("{one} and {two}")),
            [rest @ .., last] => ("s", format!("{}, and {last}", rest.join(", "))),
            [] => ("", String::new()),
        };
        Err(CommandError::type_error(format!(
            "{}() missing {} required positional argument{plural}: {list}",
            self.command,
            missing.len()
        )))
    }

    fn truthy(&mut self, name: &str) -> bool {
        self.take(name).is_some_and(|value| is_truthy(&value))
    }

    /// Commands that take no others refuse what is left.
    fn none_left(&self) -> Result<(), CommandError> {
        match self.given.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::type_error(format!(
                "{}() got an unexpected keyword argument '{name}'",
                self.command
            ))),
        }
    }
}

#[async_trait]
impl Handler for Control {
    async fn handle(
        &self,
        method: &str,
        arguments: Map<String, Value>,
        _clock: u64,
    ) -> Result<Answer, CommandError> {
        let method = command(method);
        if self
            .worker
            .settings
            .worker_disabled_commands
            .iter()
            .any(|name| command(name) == method)
        {
            log::warn!("Refused the remote command {method}: it is in worker_disabled_commands");
            return Err(CommandError(Exception::builtin(
                "PermissionError",
                format!("{method} is switched off by worker_disabled_commands"),
            )));
        }
        if method == "shutdown" {
            log::warn!("Got shutdown from remote");
            if self
                .worker
                .wishes
                .send(Wish::Warm { interrupted: false })
                .is_err()
            {
                log::debug!("The worker is going down already");
            }
            return Ok(Answer::Silence);
        }
        let arguments = Arguments {
            command: method,
            given: arguments,
        };
        self.execute(method, arguments).await.map(Answer::Value)
    }
}

impl Control {
    async fn execute(&self, method: &str, arguments: Arguments<'_>) -> Outcome {
        match method {
            "ping" => Ok(ok("pong")),
            "active" => self.active(arguments),
            "reserved" => Ok(self.reserved()),
            "scheduled" => Ok(self.scheduled()),
            "revoked" => Ok(self.worker.revoked.ids().into()),
            "registered" => self.registered(arguments),
            "active_queues" => self.active_queues(&arguments),
            "stats" => Ok(self.stats()),
            "conf" => self.conf(arguments),
            "report" => self.report(&arguments),
            "clock" => Ok(json!({"clock": self.worker.clock.value()})),
            "query_task" => self.query_task(arguments),
            "hello" => self.hello(arguments),
            "memsample" => Ok(inspect::memory_sample()),
            "memdump" => Ok(inspect::memory_dump()),
            "objgraph" => self.objgraph(arguments),
            "election" => self.election(arguments),
            "heartbeat" => self.heartbeat(&arguments),
            "revoke" => self.revoke(arguments).await,
            "terminate" => self.terminate(arguments).await,
            "revoke_by_stamped_headers" => self.revoke_by_stamped_headers(arguments).await,
            "rate_limit" => self.rate_limit(arguments),
            "time_limit" => self.time_limit(arguments),
            "pool_grow" => self.pool_grow(arguments),
            "pool_shrink" => self.pool_shrink(arguments),
            "pool_restart" => self.pool_restart(),
            "autoscale" => self.autoscale(arguments),
            "add_consumer" => self.add_consumer(arguments),
            "cancel_consumer" => self.cancel_consumer(arguments),
            "enable_events" => self.enable_events(&arguments),
            "disable_events" => self.disable_events(&arguments),
            unknown => Err(CommandError::unknown_command(unknown)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(given: Value) -> Arguments<'static> {
        let Value::Object(given) = given else {
            panic!("an object")
        };
        Arguments {
            command: "rate_limit",
            given,
        }
    }

    #[test]
    fn missing_and_unexpected_arguments_are_told_in_pythons_words() {
        let error = arguments(json!({}))
            .required(["task_name", "rate_limit"])
            .unwrap_err();
        assert_eq!(
            error.0.repr(),
            "TypeError(\"rate_limit() missing 2 required positional arguments: 'task_name' and 'rate_limit'\")"
        );
        let error = arguments(json!({"nope": 1})).none_left().unwrap_err();
        assert_eq!(
            error.0.repr(),
            "TypeError(\"rate_limit() got an unexpected keyword argument 'nope'\")"
        );
    }

    #[test]
    fn arguments_are_as_true_as_python_finds_them() {
        let mut given = arguments(json!({"a": 0, "b": "", "c": "x", "d": [], "e": 1, "f": null}));
        let found = ["a", "b", "c", "d", "e", "f", "g"].map(|name| given.truthy(name));
        assert_eq!(found, [false, false, true, false, true, false, false]);
    }
}
