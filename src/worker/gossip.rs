//! Gossip: what the other workers say of themselves, all the time.
//!
//! Their clock counts, their silence is noted, two workers of one name are pointed out, and
//! elections are decided. Answers for `celery.worker.consumer.gossip`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Worker, heart};
use crate::events::{self, Received, Receiver};
use crate::transport::Channel;

/// How often silent neighbours and open elections are looked at.
const CHECK: Duration = Duration::from_secs(1);
/// How long a neighbour that missed its heartbeats may still come back unnoticed.
const GRACE: Duration = Duration::from_secs(5);
/// Until then not every neighbour has sent a heartbeat.
const YOUTH: Duration = Duration::from_secs(3);
/// Heartbeats that a worker may miss and still count as alive.
const MISSED: f64 = 2.0;

/// The other workers: when each was last heard of, and how often it means to be.
#[derive(Debug, Default)]
struct Neighbours(HashMap<String, (Instant, f64)>);

impl Neighbours {
    fn heard(&mut self, event: &Received) {
        match event.kind.as_str() {
            "worker-offline" => {
                log::debug!("{} left", event.hostname);
                self.0.remove(&event.hostname);
                return;
            }
            "worker-elect" | "worker-elect-ack" => return,
            _ => {}
        }
        let freq = event
            .fields
            .get("freq")
            .and_then(Value::as_f64)
            .unwrap_or(2.0);
        if self
            .0
            .insert(event.hostname.clone(), (Instant::now(), freq))
            .is_none()
        {
            log::debug!("{} joined the party", event.hostname);
        }
    }

    fn alive(&self) -> usize {
        self.0
            .values()
            .filter(|(since, freq)| since.elapsed().as_secs_f64() < freq * MISSED)
            .count()
    }

    fn forget_silent(&mut self) {
        self.0.retain(|node, (since, freq)| {
            let alive = since.elapsed().as_secs_f64() < *freq * MISSED + GRACE.as_secs_f64();
            if !alive {
                log::info!("missed heartbeat from {node}");
            }
            alive
        });
    }
}

/// Listens until the channel ends.
pub async fn gossip(worker: Arc<Worker>, channel: Arc<dyn Channel>, driver: &'static str) {
    let exchange = events::exchange(&worker.settings.event_exchange, driver);
    let keys = ["worker.#".to_owned()];
    let ear = heart::ear(&worker.settings);
    let clock = worker.clock.clone();
    let receiver = Receiver::subscribe(&channel, exchange, &ear, &keys, clock, None).await;
    let Ok(mut receiver) = receiver else { return };
    let mut neighbours = Neighbours::default();
    let began = Instant::now();
    let mut warned = false;
    let mut check = tokio::time::interval(CHECK);
    loop {
        let event = tokio::select! {
            event = receiver.next() => event,
            _ = check.tick() => {
                neighbours.forget_silent();
                worker.elections.overdue(&worker);
                continue;
            }
        };
        let Some(event) = event else { return };
        match event.kind.as_str() {
            "worker-elect" => worker.elections.candidate(&worker, &event),
            "worker-elect-ack" => {
                let known = began.elapsed() >= YOUTH;
                let others = known.then(|| neighbours.alive());
                worker.elections.acknowledged(&worker, &event, others)
            }
            _ => {}
        }
        if event.hostname != worker.node {
            neighbours.heard(&event);
            continue;
        }
        let pid = event.fields.get("pid").and_then(Value::as_u64);
        let other = pid.filter(|pid| *pid != u64::from(std::process::id()));
        if other.is_some() && !std::mem::replace(&mut warned, true) {
            warn_of_namesake(&worker.node, other);
        }
    }
}

/// Another worker has our name.
pub fn warn_of_namesake(node: &str, pid: Option<u64>) {
    let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
    log::warn!(
        "A node named {node} is already running{pid}. Give each worker its own name with -n, or \
         their replies and events are mixed up."
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(kind: &str, hostname: &str) -> Received {
        let Value::Object(fields) = json!({"freq": 2.0}) else {
            panic!("an object")
        };
        Received {
            kind: kind.to_owned(),
            hostname: hostname.to_owned(),
            fields,
        }
    }

    #[test]
    fn neighbours_come_with_any_event_and_go_with_offline() {
        let mut neighbours = Neighbours::default();
        neighbours.heard(&event("worker-heartbeat", "a@h"));
        neighbours.heard(&event("worker-online", "b@h"));
        neighbours.heard(&event("worker-elect", "c@h"));
        assert_eq!(neighbours.alive(), 2);
        neighbours.heard(&event("worker-offline", "a@h"));
        neighbours.forget_silent();
        assert_eq!(neighbours.alive(), 1);
    }
}
