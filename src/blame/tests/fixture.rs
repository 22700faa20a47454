//! Repositories made with `git fast-import`, and what the real git says of them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use crate::blame::{Options, Outcome, blame};
use crate::git::Repository;

/// Path to lines by commit.
pub(super) type Lines = BTreeMap<String, BTreeMap<String, u64>>;

/// Path to mode and contents.
pub(super) type Tree = BTreeMap<String, (&'static str, Vec<u8>)>;

pub(super) const FILE: &str = "100644";
pub(super) const LINK: &str = "120000";

/// A repository under construction.
pub(super) struct Fixture {
    directory: tempfile::TempDir,
    stream: Vec<u8>,
    marks: usize,
}

impl Fixture {
    pub(super) fn new() -> Fixture {
        let fixture = Fixture {
            directory: tempfile::tempdir().unwrap(),
            stream: Vec::new(),
            marks: 0,
        };
        fixture.git(&["init", "-q", "--bare", "-b", "main", "."]);
        fixture
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("git");
        command
            .current_dir(self.path())
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("LC_ALL", "C");
        command
    }

    pub(super) fn git(&self, arguments: &[&str]) -> Vec<u8> {
        let output = self.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {arguments:?}: {errors}");
        output.stdout
    }

    /// Adds a commit with exactly these files; gives back its mark.
    pub(super) fn commit(&mut self, parents: &[usize], time: i64, tree: &Tree) -> usize {
        let author = format!("A{0} <a{0}@example.com>", self.marks % 5);
        self.commit_by(&author, parents, time, tree)
    }

    pub(super) fn commit_by(
        &mut self,
        author: &str,
        parents: &[usize],
        time: i64,
        tree: &Tree,
    ) -> usize {
        self.marks += 1;
        let mark = self.marks;
        let time = 1_500_000_000 + time;
        let mut text = format!(
            "commit refs/heads/import\nmark :{mark}\nauthor {author} {time} +0000\n\
             committer C <c@example.com> {time} +0000\ndata 0\n"
        );
        for (place, parent) in parents.iter().enumerate() {
            let word = if place == 0 { "from" } else { "merge" };
            text.push_str(&format!("{word} :{parent}\n"));
        }
        if parents.is_empty() {
            text = format!("reset refs/heads/import\n{text}");
        }
        text.push_str("deleteall\n");
        self.stream.extend(text.into_bytes());
        for (path, (mode, bytes)) in tree {
            let head = format!("M {mode} inline \"{path}\"\ndata {}\n", bytes.len());
            self.stream.extend(head.into_bytes());
            self.stream.extend(bytes);
            self.stream.push(b'\n');
        }
        mark
    }

    /// Writes all commits; `packed` with deltas, else as git likes it.
    pub(super) fn import(&mut self, head: usize, packed: bool) {
        let reset = format!("reset refs/heads/main\nfrom :{head}\n");
        self.stream.extend(reset.into_bytes());
        let mut child = self
            .command(&["fast-import", "--quiet", "--force"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(&self.stream).unwrap();
        drop(input);
        assert!(child.wait().unwrap().success());
        if packed {
            self.git(&["repack", "-adfq", "--depth=50", "--window=20"]);
        }
    }

    pub(super) fn ours(&self, options: &Options) -> Outcome {
        let repository = Repository::open(self.path()).unwrap();
        let head = repository.head().unwrap().unwrap();
        let flag = AtomicBool::new(false);
        blame(&repository, head, options, &|_| (), &flag).unwrap()
    }

    pub(super) fn our_lines(&self, options: &Options) -> Lines {
        let options = Options {
            per_commit: true,
            ..options.clone()
        };
        let mut lines = Lines::new();
        for file in self.ours(&options).per_commit.unwrap() {
            let commits = file.commits.iter();
            let commits = commits.map(|(commit, lines)| (commit.to_string(), *lines));
            lines.insert(text(&file.path), commits.collect());
        }
        lines
    }

    /// What git says, file by file.
    pub(super) fn git_lines(&self, options: &[&str]) -> Lines {
        let listed = self.git(&["ls-tree", "-rz", "--full-tree", "main"]);
        let mut lines = Lines::new();
        for row in listed
            .split(|&byte| byte == 0)
            .filter(|row| !row.is_empty())
        {
            let row = text(row);
            let (meta, path) = row.split_once('\t').unwrap();
            if meta.starts_with("160000") || self.is_binary(path) {
                continue;
            }
            let mut arguments = vec!["blame", "--incremental"];
            arguments.extend(options);
            arguments.extend(["main", "--", path]);
            let mut counts = BTreeMap::new();
            let mut at_header = true;
            for line in text(&self.git(&arguments)).lines() {
                if at_header {
                    let words: Vec<&str> = line.split(' ').collect();
                    *counts.entry(words[0].to_owned()).or_default() +=
                        words[3].parse::<u64>().unwrap();
                }
                at_header = line.starts_with("filename ");
            }
            lines.insert(path.to_owned(), counts);
        }
        lines
    }

    pub(super) fn is_binary(&self, path: &str) -> bool {
        let bytes = self.git(&["cat-file", "blob", &format!("main:{path}")]);
        bytes[..bytes.len().min(8000)].contains(&0)
    }

    #[track_caller]
    pub(super) fn check(&self) {
        let expected = self.git_lines(&[]);
        for threads in [1, 2] {
            let options = Options {
                threads,
                ..Options::default()
            };
            assert_eq!(self.our_lines(&options), expected, "{threads} threads");
        }
    }
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
