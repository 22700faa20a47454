//! The commands that change queues and events.

use serde_json::Value;

use super::{Arguments, Control, Outcome, ok};
use crate::events::Toggle;
use crate::pidbox::CommandError;
use crate::protocol::saferepr;
use crate::transport::{Exchange, ExchangeKind, Queue};
use crate::worker::consumer::Command;

impl Control {
    pub(super) fn add_consumer(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [name] = arguments.required(["queue"])?;
        if !(name.is_string() || name.is_number()) {
            return Err(CommandError::type_error(format!(
                "a queue's name is a text, not {}",
                saferepr::repr(&name)
            )));
        }
        let name = saferepr::str(&name);
        if name.is_empty() || name.len() > 255 {
            return Err(CommandError::value_error(
                "a queue's name has 1 to 255 bytes",
            ));
        }
        let mut text = |key: &str| arguments.take(key).map(|value| saferepr::str(&value));
        let exchange = text("exchange").unwrap_or_else(|| name.clone());
        let kind = match text("exchange_type").as_deref() {
            None | Some("direct") => ExchangeKind::Direct,
            Some("topic") => ExchangeKind::Topic,
            Some("fanout") => ExchangeKind::Fanout,
            Some(other) => {
                return Err(CommandError::value_error(format!(
                    "unknown exchange type {other}"
                )));
            }
        };
        let key = text("routing_key").unwrap_or_else(|| name.clone());
        let mut queue = Queue::bound(name.clone(), Exchange::new(exchange, kind), key);
        if let Some(Value::Object(options)) = arguments.take("queue_arguments") {
            queue.arguments = options;
        }
        self.command(Command::AddQueue(Box::new(queue)));
        Ok(ok(format!("add consumer {name}")))
    }

    pub(super) fn cancel_consumer(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [name] = arguments.required(["queue"])?;
        let name = saferepr::str(&name);
        self.command(Command::CancelQueue(name.clone()));
        Ok(ok(format!("no longer consuming from {name}")))
    }

    pub(super) fn enable_events(&self, arguments: &Arguments<'_>) -> Outcome {
        arguments.none_left()?;
        let toggle = self.worker.events.enable_task_events();
        if toggle == Toggle::Changed {
            log::info!("Events of group {{task}} enabled by remote.");
        }
        Ok(toggle.reply("enabled"))
    }

    pub(super) fn disable_events(&self, arguments: &Arguments<'_>) -> Outcome {
        arguments.none_left()?;
        let toggle = self.worker.events.disable_task_events();
        if toggle == Toggle::Changed {
            log::info!("Events of group {{task}} disabled by remote.");
        }
        Ok(toggle.reply("disabled"))
    }
}
