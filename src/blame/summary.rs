//! What a blame has found out, in the form others use.

use std::collections::HashMap;
use std::time::Duration;

use super::shard::Walked;
use super::survey::Survey;
use super::tally::Tally;
use super::{Error, Options};
use crate::git::history::History;
use crate::git::{Interrupt, Oid};

/// Who wrote the lines of a repository.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Addresses, as bytes and after the mailmap, and their lines; most lines first, then by
    /// address. Addresses without lines are left out.
    pub totals: Vec<(Vec<u8>, u64)>,
    /// Text files explained, empty ones included.
    pub files: u64,
    /// Their lines: the sum of all totals.
    pub lines: u64,
    /// Files with a NUL among their first 8,000 bytes; they have no lines.
    pub binary_files: u64,
    /// Files that were left out although they may be text.
    pub skipped: Vec<Skipped>,
    /// Where a limit ended the search, so that git might name another commit.
    pub bounded: Vec<Bounded>,
    /// Each file's lines by author, if asked for; files in the order of the tree.
    pub per_file: Option<Vec<FileLines>>,
    /// Each file's lines by commit, if asked for; files in the order of the tree.
    pub per_commit: Option<Vec<FileCommits>>,
    /// What it took.
    pub statistics: Statistics,
}

/// A file at HEAD that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The path.
    pub path: Vec<u8>,
    /// Why.
    pub reason: String,
}

/// A comparison that was not made because of a limit: the lines in question count for the
/// commit at which the search ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounded {
    /// The commit.
    pub commit: Oid,
    /// The path in that commit.
    pub path: Vec<u8>,
    /// Which limit.
    pub reason: String,
}

/// The lines of one file by author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLines {
    /// The path.
    pub path: Vec<u8>,
    /// Places in [`Outcome::totals`] and lines, most lines first.
    pub authors: Vec<(u32, u64)>,
}

/// The lines of one file by commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileCommits {
    /// The path.
    pub path: Vec<u8>,
    /// Commits and lines, most lines first.
    pub commits: Vec<(Oid, u64)>,
}

/// What a blame took; times of several threads are added.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// Commits in the history.
    pub commits: u64,
    /// Commits at which something was live, once for each part of the files.
    pub commits_visited: u64,
    /// Trees read for comparisons.
    pub trees: u64,
    /// Blobs and other objects made from packs.
    pub objects: u64,
    /// Pairs of versions compared.
    pub diffs: u64,
    /// Paths for which a rename was looked for.
    pub renames: u64,
    /// Bytes that came out of deflated streams.
    pub inflated_bytes: u64,
    /// Bytes of all objects made.
    pub object_bytes: u64,
    /// Time to read the commits and count the lines (elapsed, not added).
    pub preparing: Duration,
    /// Time in comparisons of trees.
    pub comparing_trees: Duration,
    /// Time to read blobs.
    pub reading: Duration,
    /// Time in comparisons of lines.
    pub diffing: Duration,
    /// Time to look for renames.
    pub renaming: Duration,
    /// All in all (elapsed, not added).
    pub elapsed: Duration,
}

/// Adds up what the threads have found and checks that no line was lost.
pub(super) fn summarise(
    history: &History,
    survey: Survey,
    walked: Vec<Walked>,
    options: &Options,
    interrupt: &Interrupt<'_>,
) -> Result<Outcome, Error> {
    let mut tally = Tally::new(history, options.per_file, options.per_commit);
    let mut outcome = Outcome {
        files: survey.files.len() as u64,
        lines: survey.lines,
        binary_files: survey.binary_files,
        skipped: survey.skipped,
        ..Outcome::default()
    };
    let sum = &mut outcome.statistics;
    sum.commits = history.len() as u64;
    for walked in walked {
        tally.add(walked.tally, interrupt)?;
        outcome.bounded.extend(walked.bounded);
        sum.commits_visited += walked.statistics.commits;
        sum.trees += walked.statistics.trees;
        sum.diffs += walked.statistics.diffs;
        sum.renames += walked.statistics.renames;
        sum.comparing_trees += walked.statistics.comparing_trees;
        sum.reading += walked.statistics.reading;
        sum.diffing += walked.statistics.diffing;
        sum.renaming += walked.statistics.renaming;
        sum.objects += walked.objects.made;
        sum.inflated_bytes += walked.objects.inflated_bytes;
        sum.object_bytes += walked.objects.made_bytes;
    }
    if tally.lines != survey.lines {
        return Err(Error::Lost {
            settled: tally.lines,
            lines: survey.lines,
        });
    }

    let mut authors: Vec<(u32, u64)> = (0..).zip(tally.authors).collect();
    authors.retain(|&(_, lines)| lines > 0);
    let emails = history.emails();
    authors.sort_by(|one, other| {
        let email = |author: u32| &emails[author as usize];
        (other.1.cmp(&one.1)).then_with(|| email(one.0).cmp(email(other.0)))
    });
    let mut places = HashMap::new();
    for (place, &(author, lines)) in (0_u32..).zip(&authors) {
        places.insert(author, place);
        outcome
            .totals
            .push((emails[author as usize].clone(), lines));
    }

    if let Some(counts) = tally.files {
        let mut files: Vec<FileLines> = (survey.files.iter())
            .map(|file| FileLines {
                path: file.path.clone(),
                authors: Vec::new(),
            })
            .collect();
        for ((file, author), lines) in counts {
            interrupt.work(ENTRY)?;
            files[file as usize].authors.push((places[&author], lines));
        }
        for file in &mut files {
            interrupt.work(ENTRY)?;
            sort(&mut file.authors);
        }
        outcome.per_file = Some(files);
    }
    if let Some(counts) = tally.commits {
        let mut files: Vec<FileCommits> = (survey.files.iter())
            .map(|file| FileCommits {
                path: file.path.clone(),
                commits: Vec::new(),
            })
            .collect();
        for ((file, commit), lines) in counts {
            interrupt.work(ENTRY)?;
            let commits = &mut files[file as usize].commits;
            commits.push((history.oid(commit), lines));
        }
        for file in &mut files {
            interrupt.work(ENTRY)?;
            sort(&mut file.commits);
        }
        outcome.per_commit = Some(files);
    }
    Ok(outcome)
}

/// What it costs to count the lines of a file by one author or commit.
pub(super) const ENTRY: usize = 1 << 8;

/// Most lines first.
fn sort<K: Ord + Copy>(counts: &mut [(K, u64)]) {
    counts.sort_by_key(|&(key, lines)| (std::cmp::Reverse(lines), key));
}
