//! The directory below which this worker's children clone, and the janitor of dead ones.
//!
//! Each worker has one directory of its own with a locked file in it. The lock goes with the
//! process however it ends, so whoever starts later can tell a dead worker's directory from a
//! living one's and removes it: no clone outlives its worker for long.
//!
//! A worker may die between making the directory and locking the file. Therefore both happen
//! under a lock of the directory above, and whoever holds that one may take a directory without
//! a lock for dead. Should somebody else sit on it, such directories are left to the next start.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PREFIX: &str = "celeriac-worker-";
const LOCK: &str = "lock";

/// How long a worker that starts waits for others that start.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// Why there is no directory to clone into.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot make a directory for clones below {parent}: {source}; name a writable one in TMPDIR"
)]
pub struct Error {
    parent: PathBuf,
    source: io::Error,
}

/// A worker's directory; removed with it.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Held for its lock.
    _lock: File,
}

impl Scratch {
    /// Makes a directory below `parent`, and removes those of dead workers.
    pub fn create(parent: &Path) -> Result<Self, Error> {
        let fault = |source| Error {
            parent: parent.to_owned(),
            source,
        };
        let alone = alone_in(parent);
        let dead = dead_in(parent, alone.is_some());
        let scratch = Self::make(parent).map_err(fault);
        drop(alone);
        for path in dead {
            log::info!("Removing what a dead worker left: {}", path.display());
            if let Err(error) = fs::remove_dir_all(&path)
                // Another worker that starts now does the same.
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("Cannot remove {}: {error}", path.display());
            }
        }
        match scratch {
            // There was no room, and now there may be.
            Err(_) => Self::make(parent).map_err(fault),
            made => made,
        }
    }

    fn make(parent: &Path) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let lock = File::create(directory.path().join(LOCK))?;
        lock.try_lock()?;
        fs::create_dir(directory.path().join("clones"))?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// Where children may have directories.
    pub fn clones(&self) -> PathBuf {
        self.directory.path().join("clones")
    }
}

/// The lock of the directory above, unless somebody keeps it for long or its file system has none.
fn alone_in(parent: &Path) -> Option<File> {
    let directory = File::open(parent).ok()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(_) => return None,
        }
    }
}

/// The directories of dead workers.
fn dead_in(parent: &Path, alone: bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .map(|entry| entry.path())
        .filter(|path| is_dead(path, alone))
        .collect()
}

/// Nobody holds the lock. A directory without one is being made this moment, unless we are alone.
fn is_dead(path: &Path, alone: bool) -> bool {
    match File::open(path.join(LOCK)) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(error) => alone && error.kind() == io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_workers_directory_is_removed_and_a_living_ones_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let living = Scratch::create(parent.path()).unwrap();
        let dead = parent.path().join("celeriac-worker-dead");
        fs::create_dir_all(dead.join("clones/x")).unwrap();
        File::create(dead.join(LOCK)).unwrap();
        let unlocked = parent.path().join("celeriac-worker-unlocked");
        fs::create_dir(&unlocked).unwrap();
        let another = Scratch::create(parent.path()).unwrap();
        assert!(!dead.exists() && !unlocked.exists());
        assert!(living.clones().exists() && another.clones().exists());
        let path = living.clones();
        drop(living);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_is_being_made_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let maker = alone_in(parent.path()).unwrap();
        let fresh = parent.path().join("celeriac-worker-fresh");
        fs::create_dir(&fresh).unwrap();
        let second = File::open(parent.path()).unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        assert_eq!(dead_in(parent.path(), false), Vec::<PathBuf>::new());
        drop(maker);
        assert_eq!(dead_in(parent.path(), true), [fresh]);
    }
}
