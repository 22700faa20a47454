//! Sends events, if anybody asked for them.
//!
//! Asking whether a group is on is one atomic load, so a worker nobody watches pays nothing.
//! Task events are gathered and sent as one array: at the next turn of the flusher
//! ([`Dispatcher::run`]) or when there are 24. While the broker is away a bounded number of
//! events is kept; the oldest are dropped and counted. Heartbeats of that time are not kept:
//! they would be stale.
//!
//! Answers for `celery.events.dispatcher.EventDispatcher` and the bootstep that makes it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokio::sync::Notify;

use super::event::Event;
use crate::protocol::clock::Clock;
use crate::protocol::envelope::{Envelope, Properties};
use crate::transport::{Channel, Exchange, Publication};

/// Task events in one message at most.
const BATCH: usize = 24;

/// Everything is sent.
const ALL: u8 = 1;
/// Events of the group `worker` are sent.
const WORKER: u8 = 2;
/// Events of the group `task` are sent.
const TASK: u8 = 4;

/// What cannot be defaulted, and which events are sent at first.
#[derive(Debug, Clone)]
pub struct Options {
    /// Node name.
    pub hostname: String,
    /// The logical clock all events of this process share.
    pub clock: Clock,
    /// Where to, see [`super::exchange`].
    pub exchange: Exchange,
    /// `-E`: everything is sent, from the start to the end.
    pub task_events: bool,
    /// Gossip or heartbeat is on: worker events are sent.
    pub worker_events: bool,
    /// Events kept while the broker is away.
    pub backlog: usize,
    /// Bytes kept while the broker is away.
    pub backlog_bytes: usize,
}

/// What a command that turns task events on or off has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toggle {
    /// They were not so before.
    Changed,
    /// They were so already.
    Already,
    /// This worker sends no events at all.
    Unavailable,
}

/// How long task events are gathered before they are sent together: nobody watches closer, and
/// a busy worker spares its broker nine messages in ten.
const WINDOW: Duration = Duration::from_millis(10);

/// Sends the events of this process; clones are the same dispatcher.
#[derive(Clone)]
pub struct Dispatcher(Arc<Inner>);

struct Inner {
    groups: AtomicU8,
    options: Options,
    /// Written before the fields of every event.
    pid: u32,
    wake: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    channel: Option<Arc<dyn Channel>>,
    /// Task events that were not sent yet, as the items of a JSON array.
    batch: Vec<u8>,
    batched: usize,
    backlog: VecDeque<Kept>,
    backlog_events: usize,
    backlog_bytes: usize,
    dropped: u64,
    /// How many of them the log tells of.
    dropped_told: u64,
}

/// A message that waits for the broker.
struct Kept {
    routing_key: String,
    body: Vec<u8>,
    events: usize,
}

impl Options {
    /// The defaults of a worker without `-E`.
    pub fn new(hostname: impl Into<String>, clock: Clock, exchange: Exchange) -> Self {
        Self {
            hostname: hostname.into(),
            clock,
            exchange,
            task_events: false,
            worker_events: true,
            backlog: 10_000,
            backlog_bytes: 8 << 20,
        }
    }
}

impl Dispatcher {
    /// A dispatcher without connection.
    pub fn new(options: Options) -> Self {
        let groups = match (options.task_events, options.worker_events) {
            (true, _) => ALL,
            (false, true) => WORKER,
            (false, false) => 0,
        };
        Self(Arc::new(Inner {
            groups: AtomicU8::new(groups),
            options,
            pid: std::process::id(),
            wake: Notify::new(),
            state: Mutex::new(State::default()),
        }))
    }

    /// Whether task events are sent. Ask before gathering what an event shows.
    pub fn sends_task_events(&self) -> bool {
        self.0.groups.load(Ordering::Relaxed) & (ALL | TASK) != 0
    }

    /// Whether events of a group are sent.
    pub fn sends(&self, group: &str) -> bool {
        let wanted = match group {
            "task" => ALL | TASK,
            "worker" => ALL | WORKER,
            _ => ALL,
        };
        self.0.groups.load(Ordering::Relaxed) & wanted != 0
    }

    /// The command `enable_events`.
    pub fn enable_task_events(&self) -> Toggle {
        self.toggle(TASK, |groups| groups | TASK)
    }

    /// The command `disable_events`. With `-E` there is nothing to take away, and they go on.
    pub fn disable_task_events(&self) -> Toggle {
        self.toggle(0, |groups| groups & !TASK)
    }

    fn toggle(&self, wanted: u8, change: impl Fn(u8) -> u8) -> Toggle {
        let groups = self.0.groups.load(Ordering::Relaxed);
        if groups == 0 {
            return Toggle::Unavailable;
        }
        if groups & ALL != 0 || groups & TASK == wanted {
            return Toggle::Already;
        }
        self.0.groups.store(change(groups), Ordering::Relaxed);
        Toggle::Changed
    }

    /// Uses this channel from now on and sends what has waited for one.
    pub fn connect(&self, channel: Arc<dyn Channel>) {
        let mut state = self.state();
        for kept in std::mem::take(&mut state.backlog) {
            channel.cast(self.publication(kept.routing_key, kept.body));
        }
        state.backlog_events = 0;
        state.backlog_bytes = 0;
        if state.dropped > state.dropped_told {
            log::warn!(
                "{} events were dropped while the broker was away: monitors do not know of them",
                state.dropped - state.dropped_told
            );
            state.dropped_told = state.dropped;
        }
        state.channel = Some(channel);
        self.flush_batch(&mut state);
    }

    /// The channel is gone: keeps events until there is another.
    pub fn disconnect(&self) {
        self.state().channel = None;
    }

    /// How many events were dropped because the broker was away for too long.
    pub fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Sends an event if its group is on.
    pub fn send(&self, event: &Event) {
        let group = event.group();
        if !self.sends(group) {
            return;
        }
        let is_task = group == "task";
        let mut state = self.state();
        if is_task {
            if state.batched > 0 {
                state.batch.push(b',');
            }
            self.write(&mut state.batch, event);
            state.batched += 1;
            if state.batched >= BATCH {
                self.flush_batch(&mut state);
            } else {
                self.0.wake.notify_one();
            }
            return;
        }
        if event.kind == "worker-offline" {
            // What tasks did before comes before.
            self.flush_batch(&mut state);
        }
        if state.channel.is_none() && event.kind == "worker-heartbeat" {
            return;
        }
        let mut body = Vec::with_capacity(256);
        self.write(&mut body, event);
        let routing_key = event.kind.replace('-', ".");
        self.publish(&mut state, routing_key, body, 1);
    }

    /// Sends the task events gathered so far.
    pub fn flush(&self) {
        let mut state = self.state();
        self.flush_batch(&mut state);
    }

    /// Sends gathered task events whenever there are some, for as long as it is polled.
    pub async fn run(&self) {
        loop {
            self.0.wake.notified().await;
            // What happens in the next moments travels in the same message.
            tokio::time::sleep(WINDOW).await;
            self.flush();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush_batch(&self, state: &mut State) {
        if state.batched == 0 {
            return;
        }
        let events = std::mem::take(&mut state.batched);
        let mut body = Vec::with_capacity(state.batch.len() + 2);
        body.push(b'[');
        body.append(&mut state.batch);
        body.push(b']');
        self.publish(state, "task.multi".to_owned(), body, events);
    }

    fn publish(&self, state: &mut State, routing_key: String, body: Vec<u8>, events: usize) {
        if let Some(channel) = &state.channel {
            channel.cast(self.publication(routing_key, body));
            return;
        }
        let Options {
            backlog,
            backlog_bytes,
            ..
        } = self.0.options;
        state.backlog_events += events;
        state.backlog_bytes += body.len();
        state.backlog.push_back(Kept {
            routing_key,
            body,
            events,
        });
        while state.backlog_events > backlog || state.backlog_bytes > backlog_bytes {
            let Some(oldest) = state.backlog.pop_front() else {
                break;
            };
            state.backlog_events -= oldest.events;
            state.backlog_bytes -= oldest.body.len();
            state.dropped += oldest.events as u64;
        }
    }

    fn publication(&self, routing_key: String, body: Vec<u8>) -> Publication {
        let Options {
            hostname, exchange, ..
        } = &self.0.options;
        let mut headers = Map::new();
        headers.insert("hostname".to_owned(), hostname.clone().into());
        Publication {
            exchange: exchange.clone(),
            routing_key,
            envelope: Envelope {
                body,
                content_type: Some("application/json".to_owned()),
                content_encoding: Some("utf-8".to_owned()),
                headers,
                properties: Properties {
                    delivery_mode: Some(1),
                    priority: Some(0),
                    ..Properties::default()
                },
            },
        }
    }

    /// Writes the JSON object of an event.
    fn write(&self, out: &mut Vec<u8>, event: &Event) {
        let Options {
            hostname, clock, ..
        } = &self.0.options;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let utcoffset = utc_offset();
        let written = (|| {
            out.write_all(b"{\"hostname\":")?;
            serde_json::to_writer(&mut *out, hostname)?;
            write!(out, ",\"utcoffset\":{utcoffset:?},\"pid\":{}", self.0.pid)?;
            write!(out, ",\"clock\":{}", clock.forward())?;
            for (name, value) in &event.fields {
                out.write_all(b",")?;
                serde_json::to_writer(&mut *out, name)?;
                out.write_all(b":")?;
                serde_json::to_writer(&mut *out, value)?;
            }
            write!(
                out,
                ",\"timestamp\":{:?},\"type\":",
                now.as_micros() as f64 / 1e6
            )?;
            serde_json::to_writer(&mut *out, &event.kind)?;
            out.write_all(b"}")
        })();
        written.expect("because writing JSON to memory cannot fail");
    }
}

impl Toggle {
    /// The reply to `enable_events` (`word` is `enabled`) or `disable_events`.
    pub fn reply(self, word: &str) -> Value {
        match self {
            Self::Changed => serde_json::json!({"ok": format!("task events {word}")}),
            Self::Already => serde_json::json!({"ok": format!("task events already {word}")}),
            Self::Unavailable => serde_json::json!({"error": "event dispatcher unavailable"}),
        }
    }
}

/// Hours that local time is behind UTC.
fn utc_offset() -> f64 {
    let ahead = chrono::Local::now().offset().local_minus_utc();
    f64::from(-ahead) / 3600.0
}

#[cfg(test)]
mod tests;
