//! What is still to be explained at one commit: a trie that mirrors the commit's tree.
//!
//! Because it has the shape of git's trees, a comparison of two trees enters only directories
//! in which something is live, and a commit with one parent hands its whole trie on instead of
//! copying it. Empty directories are removed at once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// A directory with something live in it.
#[derive(Debug)]
pub(super) struct Trie<T> {
    entries: BTreeMap<Box<[u8]>, Node<T>>,
}

/// A name in a directory.
#[derive(Debug)]
pub(super) enum Node<T> {
    /// A directory; its trie is not empty.
    Directory(Trie<T>),
    /// A file.
    File(T),
}

/// One path stands for a file and a directory at once: the tree it came from is malformed.
#[derive(Debug)]
pub(super) struct Conflict;

impl<T> Default for Trie<T> {
    fn default() -> Trie<T> {
        Trie {
            entries: BTreeMap::new(),
        }
    }
}

impl<T> Trie<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn get_mut(&mut self, name: &[u8]) -> Option<&mut Node<T>> {
        self.entries.get_mut(name)
    }

    pub(super) fn remove(&mut self, name: &[u8]) -> Option<Node<T>> {
        self.entries.remove(name)
    }

    /// Puts a value at a path; `join` unites it with one that is there already.
    pub(super) fn insert(
        &mut self,
        path: &[u8],
        value: T,
        join: fn(&mut T, T),
    ) -> Result<(), Conflict> {
        let mut trie = self;
        let mut rest = path;
        while let Some(slash) = memchr::memchr(b'/', rest) {
            let node = trie.entries.entry(rest[..slash].into());
            match node.or_insert_with(|| Node::Directory(Trie::default())) {
                Node::Directory(inner) => trie = inner,
                Node::File(_) => return Err(Conflict),
            }
            rest = &rest[slash + 1..];
        }
        match trie.entries.entry(rest.into()) {
            Entry::Vacant(place) => {
                place.insert(Node::File(value));
            }
            Entry::Occupied(place) => match place.into_mut() {
                Node::File(present) => join(present, value),
                Node::Directory(_) => return Err(Conflict),
            },
        }
        Ok(())
    }

    /// Unites two tries, in each directory the smaller one into the larger.
    pub(super) fn union(
        &mut self,
        mut other: Trie<T>,
        join: fn(&mut T, T),
    ) -> Result<(), Conflict> {
        if other.entries.len() > self.entries.len() {
            std::mem::swap(self, &mut other);
        }
        for (name, node) in other.entries {
            match self.entries.entry(name) {
                Entry::Vacant(place) => {
                    place.insert(node);
                }
                Entry::Occupied(place) => match (place.into_mut(), node) {
                    (Node::File(ours), Node::File(theirs)) => join(ours, theirs),
                    (Node::Directory(ours), Node::Directory(theirs)) => {
                        ours.union(theirs, join)?;
                    }
                    _ => return Err(Conflict),
                },
            }
        }
        Ok(())
    }

    /// How many files there are.
    pub(super) fn files(&self) -> usize {
        let count = |node: &Node<T>| match node {
            Node::File(_) => 1,
            Node::Directory(inner) => inner.files(),
        };
        self.entries.values().map(count).sum()
    }

    /// Shows all files in order, each with the names on its path.
    pub(super) fn each<'t>(&'t self, visit: &mut impl FnMut(&[&'t [u8]], &'t T)) {
        self.each_below(&mut Vec::new(), visit);
    }

    fn each_below<'t>(
        &'t self,
        path: &mut Vec<&'t [u8]>,
        visit: &mut impl FnMut(&[&'t [u8]], &'t T),
    ) {
        for (name, node) in &self.entries {
            path.push(name);
            match node {
                Node::File(value) => visit(path, value),
                Node::Directory(inner) => inner.each_below(path, visit),
            }
            path.pop();
        }
    }

    /// The path of a file with about half of all weight before it; never the first one.
    pub(super) fn middle(&self, weight: &dyn Fn(&T) -> u64) -> Option<Vec<Box<[u8]>>> {
        let mut files = Vec::new();
        let mut before: Vec<&[u8]> = Vec::new();
        self.each(&mut |path, value| {
            let shared = common(&before, path);
            before = path.to_vec();
            files.push((shared, weight(value)));
        });
        let all = files.iter().map(|(_, weight)| weight).sum();
        let place = cut(&files, all, all / 2, all / 5)?;
        let (mut number, mut middle) = (0, None);
        self.each(&mut |path, _| {
            if number == place {
                middle = Some(path.iter().map(|&name| name.into()).collect());
            }
            number += 1;
        });
        middle
    }

    /// Takes out all files from a path on, in the order of [`Trie::each`].
    pub(super) fn split_off(&mut self, path: &[Box<[u8]>]) -> Trie<T> {
        let Some((name, below)) = path.split_first() else {
            return std::mem::take(self);
        };
        let mut rest = Trie {
            entries: self.entries.split_off(name),
        };
        if below.is_empty() {
            return rest;
        }
        // The directory at the cut is divided itself; a file of that name comes before what is in it.
        match rest.entries.remove(name) {
            Some(Node::Directory(mut inner)) => {
                let cut = inner.split_off(below);
                if !cut.is_empty() {
                    rest.entries.insert(name.clone(), Node::Directory(cut));
                }
                if !inner.is_empty() {
                    self.entries.insert(name.clone(), Node::Directory(inner));
                }
            }
            Some(file) => {
                self.entries.insert(name.clone(), file);
            }
            None => {}
        }
        rest
    }

    /// Hands over all files.
    pub(super) fn drain(self, visit: &mut impl FnMut(T)) {
        for node in self.entries.into_values() {
            match node {
                Node::File(value) => visit(value),
                Node::Directory(inner) => inner.drain(visit),
            }
        }
    }
}

/// How many directories two paths share.
pub(super) fn common(one: &[&[u8]], other: &[&[u8]]) -> usize {
    let pairs = one.iter().zip(other);
    pairs.take_while(|(one, other)| one == other).count()
}

/// Where to cut a list of files so that about `wanted` of the weight is before the cut.
///
/// Directories that both sides share are walked through twice. So of the cuts that are less than `slack` off, one
/// between files that share as few directories as possible is the best, and of such the one that is nearest.
/// `files` tells of each how many directories it shares with the one before, and its weight.
pub(super) fn cut(files: &[(usize, u64)], all: u64, wanted: u64, slack: u64) -> Option<usize> {
    let mut before = 0;
    let mut best: Option<(bool, usize, u64, usize)> = None;
    for (place, &(shared, weight)) in files.iter().enumerate() {
        let off = wanted.abs_diff(before.min(all));
        let is_far = off > slack;
        // Among those that are too far off the nearest one counts, whatever is shared there.
        let cost = (is_far, if is_far { 0 } else { shared }, off, place);
        if place > 0 && best.is_none_or(|best| cost < best) {
            best = Some(cost);
        }
        before += weight;
    }
    best.map(|(.., place)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(ours: &mut Vec<u32>, theirs: Vec<u32>) {
        ours.extend(theirs);
    }

    fn trie(paths: &[(&str, u32)]) -> Trie<Vec<u32>> {
        let mut trie = Trie::default();
        for (path, value) in paths {
            trie.insert(path.as_bytes(), vec![*value], join).unwrap();
        }
        trie
    }

    #[test]
    fn a_union_holds_what_either_had() {
        let mut ours = trie(&[("a/b/c", 1), ("a/d", 2)]);
        ours.union(trie(&[("a/b/c", 3), ("e", 4), ("f", 5)]), join)
            .unwrap();
        let mut found = Vec::new();
        ours.drain(&mut |mut values| {
            values.sort();
            found.push(values);
        });
        assert_eq!(found, [vec![1, 3], vec![2], vec![4], vec![5]]);
    }

    #[test]
    fn a_cut_is_made_where_few_directories_are_shared() {
        let one = |shared| (shared, 1);
        let files = [
            one(0),
            one(2),
            one(2),
            one(1),
            one(2),
            one(2),
            one(2),
            one(2),
        ];
        assert_eq!(cut(&files, 8, 4, 1), Some(3));
        assert_eq!(cut(&files, 8, 4, 0), Some(4));
        assert_eq!(cut(&[(0, 1), (0, 60), (5, 9)], 70, 35, 10), Some(2));
        assert_eq!(cut(&[(0, 9)], 9, 4, 1), None);
    }

    #[test]
    fn a_path_cannot_be_a_file_and_a_directory() {
        let mut ours = trie(&[("a/b", 1)]);
        assert!(ours.insert(b"a", vec![2], join).is_err());
        assert!(ours.insert(b"a/b/c", vec![2], join).is_err());
        assert!(ours.union(trie(&[("a", 3)]), join).is_err());
    }
}
