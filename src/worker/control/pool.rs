//! The commands that change limits and the pool.

use std::time::Duration;

use serde_json::Value;

use super::{Arguments, Control, Outcome, error, ok};
use crate::pidbox::CommandError;
use crate::protocol::saferepr;
use crate::tasks::registry::seconds;
use crate::worker::autoscale::MOST_PROCESSES;
use crate::worker::consumer::Command;
use crate::worker::rate_limit;

impl Control {
    pub(super) fn rate_limit(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [name, rate] = arguments.required(["task_name", "rate_limit"])?;
        let text = match &rate {
            Value::Null => String::new(),
            other => saferepr::str(other),
        };
        let parsed = match rate_limit::parse(&text) {
            Ok(parsed) => parsed,
            Err(reason) if reason.starts_with("ValueError") => {
                return Ok(error(format!("Invalid rate limit string: {reason}")));
            }
            Err(reason) => return Ok(error(reason)),
        };
        let name = saferepr::str(&name);
        let Some(entry) = self.worker.registry.get(&name) else {
            log::error!("Rate limit attempt for unknown task {name}");
            return Ok(error("unknown task"));
        };
        entry.change(|options| options.rate_limit = parsed.map(|_| text.clone()));
        self.command(Command::RateLimit(entry.name));
        if parsed.is_none() {
            log::info!("Rate limits disabled for tasks of type {name}");
            return Ok(ok("rate limit disabled successfully"));
        }
        log::info!("New rate limit for tasks of type {name}: {text}.");
        Ok(ok("new rate limit set successfully"))
    }

    pub(super) fn time_limit(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [name] = arguments.required(["task_name"])?;
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
        let count = arguments.count("n", 1)?;
        if self.worker.autoscaler.is_some() {
            return Ok(autoscaled("pool_grow"));
        }
        if self.worker.pool.size().saturating_add(count) > MOST_PROCESSES {
            return Err(too_many());
        }
        self.worker.pool.grow(count);
        self.command(Command::Resized);
        Ok(ok("pool will grow"))
    }

    pub(super) fn pool_shrink(&self, mut arguments: Arguments<'_>) -> Outcome {
        let count = arguments.count("n", 1)?;
        if self.worker.autoscaler.is_some() {
            return Ok(autoscaled("pool_shrink"));
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
        let [max, min] = [
            arguments.optional_count("max")?,
            arguments.optional_count("min")?,
        ];
        arguments.none_left()?;
        let Some(autoscaler) = &self.worker.autoscaler else {
            return Err(CommandError::value_error("Autoscale not enabled"));
        };
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
