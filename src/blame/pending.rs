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
    fn a_path_cannot_be_a_file_and_a_directory() {
        let mut ours = trie(&[("a/b", 1)]);
        assert!(ours.insert(b"a", vec![2], join).is_err());
        assert!(ours.insert(b"a/b/c", vec![2], join).is_err());
        assert!(ours.union(trie(&[("a", 3)]), join).is_err());
    }
}
