//! Task messages as the worker reads them.
//!
//! Three forms reach a worker: protocol 2 (headers say everything, the body is `[args, kwargs,
//! embed]`), protocol 1 (no headers, the body is one object) and a hybrid of both. All become a
//! [`Message`]. What cannot become one is an [`Invalid`], which keeps the id of the task where
//! it can be read, so that the caller can be told. Any bytes at all end in one of the two.
//!
//! Does not know which tasks exist, what time it is, or what to do with a message.
//!
//! Answers for `celery.worker.strategy` (`proto1_to_proto2`, `hybrid_to_proto2`), the reading
//! half of `celery.worker.request.Request` and `Consumer.on_unknown_message` and friends.

use std::fmt;

use serde_json::{Map, Value};

use super::envelope::Envelope;
use super::exception::Exception;
use super::serialization::{self, Accept};
use super::signature::Signature;
use super::time::Timestamp;
use super::zone::Zone;
use super::{Error, Limits, compression, saferepr};

mod fields;

use fields::Fields;

/// How a message reached this worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveryInfo {
    /// Exchange it was published to.
    pub exchange: String,
    /// Routing key it was published with.
    pub routing_key: String,
    /// Whether it may have been delivered before.
    pub redelivered: bool,
    /// Priority; taken from the envelope when absent here.
    pub priority: Option<u8>,
}

/// What is to be called after a task.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Embed {
    /// Called with the result after success.
    pub callbacks: Option<Vec<Signature>>,
    /// Called after failure.
    pub errbacks: Option<Vec<Signature>>,
    /// The rest of the chain, next step last. An empty list is not the same as none on the
    /// wire: it marks the last step.
    pub chain: Option<Vec<Signature>>,
    /// Body of the chord this task is a part of.
    pub chord: Option<Signature>,
}

/// A task message.
#[derive(Clone, PartialEq)]
pub struct Message {
    /// Id of the task.
    pub id: String,
    /// Registered name of the task.
    pub task: String,
    /// Name to show instead.
    pub shadow: Option<String>,
    /// Not to be run before.
    pub eta: Option<Timestamp>,
    /// Not to be run after.
    pub expires: Option<Timestamp>,
    /// `expires` as it was written, for a retry.
    pub expires_text: Option<String>,
    /// Whether `eta` and `expires` came without an offset; see [`Message::show_naive_in`].
    pub naive: [bool; 2],
    /// Id of the group it belongs to.
    pub group: Option<String>,
    /// Position in the group.
    pub group_index: Option<i64>,
    /// How often it was retried.
    pub retries: i64,
    /// Hard time limit of this call in seconds.
    pub time_limit: Option<f64>,
    /// Soft time limit of this call in seconds.
    pub soft_time_limit: Option<f64>,
    /// First task of the workflow.
    pub root_id: Option<String>,
    /// Task that sent this one.
    pub parent_id: Option<String>,
    /// Positional arguments as the client wants them shown.
    pub argsrepr: String,
    /// Keyword arguments as the client wants them shown.
    pub kwargsrepr: String,
    /// Node name of the sender.
    pub origin: Option<String>,
    /// Overrides the task's own setting.
    pub ignore_result: Option<bool>,
    /// How often the task replaced itself.
    pub replaced_task_nesting: i64,
    /// Names of stamps.
    pub stamped_headers: Option<Vec<String>>,
    /// Stamps: a value or a list of values for each name.
    pub stamps: Map<String, Value>,
    /// Queue for `rpc://` results.
    pub reply_to: Option<String>,
    /// Correlation id of the AMQP properties.
    pub correlation_id: Option<String>,
    /// Priority it was sent with.
    pub priority: Option<u8>,
    /// Headers that Celery gives no meaning, in their order.
    pub headers: Map<String, Value>,
    /// How it was delivered.
    pub delivery: DeliveryInfo,
    /// Positional arguments.
    pub args: Vec<Value>,
    /// Keyword arguments.
    pub kwargs: Map<String, Value>,
    /// What follows.
    pub embed: Embed,
}

/// Why a message is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidKind {
    /// Nothing says which task it is for.
    UnknownMessage,
    /// Its content type is not accepted.
    Refused,
    /// Its body cannot be decompressed or decoded.
    Undecodable,
    /// A header has a value that cannot be used.
    InvalidHeader,
    /// The body has the wrong shape.
    InvalidBody,
    /// The arguments cannot be used for a call at all.
    InvalidArguments,
}

/// A message that cannot become a task.
#[derive(Debug, Clone, PartialEq)]
pub struct Invalid {
    /// What is wrong.
    pub kind: InvalidKind,
    /// Id of the task, if it could be read.
    pub id: Option<String>,
    /// Name of the task, if it could be read.
    pub task: Option<String>,
    /// Where an `rpc://` client waits.
    pub reply_to: Option<String>,
    /// Correlation id of the AMQP properties.
    pub correlation_id: Option<String>,
    /// The text of Celery's exception.
    pub reason: String,
}

/// Headers that have a field of their own in [`Message`], or only matter on the way.
const KNOWN_HEADERS: &[&str] = &[
    "lang",
    "task",
    "id",
    "shadow",
    "eta",
    "expires",
    "group",
    "group_index",
    "retries",
    "timelimit",
    "root_id",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
    "compression",
    "redelivered",
];

impl Message {
    /// Reads a message.
    pub fn decode(
        envelope: &Envelope,
        delivery: &DeliveryInfo,
        accept: &Accept,
        limits: &Limits,
    ) -> Result<Self, Box<Invalid>> {
        decode(envelope, delivery, accept, limits).map_err(|(kind, reason)| {
            Box::new(Invalid {
                kind,
                reason,
                id: readable_id(envelope),
                task: text_header(&envelope.headers, "task"),
                reply_to: envelope.properties.reply_to.clone(),
                correlation_id: envelope.properties.correlation_id.clone(),
            })
        })
    }

    /// The name for logs and events.
    pub fn display_name(&self) -> &str {
        self.shadow.as_deref().unwrap_or(&self.task)
    }

    /// Shows times that came without an offset, and so are UTC, in a zone.
    pub fn show_naive_in(&mut self, zone: &Zone) {
        for (time, naive) in [&mut self.eta, &mut self.expires]
            .into_iter()
            .zip(self.naive)
        {
            if let Some(time) = time.as_mut().filter(|_| naive) {
                *time = zone.show(&time.to_utc());
            }
        }
    }

    /// The first task of the workflow: this one, unless the message names another.
    pub fn root(&self) -> &str {
        self.root_id.as_deref().unwrap_or(&self.id)
    }
}

impl fmt::Debug for Message {
    /// Without arguments, which may be secret.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Message")
            .field("id", &self.id)
            .field("task", &self.task)
            .field("eta", &self.eta)
            .field("expires", &self.expires)
            .field("retries", &self.retries)
            .field("group", &self.group)
            .field("delivery", &self.delivery)
            .finish_non_exhaustive()
    }
}

impl Invalid {
    /// The failure to store for its task.
    pub fn exception(&self) -> Exception {
        let (module, class) = match self.kind {
            InvalidKind::Refused => ("kombu.exceptions", "ContentDisallowed"),
            InvalidKind::Undecodable => ("kombu.exceptions", "DecodeError"),
            InvalidKind::InvalidArguments => ("builtins", "TypeError"),
            InvalidKind::UnknownMessage | InvalidKind::InvalidHeader | InvalidKind::InvalidBody => {
                ("celery.exceptions", "InvalidTaskError")
            }
        };
        Exception::new(module, class, vec![self.reason.clone().into()])
    }
}

impl fmt::Display for Invalid {
    /// The line for the log.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            InvalidKind::UnknownMessage => {
                formatter
                    .write_str("Received and deleted unknown message.  Wrong destination?!?")?;
            }
            InvalidKind::Undecodable => {
                write!(formatter, "Can't decode message body: {}", self.reason)?;
            }
            _ => write!(formatter, "Received invalid task message: {}", self.reason)?,
        }
        match (&self.task, &self.id) {
            (Some(task), Some(id)) => write!(formatter, " [task {task}[{id}]]"),
            (None, Some(id)) => write!(formatter, " [id {id}]"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Invalid {}

type Fault = (InvalidKind, String);

/// Positional and keyword arguments, and what follows.
type Parts = (Vec<Value>, Map<String, Value>, Embed);

fn decode(
    envelope: &Envelope,
    delivery: &DeliveryInfo,
    accept: &Accept,
    limits: &Limits,
) -> Result<Message, Fault> {
    let headers = &envelope.headers;
    let is_named = headers.get("task").is_some_and(|task| !task.is_null());
    let payload = payload(envelope, accept, limits)?;
    let custom = || -> Map<String, Value> {
        headers
            .iter()
            .filter(|(name, _)| !KNOWN_HEADERS.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    let mut message = match payload {
        Value::Array(mut parts) if is_named => {
            if parts.len() != 3 {
                let more = if parts.len() > 3 {
                    "too many"
                } else {
                    "not enough"
                };
                let got = if parts.len() > 3 {
                    String::new()
                } else {
                    format!(", got {}", parts.len())
                };
                let reason = format!("{more} values to unpack (expected 3{got})");
                return Err((InvalidKind::InvalidBody, reason));
            }
            let embed = embed(parts.pop().unwrap_or_default(), true)?;
            let kwargs = kwargs(parts.pop().unwrap_or_default())?;
            let fields = Fields {
                first: headers,
                second: None,
            };
            let args = args(parts.pop().unwrap_or_default(), &fields)?;
            let mut message = fields.message(args, kwargs, embed)?;
            message.fill_reprs(false);
            message
        }
        Value::Object(mut body) if is_named && body.contains_key("args") => {
            let parts = object_parts(&mut body, headers)?;
            let fields = Fields {
                first: headers,
                second: Some(&body),
            };
            let mut message = fields.message(parts.0, parts.1, parts.2)?;
            message.fill_reprs(false);
            message
        }
        Value::Object(mut body) if body.get("task").is_some_and(Value::is_string) && !is_named => {
            if let Some(taskset) = body.remove("taskset") {
                body.insert("group".to_owned(), taskset);
            }
            // These two say nothing in this protocol; a client's own entry must not be shown.
            body.remove("argsrepr");
            body.remove("kwargsrepr");
            let parts = object_parts(&mut body, &Map::new())?;
            let fields = Fields {
                first: &body,
                second: None,
            };
            let mut message = fields.message(parts.0, parts.1, parts.2)?;
            message.fill_reprs(true);
            message
        }
        _ if is_named => {
            let reason = "the body is neither [args, kwargs, embed] nor an object with args";
            return Err((InvalidKind::InvalidBody, reason.to_owned()));
        }
        _ => return Err((InvalidKind::UnknownMessage, "no task is named".to_owned())),
    };
    message.headers = custom();
    message.reply_to = envelope.properties.reply_to.clone();
    message.correlation_id = envelope.properties.correlation_id.clone();
    message.priority = delivery.priority.or(envelope.properties.priority);
    message.delivery = DeliveryInfo {
        priority: message.priority,
        ..delivery.clone()
    };
    Ok(message)
}

fn payload(envelope: &Envelope, accept: &Accept, limits: &Limits) -> Result<Value, Fault> {
    let method = match envelope.headers.get("compression") {
        None | Some(Value::Null) => None,
        Some(Value::String(name)) => Some(name.as_str()),
        Some(other) => {
            let reason = format!("invalid compression value {}", saferepr::repr(other));
            return Err((InvalidKind::InvalidHeader, reason));
        }
    };
    let undecodable = |error: Error| (InvalidKind::Undecodable, error.to_string());
    let body = compression::decompress(method, &envelope.body, limits.body).map_err(undecodable)?;
    serialization::decode(envelope.content_type.as_deref(), &body, accept, limits).map_err(
        |error| match error {
            Error::Refused(_) => (InvalidKind::Refused, error.to_string()),
            other => undecodable(other),
        },
    )
}

/// The id where a message has it, whatever else is wrong.
fn readable_id(envelope: &Envelope) -> Option<String> {
    text_header(&envelope.headers, "id")
        .or_else(|| envelope.properties.correlation_id.clone())
        .filter(|id| !id.is_empty())
}

fn text_header(headers: &Map<String, Value>, name: &str) -> Option<String> {
    headers.get(name).and_then(Value::as_str).map(str::to_owned)
}

fn kwargs(value: Value) -> Result<Map<String, Value>, Fault> {
    match value {
        Value::Object(kwargs) => Ok(kwargs),
        _ => Err((
            InvalidKind::InvalidBody,
            "Task keyword arguments is not a mapping".to_owned(),
        )),
    }
}

/// Positional arguments: what Python's `*args` makes of the value.
fn args(value: Value, fields: &Fields<'_>) -> Result<Vec<Value>, Fault> {
    let kind = match value {
        Value::Array(items) => return Ok(items),
        Value::String(text) => {
            return Ok(text.chars().map(|char| char.to_string().into()).collect());
        }
        Value::Object(object) => {
            return Ok(object.into_iter().map(|(key, _)| key.into()).collect());
        }
        Value::Null => "NoneType",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float",
        Value::Number(_) => "int",
    };
    let task = fields
        .get("task")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let text = format!("{task}() argument after * must be an iterable, not {kind}");
    Err((InvalidKind::InvalidArguments, text))
}

fn embed(value: Value, is_protocol_2: bool) -> Result<Embed, Fault> {
    let mut object = match value {
        Value::Null => return Ok(Embed::default()),
        Value::Object(object) => object,
        _ => {
            return Err((
                InvalidKind::InvalidBody,
                "embed is not an object".to_owned(),
            ));
        }
    };
    let mut list = |name: &str| {
        let value = object.remove(name).unwrap_or_default();
        Signature::list(value)
            .map_err(|reason| (InvalidKind::InvalidBody, format!("{name}: {reason}")))
    };
    let (callbacks, errbacks) = (list("callbacks")?, list("errbacks")?);
    let chain = if is_protocol_2 { list("chain")? } else { None };
    let chord = match object.remove("chord") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            Signature::from_value(value)
                .map_err(|reason| (InvalidKind::InvalidBody, format!("chord: {reason}")))?,
        ),
    };
    Ok(Embed {
        callbacks,
        errbacks,
        chain,
        chord,
    })
}

/// Arguments and follow-ups of a body that is one object.
fn object_parts(
    body: &mut Map<String, Value>,
    headers: &Map<String, Value>,
) -> Result<Parts, Fault> {
    let given = body
        .remove("args")
        .unwrap_or_else(|| Value::Array(Vec::new()));
    let args = args(
        given,
        &Fields {
            first: headers,
            second: Some(body),
        },
    )?;
    let kwargs = kwargs(
        body.remove("kwargs")
            .unwrap_or_else(|| Value::Object(Map::new())),
    )?;
    let mut follow = Map::new();
    for name in ["callbacks", "errbacks", "chord"] {
        if let Some(value) = body.remove(name) {
            follow.insert(name.to_owned(), value);
        }
    }
    Ok((args, kwargs, embed(Value::Object(follow), false)?))
}

impl Message {
    /// Reprs the sender did not make. Protocol 1 has its arguments in a list.
    fn fill_reprs(&mut self, is_protocol_1: bool) {
        let (length, levels) = (saferepr::MAX_LENGTH, saferepr::MAX_LEVELS);
        if self.argsrepr.is_empty() {
            let shown = saferepr::saferepr_args(&self.args, length, levels);
            self.argsrepr = if is_protocol_1 {
                as_list(&shown)
            } else {
                shown
            };
        }
        if self.kwargsrepr.is_empty() {
            self.kwargsrepr = saferepr::saferepr_kwargs(&self.kwargs, length, levels);
        }
    }
}

/// `(1, 2)` and `(1,)` as `[1, 2]` and `[1]`.
fn as_list(tuple: &str) -> String {
    let inner = tuple.strip_prefix('(').unwrap_or(tuple);
    let inner = inner.strip_suffix(')').unwrap_or(inner);
    format!("[{}]", inner.strip_suffix(',').unwrap_or(inner))
}

#[cfg(test)]
mod tests;
