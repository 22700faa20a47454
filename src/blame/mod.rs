//! Who wrote each line of a whole repository, in one walk over its history.
//!
//! The answer is that of `git blame` for every text file at a commit, line for line. Asking
//! file by file reads the same history again for each; here all files go through it together.
//!
//! * A **live** line is one whose origin is still looked for. It stands at one commit, in one
//!   file, at one place: in a range in the trie of that commit. At the start all lines are
//!   live at the commit that is explained.
//! * A line is **settled** when no parent of the commit it stands at has it: that commit wrote it.
//! * To **pass** lines is to move them to a parent, counted as that parent counts them.
//!
//! Invariant: each line is settled or live in exactly one place. So the settled lines rise
//! from none to all, are the measure of progress, and are compared with all at the end.
//!
//! ```text
//! for each commit, children before parents, at which something is live:
//!     compare its tree with its parent's; what is the same passes as a whole
//!     a changed file: compare the lines; what is the same passes, the rest settles
//!     a new file: look for the file it was renamed from, then the same with that one
//!     several parents: first whole files to whoever has them, then lines, in parents' order
//! ```
//!
//! What becomes of a line at a commit depends on that commit, path and line only, not on other
//! lines or on the order of the walk. Therefore the files can be divided among threads, which
//! share the commits' table and nothing else.
//!
//! Commits may be ignored (a reformatting, say): what they settle is then looked for in their
//! parents by likeness, line by line.
//!
//! Left out: `-M` and `-C`, whose answers in git depend on how the lines still live are cut into
//! pieces; the default of git has neither.

mod compare;
mod glob;
mod pass;
mod pending;
mod ranges;
mod shard;
mod share;
mod summary;
mod survey;
mod tally;
mod workers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::git::history::{self, History};
use crate::git::mailmap::Mailmap;
use crate::git::objects::{self, Reader};
use crate::git::tree::Entries;
use crate::git::{self, Interrupt, Oid, Repository};

pub use crate::git::line_diff::Whitespace;
pub use summary::{Bounded, FileCommits, FileLines, Outcome, Skipped, Statistics};

use shard::{Advance, Shard};
use share::{Part, Share, WHOLE};
use survey::Survey;

/// What can be chosen; the default is what `git blame` does by default.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads that walk; more than the CPUs at hand is of no use.
    pub threads: usize,
    /// Memory for cached objects, of all threads together.
    pub cache_bytes: usize,
    /// Whether white space counts in lines; [`Whitespace::IgnoreAll`] is `-w`.
    pub whitespace: Whitespace,
    /// Follow only the first parent of merges.
    pub first_parent: bool,
    /// Commits that do not count: the lines they changed are those of the parent that they are
    /// most like, as far as there are such; `--ignore-rev`.
    pub ignored: Vec<Oid>,
    /// If not empty, only files that fit one of these patterns.
    pub include: Vec<String>,
    /// No files that fit one of these patterns.
    pub exclude: Vec<String>,
    /// Also tell each file's lines by author.
    pub per_file: bool,
    /// Also tell each file's lines by commit.
    pub per_commit: bool,
    /// Bounds of the work.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Options {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Options {
            threads: cpus,
            cache_bytes: 256 << 20,
            whitespace: Whitespace::Exact,
            first_parent: false,
            ignored: Vec::new(),
            include: Vec::new(),
            exclude: Vec::new(),
            per_file: false,
            per_commit: false,
            limits: Limits::default(),
        }
    }
}

/// What is refused or skipped because a stranger could ask too much with it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Larger files at HEAD are skipped and named in the outcome.
    pub max_file_bytes: u64,
    /// The same for files of more lines: an empty line is one byte, but takes 12 in memory. A
    /// version in history that has more ends the search there, which the outcome names.
    pub max_file_lines: usize,
    /// More files at HEAD, or removed by one commit, are an error.
    pub max_files: usize,
    /// Larger objects in history are an error, but larger versions of a file only end the
    /// search for its lines there, which the outcome names.
    pub objects: objects::Limits,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_file_bytes: 128 << 20,
            max_file_lines: 16 << 20,
            max_files: 4_000_000,
            objects: objects::Limits::default(),
        }
    }
}

/// How far a blame has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Commits passed, on the average of all parts of the files.
    pub commits_done: u64,
    /// Commits to pass; 0 while they are still being read.
    pub commits_total: u64,
    /// Lines whose origin is known.
    pub lines_settled: u64,
    /// All lines; 0 while they are still being counted.
    pub lines_total: u64,
}

impl Progress {
    /// From 0 to 1, never falling. Lines settle quickly at first and slowly at the end, commits
    /// are passed the other way round; half of each is nearest to the time it takes.
    pub fn fraction(&self) -> f64 {
        let share = |done: u64, total: u64| match total {
            0 => 0.0,
            total => done.min(total) as f64 / total as f64,
        };
        if self.commits_total > 0 && self.commits_done >= self.commits_total {
            return 1.0;
        }
        (share(self.commits_done, self.commits_total) + share(self.lines_settled, self.lines_total))
            / 2.0
    }
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The interrupt flag was set.
    #[error("finish the blame: interrupted")]
    Interrupted,
    /// The repository could not be read.
    #[error(transparent)]
    Git(git::Error),
    /// A tree has an impossible path.
    #[error("blame {path:?}: the path is a file and a directory at once")]
    Malformed {
        /// The path.
        path: String,
    },
    /// There is no thread to be had.
    #[error("start a thread for the blame: {source}")]
    Thread {
        /// The system's answer.
        source: std::io::Error,
    },
    /// A thread ended without an answer.
    #[error("finish the blame: {settled} of {lines} lines were settled; please report this")]
    Lost {
        /// Lines settled.
        settled: u64,
        /// All lines.
        lines: u64,
    },
}

impl From<git::Error> for Error {
    fn from(error: git::Error) -> Error {
        match error {
            git::Error::Interrupted => Error::Interrupted,
            error => Error::Git(error),
        }
    }
}

/// Tells who wrote each line of the text files at `commit`.
///
/// `progress` is called by this thread at most ten times a second; when `interrupt` is set the
/// answer is [`Error::Interrupted`] within about a tenth of a second.
pub fn blame(
    repository: &Repository,
    commit: Oid,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
    interrupt: &AtomicBool,
) -> Result<Outcome, Error> {
    let started = Instant::now();
    let workers = workers::Workers::new(interrupt);
    let (history, survey) = prepare(repository, commit, options, &workers)?;
    let prepared = started.elapsed();

    let threads = options.threads.max(1);
    let files = survey.parts(threads, &Interrupt::new(interrupt))?;
    let count = files.len() as u64;
    let advance = Advance::default();
    let report = || {
        progress(Progress {
            commits_done: advance.commits.load(Ordering::Relaxed) / WHOLE,
            commits_total: history.len() as u64,
            lines_settled: advance.lines.load(Ordering::Relaxed),
            lines_total: survey.lines,
        });
    };
    report();
    let mut parts = Vec::new();
    for (place, files) in (0..).zip(files) {
        let live = shard::all_lines(files, &Interrupt::new(interrupt))?;
        let mut part = Part {
            // What does not divide evenly goes to the first.
            share: WHOLE / count + if place == 0 { WHOLE % count } else { 0 },
            ..Part::default()
        };
        if !live.is_empty() {
            part.pending.insert(0, live);
        }
        parts.push(part);
    }
    let ignored = history.find(&options.ignored);
    let share = Share::new(parts);
    let walk = || {
        let mut shard = Shard::new(
            repository,
            &history,
            options,
            &ignored,
            workers.stop(),
            &advance,
        );
        while let Some(mut taken) = share.take(workers.stop())? {
            shard.walk(std::mem::take(&mut taken.part), &share)?;
        }
        Ok(shard.finish())
    };
    let jobs = (0..threads).map(|_| walk).collect();
    let walked = workers.run(jobs, &report)?;
    report();

    let interrupt = Interrupt::new(interrupt);
    let mut outcome = summary::summarise(&history, survey, walked, options, &interrupt)?;
    outcome.statistics.preparing = prepared;
    outcome.statistics.elapsed = started.elapsed();
    Ok(outcome)
}

/// Reads the commits' table and, beside it, counts the lines at HEAD.
fn prepare(
    repository: &Repository,
    commit: Oid,
    options: &Options,
    workers: &workers::Workers<'_>,
) -> Result<(History, Survey), Error> {
    enum Part {
        History(History),
        Survey(Survey),
    }
    let cache = options.cache_bytes.min(64 << 20) / 2;
    let reader = || Reader::new(repository, cache, options.limits.objects, workers.stop());
    let loaded = AtomicU64::new(0);
    let load = || {
        let mut reader = reader();
        let options = history::Options {
            shallow: repository.shallow(),
            first_parent: options.first_parent,
            mailmap: mailmap(repository, &mut reader)?,
        };
        let seen = |count| loaded.store(count, Ordering::Relaxed);
        Ok(Part::History(History::load(
            &mut reader,
            commit,
            &options,
            &seen,
        )?))
    };
    let count = || {
        let mut reader = reader();
        let tree = history::tree_of(&mut reader, commit)?;
        Ok(Part::Survey(survey::survey(&mut reader, tree, options)?))
    };
    type Job<'j> = Box<dyn FnOnce() -> Result<Part, Error> + Send + 'j>;
    let jobs: Vec<Job<'_>> = match options.threads {
        0 | 1 => Vec::new(),
        _ => vec![Box::new(load), Box::new(count)],
    };
    let mut parts = Vec::new();
    if jobs.is_empty() {
        let jobs: Vec<Job<'_>> = vec![Box::new(load)];
        parts.extend(workers.run(jobs, &|| ())?);
        let jobs: Vec<Job<'_>> = vec![Box::new(count)];
        parts.extend(workers.run(jobs, &|| ())?);
    } else {
        parts.extend(workers.run(jobs, &|| ())?);
    }
    let mut both = (History::default(), Survey::default());
    for part in parts {
        match part {
            Part::History(history) => both.0 = history,
            Part::Survey(survey) => both.1 = survey,
        }
    }
    Ok(both)
}

/// Reads `HEAD:.mailmap`, whatever commit is explained, as git does in a bare repository.
fn mailmap(repository: &Repository, reader: &mut Reader<'_>) -> Result<Mailmap, Error> {
    let Some(head) = repository.head()? else {
        return Ok(Mailmap::default());
    };
    let tree = history::tree_of(reader, head)?;
    let object = reader.tree(tree)?;
    let mut entries = Entries::new(tree, &object.bytes);
    while let Some(entry) = entries.read()? {
        if entry.name == b".mailmap" && !entry.is_directory() {
            return match reader.blob(entry.oid) {
                Ok(blob) => Ok(Mailmap::parse(&blob.bytes)),
                // A submodule of that name is no mailmap.
                Err(git::Error::Missing { .. }) => Ok(Mailmap::default()),
                Err(error) => Err(error.into()),
            };
        }
    }
    Ok(Mailmap::default())
}

/// How often the caller's flag is looked at.
const TICK: Duration = Duration::from_millis(20);

/// The least time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;
