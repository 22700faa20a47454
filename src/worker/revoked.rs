//! What is not to run: revoked ids, and revoked values of stamps.
//!
//! Bounded in number and in time, as `celery.worker.state.revoked` is. How it outlives this
//! process is the business of [`super::statedb`] (a file) and [`super::control`] (the broker);
//! both are told by [`Revoked::changes`]. Knows no task and no message.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub struct Revoked {
    most: usize,
    keep: Duration,
    entries: Mutex<Entries>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Entries {
    ids: HashMap<Arc<str>, Key>,
    /// The same, oldest first.
    order: BTreeMap<Key, Arc<str>>,
    next: u64,
    /// Name and value, oldest first.
    stamps: VecDeque<(String, Value)>,
    /// The same as texts, for finding them.
    stamped: HashSet<String>,
}

/// When an id was revoked; the number tells those of one moment apart.
type Key = (Instant, u64);

impl Revoked {
    /// Nothing yet. At most so many ids are kept, and for so long.
    pub fn new(most: usize, keep: Duration) -> Self {
        let entries = Mutex::default();
        Self {
            most: most.max(1),
            keep,
            entries,
            changes: watch::Sender::new(0),
        }
    }

    /// How long an id is kept.
    pub fn keep(&self) -> Duration {
        self.keep
    }

    /// Remembers ids; the oldest are forgotten beyond the limits.
    pub fn add(&self, ids: impl IntoIterator<Item = String>) {
        self.recall(ids.into_iter().map(|id| (id, Duration::ZERO)));
    }

    /// Remembers ids that were revoked a while ago.
    pub fn recall(&self, ids: impl IntoIterator<Item = (String, Duration)>) {
        let now = Instant::now();
        let mut entries = self.entries();
        let mut changed = false;
        for (id, age) in ids {
            // A machine that started later than the id was revoked has no earlier moment.
            let Some(since) = now.checked_sub(age).filter(|_| age <= self.keep) else {
                continue;
            };
            changed |= entries.insert(id, since);
        }
        entries.evict(self.most, now.checked_sub(self.keep));
        drop(entries);
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Whether an id is revoked.
    pub fn contains(&self, id: &str) -> bool {
        self.entries()
            .ids
            .get(id)
            .is_some_and(|(since, _)| since.elapsed() <= self.keep)
    }

    /// The ids, oldest first.
    pub fn ids(&self) -> Vec<String> {
        self.aged().into_iter().map(|(id, _)| id).collect()
    }

    /// The ids and how long ago they were revoked, oldest first.
    pub fn aged(&self) -> Vec<(String, Duration)> {
        let now = Instant::now();
        let entries = self.entries();
        let aged = entries
            .order
            .iter()
            .map(|((since, _), id)| (id.to_string(), now.duration_since(*since)));
        aged.filter(|(_, age)| *age <= self.keep).collect()
    }

    /// Remembers values of a stamp.
    pub fn add_stamp(&self, name: &str, values: &[Value]) {
        let mut entries = self.entries();
        for value in values {
            if entries.stamped.insert(text(name, value)) {
                entries.stamps.push_back((name.to_owned(), value.clone()));
            }
        }
        while entries.stamps.len() > self.most {
            if let Some((name, value)) = entries.stamps.pop_front() {
                entries.stamped.remove(&text(&name, &value));
            }
        }
        drop(entries);
        self.changes.send_modify(|count| *count += 1);
    }

    /// The values by stamp.
    pub fn stamps(&self) -> BTreeMap<String, Vec<Value>> {
        let mut stamps: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for (name, value) in &self.entries().stamps {
            stamps.entry(name.clone()).or_default().push(value.clone());
        }
        stamps
    }

    /// The stamp of a message that is revoked, for the log line.
    pub fn stamp_of(&self, stamps: &Map<String, Value>) -> Option<(String, Value)> {
        if stamps.is_empty() {
            return None;
        }
        let entries = self.entries();
        let found = stamps.iter().find(|(name, stamp)| match stamp {
            Value::Array(values) => values
                .iter()
                .any(|value| entries.stamped.contains(&text(name, value))),
            value => entries.stamped.contains(&text(name, value)),
        });
        found.map(|(name, stamp)| (name.clone(), stamp.clone()))
    }

    /// Counts the changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    /// `false` when the id is known from later.
    fn insert(&mut self, id: String, since: Instant) -> bool {
        if let Some(known) = self.ids.get(id.as_str()).copied() {
            if known.0 > since {
                return false;
            }
            self.order.remove(&known);
        }
        self.next += 1;
        let key = (since, self.next);
        let id: Arc<str> = id.into();
        self.order.insert(key, id.clone());
        self.ids.insert(id, key);
        true
    }

    fn evict(&mut self, most: usize, oldest: Option<Instant>) {
        while let Some(entry) = self.order.first_entry() {
            let expired = oldest.is_some_and(|oldest| entry.key().0 < oldest);
            if self.ids.len() <= most && !expired {
                return;
            }
            self.ids.remove(&entry.remove());
        }
    }
}

fn text(name: &str, value: &Value) -> String {
    format!("{name}\0{value}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn the_oldest_ids_go_first_and_a_repeated_one_is_young_again() {
        let revoked = Revoked::new(3, HOUR);
        let changes = revoked.changes();
        revoked.add(["a", "b"].map(str::to_owned));
        revoked.add(["a".to_owned()]);
        assert_eq!(revoked.ids(), ["b", "a"]);
        revoked.add(["c", "d"].map(str::to_owned));
        assert_eq!(revoked.ids(), ["a", "c", "d"]);
        assert!(revoked.contains("a") && !revoked.contains("b"));
        assert_eq!(*changes.borrow(), 3);
    }

    #[test]
    fn recalled_ids_keep_their_age_and_expire_by_it() {
        let revoked = Revoked::new(10, HOUR);
        revoked.add(["new".to_owned()]);
        revoked.recall([("old".to_owned(), HOUR / 2), ("gone".to_owned(), HOUR * 2)]);
        assert_eq!(revoked.ids(), ["old", "new"]);
        revoked.recall([("new".to_owned(), HOUR / 2)]);
        assert!(
            revoked.aged()[1].1 < HOUR / 2,
            "an older report does not age it"
        );
    }

    #[test]
    fn a_stamp_is_revoked_by_value_or_by_one_of_its_values() {
        let revoked = Revoked::new(10, HOUR);
        revoked.add_stamp("batch", &["b-17".into(), 3.into()]);
        let stamps = |value: Value| Map::from_iter([("batch".to_owned(), value)]);
        assert!(revoked.stamp_of(&stamps("b-17".into())).is_some());
        assert!(
            revoked
                .stamp_of(&stamps(serde_json::json!(["x", 3])))
                .is_some()
        );
        assert!(revoked.stamp_of(&stamps("b-18".into())).is_none());
        assert_eq!(revoked.stamps()["batch"].len(), 2);
    }

    #[test]
    fn stamps_are_bounded_as_well() {
        let revoked = Revoked::new(2, HOUR);
        revoked.add_stamp("s", &[1.into(), 2.into(), 3.into()]);
        let stamps = |value: Value| Map::from_iter([("s".to_owned(), value)]);
        assert!(revoked.stamp_of(&stamps(1.into())).is_none());
        assert!(revoked.stamp_of(&stamps(3.into())).is_some());
    }
}
