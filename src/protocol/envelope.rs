//! One message as kombu sees it, free of any broker's own form.
//!
//! Transports turn what their broker delivers into an [`Envelope`] and back; nothing here
//! knows Redis or AMQP. The body is the bytes after the transfer encoding (base64 on Redis)
//! was taken off and before decompression and deserialization.

use serde_json::{Map, Value};

/// A message: an opaque body, what it says about itself, and how it is to be treated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Envelope {
    /// Serialized, perhaps compressed, payload.
    pub body: Vec<u8>,
    /// MIME type of the payload, such as `application/json`; absent means raw data.
    pub content_type: Option<String>,
    /// `utf-8` for text serializers, `binary` for others.
    pub content_encoding: Option<String>,
    /// Application headers; for a task message these carry everything but the arguments.
    pub headers: Map<String, Value>,
    /// The basic properties of AMQP that kombu uses.
    pub properties: Properties,
}

/// The basic properties of AMQP that kombu fills.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Properties {
    /// The task id for tasks and results.
    pub correlation_id: Option<String>,
    /// Queue that `rpc://` results and control replies go to.
    pub reply_to: Option<String>,
    /// 1 transient, 2 persistent.
    pub delivery_mode: Option<u8>,
    /// 0 to 9 on Redis (0 is served first), 0 to `x-max-priority` on RabbitMQ.
    pub priority: Option<u8>,
    /// Milliseconds as text; enforced by RabbitMQ, ignored by the Redis transport.
    pub expiration: Option<String>,
}
