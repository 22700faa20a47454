//! Walking through trees: all files below one, and what two of them do not share.
//!
//! This answers for what git's comparison of trees reports to the search for renames.

use super::objects::Reader;
use super::tree::{Entries, Entry, Pair};
use super::{Error, Oid};

/// git refuses deeper trees by default, too.
pub const DEEPEST: usize = 2_048;

/// Longest path of a file in bytes; no Linux system can check out a longer one. Every file's path
/// is kept, so a few long names of directories would otherwise fill the memory.
const LONGEST: usize = 4_096;

/// A file, link or submodule with its path from the root of its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The whole path.
    pub path: Vec<u8>,
    /// Type and permissions.
    pub mode: u32,
    /// The object.
    pub oid: Oid,
}

/// Lists everything below `tree` that is no directory, in git's order, `most` at most.
pub fn leaves(reader: &mut Reader<'_>, tree: Oid, most: usize) -> Result<Vec<Leaf>, Error> {
    let mut found = Collect {
        reader,
        path: Vec::new(),
        found: Vec::new(),
        most,
    };
    found.all(tree, 0)?;
    Ok(found.found)
}

/// Lists what is in `old` and no more in `new`, in git's order, `most` at most: the files a
/// new file may have been renamed from.
pub fn deleted(
    reader: &mut Reader<'_>,
    old: Oid,
    new: Oid,
    most: usize,
) -> Result<Vec<Leaf>, Error> {
    let mut found = Collect {
        reader,
        path: Vec::new(),
        found: Vec::new(),
        most,
    };
    found.compare(old, new, 0)?;
    Ok(found.found)
}

struct Collect<'r, 'a> {
    reader: &'r mut Reader<'a>,
    path: Vec<u8>,
    found: Vec<Leaf>,
    most: usize,
}

impl Collect<'_, '_> {
    fn all(&mut self, tree: Oid, depth: usize) -> Result<(), Error> {
        check_depth(tree, depth)?;
        self.reader.check_interrupt()?;
        let object = self.reader.tree(tree)?;
        let mut entries = Entries::new(tree, &object.bytes);
        while let Some(entry) = entries.read()? {
            self.take(tree, &entry, depth)?;
        }
        Ok(())
    }

    fn compare(&mut self, old: Oid, new: Oid, depth: usize) -> Result<(), Error> {
        check_depth(old, depth)?;
        self.reader.check_interrupt()?;
        let pair = Pair::read(self.reader, new, Some(old))?;
        let [mut news, mut olds] = pair.cursors();
        let mut ahead = None;
        loop {
            if ahead.is_none() {
                olds.skip_common(&mut news);
            }
            let Some(entry) = olds.read()? else {
                break;
            };
            self.reader.interrupt().work(ENTRY)?;
            match news.advance(&mut ahead, &entry)? {
                None => self.take(old, &entry, depth)?,
                Some(other) if entry.is_directory() && other.oid != entry.oid => {
                    let length = push(&mut self.path, entry.name);
                    self.compare(entry.oid, other.oid, depth + 1)?;
                    self.path.truncate(length);
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn take(&mut self, tree: Oid, entry: &Entry<'_>, depth: usize) -> Result<(), Error> {
        self.reader.interrupt().work(ENTRY)?;
        let length = push(&mut self.path, entry.name);
        if entry.is_directory() {
            self.all(entry.oid, depth + 1)?;
        } else if self.path.len() > LONGEST {
            return Err(Error::TooMany {
                oid: tree,
                what: "bytes in the path of a file",
                limit: LONGEST,
            });
        } else if self.found.len() == self.most {
            return Err(Error::TooMany {
                oid: tree,
                what: "files",
                limit: self.most,
            });
        } else {
            self.found.push(Leaf {
                path: self.path.clone(),
                mode: entry.mode,
                oid: entry.oid,
            });
        }
        self.path.truncate(length);
        Ok(())
    }
}

/// What it costs to look at an entry of a tree, as work that can be interrupted.
pub const ENTRY: usize = 1 << 7;

/// Appends a name to a path; gives back the length to truncate to.
pub fn push(path: &mut Vec<u8>, name: &[u8]) -> usize {
    let length = path.len();
    if length > 0 {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    length
}

/// An error when directories are nested too deep.
pub fn check_depth(tree: Oid, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(Error::TooDeep {
            oid: tree,
            limit: DEEPEST,
        });
    }
    Ok(())
}
