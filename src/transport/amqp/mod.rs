//! kombu's AMQP transport: RabbitMQ, through lapin.
//!
//! Read in this order: `options`, `connect` (addresses, one TCP connection), `life` (how a
//! channel ends), `core` (what a channel's tasks share, declarations), `message` (tables and
//! properties), `settle` (acknowledgements, in order), `consume` (queues and prefetch), `greeting` (the server's version),
//! `publish`, `delayed` (ETA for quorum queues), `channel` (the words), `error`.
//!
//! ```text
//!  next() ◀── inbound ◀── one consumer per queue ◀──┐
//!  ack()  ──▶ ops ──▶ settle ───────────────────────┼═▶ connection for consuming
//!  subscribe() ◀── a channel each, no_ack ◀─────────┘
//!  publish() ──▶ channel with confirms ──┐
//!  cast() ──▶ casts ──▶ publish::run ────┴══════════▶ connection for publishing
//! ```
//!
//! Invariants. Declarations are those of kombu 5.7, so that Python workers share the queues.
//! Lapin's own recovery is off: the first fault ends the channel, and RabbitMQ gives what it
//! held to somebody; a [`Tag`](super::Tag) names its channel, so one that comes late is ignored.
//! While RabbitMQ is short of memory or disk it reads nothing from connections that publish;
//! acknowledgements have another. Publications and acknowledgements are therefore ordered
//! among themselves, but only an awaited [`publish`](super::Channel::publish) comes before a
//! later [`ack`](super::Channel::ack).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use self::channel::AmqpChannel;
use self::connect::Connector;
use self::core::{Core, Shared};
use self::life::Life;
pub use self::options::Options;
use super::url::{BrokerUrl, Scheme};
use super::{Channel, Error, Transport};

mod channel;
mod connect;
mod consume;
mod core;
mod delayed;
mod error;
mod greeting;
mod life;
mod message;
mod options;
mod publish;
mod settle;

/// Keeps messages nobody could process.
const QUARANTINE: &str = "celeriac.quarantine";
/// How many; the oldest go first.
const QUARANTINE_MOST: u32 = 10_000;

/// RabbitMQ as a broker.
#[derive(Debug)]
pub struct AmqpTransport {
    shared: Arc<Shared>,
    urls: Vec<BrokerUrl>,
}

impl AmqpTransport {
    /// Checks addresses and options; connects nowhere.
    pub fn new(urls: &[BrokerUrl], options: Options) -> Result<Self, Error> {
        let shared = Shared {
            connector: Connector::new(urls)?,
            options,
            current: AtomicU32::new(0),
            refuses_global: AtomicBool::new(false),
            refuses_transient: AtomicBool::new(false),
            delays: AtomicBool::new(false),
            exchanges: std::sync::Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            urls: urls.to_vec(),
        })
    }

    fn current(&self) -> &BrokerUrl {
        let index = self.shared.current.load(Ordering::Relaxed) as usize;
        self.urls.get(index).unwrap_or(&self.urls[0])
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    async fn connect(&self) -> Result<Arc<dyn Channel>, Error> {
        let life = Life::new();
        let shared = self.shared.clone();
        let found = shared.connector.connect(&shared.options, &life).await?;
        shared
            .current
            .store(u32::try_from(found.0).unwrap_or(0), Ordering::Relaxed);
        let (inbound_sender, inbound) = mpsc::unbounded_channel();
        let (op_sender, ops) = mpsc::unbounded_channel();
        let (cast_sender, casts) = mpsc::channel(publish::CASTS);
        let core = Core::new(shared, life, found, inbound_sender, op_sender, cast_sender);
        let core = Arc::new(core);
        tokio::spawn(settle::run(core.clone(), ops));
        tokio::spawn(publish::run(core.clone(), casts));
        Ok(Arc::new(AmqpChannel::new(core, inbound)))
    }

    fn display_url(&self) -> String {
        self.current().to_string()
    }

    fn info(&self) -> Value {
        let url = self.current();
        let options = &self.shared.options;
        let alternates: Vec<String> = self.urls.iter().skip(1).map(ToString::to_string).collect();
        json!({
            "hostname": if url.host == "localhost" { "127.0.0.1" } else { &url.host },
            "userid": url.username.as_deref().unwrap_or("guest"),
            "virtual_host": url.virtual_host,
            "port": url.port_or_default(),
            "insist": false,
            "ssl": url.scheme == Scheme::Amqps,
            "transport": "amqp",
            "connect_timeout": options.connect_timeout.as_secs(),
            "transport_options": Map::new(),
            "login_method": options.login_method,
            "uri_prefix": null,
            "heartbeat": options.heartbeat.as_secs_f64(),
            "failover_strategy": "round-robin",
            "alternates": alternates,
            "credential_provider": null,
        })
    }

    fn driver(&self) -> &'static str {
        "amqp"
    }
}
