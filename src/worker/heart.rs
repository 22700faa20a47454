//! How the worker shows itself: heartbeats and the mailbox; starts [`mingle`] and [`gossip`].
//!
//! All of it has a channel of its own and tasks of its own, so that a worker whose slots are
//! busy and whose queue is full still answers. A channel that breaks is made again here,
//! independent of the consumer's. Answers for `celery.worker.heartbeat` and the bootsteps
//! `pidbox` and `heart`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Worker;
use super::control::Control;
use super::controller::Neighbours;
use super::gossip::gossip;
use super::mingle::mingle;
use crate::config::Settings;
use crate::events::{self, Dispatcher, Ear, Heart, Software, WorkerStatus, load_average};
use crate::pidbox::{self, Addresses, Mailbox, Node};
use crate::pool;
use crate::protocol::clock::Clock;
use crate::protocol::serialization::Accept;
use crate::transport::{Queue, Transport};

/// Between attempts to connect; the consumer does the talking about an absent broker.
const RECONNECT: Duration = Duration::from_millis(300);
/// Heartbeats come no faster than this, whatever is asked.
const FASTEST: Duration = Duration::from_millis(100);

/// What the event dispatcher of a worker is to be.
pub fn dispatcher(
    settings: &Settings,
    node: &str,
    driver: &str,
    clock: Clock,
    neighbours: &Neighbours,
) -> Dispatcher {
    let exchange = events::exchange(&settings.event_exchange, driver);
    Dispatcher::new(events::Options {
        task_events: settings.worker_send_task_events,
        worker_events: neighbours.heartbeat.is_some() || neighbours.gossip,
        ..events::Options::new(node, clock, exchange)
    })
}

/// Where remote control listens.
pub fn addresses(settings: &Settings) -> Addresses {
    Addresses {
        namespace: settings.control_exchange.clone(),
        queue_ttl: settings.control_queue_ttl,
        queue_expires: settings.control_queue_expires,
        exclusive: settings.control_queue_exclusive,
        durable: settings.control_queue_durable,
    }
}

/// What a queue is like that receives events.
pub fn ear(settings: &Settings) -> Ear {
    Ear {
        prefix: settings.event_queue_prefix.clone(),
        ttl: settings.event_queue_ttl,
        expires: settings.event_queue_expires,
        exclusive: settings.event_queue_exclusive,
        durable: settings.event_queue_durable,
    }
}

/// What the parts of this module share.
pub struct Parts {
    /// The worker.
    pub worker: Arc<Worker>,
    /// The broker.
    pub transport: Arc<dyn Transport>,
    /// The queues consumed.
    pub queues: watch::Sender<Vec<Queue>>,
    /// Counts the consumer's connections.
    pub connections: watch::Receiver<u64>,
    /// The worker goes down.
    pub stopping: watch::Receiver<bool>,
    /// What is wanted.
    pub neighbours: Neighbours,
    /// Serializers that are accepted.
    pub accept: Accept,
}

/// Starts everything.
pub fn start(parts: Parts) {
    let Parts {
        worker,
        transport,
        queues,
        connections,
        stopping,
        neighbours,
        accept,
    } = parts;
    let dispatcher = worker.events.clone();
    tokio::spawn(async move { dispatcher.run().await });
    if let Some(heart) = heart(&worker) {
        tokio::spawn(beat(heart, connections.clone(), stopping.clone()));
    }
    tokio::spawn(listen(
        worker,
        transport,
        queues,
        connections,
        stopping,
        neighbours,
        accept,
    ));
}

/// The heart of a worker that has one.
fn heart(worker: &Arc<Worker>) -> Option<Heart> {
    let interval = Duration::try_from_secs_f64(worker.heartbeat?).unwrap_or(Duration::from_secs(2));
    let beating = worker.clone();
    let status = move || WorkerStatus {
        active: beating.state.active(),
        processed: beating.state.processed(),
        loadavg: load_average(),
    };
    Some(Heart::new(
        worker.events.clone(),
        interval.max(FASTEST),
        Software::default(),
        status,
    ))
}

/// worker-online after each connection, then a heartbeat every interval.
async fn beat(
    heart: Heart,
    mut connections: watch::Receiver<u64>,
    mut stopping: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => return,
            changed = connections.changed() => {
                if changed.is_err() {
                    return;
                }
                heart.online();
            }
            // Dropped and begun anew after each connection, so that a beat follows an interval
            // after worker-online.
            () = heart.run(), if *connections.borrow() > 0 => {}
        }
    }
}

/// worker-offline, before running tasks have finished.
pub fn offline(worker: &Arc<Worker>) {
    if let Some(heart) = heart(worker) {
        heart.offline();
    }
    worker.events.flush();
}

/// Answers commands and listens to neighbours until the worker goes down.
async fn listen(
    worker: Arc<Worker>,
    transport: Arc<dyn Transport>,
    queues: watch::Sender<Vec<Queue>>,
    mut connections: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    neighbours: Neighbours,
    accept: Accept,
) {
    let driver = transport.driver();
    let control = Control {
        worker: worker.clone(),
        queues,
        transport: transport.clone(),
    };
    let node = Node {
        addresses: addresses(&worker.settings),
        accept: accept.clone(),
        ..Node::new(worker.node.clone(), worker.clock.clone())
    };
    let mut first = true;
    // The mailbox outlives the wish to stop: a worker that finishes its tasks still answers.
    while !worker.state.closed() {
        let Ok(channel) = transport.connect().await else {
            tokio::time::sleep(RECONNECT).await;
            continue;
        };
        let mailbox = Mailbox::new(channel.clone(), node.addresses.clone(), accept.clone());
        if neighbours.mingle && !*stopping.borrow() {
            tokio::spawn(mingle(worker.clone(), mailbox, first));
        }
        if neighbours.gossip {
            tokio::spawn(gossip(worker.clone(), channel.clone(), driver));
        }
        if first {
            first = false;
            tokio::spawn(announce_ready(worker.clone(), connections.clone()));
        }
        if worker.settings.worker_enable_remote_control {
            if let Err(error) = pidbox::serve(&node, channel.clone(), &control).await {
                log::debug!("The mailbox was interrupted: {error}");
            }
        } else if connections.changed().await.is_err() {
            return;
        }
        drop(channel.close().await);
        tokio::time::sleep(RECONNECT).await;
    }
}

/// `<node> ready.`, as soon as tasks are consumed.
async fn announce_ready(worker: Arc<Worker>, mut connections: watch::Receiver<u64>) {
    if connections.wait_for(|count| *count > 0).await.is_ok() {
        log::info!("{} ready.", worker.node);
        pool::release_start_up_text();
    }
}
