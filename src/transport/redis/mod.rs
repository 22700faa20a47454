//! kombu's Redis transport, so that Python workers and celeriac share queues and recover each
//! other's messages.
//!
//! Read in this order: `keys` (names), `message` (JSON), `script` (what happens in one step),
//! `core` (what a channel's tasks share), `writer` (the one that speaks), `fetch` (knowing when
//! to take), `lease`, `unacked` (restoring), `janitor` (the dead and the old), `fanout` and `mailbox` (queues of one's
//! own), `revoked` (a note to all), `channel` (the words), `connect`, `options`.
//!
//! ```text
//!  next() ◀── inbound ◀──┐                                   ┌─▶ Tracker: told of new messages
//!  ack()  ──┐            │                                   │   (Popper: BRPOP, old servers)
//!  publish()├──▶ ops ──▶ Writer ══ one pipeline at a time ══▶ Redis
//!  call()  ─┘            ▲                                   │
//!   keep_house ──────────┘                                   ├─▶ Hub: pub/sub
//!                                                            └─▶ mailbox: BRPOP, one each
//! ```
//!
//! | key | type | content |
//! | --- | --- | --- |
//! | `<queue>`, `<queue>\x06\x16<step>` | list | waiting messages |
//! | `unacked` | hash | tag → `[envelope, exchange, routing key]` |
//! | `unacked_index` | sorted set | tag → time of delivery or of the last renewal |
//! | `unacked_mutex` | string | lock of the sweep |
//! | `_kombu.binding.<exchange>`, `_kombu.binding_permanent.<exchange>` | set | bindings |
//! | `_kombu.binding_deadlines` | sorted set | exchange → when its table may go |
//! | `celeriac.alive.<owner>` | string, 3 s | sign of life; the value is the node's name |
//! | `celeriac.owned.<owner>` | hash, ≥ 1 h | tag → score, `!` when somebody works on it |
//! | `celeriac.owners` | set, ≥ 1 h | owners that may hold something |
//! | `celeriac.fenced.<owner>` | string, ≥ 1 h | its deliveries were taken away |
//! | `celeriac.recovering.<owner>` | string, 10 s | lock of a recovery |
//! | `celeriac.running.<user>`, `celeriac.started.<user>`, `celeriac.analysing.<digest>` | sorted set | see `permits` |
//! | `celeriac.revoked` | sorted set, 3 h | revoked task id → when |
//! | `celeriac.quarantine` | list, capped | messages nobody could process |
//!
//! Invariants. Nothing is popped before it can be recorded (one exception, see `fetch`). A
//! delivery is settled only while its score is ours. No key of ours but the quarantine is
//! without an end, and a clean close removes all of them. A channel never reconnects; its
//! [`RedisTransport`] remembers what a broken one held and had not sent, and the next one goes
//! on with it when [`Channel::adopt`] is called.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use self::channel::RedisChannel;
use self::connect::Connector;
use self::core::{Core, Ledger};
use self::keys::Keys;
pub use self::options::{Options, QueueOrder};
use self::reply::refusal;
use self::script::Scripts;
use self::writer::Writer;
use super::url::{BrokerUrl, Scheme};
use super::{Channel, Error, Transport};

mod channel;
mod connect;
mod core;
mod fanout;
mod fetch;
mod janitor;
mod keys;
mod lease;
mod ledger;
mod mailbox;
mod message;
mod options;
mod permits;
mod publish;
mod reply;
mod revoked;
mod script;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
mod unacked;
mod writer;

/// Redis as a broker.
#[derive(Debug)]
pub struct RedisTransport {
    connector: Connector,
    options: Options,
    urls: Vec<BrokerUrl>,
    current: Mutex<BrokerUrl>,
    ledger: Arc<Ledger>,
}

impl RedisTransport {
    /// Checks addresses and options; connects nowhere.
    pub fn new(urls: &[BrokerUrl], options: Options) -> Result<Self, Error> {
        let connector = Connector::new(urls, &options)?;
        let first = urls.first().cloned().ok_or(Error::Closed)?;
        Ok(Self {
            connector,
            options,
            urls: urls.to_vec(),
            current: Mutex::new(first),
            ledger: Arc::new(Ledger::new()),
        })
    }

    fn current(&self) -> BrokerUrl {
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[async_trait]
impl Transport for RedisTransport {
    async fn connect(&self) -> Result<Arc<dyn Channel>, Error> {
        let (link, mut connection) = self.connector.connect().await?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = link.url.clone();
        let mut load = redis::Pipeline::new();
        for script in Scripts::new().all() {
            load.add_command(script.load());
        }
        let count = load.len();
        let replies = connection
            .send_packed_commands(&load, 0, count)
            .await
            .map_err(|error| link.unwelcome(&error))?;
        let mut scripted = true;
        if let Some(error) = replies.iter().find_map(refusal) {
            if matches!(
                error.code(),
                "LOADING" | "NOAUTH" | "DENIED" | "READONLY" | "MASTERDOWN"
            ) {
                return Err(Error::Connection {
                    operation: "connecting to Redis",
                    reason: error.to_string(),
                });
            }
            scripted = false;
            log::warn!("this Redis refuses scripts ({error}); messages are fetched one by one");
        }
        let keys = Keys::new(&self.options, link.database);
        let core = Arc::new(Core::new(
            keys,
            self.options.clone(),
            Arc::clone(&self.ledger),
            link,
            scripted,
        ));
        core.spawn(Writer::new(Arc::clone(&core), connection).run());
        core.spawn(Arc::clone(&core).keep_house());
        Ok(Arc::new(RedisChannel::new(core)))
    }

    fn display_url(&self) -> String {
        self.current().to_string()
    }

    fn info(&self) -> Value {
        let url = self.current();
        let ssl = url.scheme == Scheme::Rediss;
        let database = url.database().unwrap_or_default().to_string();
        let alternates: Vec<String> = self.urls.iter().skip(1).map(ToString::to_string).collect();
        let host = if url.host.is_empty() {
            &url.virtual_host
        } else {
            &url.host
        };
        json!({
            "hostname": host,
            "userid": url.username,
            "virtual_host": database,
            "port": url.port_or_default(),
            "insist": false,
            "ssl": ssl,
            "transport": if url.scheme == Scheme::Sentinel { "sentinel" } else { "redis" },
            "connect_timeout": self.options.connect_timeout.as_secs(),
            "transport_options": Map::new(),
            "login_method": null,
            "uri_prefix": null,
            "heartbeat": 0,
            "failover_strategy": "round-robin",
            "alternates": alternates,
            "credential_provider": null,
        })
    }

    fn driver(&self) -> &'static str {
        "redis"
    }
}
