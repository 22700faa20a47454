//! Which live files of a commit are not the same in a parent.
//!
//! Two trees are read side by side in git's order. Entries that are equal byte for byte are
//! passed over, as are names nobody waits for, so only live directories that changed are
//! entered.

use super::pending::{Node, Trie};
use crate::git::objects::Reader;
use crate::git::tree::{Pair, Type};
use crate::git::tree_diff::{ENTRY, check_depth, push};
use crate::git::{Error, Oid};

/// A live file that is not the same in the parent; it was taken out of the trie.
#[derive(Debug)]
pub(super) struct Differing<T> {
    /// Its whole path.
    pub(super) path: Vec<u8>,
    /// Its mode in the child.
    pub(super) mode: u32,
    /// Its blob in the child.
    pub(super) blob: Oid,
    /// What the parent has at this path.
    pub(super) seen: Seen,
    /// What the trie held.
    pub(super) value: T,
}

/// What a parent has at the path of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing, or a directory.
    Absent,
    /// A link for a file, a file for a link, or a submodule.
    OtherType,
    /// The same type with this blob.
    Blob(Oid),
}

/// Takes every file out of `trie` that differs between the trees; what remains is the same in
/// both. `trees` counts the trees that were read.
pub(super) fn take_differing<T>(
    reader: &mut Reader<'_>,
    child: Oid,
    parent: Oid,
    trie: &mut Trie<T>,
    trees: &mut u64,
) -> Result<Vec<Differing<T>>, Error> {
    let mut comparison = Comparison {
        reader,
        path: Vec::new(),
        found: Vec::new(),
        trees,
    };
    comparison.directory(child, Some(parent), trie, 0)?;
    Ok(comparison.found)
}

struct Comparison<'r, 'a, T> {
    reader: &'r mut Reader<'a>,
    path: Vec<u8>,
    found: Vec<Differing<T>>,
    trees: &'r mut u64,
}

impl<T> Comparison<'_, '_, T> {
    fn directory(
        &mut self,
        child: Oid,
        parent: Option<Oid>,
        trie: &mut Trie<T>,
        depth: usize,
    ) -> Result<(), Error> {
        check_depth(child, depth)?;
        self.reader.check_interrupt()?;
        *self.trees += 1 + u64::from(parent.is_some());
        let pair = Pair::read(self.reader, child, parent)?;
        let [mut entries, mut others] = pair.cursors();
        let mut ahead = None;
        loop {
            if ahead.is_none() {
                entries.skip_common(&mut others);
            }
            let Some(entry) = entries.read()? else {
                break;
            };
            self.reader.interrupt().work(ENTRY)?;
            let other = others.advance(&mut ahead, &entry)?;
            if other.is_some_and(|other| other.oid == entry.oid && other.kind() == entry.kind()) {
                continue;
            }
            let seen = match (trie.get_mut(entry.name), entry.kind()) {
                (Some(Node::Directory(inner)), Type::Directory) => {
                    let length = push(&mut self.path, entry.name);
                    self.directory(entry.oid, other.map(|other| other.oid), inner, depth + 1)?;
                    self.path.truncate(length);
                    if inner.is_empty() {
                        trie.remove(entry.name);
                    }
                    continue;
                }
                (Some(Node::File(_)), Type::File | Type::Link) => match other {
                    None => Seen::Absent,
                    Some(other) if other.kind() != entry.kind() => Seen::OtherType,
                    Some(other) => Seen::Blob(other.oid),
                },
                _ => continue,
            };
            if let Some(Node::File(value)) = trie.remove(entry.name) {
                let length = push(&mut self.path, entry.name);
                self.found.push(Differing {
                    path: self.path.clone(),
                    mode: entry.mode,
                    blob: entry.oid,
                    seen,
                    value,
                });
                self.path.truncate(length);
            }
        }
        Ok(())
    }
}
