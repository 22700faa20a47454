//! Room on the disk: what one clone may take, and what must stay free for everybody else.
//!
//! Asked before the first byte is requested and before every chunk is written; the index, whose
//! size follows from the number of objects, is reckoned with from the start of the pack on. A
//! clone is thus ended before it fills a disk that other jobs, or other programs, write to. A
//! file system that cannot say how full it is bounds nothing but the quota.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What stays free when nothing is said: this, and never more than a twentieth of the disk.
const RESERVE: u64 = 256 << 20;
const SHARE: u64 = 20;

/// Why nothing more may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// The clone has had its quota.
    Quota(u64),
    /// The disk is needed for something else.
    Reserve {
        /// Bytes that are free.
        free: u64,
        /// Bytes that are to stay free.
        reserve: u64,
        /// Whether it was others that took the room, so that it may come back.
        others: bool,
    },
}

/// The room of one clone.
#[derive(Debug)]
pub(super) struct Space {
    directory: PathBuf,
    quota: u64,
    reserve: u64,
    /// Free bytes at the start; 0 where nobody knows.
    at_start: u64,
    written: AtomicU64,
    /// Bytes that will be written later.
    planned: AtomicU64,
}

impl Space {
    /// Looks at the disk of `directory`; an error when it is too full to begin. A reserve of 0
    /// leaves the disk to the first write that fails.
    pub(super) fn open(directory: &Path, quota: u64, reserve: Option<u64>) -> Result<Space, Lack> {
        let (free, total) = measure(directory).unwrap_or_default();
        let space = Space {
            directory: directory.to_owned(),
            quota,
            reserve: reserve.unwrap_or(RESERVE.min(total / SHARE)),
            at_start: free,
            written: AtomicU64::new(0),
            planned: AtomicU64::new(0),
        };
        if total > 0 && space.reserve > 0 && free < space.reserve {
            return Err(Lack::Reserve {
                free,
                reserve: space.reserve,
                others: true,
            });
        }
        Ok(space)
    }

    /// Keeps room for the index over so many objects.
    pub(super) fn plan_index(&self, objects: u64) -> Result<(), Lack> {
        // Header, fan-out and checksums; name, checksum and offset of each object.
        self.planned.store(1072 + 28 * objects, Ordering::Relaxed);
        self.admit(0)
    }

    /// Whether so many bytes may be written now.
    pub(super) fn admit(&self, bytes: u64) -> Result<(), Lack> {
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        let wanted = bytes.saturating_add(self.planned.load(Ordering::Relaxed));
        if before.saturating_add(wanted) > self.quota {
            return Err(Lack::Quota(self.quota));
        }
        if self.reserve == 0 {
            return Ok(());
        }
        match measure(&self.directory) {
            Some((free, _)) => self.judge(before, wanted, free),
            None => Ok(()),
        }
    }

    fn judge(&self, before: u64, wanted: u64, free: u64) -> Result<(), Lack> {
        let needed = wanted.saturating_add(self.reserve);
        if free >= needed {
            return Ok(());
        }
        let taken_by_others = self.at_start.saturating_sub(free).saturating_sub(before);
        Err(Lack::Reserve {
            free,
            reserve: self.reserve,
            others: free.saturating_add(taken_by_others) >= needed,
        })
    }
}

/// Free and total bytes of the disk of a directory, as far as this user may have them.
fn measure(directory: &Path) -> Option<(u64, u64)> {
    let disk = nix::sys::statvfs::statvfs(directory).ok()?;
    let unit = disk.fragment_size();
    Some((
        disk.blocks_available().saturating_mul(unit),
        disk.blocks().saturating_mul(unit),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(quota: u64, reserve: u64, at_start: u64) -> Space {
        Space {
            directory: PathBuf::from("/"),
            quota,
            reserve,
            at_start,
            written: AtomicU64::new(0),
            planned: AtomicU64::new(0),
        }
    }

    #[test]
    fn the_quota_counts_the_index_that_is_to_come() {
        let space = space(10_000, 0, 0);
        assert_eq!(space.plan_index(100), Ok(()));
        assert_eq!(space.admit(6_000), Ok(()));
        assert_eq!(space.admit(100), Ok(()));
        assert_eq!(space.admit(100), Err(Lack::Quota(10_000)));
    }

    #[test]
    fn waiting_helps_only_where_others_took_the_room() {
        let space = space(u64::MAX, 100, 1_000);
        assert_eq!(space.judge(500, 50, 500), Ok(()));
        let lack = |free, others| {
            Err(Lack::Reserve {
                free,
                reserve: 100,
                others,
            })
        };
        // 860 are ours: alone on this disk it would be the same.
        assert_eq!(space.judge(860, 50, 140), lack(140, false));
        // 800 are others'.
        assert_eq!(space.judge(60, 50, 140), lack(140, true));
    }

    #[test]
    fn a_reserve_larger_than_the_disk_lets_nothing_begin() {
        let directory = tempfile::tempdir().unwrap();
        let lack = Space::open(directory.path(), u64::MAX, Some(u64::MAX)).unwrap_err();
        assert!(
            matches!(lack, Lack::Reserve { others: true, .. }),
            "{lack:?}"
        );
        assert!(Space::open(directory.path(), u64::MAX, Some(0)).is_ok());
    }
}
