//! Reads the fields of a task message, whatever form it has, and says which one is bad.

use serde_json::{Map, Value};

use super::{DeliveryInfo, Embed, Fault, InvalidKind, Message};
use crate::protocol::time::{self, Timestamp};
use crate::protocol::{json, saferepr};

/// Where the fields of a message stand: in the headers, or in the object that is the body.
pub(super) struct Fields<'a> {
    pub(super) first: &'a Map<String, Value>,
    pub(super) second: Option<&'a Map<String, Value>>,
}

/// A time as a field has it.
struct Time {
    at: Timestamp,
    /// It is written without an offset, and UTC.
    naive: bool,
    text: String,
}

impl Fields<'_> {
    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.first
            .get(name)
            .or_else(|| self.second?.get(name))
            .filter(|value| !value.is_null())
    }

    /// A message with those arguments; envelope and delivery are filled in by the caller.
    pub(super) fn message(
        &self,
        args: Vec<Value>,
        kwargs: Map<String, Value>,
        embed: Embed,
    ) -> Result<Message, Fault> {
        let id = self.id("id")?.filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| invalid("the message has no id"))?;
        let task = match self.get("task") {
            Some(Value::String(name)) if !name.is_empty() => name.clone(),
            other => return Err(self.bad("task", other)),
        };
        let (time_limit, soft_time_limit) = self.limits()?;
        let (eta, expires) = (self.time("eta", "ETA")?, self.time("expires", "expires")?);
        let is_naive = |time: &Option<Time>| time.as_ref().is_some_and(|time| time.naive);
        let naive = [is_naive(&eta), is_naive(&expires)];
        let (expires, expires_text) = expires.map(|time| (time.at, time.text)).unzip();
        Ok(Message {
            id,
            task,
            shadow: self.text("shadow").filter(|name| !name.is_empty()),
            eta: eta.map(|time| time.at),
            expires,
            expires_text,
            naive,
            group: self.id("group")?,
            group_index: self.whole("group_index")?,
            retries: self.whole("retries")?.unwrap_or(0),
            time_limit,
            soft_time_limit,
            root_id: self.id("root_id")?,
            parent_id: self.id("parent_id")?,
            argsrepr: self.text("argsrepr").unwrap_or_default(),
            kwargsrepr: self.text("kwargsrepr").unwrap_or_default(),
            origin: self.text("origin"),
            ignore_result: self.get("ignore_result").and_then(Value::as_bool),
            replaced_task_nesting: self.whole("replaced_task_nesting")?.unwrap_or(0),
            stamped_headers: self
                .get("stamped_headers")
                .and_then(Value::as_array)
                .map(|names| {
                    names
                        .iter()
                        .filter_map(Value::as_str)
                        .map(str::to_owned)
                        .collect()
                }),
            stamps: self
                .get("stamps")
                .and_then(Value::as_object)
                .cloned()
                .unwrap_or_default(),
            reply_to: None,
            correlation_id: None,
            priority: None,
            headers: Map::new(),
            delivery: DeliveryInfo::default(),
            args,
            kwargs,
            embed,
        })
    }

    fn bad(&self, name: &str, value: Option<&Value>) -> Fault {
        let shown = saferepr::saferepr(value.unwrap_or(&Value::Null), 80, 1);
        invalid(&format!("invalid {name} value {shown}"))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.get(name).and_then(Value::as_str).map(str::to_owned)
    }

    /// An id: a text, or a number some client did not turn into one.
    fn id(&self, name: &str) -> Result<Option<String>, Fault> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            other => Err(self.bad(name, other)),
        }
    }

    fn whole(&self, name: &str) -> Result<Option<i64>, Fault> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_i64().or_else(|| whole_float(value)) {
                Some(number) => Ok(Some(number)),
                None => Err(self.bad(name, Some(value))),
            },
        }
    }

    fn limits(&self) -> Result<(Option<f64>, Option<f64>), Fault> {
        let value = self.get("timelimit");
        let seconds = |limit: &Value| match limit {
            Value::Null => Some(None),
            // Zero means no limit, as in every place where Celery takes one.
            other => other
                .as_f64()
                .filter(|seconds| *seconds >= 0.0)
                .map(|seconds| Some(seconds).filter(|seconds| *seconds > 0.0)),
        };
        match value {
            None => Ok((None, None)),
            Some(Value::Array(pair)) if pair.is_empty() => Ok((None, None)),
            Some(Value::Array(pair)) if pair.len() == 2 => {
                match (seconds(&pair[0]), seconds(&pair[1])) {
                    (Some(hard), Some(soft)) => Ok((hard, soft)),
                    _ => Err(self.bad("timelimit", value)),
                }
            }
            _ => Err(self.bad("timelimit", value)),
        }
    }

    fn time(&self, name: &str, shown: &str) -> Result<Option<Time>, Fault> {
        let read = |text: &String| {
            time::parse_iso_or_naive(text).map(|(at, naive)| {
                Some(Time {
                    at,
                    naive,
                    text: text.clone(),
                })
            })
        };
        let fault = |value: &Value, reason: &str| {
            let value = saferepr::saferepr(value, 80, 1);
            invalid(&format!("invalid {shown} value {value}: {reason}"))
        };
        match self.get(name) {
            None => Ok(None),
            Some(value @ Value::String(text)) => read(text).map_err(|reason| fault(value, &reason)),
            // msgpack and YAML bodies of protocol 1 may carry the time itself.
            Some(Value::Object(object)) => match json::tagged(object) {
                Some((_, Value::String(text))) => {
                    read(text).map_err(|reason| fault(&Value::String(text.clone()), &reason))
                }
                _ => Err(fault(
                    &Value::Object(object.clone()),
                    "object of type 'dict' is no time",
                )),
            },
            Some(value) => {
                let kind = match value {
                    Value::Bool(_) => "bool",
                    Value::Array(_) => "list",
                    Value::Number(number) if number.is_f64() => "float",
                    _ => "int",
                };
                Err(fault(
                    value,
                    &format!("object of type '{kind}' has no len()"),
                ))
            }
        }
    }
}

fn invalid(reason: &str) -> Fault {
    (InvalidKind::InvalidHeader, reason.to_owned())
}

/// `3.0` as 3.
fn whole_float(value: &Value) -> Option<i64> {
    let float = value.as_f64()?;
    (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
}
