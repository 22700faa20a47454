//! Random histories as streams for `git fast-import`: small repositories full of what is rare in real ones.
//!
//! A history is a function of its seed and its number of commits. It has up to twelve open heads, which are
//! extended, forked and merged two to twelve at a time, and are joined in the end. Trees of merges are mixed from
//! their parents' file by file or line by line. Between a commit and its parent blocks of few different lines are
//! inserted, deleted, moved and repeated; files are renamed with and without edits, one source into two
//! destinations, whole directories at once; files become links, directories, submodules and back; modes, line
//! endings and the last newline change; dates cross by up to 5000 seconds.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;
use std::rc::Rc;

/// Numbers from a seed: small, and the same everywhere.
pub struct Numbers(u64);

impl Numbers {
    /// The numbers that follow from a seed.
    pub fn new(seed: u64) -> Self {
        Numbers(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit.max(1)
    }

    /// True in so many of a hundred cases.
    fn percent(&mut self, cases: usize) -> bool {
        self.below(100) < cases
    }

    fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Executable,
    Link,
    Submodule,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    content: Rc<Vec<u8>>,
}

type Tree = BTreeMap<String, Entry>;

struct Head {
    commit: usize,
    tree: Tree,
}

const DIRECTORIES: [&str; 7] = ["", "d/", "d/e/", "f/", "d.x/", "ü/", "d/e/g/"];
const NAMES: [&str; 8] = ["a", "b", "c", "Makefile", "a b", "d", "x.rs", "ä"];
const LINES: [&str; 12] = [
    "a\n",
    "\n",
    "  b\n",
    "}\n",
    "\tc\n",
    "    return\n",
    "b\n",
    "  \n",
    "a line long enough to fill a kilobyte of common bytes with a few repetitions only, and then some more\n",
    "{\n",
    "d\r\n",
    "    else\n",
];
/// Addresses of authors; git accepts all of them.
const AUTHORS: [&str; 5] = [
    "Ada <ada@example.com>",
    "Bob <bob@example.com>",
    "C <>",
    "Dörte <doerte@example.com>",
    "E E <e@e>",
];

/// The stream of the history with this seed, of about `commits` commits; it makes the branch `main`.
pub fn stream(seed: u64, commits: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let pool = [3, 6, LINES.len(), 60, 400][numbers.below(5)];
    let longest = [12, 40, 40, 150][numbers.below(4)];
    let merges = [5, 20, 40][numbers.below(3)];
    let forks = [5, 25, 40][numbers.below(3)];
    let mut history = History {
        numbers,
        pool,
        longest,
        stream: Vec::new(),
        blobs: HashMap::new(),
        marks: 0,
        commits: 0,
    };

    let mut heads: Vec<Head> = Vec::new();
    for number in 0..commits {
        let heads_open = heads.len();
        if heads_open == 0 || (heads_open < 12 && history.numbers.below(60) == 0) {
            let mut tree = Tree::new();
            for _ in 0..1 + history.numbers.below(10) {
                history.add_file(&mut tree);
            }
            heads.push(history.commit(&[], tree));
        } else if heads_open >= 2 && (history.numbers.percent(merges) || number + 1 == commits) {
            let most = if history.numbers.percent(60) {
                2
            } else {
                heads_open
            };
            let most = if number + 1 == commits {
                heads_open
            } else {
                most
            };
            let count = if most == heads_open && number + 1 == commits {
                most
            } else {
                2 + history.numbers.below(most - 1)
            };
            let mut parents = Vec::new();
            for _ in 0..count {
                let index = history.numbers.below(heads.len());
                parents.push(heads.swap_remove(index));
            }
            let tree = history.merge(&parents);
            let merged = history.commit(&parents, tree);
            // Now and then one of the parents goes on beside the merge.
            if history.numbers.percent(15) {
                heads.push(parents.swap_remove(0));
            }
            heads.push(merged);
        } else {
            let index = history.numbers.below(heads_open);
            let mut tree = heads[index].tree.clone();
            for _ in 0..1 + history.numbers.below(3) {
                history.change(&mut tree);
            }
            let head = history.commit(std::slice::from_ref(&heads[index]), tree);
            if heads_open < 12 && history.numbers.percent(forks) {
                heads.push(head);
            } else {
                heads[index] = head;
            }
        }
    }
    let last = if heads.len() > 1 {
        let tree = history.merge(&heads);
        history.commit(&heads, tree)
    } else {
        heads.remove(0)
    };
    let reset = format!("reset refs/heads/main\nfrom :{}\n\ndone\n", last.commit);
    history.stream.extend_from_slice(reset.as_bytes());
    history.stream
}

struct History {
    numbers: Numbers,
    /// How many different lines there are.
    pool: usize,
    /// How many lines a new file has at most.
    longest: usize,
    stream: Vec<u8>,
    blobs: HashMap<Rc<Vec<u8>>, usize>,
    marks: usize,
    commits: usize,
}

impl History {
    fn line(&mut self) -> Vec<u8> {
        let line = self.numbers.below(self.pool);
        match LINES.get(line) {
            Some(text) => text.as_bytes().to_vec(),
            None => format!("{:1$}line {line} of many\n", "", line % 5).into_bytes(),
        }
    }

    fn block(&mut self, most: usize) -> Vec<Vec<u8>> {
        (0..self.numbers.below(most + 1))
            .map(|_| self.line())
            .collect()
    }

    fn path(&mut self) -> String {
        format!(
            "{}{}",
            self.numbers.pick(&DIRECTORIES),
            self.numbers.pick(&NAMES)
        )
    }

    fn existing(&mut self, tree: &Tree) -> Option<String> {
        let index = self.numbers.below(tree.len());
        tree.keys().nth(index).cloned()
    }

    fn add_file(&mut self, tree: &mut Tree) {
        let mut content = self.block(self.longest).concat();
        match self.numbers.below(20) {
            0 => content.insert(content.len() / 2, 0),
            1 => content.clear(),
            2 | 3 if git_counts_last_lines() => {
                content.pop();
            }
            _ => {}
        }
        let kind = if self.numbers.percent(10) {
            Kind::Executable
        } else {
            Kind::File
        };
        let path = self.path();
        insert(
            tree,
            path,
            Entry {
                kind,
                content: Rc::new(content),
            },
        );
    }

    /// One change as people make them, and some they seldom make.
    fn change(&mut self, tree: &mut Tree) {
        let Some(path) = self.existing(tree) else {
            return self.add_file(tree);
        };
        let entry = tree[&path].clone();
        match self.numbers.below(24) {
            0 | 1 => self.add_file(tree),
            2 => {
                tree.remove(&path);
            }
            3 | 4 => {
                let to = self.path();
                tree.remove(&path);
                insert(tree, to, entry);
            }
            5 | 6 => {
                let to = self.path();
                tree.remove(&path);
                let edited = self.edit(&entry);
                insert(tree, to, edited);
            }
            7 => {
                // One source, two destinations.
                tree.remove(&path);
                for _ in 0..2 {
                    let to = self.path();
                    let edited = if self.numbers.percent(50) {
                        entry.clone()
                    } else {
                        self.edit(&entry)
                    };
                    insert(tree, to, edited);
                }
            }
            8 => {
                let to = self.path();
                insert(tree, to, entry);
            }
            9 => self.move_directory(tree),
            10 => {
                // Two files change places.
                if let Some(other) = self.existing(tree) {
                    let other_entry = tree[&other].clone();
                    tree.insert(path, other_entry);
                    tree.insert(other, entry);
                }
            }
            11 => {
                // The file is now what another one was.
                if let Some(other) = self.existing(tree).filter(|other| *other != path) {
                    let other_entry = tree.remove(&other).unwrap();
                    tree.insert(path, other_entry);
                }
            }
            12 => {
                let kind = *self.numbers.pick(&[
                    Kind::File,
                    Kind::Executable,
                    Kind::Link,
                    Kind::Submodule,
                ]);
                tree.insert(path, Entry { kind, ..entry });
            }
            13 => {
                let kind = if entry.kind == Kind::File {
                    Kind::Executable
                } else {
                    Kind::File
                };
                tree.insert(path, Entry { kind, ..entry });
            }
            14 => {
                // A file becomes a directory with itself in it.
                let inside = format!("{path}/{}", self.numbers.pick(&NAMES));
                insert(tree, inside, entry);
            }
            15 => {
                // A directory becomes a file.
                if let Some((directory, _)) = path.rsplit_once('/') {
                    insert(tree, directory.to_owned(), entry);
                }
            }
            16 => {
                let content = String::from_utf8_lossy(&entry.content).into_owned();
                let content = if content.contains("\r\n") {
                    content.replace("\r\n", "\n")
                } else {
                    content.replace('\n', "\r\n")
                };
                tree.insert(
                    path,
                    Entry {
                        content: Rc::new(content.into_bytes()),
                        ..entry
                    },
                );
            }
            _ => {
                let edited = self.edit(&entry);
                tree.insert(path, edited);
            }
        }
    }

    fn move_directory(&mut self, tree: &mut Tree) {
        let (from, to) = (
            *self.numbers.pick(&DIRECTORIES[1..]),
            *self.numbers.pick(&DIRECTORIES),
        );
        let moved: Vec<String> = tree
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        let edits = self.numbers.percent(30);
        let entries: Vec<(String, Entry)> = moved
            .into_iter()
            .map(|path| {
                (
                    format!("{to}{}", &path[from.len()..]),
                    tree.remove(&path).unwrap(),
                )
            })
            .collect();
        for (path, entry) in entries {
            let entry = if edits { self.edit(&entry) } else { entry };
            insert(tree, path, entry);
        }
    }

    /// Inserts, deletes, moves, repeats or replaces blocks of lines; sometimes only the last newline.
    fn edit(&mut self, entry: &Entry) -> Entry {
        let mut lines: Vec<Vec<u8>> = entry
            .content
            .split_inclusive(|&byte| byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect();
        let block = 1 + self.numbers.below(8);
        for _ in 0..1 + self.numbers.below(3) {
            let at = self.numbers.below(lines.len() + 1);
            let length = self.numbers.below(block + 1).min(lines.len() - at);
            let to = self.numbers.below(lines.len() - length + 1);
            match self.numbers.below(6) {
                0 | 1 => {
                    let inserted = self.block(block);
                    lines.splice(at..at, inserted);
                }
                2 => {
                    lines.drain(at..at + length);
                }
                3 => {
                    let moved: Vec<_> = lines.drain(at..at + length).collect();
                    lines.splice(to..to, moved);
                }
                4 => {
                    let repeated = lines[at..at + length].to_vec();
                    lines.splice(to..to, repeated);
                }
                _ => {
                    let replaced = self.block(length);
                    lines.splice(at..at + length, replaced);
                }
            }
        }
        let mut content = lines.concat();
        if self.numbers.percent(8) && git_counts_last_lines() {
            match content.last() {
                Some(b'\n') => {
                    content.pop();
                }
                _ => content.push(b'\n'),
            }
        }
        Entry {
            content: Rc::new(content),
            kind: entry.kind,
        }
    }

    /// A tree that has something of every parent's.
    fn merge(&mut self, parents: &[Head]) -> Tree {
        if self.numbers.percent(20) {
            return self.numbers.pick(parents).tree.clone();
        }
        let lines_mixed = [5, 30, 70][self.numbers.below(3)];
        let first_wins = [0, 50, 90][self.numbers.below(3)];
        let paths: std::collections::BTreeSet<&String> = parents
            .iter()
            .flat_map(|parent| parent.tree.keys())
            .collect();
        let mut tree = Tree::new();
        for path in paths {
            let versions: Vec<&Entry> = parents
                .iter()
                .filter_map(|parent| parent.tree.get(path))
                .collect();
            if self.numbers.percent(lines_mixed) {
                let mixed = self.mix(&versions);
                insert(&mut tree, path.clone(), mixed);
            } else {
                let parent = if self.numbers.percent(first_wins) {
                    &parents[0]
                } else {
                    self.numbers.pick(parents)
                };
                if let Some(entry) = parent.tree.get(path) {
                    insert(&mut tree, path.clone(), entry.clone());
                }
            }
        }
        if self.numbers.percent(30) {
            self.change(&mut tree);
        }
        tree
    }

    /// Blocks of lines of several versions of a file, in the order of the lines.
    fn mix(&mut self, versions: &[&Entry]) -> Entry {
        let texts: Vec<Vec<&[u8]>> = versions
            .iter()
            .map(|version| {
                version
                    .content
                    .split_inclusive(|&byte| byte == b'\n')
                    .collect()
            })
            .collect();
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let mut content = Vec::new();
        let mut line = 0;
        while line < longest {
            let end = line + 1 + self.numbers.below(10);
            let text = self.numbers.pick(&texts);
            content.extend(text[line.min(text.len())..end.min(text.len())].concat());
            line = end;
        }
        if self.numbers.percent(30) {
            content.extend(self.line());
        }
        Entry {
            kind: self.numbers.pick(versions).kind,
            content: Rc::new(content),
        }
    }

    fn commit(&mut self, parents: &[Head], tree: Tree) -> Head {
        let mut files = String::from("deleteall\n");
        for (path, entry) in &tree {
            let mode = match entry.kind {
                Kind::File => "100644",
                Kind::Executable => "100755",
                Kind::Link => "120000",
                Kind::Submodule => {
                    let length = entry.content.len();
                    files.push_str(&format!("M 160000 {length:040x} {path}\n"));
                    continue;
                }
            };
            let blob = self.blob(&entry.content);
            files.push_str(&format!("M {mode} :{blob} {path}\n"));
        }

        self.marks += 1;
        self.commits += 1;
        let mark = self.marks;
        let date = 1_600_000_000 + self.commits * 100 + self.numbers.below(10_001) - 5_000;
        let author = *self.numbers.pick(&AUTHORS);
        let mut text = format!(
            "reset refs/heads/work\n\ncommit refs/heads/work\nmark :{mark}\nauthor {author} {date} +0000\n\
             committer {author} {date} +0000\ndata 0\n"
        );
        for (index, parent) in parents.iter().enumerate() {
            let word = if index == 0 { "from" } else { "merge" };
            text.push_str(&format!("{word} :{}\n", parent.commit));
        }
        self.stream.extend_from_slice(text.as_bytes());
        self.stream.extend_from_slice(files.as_bytes());
        self.stream.push(b'\n');
        Head { commit: mark, tree }
    }

    fn blob(&mut self, content: &Rc<Vec<u8>>) -> usize {
        if let Some(&mark) = self.blobs.get(content) {
            return mark;
        }
        self.marks += 1;
        let head = format!("blob\nmark :{}\ndata {}\n", self.marks, content.len());
        self.stream.extend_from_slice(head.as_bytes());
        self.stream.extend_from_slice(content);
        self.stream.push(b'\n');
        self.blobs.insert(Rc::clone(content), self.marks);
        self.marks
    }
}

/// Puts an entry into a tree; what stands in its way (a file where it needs a directory, or the reverse) goes.
fn insert(tree: &mut Tree, path: String, entry: Entry) {
    for (slash, _) in path.match_indices('/') {
        tree.remove(&path[..slash]);
    }
    let below = format!("{path}/");
    tree.retain(|other, _| !other.starts_with(&below));
    tree.insert(path, entry);
}

/// Whether the git at hand looks at a last line without its newline when it searches renames;
/// before 2.44 it did not, and missed some.
fn git_counts_last_lines() -> bool {
    static ANSWER: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ANSWER.get_or_init(|| {
        let output = Command::new("git").arg("--version").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let version = text.split_whitespace().nth(2).unwrap();
        let mut numbers = version
            .split('.')
            .map(|number| number.parse::<u32>().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(2), Some(44))
    })
}
