//! The commands that change limits and the pool.

use std::time::Duration;

use serde_json::Value;

use super::{Arguments, Control, Outcome, error, is_truthy, ok, type_name};
use crate::pidbox::CommandError;
use crate::protocol::saferepr;
use crate::tasks::registry::seconds;
use crate::worker::autoscale::MOST_PROCESSES;
use crate::worker::consumer::Command;
use crate::worker::rate_limit;

impl Control {
    pub(super) fn rate_limit(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [name, rate] = arguments.required(["task_name", "rate_limit"])?;
        hashable(&name)?;
        let text = match &rate {
            Value::Null => String::new(),
            Value::Bool(flag) => u8::from(*flag).to_string(),
            Value::String(_) | Value::Number(_) => saferepr::str(&rate),
            Value::Array(_) | Value::Object(_) if !is_truthy(&rate) => String::new(),
            other => {
                return Err(CommandError::type_error(format!(
                    "float() argument must be a string or a real number, not '{}'",
                    type_name(other)
                )));
            }
        };
        match rate_limit::parse(&text) {
            Ok(_) => {}
            Err(reason) if reason.starts_with("ValueError") => {
                return Ok(error(format!("Invalid rate limit string: {reason}")));
            }
            Err(reason) => return Ok(error(reason)),
        }
        let name = saferepr::str(&name);
        let Some(entry) = self.worker.registry.get(&name) else {
            log::error!("Rate limit attempt for unknown task {name}");
            return Ok(error("unknown task"));
        };
        // `registered` shows what was asked for, also where it means no limit.
        entry.change(|options| options.rate_limit = (!rate.is_null()).then(|| text.clone()));
        self.command(Command::RateLimit(entry.name));
        // As Celery: the text "0" is a new limit that limits nothing.
        if !is_truthy(&rate) {
            log::info!("Rate limits disabled for tasks of type {name}");
            return Ok(ok("rate limit disabled successfully"));
        }
        log::info!("New rate limit for tasks of type {name}: {text}.");
        Ok(ok("new rate limit set successfully"))
    }

    pub(super) fn time_limit(&self, mut arguments: Arguments<'_>) -> Outcome {
        let name = arguments.take("task_name").unwrap_or_default();
        hashable(&name)?;
        let name = saferepr::str(&name);
        let soft = limit(arguments.take("soft"), "soft")?;
        let hard = limit(arguments.take("hard"), "hard")?;
        let Some(entry) = self.worker.registry.get(&name) else {
            log::error!("Change time limit attempt for unknown task {name}");
            return Ok(error("unknown task"));
        };
        entry.change(|options| {
            options.soft_time_limit = soft;
            options.time_limit = hard;
        });
        log::info!("New time limits for tasks of type {name}: soft={soft:?} hard={hard:?}");
        Ok(ok("time limits set successfully"))
    }

    pub(super) fn pool_grow(&self, mut arguments: Arguments<'_>) -> Outcome {
        if self.worker.autoscaler.is_some() {
            return Ok(autoscaled("pool_grow"));
        }
        let count = processes(arguments.given.remove("n"), |kind| {
            format!("'{kind}' object cannot be interpreted as an integer")
        })?;
        if self.worker.pool.size().saturating_add(count) > MOST_PROCESSES {
            return Err(too_many());
        }
        self.worker.pool.grow(count);
        self.command(Command::Resized);
        Ok(ok("pool will grow"))
    }

    pub(super) fn pool_shrink(&self, mut arguments: Arguments<'_>) -> Outcome {
        if self.worker.autoscaler.is_some() {
            return Ok(autoscaled("pool_shrink"));
        }
        let count = processes(arguments.given.remove("n"), |kind| {
            format!("unsupported operand type(s) for -: '{kind}' and 'int'")
        })?;
        // Celery would end them all, and the worker would never again run a task.
        if count >= self.worker.pool.size() {
            return Err(CommandError::value_error(format!(
                "Can't shrink pool by {count}: it has {}, and one process must stay",
                self.worker.pool.size()
            )));
        }
        let shrunk = self.worker.pool.shrink(count);
        shrunk.map_err(|error| CommandError::value_error(error.to_string()))?;
        self.command(Command::Resized);
        Ok(ok("pool will shrink"))
    }

    pub(super) fn pool_restart(&self) -> Outcome {
        if !self.worker.settings.worker_pool_restarts {
            return Err(CommandError::value_error("Pool restarts not enabled"));
        }
        self.worker.pool.restart();
        Ok(ok("reload started"))
    }

    pub(super) fn autoscale(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [max, min] = ["max", "min"].map(|name| arguments.take(name));
        arguments.none_left()?;
        let Some(autoscaler) = &self.worker.autoscaler else {
            return Err(CommandError::value_error("Autoscale not enabled"));
        };
        let [max, min] = [count("max", max)?, count("min", min)?];
        if max.max(min).is_some_and(|most| most > MOST_PROCESSES) {
            return Err(too_many());
        }
        let range = autoscaler.update(max, min, &self.worker.pool);
        self.command(Command::Resized);
        Ok(ok(format!(
            "autoscale now max={} min={}",
            range.max, range.min
        )))
    }

    /// Asks the consumer's loop; it is gone only when the worker goes down.
    pub(super) fn command(&self, command: Command) {
        drop(self.worker.commands.send(command));
    }
}

/// A name to look something up by, with Python's words where it cannot be one.
fn hashable(name: &Value) -> Result<(), CommandError> {
    if name.is_array() || name.is_object() {
        return Err(CommandError::type_error(format!(
            "unhashable type: '{}'",
            type_name(name)
        )));
    }
    Ok(())
}

/// How many processes more or less, 1 if nothing is said; `words` are Python's for a type that
/// cannot be counted with.
fn processes(value: Option<Value>, words: impl Fn(&str) -> String) -> Result<usize, CommandError> {
    match value {
        None => Ok(1),
        Some(Value::Bool(flag)) => Ok(usize::from(flag)),
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
            Ok(count("n", Some(Value::Number(number)))?.unwrap_or(1))
        }
        Some(other) => Err(CommandError::type_error(words(type_name(&other)))),
    }
}

fn count(name: &str, value: Option<Value>) -> Result<Option<usize>, CommandError> {
    let Some(value) = value else { return Ok(None) };
    let number = match &value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_u64(),
    };
    let count = number.and_then(|number| usize::try_from(number).ok());
    count.map(Some).ok_or_else(|| {
        CommandError::value_error(format!(
            "{name} must be a whole number of 0 or more, not {}",
            saferepr::repr(&value)
        ))
    })
}

fn autoscaled(command: &str) -> Value {
    error(format!(
        "{command} is not supported with autoscale. Adjust autoscale range instead."
    ))
}

fn too_many() -> CommandError {
    CommandError::value_error(format!("a pool has at most {MOST_PROCESSES} processes"))
}

fn limit(value: Option<Value>, name: &str) -> Result<Option<Duration>, CommandError> {
    let Some(value) = value else { return Ok(None) };
    let number = match &value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    match number {
        Some(number) if number >= 0.0 => Ok(seconds(number)),
        _ => Err(CommandError::value_error(format!(
            "{name} must be a number of seconds, not {}",
            saferepr::repr(&value)
        ))),
    }
}
