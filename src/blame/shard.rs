//! One walk over history for a part of the files, by one thread, without locks.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::pending::Trie;
use super::ranges::{self, Range};
use super::share::{self, Part, Pending, Share};
use super::survey::File;
use super::tally::Tally;
use super::{Bounded, Error, Options};
use crate::git::history::{CommitIndex, History};
use crate::git::line_diff::{Differ, Hunk};
use crate::git::objects::{Counters, Reader};
use crate::git::rename::RenameDetector;
use crate::git::{Interrupt, Repository};

/// What is live at one commit.
pub(super) type Live = Trie<Vec<Range>>;

/// How far all threads together have come; only ever rises.
#[derive(Debug, Default)]
pub(super) struct Advance {
    /// Commits passed, each counted with the share of the part that passed it.
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

/// The tools and the state of one thread. Parts are walked one after another; caches and
/// scratch memory are kept between them.
pub(super) struct Shard<'a> {
    pub(super) history: &'a History,
    pub(super) options: &'a Options,
    /// Commits that do not count.
    pub(super) ignored: &'a HashSet<CommitIndex>,
    pub(super) reader: Reader<'a>,
    pub(super) renames: RenameDetector,
    pub(super) differ: Differ,
    pub(super) tally: Tally,
    pub(super) bounded: Vec<Bounded>,
    pub(super) statistics: ShardStatistics,
    /// What is live where.
    pub(super) pending: Pending,
    /// Scratch of one comparison: its hunks, what the child keeps, what it passes on.
    pub(super) hunks: Vec<Hunk>,
    pub(super) kept: Vec<Range>,
    pub(super) passed: Vec<Range>,
    advance: &'a Advance,
}

/// Looking for a place to cut costs about as much as passing some commits.
const CUT_EVERY: u64 = 64;

/// What it costs to enter a file.
const FILE: usize = 1 << 10;

/// The lines of these files at the commit that is explained.
pub(super) fn all_lines(files: &[File], interrupt: &Interrupt<'_>) -> Result<Live, Error> {
    let mut head = Live::default();
    for file in files.iter().filter(|file| file.lines > 0) {
        interrupt.work(FILE)?;
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
    Ok(head)
}

impl<'a> Shard<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        history: &'a History,
        options: &'a Options,
        ignored: &'a HashSet<CommitIndex>,
        stop: &'a AtomicBool,
        advance: &'a Advance,
    ) -> Shard<'a> {
        let cache_bytes = options.cache_bytes / options.threads.max(1);
        Shard {
            history,
            options,
            ignored,
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
            pending: Pending::new(),
            hunks: Vec::new(),
            kept: Vec::new(),
            passed: Vec::new(),
            advance,
        }
    }

    /// Follows all lines of a part back to the commits that wrote them; gives half of it away
    /// when another thread has nothing to do.
    pub(super) fn walk(&mut self, mut part: Part, share: &Share) -> Result<(), Error> {
        self.pending = std::mem::take(&mut part.pending);
        let mut settled = self.tally.lines;
        let mut next_cut = 0;
        while let Some((commit, live)) = self.pending.pop_first() {
            self.reader.check_interrupt()?;
            self.pass(commit, live)?;
            self.statistics.commits += 1;
            let here = u64::from(commit) + 1;
            self.advance
                .commits
                .fetch_add((here - part.passed) * part.share, Ordering::Relaxed);
            part.passed = here;
            self.advance
                .lines
                .fetch_add(self.tally.lines - settled, Ordering::Relaxed);
            settled = self.tally.lines;
            if share.is_wanted() && here >= next_cut {
                self.give(&mut part, share);
                next_cut = here + CUT_EVERY;
            }
        }
        let rest = self.history.len() as u64 - part.passed;
        self.advance
            .commits
            .fetch_add(rest * part.share, Ordering::Relaxed);
        Ok(())
    }

    fn give(&mut self, part: &mut Part, share: &Share) {
        if let Some(pending) = share::cut(&mut self.pending) {
            let half = part.share / 2;
            part.share -= half;
            share.give(Part {
                pending,
                passed: part.passed,
                share: half,
            });
        }
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
