//! Passing blame: what one commit keeps and what goes to which of its parents.
//!
//! Answers for the rules of git's blame about origins: the same path first, renames only for a
//! path the parent does not have, and at merges a parent with the identical file before all
//! line comparisons, whatever its place among the parents.

use std::rc::Rc;
use std::time::Instant;

use super::compare::{Differing, Seen, take_differing};
use super::pending::Trie;
use super::ranges::{self, Range};
use super::shard::{Live, Shard};
use super::{Bounded, Error};
use crate::git::history::CommitIndex;
use crate::git::line_diff::{Lines, Text, count_lines, guess};
use crate::git::objects::{Object, Reader};
use crate::git::rename::{Blobs, Candidate};
use crate::git::tree_diff::{Leaf, deleted};
use crate::git::{self, Interrupt, Oid};

/// What is looked for in ignored commits takes up to 200 bytes of memory for each line.
const MOST_GUESSED: usize = 4 << 20;

/// A file after a change, and before it.
type Versions = (Rc<Object>, Rc<Object>);

/// A file of a merge that is not the same in the parents looked at so far.
struct Undecided {
    file: Differing<()>,
    ranges: Vec<Range>,
    /// What each parent looked at has.
    seen: Vec<Seen>,
}

/// A version in a parent that lines of a merge may come from.
struct Origin {
    path: Vec<u8>,
    blob: Oid,
}

impl Shard<'_> {
    /// Divides what is live at a commit among the commit itself and its parents.
    pub(super) fn pass(&mut self, commit: CommitIndex, live: Live) -> Result<(), Error> {
        let history = self.history;
        match history.parents(commit) {
            [] => {
                live.drain(&mut |ranges| self.tally.settle(history, commit, &ranges));
                Ok(())
            }
            [parent] => self.pass_to_only(commit, *parent, live),
            parents => self.pass_to_many(commit, parents, live),
        }
    }

    fn pass_to_only(
        &mut self,
        commit: CommitIndex,
        parent: CommitIndex,
        mut live: Live,
    ) -> Result<(), Error> {
        let trees = (self.history.tree(commit), self.history.tree(parent));
        let mut missing = Vec::new();
        for mut file in self.differing(trees.0, trees.1, &mut live)? {
            match file.seen {
                Seen::Absent => missing.push(file),
                Seen::OtherType => self.settle(commit, &file.value),
                Seen::Blob(blob) => {
                    let path = file.path.clone();
                    self.pass_file(commit, &mut file, &path, blob, &mut live)?;
                }
            }
        }
        if !missing.is_empty() {
            let sources = self.deleted(trees.1, trees.0)?;
            for mut file in missing {
                match self.renamed(commit, &file, &sources)? {
                    Some(source) => {
                        self.pass_file(commit, &mut file, &source.path, source.oid, &mut live)?;
                    }
                    None => self.settle(commit, &file.value),
                }
            }
        }
        self.hand_over(parent, live)
    }

    /// Divides a file's lines between a commit and `live`, that of its only parent, where the
    /// file has this path and blob.
    fn pass_file(
        &mut self,
        commit: CommitIndex,
        file: &mut Differing<Vec<Range>>,
        path: &[u8],
        blob: Oid,
        live: &mut Live,
    ) -> Result<(), Error> {
        let tree = self.history.tree(self.history.parents(commit)[0]);
        self.split(commit, &file.path, blob, file.blob, &mut file.value)?;
        if !self.passed.is_empty() {
            join_path(live, path, self.passed.clone(), tree)?;
        }
        if self.is_ignored(commit) && !file.value.is_empty() {
            self.look_through(commit, &file.path, blob, file.blob, &mut file.value)?;
            if !self.passed.is_empty() {
                join_path(live, path, self.passed.clone(), tree)?;
            }
        }
        self.settle(commit, &file.value);
        Ok(())
    }

    fn pass_to_many(
        &mut self,
        commit: CommitIndex,
        parents: &[CommitIndex],
        live: Live,
    ) -> Result<(), Error> {
        let mut undecided = self.pass_identical(commit, parents, live)?;
        if undecided.is_empty() {
            return Ok(());
        }
        let tree = self.history.tree(commit);
        let mut sources: Vec<Option<Rc<Vec<Leaf>>>> = vec![None; parents.len()];
        for mut one in std::mem::take(&mut undecided) {
            let mut origins: Vec<Option<Origin>> = Vec::with_capacity(parents.len());
            for seen in &one.seen {
                let origin = match seen {
                    Seen::Blob(blob) if !has(&origins, *blob) => Some(Origin {
                        path: one.file.path.clone(),
                        blob: *blob,
                    }),
                    _ => None,
                };
                origins.push(origin);
            }
            for (place, &parent) in parents.iter().enumerate() {
                if one.seen[place] != Seen::Absent {
                    continue;
                }
                let parent_tree = self.history.tree(parent);
                let known = match &sources[place] {
                    Some(known) => Rc::clone(known),
                    None => Rc::new(self.deleted(parent_tree, tree)?),
                };
                sources[place] = Some(Rc::clone(&known));
                let Some(source) = self.renamed(commit, &one.file, &known)? else {
                    continue;
                };
                if source.oid == one.file.blob {
                    let all = std::mem::take(&mut one.ranges);
                    self.hand_over_file(parent, &source.path, all)?;
                    break;
                }
                if !has(&origins[..place], source.oid) {
                    origins[place] = Some(Origin {
                        path: source.path.clone(),
                        blob: source.oid,
                    });
                }
            }
            let rounds = if self.is_ignored(commit) { 2 } else { 1 };
            for round in 0..rounds {
                for (origin, &parent) in origins.iter().zip(parents) {
                    if one.ranges.is_empty() {
                        break;
                    }
                    let Some(origin) = origin else {
                        continue;
                    };
                    let (path, blob) = (&one.file.path, one.file.blob);
                    if round == 0 {
                        self.split(commit, path, origin.blob, blob, &mut one.ranges)?;
                    } else {
                        self.look_through(commit, path, origin.blob, blob, &mut one.ranges)?;
                    }
                    if !self.passed.is_empty() {
                        let passed = self.passed.clone();
                        self.hand_over_file(parent, &origin.path, passed)?;
                    }
                }
            }
            self.settle(commit, &one.ranges);
        }
        Ok(())
    }

    /// Gives each live file to the first parent that has the identical one; the others remain.
    fn pass_identical(
        &mut self,
        commit: CommitIndex,
        parents: &[CommitIndex],
        mut live: Live,
    ) -> Result<Vec<Undecided>, Error> {
        let tree = self.history.tree(commit);
        let first_tree = self.history.tree(parents[0]);
        let differing = self.differing(tree, first_tree, &mut live)?;
        self.hand_over(parents[0], live)?;
        let mut undecided: Vec<Undecided> = Vec::with_capacity(differing.len());
        for file in differing {
            undecided.push(Undecided {
                ranges: file.value,
                seen: vec![file.seen],
                file: Differing {
                    path: file.path,
                    mode: file.mode,
                    blob: file.blob,
                    seen: file.seen,
                    value: (),
                },
            });
        }
        for &parent in &parents[1..] {
            if undecided.is_empty() {
                break;
            }
            let parent_tree = self.history.tree(parent);
            let mut numbers: Trie<usize> = Trie::default();
            for (number, one) in undecided.iter().enumerate() {
                numbers
                    .insert(&one.file.path, number, |_, _| ())
                    .map_err(|_| malformed(tree))?;
            }
            let differing = self.differing(tree, parent_tree, &mut numbers)?;
            let mut identical = vec![true; undecided.len()];
            for file in differing {
                identical[file.value] = false;
                undecided[file.value].seen.push(file.seen);
            }
            let mut remaining = Vec::new();
            for (one, identical) in undecided.into_iter().zip(identical) {
                if identical {
                    self.hand_over_file(parent, &one.file.path, one.ranges)?;
                } else {
                    remaining.push(one);
                }
            }
            undecided = remaining;
        }
        Ok(undecided)
    }

    /// Leaves in `ranges` what the child has changed, and in `passed` what comes from the parent.
    fn split(
        &mut self,
        commit: CommitIndex,
        path: &[u8],
        parent: Oid,
        child: Oid,
        ranges: &mut Vec<Range>,
    ) -> Result<(), Error> {
        self.passed.clear();
        if parent == child {
            self.passed.append(ranges);
            return Ok(());
        }
        if self.compare(commit, path, parent, child)?.is_some() {
            ranges::split(ranges, &self.hunks, &mut self.kept, &mut self.passed);
            std::mem::swap(ranges, &mut self.kept);
        }
        Ok(())
    }

    /// Leaves in `ranges`, which are lines the child has changed, those like nothing in the parent,
    /// and in `passed` what they were in it: for commits that do not count.
    fn look_through(
        &mut self,
        commit: CommitIndex,
        path: &[u8],
        parent: Oid,
        child: Oid,
        ranges: &mut Vec<Range>,
    ) -> Result<(), Error> {
        self.passed.clear();
        if let Some((old, new)) = self.compare(commit, path, parent, child)?
            && let (Some(old_lines), Some(new_lines)) = (old.lines.get(), new.lines.get())
        {
            if old.bytes.len().max(new.bytes.len()) > MOST_GUESSED {
                let reason = format!(
                    "versions above {MOST_GUESSED} bytes are not searched for what an ignored \
                     commit changed"
                );
                self.bound_by(commit, path, reason);
                return Ok(());
            }
            let start = Instant::now();
            let texts = texts([(&old, old_lines), (&new, new_lines)]);
            let interrupt = self.reader.interrupt();
            let guesses = guess(texts[0], texts[1], &self.hunks, interrupt)?;
            let (kept, passed) = (&mut self.kept, &mut self.passed);
            ranges::move_guessed(ranges, &self.hunks, &guesses, kept, passed);
            std::mem::swap(ranges, &mut self.kept);
            self.statistics.diffing += start.elapsed();
        }
        Ok(())
    }

    /// Fills `hunks`; gives back both versions, or nothing when a limit forbids to compare them.
    fn compare(
        &mut self,
        commit: CommitIndex,
        path: &[u8],
        parent: Oid,
        child: Oid,
    ) -> Result<Option<Versions>, Error> {
        let start = Instant::now();
        let new = self.reader.blob(child);
        let old = self.reader.blob(parent);
        let read = Instant::now();
        self.statistics.reading += read - start;
        let (new, old) = match (new, old) {
            (Ok(new), Ok(old)) => (new, old),
            (Err(error), _) | (_, Err(error)) => {
                self.bound(commit, path, error)?;
                return Ok(None);
            }
        };
        let whitespace = self.options.whitespace;
        // With files of a hundred megabytes each of these steps takes its time.
        let interrupt = self.reader.interrupt();
        interrupt.look()?;
        let most = self.options.limits.max_file_lines;
        for version in [&new, &old] {
            // There are not more lines than bytes, so hardly ever is anything counted here.
            if version.lines.get().is_none()
                && version.bytes.len() > most
                && count_lines(&version.bytes, interrupt)? > most
            {
                let reason = format!("a version has more than {most} lines");
                self.bound_by(commit, path, reason);
                return Ok(None);
            }
        }
        let mut grown = 0;
        let mut keep = |object: &Object, lines: Lines| {
            grown += lines.memory();
            // It was empty a moment ago, and this thread alone has it.
            let _ = object.lines.set(lines);
        };
        if new.lines.get().is_none() {
            keep(&new, Lines::of_until(&new.bytes, whitespace, interrupt)?);
        }
        if let (None, Some(near)) = (old.lines.get(), new.lines.get()) {
            let lines = Lines::derive(&old.bytes, &new.bytes, near, whitespace, interrupt)?;
            keep(&old, lines);
        }
        let (Some(old_lines), Some(new_lines)) = (old.lines.get(), new.lines.get()) else {
            unreachable!("because both were made just now");
        };
        let texts = texts([(&old, old_lines), (&new, new_lines)]);
        self.differ
            .diff_until(texts[0], texts[1], &mut self.hunks, interrupt)?;
        self.reader.grown(grown);
        self.statistics.diffs += 1;
        self.statistics.diffing += read.elapsed();
        Ok(Some((old, new)))
    }

    /// An object beyond the limits bounds the work on one path; other errors end it all.
    fn bound(&mut self, commit: CommitIndex, path: &[u8], error: git::Error) -> Result<(), Error> {
        if !matches!(error, git::Error::TooLarge { .. }) {
            return Err(error.into());
        }
        self.bound_by(commit, path, error.to_string());
        Ok(())
    }

    fn bound_by(&mut self, commit: CommitIndex, path: &[u8], reason: String) {
        self.bounded.push(Bounded {
            commit: self.history.oid(commit),
            path: path.to_vec(),
            reason,
        });
    }

    fn is_ignored(&self, commit: CommitIndex) -> bool {
        self.ignored.contains(&commit)
    }

    fn differing<T>(
        &mut self,
        child: Oid,
        parent: Oid,
        trie: &mut Trie<T>,
    ) -> Result<Vec<Differing<T>>, Error> {
        if child == parent {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let trees = &mut self.statistics.trees;
        let found = take_differing(&mut self.reader, child, parent, trie, trees)?;
        self.statistics.comparing_trees += start.elapsed();
        Ok(found)
    }

    fn deleted(&mut self, parent: Oid, child: Oid) -> Result<Vec<Leaf>, Error> {
        let start = Instant::now();
        let most = self.options.limits.max_files;
        let found = deleted(&mut self.reader, parent, child, most)?;
        self.statistics.renaming += start.elapsed();
        Ok(found)
    }

    fn renamed<'s, T>(
        &mut self,
        commit: CommitIndex,
        file: &Differing<T>,
        sources: &'s [Leaf],
    ) -> Result<Option<&'s Leaf>, Error> {
        let start = Instant::now();
        let candidates: Vec<Candidate<'_>> = sources
            .iter()
            .map(|leaf| Candidate {
                path: &leaf.path,
                mode: leaf.mode,
                oid: leaf.oid,
            })
            .collect();
        let target = Candidate {
            path: &file.path,
            mode: file.mode,
            oid: file.blob,
        };
        let mut blobs = ReaderBlobs(&mut self.reader);
        let found = self.renames.find(&target, &candidates, &mut blobs);
        self.statistics.renames += 1;
        self.statistics.renaming += start.elapsed();
        match found {
            Ok(found) => Ok(found.map(|number| &sources[number])),
            Err(error) => self.bound(commit, &file.path, error).map(|()| None),
        }
    }

    fn settle(&mut self, commit: CommitIndex, ranges: &[Range]) {
        self.tally.settle(self.history, commit, ranges);
    }

    fn hand_over(&mut self, parent: CommitIndex, live: Live) -> Result<(), Error> {
        if live.is_empty() {
            return Ok(());
        }
        let tree = self.history.tree(parent);
        let pending = self.pending.entry(parent).or_default();
        pending
            .union(live, ranges::union)
            .map_err(|_| malformed(tree).into())
    }

    fn hand_over_file(
        &mut self,
        parent: CommitIndex,
        path: &[u8],
        ranges: Vec<Range>,
    ) -> Result<(), Error> {
        let tree = self.history.tree(parent);
        let pending = self.pending.entry(parent).or_default();
        join_path(pending, path, ranges, tree)
    }
}

fn join_path(live: &mut Live, path: &[u8], ranges: Vec<Range>, tree: Oid) -> Result<(), Error> {
    live.insert(path, ranges, ranges::union)
        .map_err(|_| malformed(tree).into())
}

fn malformed(tree: Oid) -> git::Error {
    git::Error::Corrupt {
        oid: tree,
        reason: "one of its paths is a file and a directory at once".to_owned(),
    }
}

fn texts<'o>(versions: [(&'o Rc<Object>, &'o Lines); 2]) -> [Text<'o>; 2] {
    versions.map(|(object, lines)| Text {
        bytes: &object.bytes,
        lines,
    })
}

fn has(origins: &[Option<Origin>], blob: Oid) -> bool {
    origins.iter().flatten().any(|origin| origin.blob == blob)
}

/// What the search for renames reads.
struct ReaderBlobs<'r, 'a>(&'r mut Reader<'a>);

impl Blobs for ReaderBlobs<'_, '_> {
    fn size(&mut self, oid: Oid) -> Result<u64, git::Error> {
        self.0.blob_size(oid)
    }

    fn bytes(&mut self, oid: Oid) -> Result<Rc<dyn AsRef<[u8]>>, git::Error> {
        self.0.check_interrupt()?;
        Ok(self.0.blob(oid)?)
    }

    fn interrupt(&self) -> &Interrupt<'_> {
        self.0.interrupt()
    }
}
