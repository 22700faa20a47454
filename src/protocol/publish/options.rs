//! What the options of a signature mean for its call.
//!
//! Answers for the option handling of `Signature.apply_async` and `Celery.send_task`.

use serde_json::Value;

use super::TaskCall;
use crate::protocol::serialization::Serializer;
use crate::protocol::signature::Signature;
use crate::protocol::time::{self, Timestamp};
use crate::protocol::{json, saferepr};

impl TaskCall {
    /// Takes over every option Celery knows; null ones count as absent.
    pub(super) fn apply_options(
        &mut self,
        signature: &Signature,
        now: &Timestamp,
    ) -> Result<(), String> {
        let text = |name: &str| signature.option_str(name).map(str::to_owned);
        let seconds = |name: &str| -> Result<Option<f64>, String> {
            match signature.option(name) {
                None => Ok(None),
                Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                    format!("option {name} is not a number: {}", saferepr::repr(value))
                }),
            }
        };
        self.shadow = text("shadow");
        self.group = text("group_id");
        self.group_index = signature.option_i64("group_index");
        self.root_id = text("root_id");
        self.parent_id = text("parent_id");
        self.retries = signature.option_i64("retries").unwrap_or(0);
        self.argsrepr = text("argsrepr");
        self.kwargsrepr = text("kwargsrepr");
        self.time_limit = seconds("time_limit")?;
        self.soft_time_limit = seconds("soft_time_limit")?;
        self.replaced_task_nesting = signature.option_i64("replaced_task_nesting").unwrap_or(0);
        self.queue = match signature.option("queue") {
            // A queue object of kombu travels as its fields.
            Some(Value::Object(queue)) => {
                queue.get("name").and_then(Value::as_str).map(str::to_owned)
            }
            _ => text("queue"),
        };
        self.exchange = text("exchange");
        self.routing_key = text("routing_key");
        self.reply_to = text("reply_to").unwrap_or_default();
        self.priority = match signature.option("priority") {
            None => None,
            Some(value) => Some(
                value
                    .as_i64()
                    .map(|priority| u8::try_from(priority.clamp(0, 255)).unwrap_or(u8::MAX))
                    .ok_or_else(|| {
                        format!("option priority is not a number: {}", saferepr::repr(value))
                    })?,
            ),
        };
        if let Some(flag) = signature.option("ignore_result").and_then(Value::as_bool) {
            self.ignore_result = Some(flag);
        }
        if let Some(name) = signature.option_str("serializer") {
            self.serializer = Serializer::parse(name).map_err(|error| error.to_string())?;
        }
        self.compression = text("compression");
        if let Some(Value::Object(headers)) = signature.option("headers") {
            self.headers = headers.clone();
        }
        self.eta = match seconds("countdown")?.filter(|countdown| *countdown != 0.0) {
            Some(countdown) => Some(time::add_seconds(now, countdown)),
            None => signature.option("eta").map(option_time).transpose()?,
        };
        if let Some(value) = signature.option("expires") {
            self.expire(value, now)?;
        }
        if let Some(Value::Array(names)) = signature.option("stamped_headers") {
            let names: Vec<String> = names
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect();
            for name in &names {
                let value = signature.option(name).cloned().unwrap_or(Value::Null);
                self.stamps.insert(name.clone(), value);
            }
            self.stamped_headers = Some(names);
        }
        self.embed.callbacks = Some(signature.links("link")?).filter(|links| !links.is_empty());
        self.embed.errbacks =
            Some(signature.links("link_error")?).filter(|links| !links.is_empty());
        self.embed.chain =
            Signature::list(signature.option("chain").cloned().unwrap_or(Value::Null))?;
        self.embed.chord = signature
            .option("chord")
            .cloned()
            .map(Signature::from_value)
            .transpose()?;
        Ok(())
    }

    /// Sets `expires`: a number of seconds, or a time.
    pub fn expire(&mut self, value: &Value, now: &Timestamp) -> Result<(), String> {
        let (text, at) = match value.as_f64() {
            Some(seconds) => {
                let at = time::add_seconds(now, seconds);
                (time::format_iso(&at), at)
            }
            None => {
                let at = option_time(value)?;
                let text = value
                    .as_str()
                    .map_or_else(|| time::format_iso(&at), str::to_owned);
                (text, at)
            }
        };
        let left = (at - now).num_milliseconds().max(0);
        self.expiration = Some(left as f64 / 1000.0);
        self.expires = Some(text);
        Ok(())
    }
}

/// A time in an option: a text, or kombu's tagged object.
fn option_time(value: &Value) -> Result<Timestamp, String> {
    let text = match value {
        Value::String(text) => text,
        Value::Object(object) => match json::tagged(object) {
            Some((_, Value::String(text))) => text,
            _ => return Err(format!("not a time: {}", saferepr::repr(value))),
        },
        other => return Err(format!("not a time: {}", saferepr::repr(other))),
    };
    time::parse_iso(text)
        .map_err(|reason| format!("not a time: {}: {reason}", saferepr::repr_str(text)))
}
