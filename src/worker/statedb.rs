//! `--statedb`: revoked ids, revoked stamps and the clock survive a restart.
//!
//! One JSON document, replaced atomically: soon after a revocation, now and then for the clock,
//! and at the end. Private to one worker, as Celery's file of the same option is; that one is
//! pickled and not read. Knows nothing of how ids come to be revoked.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::Worker;
use super::request::unix_time;
use super::revoked::Revoked;
use crate::protocol::clock::Clock;

/// Revocations that come in a burst are written once.
const GATHER: Duration = Duration::from_millis(500);
/// How often the clock is written when nothing else happens.
const CLOCK: Duration = Duration::from_secs(60);
/// More than this is no file of ours: fifty thousand ids take a tenth.
const LARGEST: u64 = 64 << 20;

/// The file of one worker.
#[derive(Debug, Clone)]
pub struct StateDb {
    path: PathBuf,
}

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("{operation} the state file {path}: {source}")]
    File {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl StateDb {
    /// The file, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Takes up what an earlier process left. A file of somebody else is set aside, not lost.
    pub fn load(&self, revoked: &Revoked, clock: &Clock) -> Result<(), Error> {
        let bytes = match fs::metadata(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Ok(metadata) if metadata.len() > LARGEST => Vec::new(),
            _ => fs::read(&self.path).map_err(|source| self.failed("read", source))?,
        };
        let Some(document) = parse(&bytes) else {
            let aside = beside(&self.path, "unreadable");
            fs::rename(&self.path, &aside).map_err(|source| self.failed("set aside", source))?;
            log::warn!(
                "The state file {} is none of celeriac's; it was renamed to {} and a new one is begun",
                self.path.display(),
                aside.display(),
            );
            return Ok(());
        };
        let now = unix_time();
        let ids = document
            .get("revoked")
            .and_then(Value::as_object)
            .into_iter()
            .flatten();
        revoked.recall(ids.filter_map(|(id, since)| {
            let age = (now - since.as_f64()?).max(0.0);
            Some((id.clone(), Duration::try_from_secs_f64(age).ok()?))
        }));
        let stamps = document
            .get("stamps")
            .and_then(Value::as_object)
            .into_iter()
            .flatten();
        for (name, values) in stamps {
            revoked.add_stamp(name, values.as_array().map_or(&[], Vec::as_slice));
        }
        if let Some(time) = document.get("clock").and_then(Value::as_u64) {
            clock.adjust(time);
        }
        Ok(())
    }

    /// Replaces the file.
    pub fn save(&self, revoked: &Revoked, clock: &Clock) -> Result<(), Error> {
        let now = unix_time();
        let since = |age: Duration| crate::protocol::json::float(now - age.as_secs_f64());
        let ids: Map<String, Value> = revoked
            .aged()
            .into_iter()
            .map(|(id, age)| (id, since(age)))
            .collect();
        let document = json!({
            "celeriac": 1,
            "clock": clock.value(),
            "revoked": ids,
            "stamps": revoked.stamps(),
        });
        self.replace(&document.to_string())
            .map_err(|source| self.failed("write", source))
    }

    /// A crash leaves the old file or the new one, never half of one.
    fn replace(&self, text: &str) -> std::io::Result<()> {
        let temporary = beside(&self.path, "new");
        let mut file = fs::File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)
    }

    fn failed(&self, operation: &'static str, source: std::io::Error) -> Error {
        Error::File {
            operation,
            path: self.path.clone(),
            source,
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Value> {
    let document: Value = serde_json::from_slice(bytes).ok()?;
    (document.get("celeriac")?.as_u64()? == 1).then_some(document)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes the file whenever there is something new, for as long as it is polled.
pub async fn keep(worker: Arc<Worker>, file: StateDb) {
    let mut changes = worker.revoked.changes();
    let mut written = (Instant::now(), worker.clock.value());
    loop {
        // The sender lives as long as the worker, which this task holds.
        let changed = tokio::time::timeout(CLOCK, changes.changed()).await.is_ok();
        if changed {
            tokio::time::sleep(GATHER).await;
            changes.mark_unchanged();
        } else if worker.clock.value() == written.1 {
            continue;
        }
        written = (Instant::now(), worker.clock.value());
        let (worker, file) = (worker.clone(), file.clone());
        let saved = tokio::task::spawn_blocking(move || file.save(&worker.revoked, &worker.clock));
        if let Ok(Err(error)) = saved.await {
            log::error!("Cannot {error}. Revoked tasks may run again after a restart.");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoked() -> Revoked {
        Revoked::new(100, Duration::from_secs(100))
    }

    #[test]
    fn what_was_saved_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateDb::new(directory.path().join("state"));
        let before = revoked();
        before.recall([("old".to_owned(), Duration::from_secs(60))]);
        before.add(["new".to_owned()]);
        before.add_stamp("batch", &["b-17".into(), 4.into()]);
        file.save(&before, &Clock::new(400)).unwrap();
        let (after, clock) = (revoked(), Clock::new(0));
        file.load(&after, &clock).unwrap();
        assert_eq!(after.ids(), ["old", "new"]);
        let age = after.aged()[0].1.as_secs_f64();
        assert!((59.0..70.0).contains(&age), "{age}");
        assert_eq!(after.stamps(), before.stamps());
        assert!(clock.value() > 400);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_missing_file_is_a_fresh_start_and_a_foreign_one_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let file = StateDb::new(path.clone());
        file.load(&revoked(), &Clock::new(0)).unwrap();
        for foreign in [&b"\x80\x05pickle"[..], b"{}", b"{\"celeriac\": 2}", b"[1]"] {
            fs::write(&path, foreign).unwrap();
            file.load(&revoked(), &Clock::new(0)).unwrap();
            assert!(!path.exists());
            assert_eq!(
                fs::read(directory.path().join("state.unreadable")).unwrap(),
                foreign
            );
        }
        let lies =
            br#"{"celeriac": 1, "revoked": {"a": "x", "b": -1e300, "c": 1e300}, "stamps": 3}"#;
        fs::write(&path, lies).unwrap();
        file.load(&revoked(), &Clock::new(0)).unwrap();
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let file = StateDb::new(PathBuf::from("/nowhere/state"));
        let error = file
            .save(&revoked(), &Clock::new(0))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("write the state file /nowhere/state: "),
            "{error}"
        );
    }
}
