//! `broker_transport_options` as kombu's Redis transport understands them.
//!
//! Owns reading and defaults. An option nobody knows is collected in [`Options::unknown`], so
//! that the worker can say so once. Answers for the class attributes of
//! `kombu/transport/redis.py`.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::transport::Error;

/// The order in which several queues are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueOrder {
    /// After a message from a queue that queue goes to the end.
    RoundRobin,
    /// The order of consumption never changes.
    Priority,
    /// Alphabetical.
    Sorted,
}

/// Transport options; [`Options::default`] is kombu's behaviour.
#[derive(Debug, Clone)]
pub struct Options {
    /// Seconds after which an unsettled delivery of somebody who does not renew it is
    /// delivered again.
    pub visibility_timeout: Duration,
    /// Hash of the unsettled deliveries.
    pub unacked_key: String,
    /// Sorted set of their times.
    pub unacked_index_key: String,
    /// Lock of the sweep.
    pub unacked_mutex_key: String,
    /// How long that lock lasts.
    pub unacked_mutex_expire: Duration,
    /// How many deliveries one sweep restores.
    pub unacked_restore_limit: Option<u64>,
    /// Time between two sweeps.
    pub unacked_restore_interval: Duration,
    /// The steps of priority, ascending; the first one is the bare list.
    pub priority_steps: Vec<u8>,
    /// Stands between queue and step, and between the fields of a binding.
    pub sep: String,
    /// The order in which several queues are asked.
    pub queue_order_strategy: QueueOrder,
    /// In front of every key and every channel.
    pub global_keyprefix: String,
    /// In front of a fan-out channel, `{db}` not yet replaced; empty for none.
    pub fanout_prefix: String,
    /// Whether the routing key is part of the fan-out channel.
    pub fanout_patterns: bool,
    /// Whether deliveries are recorded until they are acknowledged.
    pub ack_emulation: bool,
    /// Deadline of a command.
    pub command_timeout: Duration,
    /// Deadline of connecting.
    pub connect_timeout: Duration,
    /// Time between health checks of an idle connection.
    pub health_check_interval: Duration,
    /// Time-out of the blocking pops of reply queues.
    pub polling_interval: Option<Duration>,
    /// Name given to the server for `CLIENT LIST`.
    pub client_name: Option<String>,
    /// Name of the master the sentinels watch.
    pub master_name: Option<String>,
    /// Login of the sentinels themselves.
    pub sentinel_username: Option<String>,
    /// Login of the sentinels themselves.
    pub sentinel_password: Option<secrecy::SecretString>,
    /// Also speak on the literal `{db}` channels of kombu before 5.4.
    pub sentinel_fanout_compat: bool,
    /// Names this worker for people who look at its liveness key.
    pub node: String,
    /// Options nobody knows.
    pub unknown: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            visibility_timeout: Duration::from_secs(3600),
            unacked_key: "unacked".into(),
            unacked_index_key: "unacked_index".into(),
            unacked_mutex_key: "unacked_mutex".into(),
            unacked_mutex_expire: Duration::from_secs(300),
            unacked_restore_limit: None,
            unacked_restore_interval: Duration::from_secs(10),
            priority_steps: vec![0, 3, 6, 9],
            sep: "\u{6}\u{16}".into(),
            queue_order_strategy: QueueOrder::RoundRobin,
            global_keyprefix: String::new(),
            fanout_prefix: "/{db}.".into(),
            fanout_patterns: true,
            ack_emulation: true,
            command_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(4),
            health_check_interval: Duration::from_secs(4),
            polling_interval: None,
            client_name: None,
            master_name: None,
            sentinel_username: None,
            sentinel_password: None,
            sentinel_fanout_compat: false,
            node: "celeriac".into(),
            unknown: Vec::new(),
        }
    }
}

impl Options {
    /// Reads kombu's options. An option with a value of the wrong type is an error; an option
    /// nobody knows is not.
    pub fn from_json(json: &Map<String, Value>) -> Result<Self, Error> {
        let mut options = Self::default();
        for (name, value) in json {
            options.set(name, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<(), Error> {
        // kombu treats None as not given.
        if value.is_null() {
            return Ok(());
        }
        match name {
            "visibility_timeout" => self.visibility_timeout = seconds(name, value)?,
            "unacked_key" => self.unacked_key = text(name, value)?,
            "unacked_index_key" => self.unacked_index_key = text(name, value)?,
            "unacked_mutex_key" => self.unacked_mutex_key = text(name, value)?,
            "unacked_mutex_expire" => self.unacked_mutex_expire = seconds(name, value)?,
            "unacked_restore_limit" => {
                self.unacked_restore_limit = Some(number(name, value)? as u64);
            }
            // Sweeping is cheap here; kombu's throttle of 10 would only delay it.
            "unacked_restore_interval" => self.unacked_restore_interval = seconds(name, value)?,
            "priority_steps" => self.priority_steps = steps(name, value)?,
            "sep" => {
                self.sep = text(name, value)?;
                if self.sep.is_empty() {
                    return Err(wrong(name, "a text that is not empty"));
                }
            }
            "queue_order_strategy" => {
                self.queue_order_strategy = match value.as_str() {
                    Some("round_robin") => QueueOrder::RoundRobin,
                    Some("priority") => QueueOrder::Priority,
                    Some("sorted") => QueueOrder::Sorted,
                    _ => return Err(wrong(name, "one of round_robin, priority and sorted")),
                };
            }
            "global_keyprefix" => self.global_keyprefix = text(name, value)?,
            "fanout_prefix" => {
                self.fanout_prefix = match value {
                    Value::Bool(true) => "/{db}.".into(),
                    Value::Bool(false) => String::new(),
                    Value::String(prefix) if prefix.starts_with('/') && prefix.ends_with('.') => {
                        prefix.clone()
                    }
                    _ => return Err(wrong(name, "true, false or a text like `/{db}.`")),
                };
            }
            "fanout_patterns" => self.fanout_patterns = flag(name, value)?,
            "ack_emulation" => self.ack_emulation = flag(name, value)?,
            // A longer deadline than ours would only hide a dead connection.
            "socket_timeout" => {
                self.command_timeout = seconds(name, value)?
                    .clamp(Duration::from_millis(100), Self::default().command_timeout);
            }
            "socket_connect_timeout" => self.connect_timeout = seconds(name, value)?,
            "health_check_interval" => {
                let interval = seconds(name, value)?;
                if !interval.is_zero() {
                    self.health_check_interval =
                        interval.min(Self::default().health_check_interval);
                }
            }
            "polling_interval" => self.polling_interval = Some(seconds(name, value)?),
            "client_name" => self.client_name = Some(text(name, value)?),
            "master_name" => self.master_name = Some(text(name, value)?),
            "sentinel_fanout_compat" => self.sentinel_fanout_compat = flag(name, value)?,
            "sentinel_kwargs" => {
                let Some(kwargs) = value.as_object() else {
                    return Err(wrong(name, "an object"));
                };
                for (key, value) in kwargs {
                    match key.as_str() {
                        "username" => self.sentinel_username = Some(text(key, value)?),
                        "password" => self.sentinel_password = Some(text(key, value)?.into()),
                        _ => self.unknown.push(format!("sentinel_kwargs.{key}")),
                    }
                }
            }
            // Understood, and without an effect here: there is no connection pool, every
            // connection has keepalive and a deadline, and bodies are always base64.
            "unacked_restore_throttle"
            | "max_connections"
            | "retry_on_timeout"
            | "socket_keepalive"
            | "socket_keepalive_options"
            | "body_encoding"
            | "min_other_sentinels"
            | "reauth_check_interval" => {}
            _ => self.unknown.push(name.to_owned()),
        }
        Ok(())
    }
}

fn wrong(name: &str, wanted: &str) -> Error {
    Error::Url(format!(
        "broker transport option `{name}` must be {wanted}, as in \
         {{\"visibility_timeout\": 3600, \"queue_order_strategy\": \"priority\"}}"
    ))
}

fn text(name: &str, value: &Value) -> Result<String, Error> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| wrong(name, "a text"))
}

fn flag(name: &str, value: &Value) -> Result<bool, Error> {
    value.as_bool().ok_or_else(|| wrong(name, "true or false"))
}

fn number(name: &str, value: &Value) -> Result<f64, Error> {
    value
        .as_f64()
        .filter(|number| number.is_finite() && *number >= 0.0 && *number < 1e12)
        .ok_or_else(|| wrong(name, "a number that is not negative"))
}

fn seconds(name: &str, value: &Value) -> Result<Duration, Error> {
    number(name, value).map(Duration::from_secs_f64)
}

fn steps(name: &str, value: &Value) -> Result<Vec<u8>, Error> {
    let list = value
        .as_array()
        .ok_or_else(|| wrong(name, "a list of numbers from 0 to 9"))?;
    let mut steps = list
        .iter()
        .map(|step| {
            step.as_u64()
                .filter(|step| *step <= 9)
                .map(|step| step as u8)
        })
        .collect::<Option<Vec<u8>>>()
        .filter(|steps| !steps.is_empty())
        .ok_or_else(|| wrong(name, "a list of numbers from 0 to 9"))?;
    steps.sort_unstable();
    steps.dedup();
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Options, Error> {
        Options::from_json(value.as_object().unwrap())
    }

    #[test]
    fn options_of_kombu_are_understood_and_others_reported() {
        let options = read(json!({
            "visibility_timeout": 7200, "priority_steps": [9, 0, 5], "sep": ":",
            "queue_order_strategy": "sorted", "global_keyprefix": "pfx:", "fanout_prefix": false,
            "fanout_patterns": false, "ack_emulation": false, "socket_timeout": 2.5,
            "max_connections": 20, "colour": "blue", "unacked_restore_limit": 7,
            "sentinel_kwargs": {"password": "x"}, "client_name": null,
        }))
        .unwrap();
        assert_eq!(options.visibility_timeout.as_secs(), 7200);
        assert_eq!(options.priority_steps, [0, 5, 9]);
        assert_eq!(options.fanout_prefix, "");
        assert_eq!(options.command_timeout.as_millis(), 2500);
        assert_eq!(options.unacked_restore_limit, Some(7));
        assert_eq!(options.unknown, ["colour"]);
    }

    #[test]
    fn value_of_the_wrong_type_is_named() {
        for (name, value) in [
            ("visibility_timeout", json!("long")),
            ("visibility_timeout", json!(-1)),
            ("priority_steps", json!([0, 99])),
            ("queue_order_strategy", json!("random")),
            ("fanout_prefix", json!("x")),
            ("sep", json!("")),
        ] {
            let mut options = Map::new();
            options.insert(name.to_owned(), value);
            let error = Options::from_json(&options).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
