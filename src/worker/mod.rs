//! The consumer side: what happens to a message between the broker and its last effect.
//!
//! In the order of the journey: [`consumer`] (the connection's loop) hands deliveries to
//! [`strategy`], which makes [`request`]s of them or says why not; [`timer`] with [`scheduled`]
//! and [`rate_limit`] hold those that must wait; [`fairness`] and [`permits`] say whose turn it is,
//! [`turn`] and [`reuse`] that the same work is done once;
//! a free slot starts the journey through rusty-celery
//! ([`app`]) into [`execute`], where [`effects`] says what follows from what and [`canvas`] and
//! [`report`] carry it out. [`controller`] starts and stops all of it; [`state`] and [`revoked`]
//! are what the others may look at; [`link`] is the channel that comes and goes. Beside the
//! journey: [`heart`], [`control`], [`mingle`], [`gossip`] and [`election`] talk to people and
//! other workers, [`autoscale`] follows the load, [`statedb`] remembers.

use std::path::PathBuf;
use std::sync::Arc;

use crate::backend::Backend;
use crate::config::Settings;
use crate::database::{Database, Keys};
use crate::events::Dispatcher;
use crate::pool::Pool;
use crate::protocol::clock::Clock;
use crate::protocol::serialization::Accept;
use crate::protocol::time::Timestamp;
use crate::protocol::zone::Zones;
use crate::tasks::Registry;

pub mod analyze;
pub mod app;
pub mod autoscale;
pub mod canvas;
pub mod consumer;
pub mod control;
pub mod controller;
pub mod doubts;
pub mod effects;
pub mod election;
pub mod execute;
pub mod fairness;
pub mod gossip;
pub mod heart;
pub mod link;
pub mod mingle;
pub mod permits;
pub mod rate_limit;
pub mod report;
pub mod request;
pub mod reuse;
pub mod revoked;
pub mod scheduled;
pub mod scratch;
pub mod shutdown;
pub mod state;
pub mod statedb;
pub mod strategy;
pub mod timer;
pub mod token;
pub mod turn;

/// What every part of a running worker shares.
pub struct Worker {
    /// Every setting.
    pub settings: Settings,
    /// In which zones times are shown.
    pub zones: Zones,
    /// Node name.
    pub node: String,
    /// The registered tasks.
    pub registry: Registry,
    /// Held requests and totals.
    pub state: state::State,
    /// What is not to run.
    pub revoked: revoked::Revoked,
    /// Makes the pool follow the load, where that is wanted.
    pub autoscaler: Option<autoscale::Autoscaler>,
    /// Whether the other workers' events are listened to.
    pub listens: bool,
    /// Elections among workers.
    pub elections: election::Elections,
    /// Seconds between heartbeats; `None`: no heartbeats.
    pub heartbeat: Option<f64>,
    /// The child processes.
    pub pool: Arc<Pool>,
    /// Serializers that are accepted.
    pub accept: Accept,
    /// Where results go.
    pub backend: Arc<dyn Backend>,
    /// Where analyses are kept; see [`Worker::database`].
    pub database: Database,
    /// Set when the schema is known to be current.
    pub migrated: tokio::sync::OnceCell<()>,
    /// What each user may run.
    pub permits: permits::Permits,
    /// Analyses under way.
    pub flights: reuse::Flights,
    /// Keys of encrypted tokens.
    pub token_keys: Keys,
    /// Event messages.
    pub events: Dispatcher,
    /// Queue name under which this process would receive replies, as Celery's `app.oid`.
    pub oid: String,
    /// The logical clock.
    pub clock: Clock,
    /// The channel to the broker.
    pub link: link::Link,
    /// Clones are made below this directory.
    pub temporary: PathBuf,
    /// Commands for the consumer's loop.
    pub commands: tokio::sync::mpsc::UnboundedSender<consumer::Command>,
    /// How the remote `shutdown` asks for one.
    pub wishes: tokio::sync::mpsc::UnboundedSender<shutdown::Wish>,
}

impl Worker {
    /// The database with its schema brought up to date, which is tried at every use until it
    /// succeeded once: a worker starts without waiting for its database.
    pub async fn database(&self) -> Result<&Database, crate::database::Error> {
        let migrate = || async {
            for name in self.database.migrate().await? {
                log::info!("Database {}: {name}", self.database.url());
            }
            Ok(())
        };
        self.migrated.get_or_try_init(migrate).await?;
        Ok(&self.database)
    }

    /// This moment in the worker's own zone.
    pub fn now(&self) -> Timestamp {
        self.zones.own.show(&chrono::Utc::now())
    }

    /// The `origin` header of messages that this process sends.
    pub fn origin(&self) -> String {
        let host = self
            .node
            .split_once('@')
            .map_or(self.node.as_str(), |(_, host)| host);
        format!("gen{}@{host}", std::process::id())
    }

    /// Processes that prefetch counts with: those there are, or those there may come to be.
    pub fn slots(&self) -> usize {
        let most = self
            .autoscaler
            .as_ref()
            .map(|autoscaler| autoscaler.range().max);
        most.unwrap_or_else(|| self.pool.size())
    }

    /// Threads of one analysis: the slot's share of the processors. Two where there are two,
    /// because analyses seldom run in every slot at once and a lone one should be quick.
    pub fn blame_threads(&self) -> usize {
        let asked = self
            .settings
            .blame_threads
            .and_then(|threads| usize::try_from(threads).ok());
        asked.filter(|threads| *threads > 0).unwrap_or_else(|| {
            let processors = crate::pool::limits::available_cpus();
            (processors / self.slots().max(1)).max(processors.min(2))
        })
    }
}
