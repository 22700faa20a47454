//! Trees: one directory each.
//!
//! An entry is `mode SP name NUL` and the 20 bytes of its object's name. Entries are sorted by
//! name, directories as if their names ended in `/`.
//!
//! Two versions of a tree are the same but for an entry or two. To find these fast, a cached
//! tree remembers where its entries start ([`Starts`]): then equal bytes can be passed over in
//! large steps, without looking at entries, and still an entry be found again where they end.

use std::cmp::Ordering;
use std::rc::Rc;

use super::objects::{Object, Reader};
use super::{Error, Oid};

/// The bits of a mode that say what an entry is.
const TYPE: u32 = 0o170_000;

/// What a tree's entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A regular file, executable or not.
    File,
    /// A symbolic link.
    Link,
    /// A directory.
    Directory,
    /// A commit of another repository.
    Submodule,
}

impl Type {
    /// What the mode stands for; git takes any mode it does not know for a submodule's.
    pub const fn of(mode: u32) -> Type {
        match mode & TYPE {
            0o100_000 => Type::File,
            0o120_000 => Type::Link,
            0o040_000 => Type::Directory,
            _ => Type::Submodule,
        }
    }
}

/// One entry of a tree.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Type and permissions.
    pub mode: u32,
    /// The name in its directory.
    pub name: &'a [u8],
    /// The object.
    pub oid: Oid,
    /// The entry as it stands in the tree.
    pub raw: &'a [u8],
}

impl Entry<'_> {
    /// What it is.
    pub fn kind(&self) -> Type {
        Type::of(self.mode)
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == Type::Directory
    }

    /// The order of entries in a tree.
    pub fn order(&self, other: &Entry<'_>) -> Ordering {
        let shorter = self.name.len().min(other.name.len());
        let end = |entry: &Entry<'_>| match entry.name.get(shorter) {
            Some(&byte) => byte,
            None if entry.is_directory() => b'/',
            None => 0,
        };
        self.name[..shorter]
            .cmp(&other.name[..shorter])
            .then_with(|| end(self).cmp(&end(other)))
    }
}

/// Goes through the entries of a tree.
#[derive(Debug, Clone, Copy)]
pub struct Entries<'a> {
    oid: Oid,
    rest: &'a [u8],
}

impl<'a> Entries<'a> {
    /// The entries of the tree `oid` with these bytes.
    pub fn new(oid: Oid, bytes: &'a [u8]) -> Entries<'a> {
        Entries { oid, rest: bytes }
    }

    /// Reads the next entry; `None` at the end.
    pub fn read(&mut self) -> Result<Option<Entry<'a>>, Error> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (entry, rest) = split(self.rest).ok_or_else(|| malformed(self.oid))?;
        self.rest = rest;
        Ok(Some(entry))
    }
}

fn split(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let mut mode = 0_u32;
    let mut at = 0;
    loop {
        match bytes.get(at)? {
            b' ' if at > 0 => break,
            digit @ b'0'..=b'7' if at < 7 => mode = mode << 3 | u32::from(digit - b'0'),
            _ => return None,
        }
        at += 1;
    }
    let start = at + 1;
    let end = start + memchr::memchr(0, &bytes[start..])?;
    let name = &bytes[start..end];
    if name.is_empty() || name.contains(&b'/') {
        return None;
    }
    let oid = Oid::from_bytes(bytes.get(end + 1..end + 1 + Oid::LEN)?)?;
    let (raw, rest) = bytes.split_at(end + 1 + Oid::LEN);
    Some((
        Entry {
            mode,
            name,
            oid,
            raw,
        },
        rest,
    ))
}

/// Where the entries of a tree start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Starts(Vec<u32>);

impl Starts {
    /// Reads a tree to learn where its entries start.
    pub fn of(oid: Oid, bytes: &[u8]) -> Result<Starts, Error> {
        let mut starts = Starts::default();
        starts.read(oid, bytes, 0, |_| false)?;
        Ok(starts)
    }

    /// The same answer, taken over from a similar tree where their bytes agree.
    pub fn derive(
        oid: Oid,
        bytes: &[u8],
        near: &[u8],
        near_starts: &Starts,
    ) -> Result<Starts, Error> {
        let head = common_head(bytes, near);
        let tail = common_tail(&bytes[head..], &near[head..]);
        // The entry that starts last in the common head may end outside it.
        let kept = near_starts
            .0
            .partition_point(|&start| start as usize <= head);
        let kept = kept.saturating_sub(1);
        let mut starts = Starts(Vec::with_capacity(near_starts.0.len() + 4));
        starts.0.extend_from_slice(&near_starts.0[..kept]);
        let from = near_starts.0.get(kept).map_or(0, |&start| start as usize);
        let mut next = near_starts
            .0
            .partition_point(|&start| (start as usize) < near.len() - tail);
        // What follows equal bytes at the start of an entry is equal entries.
        let met = starts.read(oid, bytes, from, |start| {
            if start < bytes.len() - tail {
                return false;
            }
            let place = start + near.len() - bytes.len();
            while near_starts
                .0
                .get(next)
                .is_some_and(|&near_start| (near_start as usize) < place)
            {
                next += 1;
            }
            near_starts
                .0
                .get(next)
                .is_some_and(|&near_start| near_start as usize == place)
        })?;
        if met {
            let shift = (bytes.len() as u32).wrapping_sub(near.len() as u32);
            let tail = near_starts.0[next..].iter();
            starts.0.extend(tail.map(|start| start.wrapping_add(shift)));
        }
        Ok(starts)
    }

    /// Memory held, for caches that are bounded in bytes.
    pub fn memory(&self) -> usize {
        self.0.capacity() * size_of::<u32>()
    }

    /// Adds entries until `is_known` says that the rest is known from here; whether it did.
    fn read(
        &mut self,
        oid: Oid,
        bytes: &[u8],
        from: usize,
        mut is_known: impl FnMut(usize) -> bool,
    ) -> Result<bool, Error> {
        let mut start = from;
        while start < bytes.len() {
            if is_known(start) {
                return Ok(true);
            }
            let (_, rest) = split(&bytes[start..]).ok_or_else(|| malformed(oid))?;
            self.0.push(start as u32);
            start = bytes.len() - rest.len();
        }
        Ok(false)
    }
}

/// Two versions of a tree as the cache holds them; the newer one comes first.
pub struct Pair {
    names: [Oid; 2],
    trees: [Option<Rc<Object>>; 2],
}

impl Pair {
    /// Reads both; a tree that is not there counts as empty.
    pub fn read(reader: &mut Reader<'_>, new: Oid, old: Option<Oid>) -> Result<Pair, Error> {
        let new_tree = reader.tree(new)?;
        let old_tree = old.map(|old| reader.tree(old)).transpose()?;
        let mut grown = 0;
        let set = |tree: &Object, starts: Starts| {
            let memory = starts.memory();
            // It was empty a moment ago, and this thread alone has it.
            let _ = tree.starts.set(starts);
            memory
        };
        if new_tree.starts.get().is_none() {
            grown += set(&new_tree, Starts::of(new, &new_tree.bytes)?);
        }
        if let (Some(tree), Some(oid), Some(near)) = (&old_tree, old, new_tree.starts.get())
            && tree.starts.get().is_none()
        {
            grown += set(
                tree,
                Starts::derive(oid, &tree.bytes, &new_tree.bytes, near)?,
            );
        }
        reader.tree_grown(grown);
        Ok(Pair {
            names: [new, old.unwrap_or(new)],
            trees: [Some(new_tree), old_tree],
        })
    }

    /// Starts at the beginning of both.
    pub fn cursors(&self) -> [Cursor<'_>; 2] {
        [0, 1].map(|side| {
            let tree = self.trees[side].as_deref();
            Cursor {
                oid: self.names[side],
                bytes: tree.map_or(&[][..], |tree| &tree.bytes),
                starts: tree
                    .and_then(|tree| tree.starts.get())
                    .map_or(&[][..], |starts| &starts.0),
                next: 0,
            }
        })
    }
}

/// A place between two entries of a tree.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a> {
    oid: Oid,
    bytes: &'a [u8],
    starts: &'a [u32],
    next: usize,
}

impl<'a> Cursor<'a> {
    /// The next entry, or `None` at the end.
    pub fn read(&mut self) -> Result<Option<Entry<'a>>, Error> {
        let Some(&start) = self.starts.get(self.next) else {
            return Ok(None);
        };
        self.next += 1;
        let (entry, _) = split(&self.bytes[start as usize..]).ok_or_else(|| malformed(self.oid))?;
        Ok(Some(entry))
    }

    /// Passes over the entries that come next in both trees, byte for byte.
    pub fn skip_common(&mut self, other: &mut Cursor<'_>) {
        let (Some(&here), Some(&there)) =
            (self.starts.get(self.next), other.starts.get(other.next))
        else {
            return;
        };
        let common = common_head(&self.bytes[here as usize..], &other.bytes[there as usize..]);
        let end = here as usize + common;
        let started = self.starts[self.next..].partition_point(|&start| start as usize <= end);
        let passed = match end == self.bytes.len() {
            true => started,
            false => started - 1,
        };
        self.next += passed;
        other.next += passed;
    }

    /// Moves to the counterpart of `entry`: the same name, and both directories or both not.
    /// `ahead` holds the entry that was read too far.
    pub fn advance(
        &mut self,
        ahead: &mut Option<Entry<'a>>,
        entry: &Entry<'_>,
    ) -> Result<Option<Entry<'a>>, Error> {
        loop {
            let other = match ahead.take() {
                Some(other) => other,
                None => match self.read()? {
                    Some(other) => other,
                    None => return Ok(None),
                },
            };
            match other.order(entry) {
                Ordering::Less => {}
                Ordering::Equal => return Ok(Some(other)),
                Ordering::Greater => {
                    *ahead = Some(other);
                    return Ok(None);
                }
            }
        }
    }
}

/// The number of equal bytes at the start.
fn common_head(one: &[u8], other: &[u8]) -> usize {
    const STEP: usize = 64;
    // Blocks of a known size are compared without a call.
    let blocks = one.as_chunks::<STEP>().0.iter();
    let blocks = blocks.zip(other.as_chunks::<STEP>().0);
    let start = blocks.take_while(|(one, other)| one == other).count() * STEP;
    let rest = one[start..].iter().zip(&other[start..]);
    start + rest.take_while(|(one, other)| one == other).count()
}

/// The number of equal bytes at the end.
fn common_tail(one: &[u8], other: &[u8]) -> usize {
    const STEP: usize = 64;
    let blocks = one.as_rchunks::<STEP>().1.iter().rev();
    let blocks = blocks.zip(other.as_rchunks::<STEP>().1.iter().rev());
    let end = blocks.take_while(|(one, other)| one == other).count() * STEP;
    let rest = one[..one.len() - end].iter().rev();
    let rest = rest.zip(other[..other.len() - end].iter().rev());
    end + rest.take_while(|(one, other)| one == other).count()
}

fn malformed(oid: Oid) -> Error {
    Error::Corrupt {
        oid,
        reason: "an entry of the tree is malformed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(entries: &[(&str, &str, u8)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (mode, name, byte) in entries {
            bytes.extend(format!("{mode} {name}\0").into_bytes());
            bytes.extend([*byte; 20]);
        }
        bytes
    }

    #[test]
    fn directories_sort_as_if_they_ended_in_a_slash() {
        let bytes = bytes(&[
            ("100644", "a", 1),
            ("100644", "a.b", 1),
            ("40000", "a", 1),
            ("100644", "a0", 1),
        ]);
        let mut entries = Entries::new(Oid::new([0; 20]), &bytes);
        let mut last = entries.read().unwrap().unwrap();
        while let Some(entry) = entries.read().unwrap() {
            assert_eq!(last.order(&entry), Ordering::Less);
            assert_eq!(entry.order(&last), Ordering::Greater);
            last = entry;
        }
        assert!(last.name == b"a0");
    }

    #[test]
    fn starts_derived_from_any_similar_tree_are_those_read() {
        let oid = Oid::new([0; 20]);
        let all: Vec<(String, u8)> = (0..60)
            .map(|n| {
                (
                    format!("name{n:03}{}", "x".repeat(n % 7)),
                    (n % 3) as u8 + 48,
                )
            })
            .collect();
        let make = |keep: &dyn Fn(usize) -> bool, change: usize| {
            let mut made = Vec::new();
            for (n, (name, byte)) in all.iter().enumerate().filter(|(n, _)| keep(*n)) {
                made.push(("100644", name.as_str(), if n == change { 7 } else { *byte }));
            }
            bytes(&made)
        };
        for change in 0..60 {
            for drop in [0, 1, 30, 31, 58, 59, 99] {
                let one = make(&|_| true, change);
                let other = make(&|n| n != drop, 30);
                for (near, new) in [
                    (&one, &other),
                    (&other, &one),
                    (&one, &one),
                    (&Vec::new(), &one),
                    (&one, &Vec::new()),
                ] {
                    let near_starts = Starts::of(oid, near).unwrap();
                    let derived = Starts::derive(oid, new, near, &near_starts).unwrap();
                    assert_eq!(derived, Starts::of(oid, new).unwrap(), "{change} {drop}");
                }
            }
        }
    }

    #[test]
    fn malformed_trees_are_refused() {
        let oid = Oid::new([0; 20]);
        let sound = bytes(&[("100644", "a", 1), ("40000", "b", 2)]);
        let whole = Starts::of(oid, &sound).unwrap();
        for end in 0..sound.len() {
            let cut = &sound[..end];
            assert_eq!(Starts::of(oid, cut).is_ok(), end == 0 || end == 29);
            let derived = Starts::derive(oid, cut, &sound, &whole);
            assert_eq!(derived.is_ok(), end == 0 || end == 29);
        }
        for broken in [
            &b"100644  \0"[..],
            b"1x0644 a\0",
            b"100644 a/b\0",
            b"100644 \0",
        ] {
            let bytes = [broken, &[1; 20]].concat();
            assert_eq!(Starts::of(oid, &bytes).is_ok(), broken == b"100644  \0");
        }
    }
}
