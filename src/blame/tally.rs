//! The lines that are settled: who wrote them.

use std::collections::HashMap;

use super::Error;
use super::ranges::Range;
use super::summary::ENTRY;
use crate::git::Interrupt;
use crate::git::history::{AuthorIndex, CommitIndex, History};

/// Counts settled lines; each thread has its own, and they are added at the end.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// All lines settled.
    pub(super) lines: u64,
    /// By author.
    pub(super) authors: Vec<u64>,
    /// By file and author, if asked for.
    pub(super) files: Option<HashMap<(u32, AuthorIndex), u64>>,
    /// By file and commit, if asked for.
    pub(super) commits: Option<HashMap<(u32, CommitIndex), u64>>,
}

impl Tally {
    /// An empty count for a history.
    pub(super) fn new(history: &History, per_file: bool, per_commit: bool) -> Tally {
        Tally {
            lines: 0,
            authors: vec![0; history.emails().len()],
            files: per_file.then(HashMap::new),
            commits: per_commit.then(HashMap::new),
        }
    }

    /// These lines were written in that commit.
    pub(super) fn settle(&mut self, history: &History, commit: CommitIndex, ranges: &[Range]) {
        let author = history.author(commit);
        for range in ranges {
            let lines = u64::from(range.len);
            self.lines += lines;
            self.authors[author as usize] += lines;
            if let Some(files) = &mut self.files {
                *files.entry((range.file, author)).or_default() += lines;
            }
            if let Some(commits) = &mut self.commits {
                *commits.entry((range.file, commit)).or_default() += lines;
            }
        }
    }

    /// Adds what another thread has counted of the same history.
    pub(super) fn add(&mut self, other: Tally, interrupt: &Interrupt<'_>) -> Result<(), Error> {
        self.lines += other.lines;
        for (sum, lines) in self.authors.iter_mut().zip(other.authors) {
            *sum += lines;
        }
        if let (Some(files), Some(others)) = (&mut self.files, other.files) {
            for (key, lines) in others {
                interrupt.work(ENTRY)?;
                *files.entry(key).or_default() += lines;
            }
        }
        if let (Some(commits), Some(others)) = (&mut self.commits, other.commits) {
            for (key, lines) in others {
                interrupt.work(ENTRY)?;
                *commits.entry(key).or_default() += lines;
            }
        }
        Ok(())
    }
}
