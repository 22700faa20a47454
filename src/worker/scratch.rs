//! The directory below which this worker's children clone, and the janitor of dead ones.
//!
//! Each worker has one directory of its own with a locked file in it. The lock goes with the
//! process however it ends, so whoever starts later can tell a dead worker's directory from a
//! living one's and removes it: no clone outlives its worker for long.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

const PREFIX: &str = "celeriac-worker-";
const LOCK: &str = "lock";

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
    /// Makes a directory below `parent`, after removing those of dead workers.
    pub fn create(parent: &Path) -> Result<Self, Error> {
        sweep(parent);
        let fault = |source| Error {
            parent: parent.to_owned(),
            source,
        };
        let directory = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)
            .map_err(fault)?;
        let lock = File::create(directory.path().join(LOCK)).map_err(fault)?;
        lock.try_lock().map_err(|error| fault(error.into()))?;
        fs::create_dir(directory.path().join("clones")).map_err(fault)?;
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

fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        if is_dead(&path) {
            log::info!("Removing what a dead worker left: {}", path.display());
            if let Err(error) = fs::remove_dir_all(&path) {
                log::warn!("Cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// Nobody holds the lock. A directory without one is being made this moment.
fn is_dead(path: &Path) -> bool {
    match File::open(path.join(LOCK)).map(|lock| lock.try_lock()) {
        Ok(Ok(())) => true,
        Ok(Err(TryLockError::WouldBlock | TryLockError::Error(_))) | Err(_) => false,
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
        let fresh = parent.path().join("celeriac-worker-fresh");
        fs::create_dir(&fresh).unwrap();
        let another = Scratch::create(parent.path()).unwrap();
        assert!(!dead.exists() && fresh.exists());
        assert!(living.clones().exists() && another.clones().exists());
        let path = living.clones();
        drop(living);
        assert!(!path.exists());
    }
}
