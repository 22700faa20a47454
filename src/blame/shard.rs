//! One walk over history for a part of the files, by one thread, without locks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::pending::Trie;
use super::ranges::{self, Range};
use super::survey::File;
use super::tally::Tally;
use super::{Bounded, Error, Options};
use crate::git::Repository;
use crate::git::history::{CommitIndex, History};
use crate::git::line_diff::{Differ, Hunk};
use crate::git::objects::{Counters, Reader};
use crate::git::rename::RenameDetector;

/// What is live at one commit.
pub(super) type Live = Trie<Vec<Range>>;

/// How far all threads together have come; only ever rises.
#[derive(Debug, Default)]
pub(super) struct Advance {
    /// Commits passed, once for each shard.
    pub(super) commits: AtomicU64,
    /// Lines settled.
    pub(super) lines: AtomicU64,
}

/// What a thread has done.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ShardStatistics {
    pub(super) commits: u64,
    pub(super) trees: u64,
    pub(super) diffs: u64,
    pub(super) renames: u64,
    pub(super) reading: Duration,
    pub(super) diffing: Duration,
    pub(super) comparing_trees: Duration,
    pub(super) renaming: Duration,
}

/// What a thread gives back.
pub(super) struct Walked {
    pub(super) tally: Tally,
    pub(super) bounded: Vec<Bounded>,
    pub(super) statistics: ShardStatistics,
    pub(super) objects: Counters,
}

/// The tools and the state of one thread. Shards are walked one after another; caches and
/// scratch memory are kept between them.
pub(super) struct Shard<'a> {
    pub(super) history: &'a History,
    pub(super) options: &'a Options,
    pub(super) reader: Reader<'a>,
    pub(super) renames: RenameDetector,
    pub(super) differ: Differ,
    pub(super) tally: Tally,
    pub(super) bounded: Vec<Bounded>,
    pub(super) statistics: ShardStatistics,
    /// What is live where; the commit with the smallest number is next.
    pub(super) pending: BTreeMap<CommitIndex, Live>,
    /// Scratch of one comparison: its hunks, what the child keeps, what it passes on.
    pub(super) hunks: Vec<Hunk>,
    pub(super) kept: Vec<Range>,
    pub(super) passed: Vec<Range>,
    advance: &'a Advance,
}

impl<'a> Shard<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        history: &'a History,
        options: &'a Options,
        stop: &'a AtomicBool,
        advance: &'a Advance,
    ) -> Shard<'a> {
        let cache_bytes = options.cache_bytes / options.threads.max(1);
        Shard {
            history,
            options,
            reader: Reader::new(
                repository,
                cache_bytes / 16 * 15,
                options.limits.objects,
                stop,
            ),
            renames: RenameDetector::new(cache_bytes / 16),
            differ: Differ::new(),
            tally: Tally::new(history, options.per_file, options.per_commit),
            bounded: Vec::new(),
            statistics: ShardStatistics::default(),
            pending: BTreeMap::new(),
            hunks: Vec::new(),
            kept: Vec::new(),
            passed: Vec::new(),
            advance,
        }
    }

    /// Follows all lines of these files back to the commits that wrote them.
    pub(super) fn walk(&mut self, files: &[File]) -> Result<(), Error> {
        let mut head = Live::default();
        for file in files.iter().filter(|file| file.lines > 0) {
            let all = Range {
                start: 0,
                len: file.lines,
                file: file.number,
            };
            head.insert(&file.path, vec![all], ranges::union)
                .map_err(|_| Error::Malformed {
                    path: String::from_utf8_lossy(&file.path).into_owned(),
                })?;
        }
        if !head.is_empty() {
            self.pending.insert(0, head);
        }
        let mut passed_by = 0;
        let mut settled = self.tally.lines;
        while let Some((commit, live)) = self.pending.pop_first() {
            self.reader.check_interrupt()?;
            self.pass(commit, live)?;
            self.statistics.commits += 1;
            let here = u64::from(commit) + 1;
            self.advance
                .commits
                .fetch_add(here - passed_by, Ordering::Relaxed);
            passed_by = here;
            self.advance
                .lines
                .fetch_add(self.tally.lines - settled, Ordering::Relaxed);
            settled = self.tally.lines;
        }
        let rest = self.history.len() as u64 - passed_by;
        self.advance.commits.fetch_add(rest, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn finish(self) -> Walked {
        Walked {
            tally: self.tally,
            bounded: self.bounded,
            statistics: self.statistics,
            objects: self.reader.counters(),
        }
    }
}
