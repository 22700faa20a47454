//! Several workers that count together.

use celeriac::analysis::fingerprint;
use redis::Commands;

use super::worker::Builder;
use super::{Broker, Raw, Worker, services};

/// Where several workers count together: a broker and the database they share.
pub struct Shared<'a> {
    broker: &'a Broker,
    /// The database.
    pub postgres: services::Postgres,
}

impl<'a> Shared<'a> {
    /// An empty database beside this broker.
    pub fn new(broker: &'a Broker) -> Self {
        Self {
            broker,
            postgres: services::postgres(),
        }
    }

    /// A worker of both.
    pub fn worker(&self) -> Builder {
        self.broker.worker().database(&self.postgres)
    }

    /// Two workers, each with a queue of its own, and the ways to these queues.
    pub fn pair(&self) -> ([Worker; 2], [Raw; 2]) {
        let workers = [(), ()].map(|()| self.worker().start());
        let raws = workers.each_ref().map(|worker| self.raw(worker));
        (workers, raws)
    }

    /// The way to a worker's queue.
    pub fn raw(&self, worker: &Worker) -> Raw {
        self.broker.raw(&worker.queue)
    }

    /// The permits of a user that are alive, as milliseconds to their end by the clock of whoever
    /// counts them.
    pub fn permits(&self, user: &str) -> Vec<i64> {
        if !self.broker.is_redis() {
            return self.ends(&format!("scope = '{}'", scope(user)));
        }
        let key = format!("celeriac.running.{user}");
        let mut raw = self.broker.raw("none");
        raw.with(|connection| {
            let (seconds, micros): (i64, i64) = redis::cmd("TIME").query(connection)?;
            let now = seconds * 1000 + micros / 1000;
            let permits: Vec<(String, f64)> = connection.zrange_withscores(&key, 0, -1)?;
            let left = permits.iter().map(|(_, until)| *until as i64 - now);
            Ok(left.filter(|left| *left > 0).collect())
        })
    }

    fn ends(&self, condition: &str) -> Vec<i64> {
        let rows = self.postgres.rows(&format!(
            "SELECT ends_ms - now_ms FROM permits, permits_now() AS now_ms \
             WHERE ends_ms > now_ms AND {condition}"
        ));
        let values = rows.iter().flatten().flatten();
        values.map(|value| value.parse().unwrap()).collect()
    }

    /// How many tasks of a user run.
    pub fn running(&self, user: &str) -> usize {
        self.permits(user).len()
    }

    /// How many permits of a user are written down, those that have ended among them.
    pub fn kept(&self, user: &str) -> usize {
        if !self.broker.is_redis() {
            let of_user = format!("SELECT 1 FROM permits WHERE scope = '{}'", scope(user));
            return self.postgres.rows(&of_user).len();
        }
        let key = format!("celeriac.running.{user}");
        let mut raw = self.broker.raw("none");
        raw.with(|connection| {
            // With the last lease the key would go, and look as if the permits were given back.
            let _: bool = connection.persist(&key)?;
            connection.zcard(&key)
        })
    }

    /// How many repositories are being analysed.
    pub fn leases(&self) -> usize {
        if !self.broker.is_redis() {
            return self.ends("scope LIKE 'analysing %'").len();
        }
        let keys = self.broker.queues();
        let of_repositories = keys
            .iter()
            .filter(|key| key.contains("celeriac.analysing."));
        of_repositories.count()
    }
}

fn scope(user: &str) -> String {
    format!("running {}", fingerprint(&format!("user {user}")).unwrap())
}
