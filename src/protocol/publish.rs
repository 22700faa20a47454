//! Task messages as the worker writes them: callbacks, chain steps, retries, own calls.
//!
//! Builds protocol 2 envelopes with Celery's headers in Celery's order. Does not know queues:
//! where a call goes is read from [`TaskCall::queue`] and friends by the caller's router.
//!
//! Answers for `celery.app.amqp.AMQP.as_task_v2`, the option handling of
//! `celery.app.base.Celery.send_task`, and `Task.signature_from_request` (retries).

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use super::envelope::{Envelope, Properties};
use super::message::{Embed, Message};
use super::serialization::{Encoded, Serializer};
use super::signature::Signature;
use super::time::{self, Timestamp};
use super::{Error, compression, json, saferepr};

mod options;

/// A call that is about to be sent.
#[derive(Clone, PartialEq)]
pub struct TaskCall {
    /// Id of the task.
    pub id: String,
    /// Name of the task.
    pub name: String,
    /// Positional arguments.
    pub args: Vec<Value>,
    /// Keyword arguments.
    pub kwargs: Map<String, Value>,
    /// Name to show instead.
    pub shadow: Option<String>,
    /// Not to be run before.
    pub eta: Option<Timestamp>,
    /// Not to be run after, as text.
    pub expires: Option<String>,
    /// What the broker is told about it: seconds from now.
    pub expiration: Option<f64>,
    /// Group it belongs to.
    pub group: Option<String>,
    /// Position in the group.
    pub group_index: Option<i64>,
    /// How often it was retried.
    pub retries: i64,
    /// Hard time limit in seconds.
    pub time_limit: Option<f64>,
    /// Soft time limit in seconds.
    pub soft_time_limit: Option<f64>,
    /// First task of the workflow; this one when absent.
    pub root_id: Option<String>,
    /// Task that sends it.
    pub parent_id: Option<String>,
    /// Arguments as they are shown; made from them when absent.
    pub argsrepr: Option<String>,
    /// Keyword arguments as they are shown; made from them when absent.
    pub kwargsrepr: Option<String>,
    /// Node name of the sender.
    pub origin: String,
    /// Overrides the task's own setting; null is written when absent.
    pub ignore_result: Option<bool>,
    /// How often the task replaced itself.
    pub replaced_task_nesting: i64,
    /// Names of stamps.
    pub stamped_headers: Option<Vec<String>>,
    /// Stamps.
    pub stamps: Map<String, Value>,
    /// Custom headers.
    pub headers: Map<String, Value>,
    /// Queue for `rpc://` results.
    pub reply_to: String,
    /// Priority.
    pub priority: Option<u8>,
    /// Queue it is to go to, if the call says so.
    pub queue: Option<String>,
    /// Exchange it is to go to, if the call says so.
    pub exchange: Option<String>,
    /// Routing key, if the call says so.
    pub routing_key: Option<String>,
    /// How the body is written.
    pub serializer: Serializer,
    /// How the body is compressed.
    pub compression: Option<String>,
    /// What follows.
    pub embed: Embed,
}

/// The third part of a body.
#[derive(Serialize)]
struct WrittenEmbed<'a> {
    callbacks: &'a Option<Vec<Signature>>,
    errbacks: &'a Option<Vec<Signature>>,
    chain: &'a Option<Vec<Signature>>,
    chord: &'a Option<Signature>,
}

impl TaskCall {
    /// A plain call.
    pub fn new(
        id: impl Into<String>,
        name: impl Into<String>,
        args: Vec<Value>,
        kwargs: Map<String, Value>,
    ) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            args,
            kwargs,
            shadow: None,
            eta: None,
            expires: None,
            expiration: None,
            group: None,
            group_index: None,
            retries: 0,
            time_limit: None,
            soft_time_limit: None,
            root_id: None,
            parent_id: None,
            argsrepr: None,
            kwargsrepr: None,
            origin: String::new(),
            ignore_result: Some(false),
            replaced_task_nesting: 0,
            stamped_headers: None,
            stamps: Map::new(),
            headers: Map::new(),
            reply_to: String::new(),
            priority: None,
            queue: None,
            exchange: None,
            routing_key: None,
            serializer: Serializer::Json,
            compression: None,
            embed: Embed::default(),
        }
    }

    /// The call of a plain signature with `extra` arguments before its own (unless it is
    /// immutable). `fresh_id` is used where the signature does not fix an id.
    pub fn from_signature(
        signature: &Signature,
        extra: &[Value],
        fresh_id: impl FnOnce() -> String,
        now: &Timestamp,
    ) -> Result<Self, String> {
        let id = signature.task_id().map_or_else(fresh_id, str::to_owned);
        let mut call = Self::new(
            id,
            signature.task(),
            signature.args_with(extra),
            signature.kwargs(),
        );
        call.apply_options(signature, now)?;
        Ok(call)
    }

    /// The same task once more: same id, one retry more, at `eta`, to where it came from.
    pub fn retry_of(message: &Message, eta: Option<Timestamp>) -> Self {
        let mut call = Self::new(
            message.id.clone(),
            message.task.clone(),
            message.args.clone(),
            message.kwargs.clone(),
        );
        call.shadow = message.shadow.clone();
        call.eta = eta;
        call.expires = message.expires_text.clone();
        call.group = message.group.clone();
        call.group_index = message.group_index;
        call.retries = message.retries.saturating_add(1);
        call.time_limit = message.time_limit;
        call.soft_time_limit = message.soft_time_limit;
        call.root_id = message.root_id.clone();
        call.parent_id = Some(
            message
                .parent_id
                .clone()
                .unwrap_or_else(|| message.id.clone()),
        );
        call.argsrepr = Some(message.argsrepr.clone());
        call.kwargsrepr = Some(message.kwargsrepr.clone());
        call.origin = message.origin.clone().unwrap_or_default();
        call.ignore_result = message.ignore_result;
        call.replaced_task_nesting = message.replaced_task_nesting;
        call.stamped_headers = message.stamped_headers.clone();
        call.stamps = message.stamps.clone();
        call.headers = message
            .headers
            .iter()
            .filter(|(name, _)| !is_death_header(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        call.reply_to = message.reply_to.clone().unwrap_or_default();
        call.priority = message.priority;
        // On the default exchange the routing key is the queue.
        if message.delivery.exchange.is_empty() {
            call.queue = Some(message.delivery.routing_key.clone());
        } else {
            call.exchange = Some(message.delivery.exchange.clone());
            call.routing_key = Some(message.delivery.routing_key.clone());
        }
        call.embed = message.embed.clone();
        call
    }

    /// The message.
    pub fn to_envelope(&self) -> Result<Envelope, Error> {
        let Encoded {
            mut body,
            content_type,
            content_encoding,
        } = self.body()?;
        let mut headers = self.message_headers();
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        if let Some(method) = &self.compression {
            let (packed, name) = compression::compress(method, &body)?;
            body = packed;
            headers.insert("compression".to_owned(), name.into());
        }
        Ok(Envelope {
            body,
            content_type: Some(content_type.to_owned()),
            content_encoding: Some(content_encoding.to_owned()),
            headers,
            properties: Properties {
                correlation_id: Some(self.id.clone()),
                reply_to: Some(self.reply_to.clone()),
                delivery_mode: Some(2),
                priority: self.priority,
                expiration: self
                    .expiration
                    .map(|seconds| format!("{:.0}", (seconds * 1e3).trunc())),
            },
        })
    }

    fn body(&self) -> Result<Encoded, Error> {
        let Embed {
            callbacks,
            errbacks,
            chain,
            chord,
        } = &self.embed;
        if self.serializer == Serializer::Json {
            // The common case without a copy of the arguments.
            let embed = WrittenEmbed {
                callbacks,
                errbacks,
                chain,
                chord,
            };
            let body = serde_json::to_vec(&(&self.args, &self.kwargs, embed))
                .map_err(|error| Error::Encode(error.to_string()))?;
            return Ok(Encoded {
                body,
                content_type: Serializer::Json.content_type(),
                content_encoding: Serializer::Json.content_encoding(),
            });
        }
        let list = |signatures: &Option<Vec<Signature>>| match signatures {
            Some(list) => Value::Array(list.iter().map(Signature::to_value).collect()),
            None => Value::Null,
        };
        let mut embed = Map::new();
        embed.insert("callbacks".to_owned(), list(callbacks));
        embed.insert("errbacks".to_owned(), list(errbacks));
        embed.insert("chain".to_owned(), list(chain));
        let chord = chord.as_ref().map_or(Value::Null, Signature::to_value);
        embed.insert("chord".to_owned(), chord);
        self.serializer.encode(&Value::Array(vec![
            Value::Array(self.args.clone()),
            Value::Object(self.kwargs.clone()),
            Value::Object(embed),
        ]))
    }

    /// `argsrepr` as it will be sent, which events show as well.
    pub fn shown_args(&self) -> String {
        self.argsrepr.clone().unwrap_or_else(|| {
            saferepr::saferepr_args(&self.args, saferepr::MAX_LENGTH, saferepr::MAX_LEVELS)
        })
    }

    /// `kwargsrepr` as it will be sent.
    pub fn shown_kwargs(&self) -> String {
        self.kwargsrepr.clone().unwrap_or_else(|| {
            saferepr::saferepr_kwargs(&self.kwargs, saferepr::MAX_LENGTH, saferepr::MAX_LEVELS)
        })
    }

    fn message_headers(&self) -> Map<String, Value> {
        let limit = |seconds: Option<f64>| seconds.map_or(Value::Null, seconds_value);
        let eta = self.eta.as_ref().map(time::format_iso);
        let root = self.root_id.as_ref().unwrap_or(&self.id);
        let entries: [(&str, Value); 19] = [
            ("lang", "py".into()),
            ("task", self.name.clone().into()),
            ("id", self.id.clone().into()),
            ("shadow", self.shadow.clone().into()),
            ("eta", eta.into()),
            ("expires", self.expires.clone().into()),
            ("group", self.group.clone().into()),
            ("group_index", self.group_index.into()),
            ("retries", self.retries.into()),
            (
                "timelimit",
                Value::Array(vec![limit(self.time_limit), limit(self.soft_time_limit)]),
            ),
            ("root_id", root.clone().into()),
            ("parent_id", self.parent_id.clone().into()),
            ("argsrepr", self.shown_args().into()),
            ("kwargsrepr", self.shown_kwargs().into()),
            ("origin", self.origin.clone().into()),
            ("ignore_result", self.ignore_result.into()),
            ("replaced_task_nesting", self.replaced_task_nesting.into()),
            ("stamped_headers", self.stamped_headers.clone().into()),
            ("stamps", Value::Object(self.stamps.clone())),
        ];
        entries
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

impl fmt::Debug for TaskCall {
    /// Without arguments, which may be secret.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TaskCall")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("eta", &self.eta)
            .field("retries", &self.retries)
            .field("group", &self.group)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

/// Whole seconds are written as Python writes an int.
fn seconds_value(seconds: f64) -> Value {
    if seconds.fract() == 0.0 && seconds.abs() < 9e15 {
        Value::from(seconds as i64)
    } else {
        json::float(seconds)
    }
}

/// Headers RabbitMQ adds to dead-lettered messages, which must not be sent again.
fn is_death_header(name: &str) -> bool {
    name == "x-death" || name.starts_with("x-first-death-") || name.starts_with("x-last-death-")
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::TaskCall;
    use crate::protocol::Limits;
    use crate::protocol::message::{DeliveryInfo, Message};
    use crate::protocol::serialization::{Accept, Serializer};
    use crate::protocol::signature::Signature;
    use crate::protocol::time::parse_iso;

    fn read(call: &TaskCall) -> Message {
        let envelope = call.to_envelope().expect("writes");
        let accept = Accept::parse("json,msgpack,yaml").expect("known");
        let delivery = DeliveryInfo {
            routing_key: "celery".to_owned(),
            ..DeliveryInfo::default()
        };
        Message::decode(&envelope, &delivery, &accept, &Limits::default()).expect("reads")
    }

    #[test]
    fn headers_and_body_are_those_of_celery() {
        let mut call = TaskCall::new(
            "id-1",
            "celery_app.analyze_repo_task",
            vec![json!(17), json!("https://git.example/o/r.git")],
            Map::new(),
        );
        call.origin = "gen15576@client.example".to_owned();
        call.reply_to = "q".to_owned();
        let envelope = call.to_envelope().expect("writes");
        assert_eq!(
            serde_json::Value::Object(envelope.headers).to_string(),
            r#"{"lang":"py","task":"celery_app.analyze_repo_task","id":"id-1","shadow":null,"eta":null,"expires":null,"group":null,"group_index":null,"retries":0,"timelimit":[null,null],"root_id":"id-1","parent_id":null,"argsrepr":"(17, 'https://git.example/o/r.git')","kwargsrepr":"{}","origin":"gen15576@client.example","ignore_result":false,"replaced_task_nesting":0,"stamped_headers":null,"stamps":{}}"#
        );
        assert_eq!(
            String::from_utf8(envelope.body).expect("text"),
            r#"[[17,"https://git.example/o/r.git"],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]"#
        );
        assert_eq!(envelope.properties.correlation_id.as_deref(), Some("id-1"));
    }

    #[test]
    fn a_signature_becomes_its_call() {
        let now = parse_iso("2026-11-22T23:00:00").expect("valid");
        let signature = Signature::from_value(json!({"task": "a.b", "args": [10], "kwargs": {"k": 1}, "options": {
            "task_id": "t", "group_id": "g", "group_index": 2, "queue": "other", "countdown": 1.5, "expires": 60,
            "time_limit": 10, "priority": 3, "headers": {"x-custom": "v"}, "link": {"task": "c"}, "chain": [],
            "stamped_headers": ["stage"], "stage": "prod", "ignore_result": true, "reply_to": "r", "shadow": null}})).expect("valid");
        let mut call =
            TaskCall::from_signature(&signature, &[json!(3)], || "fresh".to_owned(), &now)
                .expect("valid");
        call.compression = Some("zlib".to_owned());
        call.serializer = Serializer::Msgpack;
        let message = read(&call);
        assert_eq!(message.args, [json!(3), json!(10)]);
        assert_eq!(
            (
                message.id.as_str(),
                message.group.as_deref(),
                message.group_index
            ),
            ("t", Some("g"), Some(2))
        );
        assert_eq!(message.eta, parse_iso("2026-11-22T23:00:01.5").ok());
        assert_eq!(
            message.expires_text.as_deref(),
            Some("2026-11-22T23:01:00+00:00")
        );
        assert_eq!(
            (
                message.time_limit,
                message.soft_time_limit,
                message.priority
            ),
            (Some(10.0), None, Some(3))
        );
        assert_eq!(
            message.headers,
            *json!({"x-custom": "v"}).as_object().expect("object")
        );
        assert_eq!(message.stamps["stage"], "prod");
        assert_eq!(message.embed.callbacks.expect("one")[0].task(), "c");
        assert_eq!(message.embed.chain, Some(vec![]));
        assert_eq!(call.queue.as_deref(), Some("other"));
        assert_eq!(
            call.to_envelope()
                .expect("writes")
                .properties
                .expiration
                .as_deref(),
            Some("60000")
        );
    }

    #[test]
    fn a_retry_keeps_everything_but_count_eta_and_parent() {
        let mut first = TaskCall::new("t", "a.b", vec![json!(1)], Map::new());
        first.headers.insert("x-death".to_owned(), json!([1]));
        first.headers.insert("x-custom".to_owned(), json!("v"));
        first.argsrepr = Some("('***',)".to_owned());
        first.embed.chain = Some(vec![Signature::new("next", vec![], Map::new())]);
        let before = read(&first);
        let again = TaskCall::retry_of(&before, parse_iso("2030-01-01").ok());
        assert_eq!(again.queue.as_deref(), Some("celery"));
        let after = read(&again);
        assert_eq!(
            (after.id.as_str(), after.retries, after.parent_id.as_deref()),
            ("t", 1, Some("t"))
        );
        assert_eq!(after.argsrepr, "('***',)");
        assert_eq!(after.embed, before.embed);
        assert!(after.headers.contains_key("x-custom") && !after.headers.contains_key("x-death"));
    }

    #[test]
    fn options_of_the_wrong_kind_are_errors() {
        let now = parse_iso("2026-11-22").expect("valid");
        for options in [
            json!({"countdown": "x"}),
            json!({"eta": 5}),
            json!({"serializer": "pickle"}),
            json!({"link": 7}),
            json!({"chord": 7}),
            json!({"expires": []}),
            json!({"priority": "high"}),
        ] {
            let signature =
                Signature::from_value(json!({"task": "a", "options": options})).expect("valid");
            TaskCall::from_signature(&signature, &[], String::new, &now)
                .expect_err(&options.to_string());
        }
    }
}
