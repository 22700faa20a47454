//! What can be set about an AMQP connection.
//!
//! Owns reading `broker_transport_options`. An option nobody knows is collected in
//! [`Options::unknown`], so that the worker can say so once. Answers for `kombu/transport/pyamqp.py`.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::transport::{Error, Queue};

/// Celery offers 120 seconds and gets RabbitMQ's 60: a dead connection is noticed after two
/// minutes, and as long does the server keep what was delivered on it. With 5 seconds, the
/// shortest of RabbitMQ's recommendation, it is at most 15 on both sides, for a frame of 8 bytes
/// every 2.5 seconds. TCP's own means do not see a server that hangs, nor a proxy whose other
/// side is dead.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Transport options; [`Options::default`] is Celery's behaviour, but for the heartbeat.
#[derive(Debug, Clone)]
pub struct Options {
    /// Heartbeat offered to the server, which may want a shorter one; zero leaves it to the
    /// server. A connection on which nothing comes for two of them is dead, for either side.
    pub heartbeat: Duration,
    /// Deadline of connecting, login included.
    pub connect_timeout: Duration,
    /// Deadline of a request such as a declaration.
    pub request_timeout: Duration,
    /// Name shown in RabbitMQ's list of connections.
    pub connection_name: String,
    /// Whether the addresses after the first are tried in random order (`broker_failover_strategy`).
    pub shuffle: bool,
    /// `broker_login_method`: PLAIN, AMQPLAIN or EXTERNAL.
    pub login_method: String,
    /// What a queue is like that a message is sent to and nobody has made; its name is replaced.
    pub missing_queue: Queue,
    /// Whether the worker's quorum queues switch off the channel-wide prefetch limit.
    pub detect_quorum_queues: bool,
    /// Type of the queues that delay messages: quorum or classic.
    pub delayed_queue_type: String,
    /// Options nobody knows.
    pub unknown: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat: HEARTBEAT,
            connect_timeout: Duration::from_secs(4),
            request_timeout: Duration::from_secs(30),
            connection_name: "celeriac".to_owned(),
            shuffle: false,
            login_method: "PLAIN".to_owned(),
            missing_queue: Queue::task("celery"),
            detect_quorum_queues: true,
            delayed_queue_type: "quorum".to_owned(),
            unknown: Vec::new(),
        }
    }
}

impl Options {
    /// Adds kombu's options. An option with a value of the wrong type is an error; an option
    /// nobody knows is not.
    pub fn with_json(self, json: &Map<String, Value>) -> Result<Self, Error> {
        let mut options = self;
        for (name, value) in json {
            match name.as_str() {
                _ if value.is_null() => {}
                "connect_timeout" => options.connect_timeout = seconds(name, value)?,
                "heartbeat" => options.heartbeat = seconds(name, value)?,
                "read_timeout" | "write_timeout" => {
                    options.request_timeout = seconds(name, value)?;
                }
                "login_method" => options.login_method = text(name, value)?,
                "client_properties" => {
                    if let Some(value) = value.get("connection_name") {
                        options.connection_name = text(name, value)?;
                    }
                }
                // Every message that matters is confirmed here in any case; the retries are
                // those of task_publish_retry_policy and of the worker's connection loop.
                "confirm_publish" | "confirm_timeout" | "max_retries" | "interval_start"
                | "interval_step" | "interval_max" => {}
                _ => options.unknown.push(name.clone()),
            }
        }
        Ok(options)
    }
}

fn seconds(name: &str, value: &Value) -> Result<Duration, Error> {
    let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
    number
        .and_then(|number| Duration::try_from_secs_f64(number).ok())
        .ok_or_else(|| wrong(name, "a number of seconds", value))
}

fn text(name: &str, value: &Value) -> Result<String, Error> {
    let text = value.as_str().map(str::to_owned);
    text.ok_or_else(|| wrong(name, "a text", value))
}

fn wrong(name: &str, wanted: &str, value: &Value) -> Error {
    Error::Url(format!(
        "the transport option `{name}` must be {wanted}, not {value}"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Options, Error> {
        Options::default().with_json(value.as_object().unwrap())
    }

    #[test]
    fn options_of_kombu_are_read_and_others_named() {
        let options = read(&json!({
            "heartbeat": 10, "connect_timeout": "2.5", "confirm_publish": true, "max_retries": 3,
            "visibility_timeout": 3600, "login_method": null,
            "client_properties": {"connection_name": "mine"},
        }));
        let options = options.unwrap();
        assert_eq!(options.heartbeat, Duration::from_secs(10));
        assert_eq!(options.connect_timeout, Duration::from_millis(2500));
        assert_eq!(options.connection_name, "mine");
        assert_eq!(options.login_method, "PLAIN");
        assert_eq!(options.unknown, ["visibility_timeout"]);
    }

    #[test]
    fn a_value_of_the_wrong_type_names_the_option() {
        let error = read(&json!({"heartbeat": "often"})).unwrap_err();
        assert!(error.to_string().contains("`heartbeat`"), "{error}");
    }
}
