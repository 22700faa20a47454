//! The heartbeat of a worker: online, a beat at every interval, offline.
//!
//! Answers for `celery.worker.heartbeat.Heart`. The interval is what the events call `freq`:
//! monitors count a worker as gone after two of them.

use std::sync::Arc;
use std::time::Duration;

use super::{Dispatcher, Event, Software, WorkerStatus};

/// Sends the worker events of this process.
#[derive(Clone)]
pub struct Heart {
    dispatcher: Dispatcher,
    interval: Duration,
    software: Software,
    status: Arc<dyn Fn() -> WorkerStatus + Send + Sync>,
}

impl Heart {
    /// A heart that asks `status` for the figures of each beat.
    pub fn new(
        dispatcher: Dispatcher,
        interval: Duration,
        software: Software,
        status: impl Fn() -> WorkerStatus + Send + Sync + 'static,
    ) -> Self {
        Self {
            dispatcher,
            interval,
            software,
            status: Arc::new(status),
        }
    }

    /// After each connect.
    pub fn online(&self) {
        self.send("worker-online");
    }

    /// One beat out of turn.
    pub fn beat(&self) {
        self.send("worker-heartbeat");
    }

    /// The answer to the command `heartbeat`.
    pub fn requested(&self) {
        self.dispatcher
            .send(&Event::requested_heartbeat(&self.software));
    }

    /// At shutdown, before the running tasks have ended.
    pub fn offline(&self) {
        self.send("worker-offline");
    }

    /// Beats for as long as it is polled, the first time after one interval.
    pub async fn run(&self) {
        let start = tokio::time::Instant::now() + self.interval;
        let mut ticks = tokio::time::interval_at(start, self.interval);
        // After a pause of the whole process one beat is enough.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.beat();
        }
    }

    fn send(&self, kind: &'static str) {
        if self.dispatcher.sends("worker") {
            let freq = self.interval.as_secs_f64();
            let event = Event::worker(kind, freq, Some((self.status)()), &self.software);
            self.dispatcher.send(&event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Heart;
    use crate::events::{Dispatcher, Options, Software, WorkerStatus, exchange};
    use crate::protocol::clock::Clock;
    use crate::transport::Queue;
    use crate::transport::redis::server::{Ear, Server};

    #[tokio::test]
    async fn a_heart_says_online_beats_and_says_offline() {
        let server = Server::start().await;
        let exchange = exchange("celeryev", "redis");
        let channel = server.channel().await;
        let queue = Queue::bound("monitor", exchange.clone(), "#");
        let mut ear = Ear::on(server.channel().await, &queue, "#").await;
        let dispatcher = Dispatcher::new(Options::new("w@h", Clock::default(), exchange));
        dispatcher.connect(channel.clone());
        let status = || WorkerStatus {
            active: 3,
            ..WorkerStatus::default()
        };
        let heart = Heart::new(
            dispatcher,
            Duration::from_millis(1),
            Software::default(),
            status,
        );
        heart.online();
        let mut keys = Vec::new();
        tokio::select! {
            () = heart.run() => {}
            () = async {
                while keys.len() < 3 {
                    keys.push(ear.next().await.routing_key);
                }
            } => {}
        }
        assert_eq!(
            keys,
            ["worker.online", "worker.heartbeat", "worker.heartbeat"]
        );
        ear.heard(&*channel).await;
        heart.requested();
        heart.offline();
        let last = ear.heard(&*channel).await;
        let text = String::from_utf8(last[0].envelope.body.clone()).expect("text");
        assert!(
            text.contains("\"freq\":5,\"sw_ident\"") && !text.contains("active"),
            "{text}"
        );
        assert_eq!(last[1].routing_key, "worker.offline");
    }
}
