//! Exchanges and queues in AMQP's terms, with the defaults Celery gives them.

use serde_json::{Map, Value};

/// How an exchange chooses the queues a message goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    /// By equality of the routing key.
    Direct,
    /// By a pattern over the words of the routing key.
    Topic,
    /// To every bound queue.
    Fanout,
}

/// Where messages are published to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// Empty for the default exchange, which routes to the queue named by the routing key.
    pub name: String,
    /// Routing rule.
    pub kind: ExchangeKind,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Deleted with its last binding.
    pub auto_delete: bool,
}

/// Where messages wait, and the binding that brings them there.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// Name of the queue.
    pub name: String,
    /// The exchange it is bound to.
    pub exchange: Exchange,
    /// Binding key: routing key, or pattern for a topic exchange.
    pub routing_key: String,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Only this connection may use it (AMQP).
    pub exclusive: bool,
    /// Deleted with its last consumer.
    pub auto_delete: bool,
    /// `x-expires`: seconds without use after which the broker deletes it.
    pub expires: Option<f64>,
    /// `x-message-ttl` in seconds.
    pub message_ttl: Option<f64>,
    /// `x-max-priority` (AMQP).
    pub max_priority: Option<u8>,
    /// Other `x-` arguments as given by the user.
    pub arguments: Map<String, Value>,
}

impl ExchangeKind {
    /// The word AMQP and kombu use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Topic => "topic",
            Self::Fanout => "fanout",
        }
    }
}

impl Exchange {
    /// The default exchange: the routing key is the queue's name.
    pub fn default_exchange() -> Self {
        Self::new("", ExchangeKind::Direct)
    }

    /// A durable exchange.
    pub fn new(name: impl Into<String>, kind: ExchangeKind) -> Self {
        Self {
            name: name.into(),
            kind,
            durable: true,
            auto_delete: false,
        }
    }
}

impl Queue {
    /// A task queue as Celery makes it from a bare name: durable, bound to a direct exchange
    /// of the same name with the same key.
    pub fn task(name: impl Into<String>) -> Self {
        let name = name.into();
        let exchange = Exchange::new(name.clone(), ExchangeKind::Direct);
        Self::bound(name.clone(), exchange, name)
    }

    /// A durable queue bound to `exchange` by `routing_key`.
    pub fn bound(
        name: impl Into<String>,
        exchange: Exchange,
        routing_key: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            exchange,
            routing_key: routing_key.into(),
            durable: true,
            exclusive: false,
            auto_delete: false,
            expires: None,
            message_ttl: None,
            max_priority: None,
            arguments: Map::new(),
        }
    }
}
