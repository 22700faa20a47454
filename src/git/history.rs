//! The commits that can be reached from one commit, read once and kept in dense arrays.
//!
//! Headers are parsed by hand, because history holds commits that libraries refuse: empty
//! addresses, missing dates, broken lines. An author line that git itself cannot split is
//! `(unknown)`, as in git's blame.
//!
//! Commits are numbered so that children come before their parents; among those whose
//! children all have numbers the youngest comes first. That keeps few of them open at a time
//! for whoever walks in this order, and follows the order of packs.

use std::collections::{BinaryHeap, HashMap, HashSet};

use super::mailmap::Mailmap;
use super::objects::{Quick, Reader};
use super::{Error, Oid};

/// The number of a commit in its history.
pub type CommitIndex = u32;

/// The number of an author's address.
pub type AuthorIndex = u32;

/// See the module.
#[derive(Debug, Default)]
pub struct History {
    oids: Vec<Oid>,
    trees: Vec<Oid>,
    authors: Vec<AuthorIndex>,
    /// Where the parents of each commit begin; one more at the end.
    first_parents: Vec<u32>,
    parents: Vec<CommitIndex>,
    emails: Vec<Vec<u8>>,
}

/// How to read a history.
#[derive(Debug, Default)]
pub struct Options<'a> {
    /// Commits whose parents are not there, sorted: the ends of a shallow clone.
    pub shallow: &'a [Oid],
    /// Follow only the first parent of merges.
    pub first_parent: bool,
    /// Gives authors one address for several.
    pub mailmap: Mailmap,
}

impl History {
    /// Reads what can be reached from `head`; `seen` is told the number of commits now and then.
    pub fn load(
        reader: &mut Reader<'_>,
        head: Oid,
        options: &Options<'_>,
        seen: &dyn Fn(u64),
    ) -> Result<History, Error> {
        let mut read = History::default();
        let mut times: Vec<i64> = Vec::new();
        let mut numbers: HashMap<Oid, CommitIndex, Quick> = HashMap::default();
        let mut people = People {
            mailmap: &options.mailmap,
            by_line: HashMap::new(),
            by_email: HashMap::new(),
        };
        numbers.insert(head, 0);
        read.oids.push(head);
        let mut next = 0;
        while let Some(&oid) = read.oids.get(next) {
            if next % 256 == 0 {
                reader.check_interrupt()?;
                seen(next as u64);
            }
            next += 1;
            let object = reader.commit(oid)?;
            let header = Header::parse(oid, &object.bytes)?;
            read.trees.push(header.tree);
            read.authors.push(people.number(&header, &mut read.emails));
            times.push(header.time);
            read.first_parents.push(read.parents.len() as u32);
            if options.shallow.binary_search(&oid).is_ok() {
                continue;
            }
            let most = if options.first_parent { 1 } else { usize::MAX };
            for parent in header.parents().take(most) {
                let fresh = read.oids.len() as CommitIndex;
                let number = *numbers.entry(parent).or_insert(fresh);
                if number == fresh {
                    read.oids.push(parent);
                }
                // A parent named twice is one parent, to git as well.
                let start = *read.first_parents.last().unwrap_or(&0) as usize;
                if !read.parents[start..].contains(&number) {
                    read.parents.push(number);
                }
            }
        }
        read.first_parents.push(read.parents.len() as u32);
        seen(next as u64);
        Ok(read.sorted(&times))
    }

    /// The number of commits.
    pub fn len(&self) -> usize {
        self.oids.len()
    }

    /// Whether there are no commits; never so after loading.
    pub fn is_empty(&self) -> bool {
        self.oids.is_empty()
    }

    /// The commit's name.
    pub fn oid(&self, commit: CommitIndex) -> Oid {
        self.oids[commit as usize]
    }

    /// The numbers of these commits, those that are in the history.
    pub fn find(&self, oids: &[Oid]) -> HashSet<CommitIndex> {
        let wanted: HashSet<&Oid> = oids.iter().collect();
        match wanted.is_empty() {
            true => HashSet::new(),
            false => (0..)
                .zip(&self.oids)
                .filter(|(_, oid)| wanted.contains(oid))
                .map(|(number, _)| number)
                .collect(),
        }
    }

    /// The commit's tree.
    pub fn tree(&self, commit: CommitIndex) -> Oid {
        self.trees[commit as usize]
    }

    /// The commit's author.
    pub fn author(&self, commit: CommitIndex) -> AuthorIndex {
        self.authors[commit as usize]
    }

    /// The commit's parents, all with higher numbers.
    pub fn parents(&self, commit: CommitIndex) -> &[CommitIndex] {
        let range = &self.first_parents[commit as usize..commit as usize + 2];
        &self.parents[range[0] as usize..range[1] as usize]
    }

    /// All addresses after mapping, by the numbers of authors.
    pub fn emails(&self) -> &[Vec<u8>] {
        &self.emails
    }

    /// Numbers the commits anew, children before parents.
    fn sorted(mut self, times: &[i64]) -> History {
        let count = self.len();
        let mut children = vec![0_u32; count];
        for &parent in &self.parents {
            children[parent as usize] += 1;
        }
        let mut ready = BinaryHeap::new();
        ready.push((times[0], 0_u32));
        let mut order: Vec<CommitIndex> = Vec::with_capacity(count);
        let mut position = vec![0_u32; count];
        while let Some((_, commit)) = ready.pop() {
            position[commit as usize] = order.len() as u32;
            order.push(commit);
            for &parent in self.parents(commit) {
                children[parent as usize] -= 1;
                if children[parent as usize] == 0 {
                    ready.push((times[parent as usize], parent));
                }
            }
        }
        let mut sorted = History {
            emails: std::mem::take(&mut self.emails),
            ..History::default()
        };
        for &commit in &order {
            sorted.oids.push(self.oid(commit));
            sorted.trees.push(self.tree(commit));
            sorted.authors.push(self.author(commit));
            sorted.first_parents.push(sorted.parents.len() as u32);
            let parents = self.parents(commit).iter();
            sorted
                .parents
                .extend(parents.map(|&parent| position[parent as usize]));
        }
        sorted.first_parents.push(sorted.parents.len() as u32);
        sorted
    }
}

/// The tree of a commit.
pub fn tree_of(reader: &mut Reader<'_>, commit: Oid) -> Result<Oid, Error> {
    let object = reader.commit(commit)?;
    Ok(Header::parse(commit, &object.bytes)?.tree)
}

/// Numbers authors by their mapped address.
struct People<'a> {
    mailmap: &'a Mailmap,
    by_line: HashMap<Vec<u8>, AuthorIndex>,
    by_email: HashMap<Vec<u8>, AuthorIndex>,
}

impl People<'_> {
    fn number(&mut self, header: &Header<'_>, emails: &mut Vec<Vec<u8>>) -> AuthorIndex {
        let (name, email) = header.author();
        if header.is_latin1() {
            // The same bytes mean something else in another encoding.
            return self.mapped(&to_utf8(name), &to_utf8(email), emails);
        }
        let line = header.identity().unwrap_or_default();
        if let Some(&number) = self.by_line.get(line) {
            return number;
        }
        let number = self.mapped(name, email, emails);
        self.by_line.insert(line.to_vec(), number);
        number
    }

    fn mapped(&mut self, name: &[u8], email: &[u8], emails: &mut Vec<Vec<u8>>) -> AuthorIndex {
        let mapped = self.mailmap.email(name, email);
        match self.by_email.get(mapped) {
            Some(&number) => number,
            None => {
                let number = emails.len() as AuthorIndex;
                emails.push(mapped.to_vec());
                self.by_email.insert(mapped.to_vec(), number);
                number
            }
        }
    }
}

/// The lines of a commit up to its message.
struct Header<'a> {
    tree: Oid,
    time: i64,
    lines: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(oid: Oid, bytes: &'a [u8]) -> Result<Header<'a>, Error> {
        let end = memchr::memmem::find(bytes, b"\n\n").map_or(bytes.len(), |at| at + 1);
        let lines = &bytes[..end];
        let tree = lines
            .strip_prefix(b"tree ")
            .and_then(|rest| Oid::from_hex(rest.get(..40)?))
            .ok_or_else(|| Error::Corrupt {
                oid,
                reason: "the commit does not begin with its tree".to_owned(),
            })?;
        let mut header = Header {
            tree,
            time: 0,
            lines,
        };
        header.time = header.value(b"committer ").map_or(0, time);
        Ok(header)
    }

    fn parents(&self) -> impl Iterator<Item = Oid> + use<'a> {
        self.lines
            .split(|&byte| byte == b'\n')
            .skip(1)
            .map_while(|line| Oid::from_hex(line.strip_prefix(b"parent ")?))
    }

    fn value(&self, key: &[u8]) -> Option<&'a [u8]> {
        self.lines
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(key))
    }

    /// Name and address of the author.
    fn author(&self) -> (&'a [u8], &'a [u8]) {
        let unknown: (&[u8], &[u8]) = (b"(unknown)", b"(unknown)");
        let Some(line) = self.identity() else {
            return unknown;
        };
        let left = memchr::memchr(b'<', line).unwrap_or(0);
        (line[..left].trim_ascii_end(), &line[left + 1..])
    }

    /// The author's line up to the end of the address, if it has one.
    fn identity(&self) -> Option<&'a [u8]> {
        let line = self.value(b"author ")?;
        let start = memchr::memchr(b'<', line)? + 1;
        let length = memchr::memchr(b'>', &line[start..])?;
        Some(&line[..start + length])
    }

    /// Whether git would convert the header from Latin-1 before it looks at it.
    fn is_latin1(&self) -> bool {
        self.value(b"encoding ").is_some_and(|encoding| {
            [
                &b"iso-8859-1"[..],
                b"iso8859-1",
                b"iso_8859-1",
                b"latin1",
                b"latin-1",
            ]
            .iter()
            .any(|name| encoding.eq_ignore_ascii_case(name))
        })
    }
}

/// The seconds of an identity line; 0 if there are none.
fn time(line: &[u8]) -> i64 {
    let after = memchr::memrchr(b'>', line).map_or(0, |at| at + 1);
    let digits = line[after..].trim_ascii_start();
    let end = digits.iter().position(|byte| !byte.is_ascii_digit());
    std::str::from_utf8(&digits[..end.unwrap_or(digits.len())])
        .ok()
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

fn to_utf8(latin: &[u8]) -> Vec<u8> {
    let text: String = latin.iter().map(|&byte| byte as char).collect();
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text: &str) -> Header<'_> {
        Header::parse(Oid::new([1; 20]), text.as_bytes()).unwrap()
    }

    const TREE: &str = "tree 0123456789012345678901234567890123456789\n";

    #[test]
    fn headers_that_libraries_refuse_are_read() {
        for (line, name, email) in [
            ("author A B <a@b> 1 +0000", "A B", "a@b"),
            ("author A B <> 1 +0000", "A B", ""),
            ("author <a@b>", "", "a@b"),
            ("author A  < a@b > x <c>", "A", " a@b "),
            ("author A a@b 1 +0000", "(unknown)", "(unknown)"),
            ("nobody A <a@b> 1 +0000", "(unknown)", "(unknown)"),
        ] {
            let text = format!("{TREE}{line}\ncommitter C <c@d> 77 +0100\n\nmessage");
            let header = header(&text);
            assert_eq!(header.author(), (name.as_bytes(), email.as_bytes()));
            assert_eq!(header.time, 77);
        }
    }

    #[test]
    fn parents_end_where_other_lines_begin() {
        let parent = "parent 1111111111111111111111111111111111111111\n";
        let text = format!("{TREE}{parent}{parent}author A <a> 1 +0\n{parent}\n{parent}");
        assert_eq!(header(&text).parents().count(), 2);
        assert_eq!(header(&text).time, 0);
    }

    #[test]
    fn a_commit_without_a_tree_is_refused_by_name() {
        let error = Header::parse(Oid::new([1; 20]), b"author A <a> 1 +0\n").err();
        assert!(error.unwrap().to_string().contains("0101010101"));
    }
}
