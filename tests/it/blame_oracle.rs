//! What git itself says about a repository, beside what the blame engine says: lines by file and commit.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use celeriac::blame::{self, Options, Whitespace};
use celeriac::git::{Oid, Repository};

/// Lines by commit of each text file.
pub type Lines = BTreeMap<String, BTreeMap<String, u64>>;

/// Runs git without anybody's configuration and returns what it prints.
#[track_caller]
pub fn git(repository: &Path, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = neutral("git")
        .arg("-C")
        .arg(repository)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("git runs");
    let mut stdin = child.stdin.take().unwrap();
    let done = std::thread::scope(|scope| {
        scope.spawn(move || {
            // git may end without reading all; its exit code tells why.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    });
    assert!(done.status.success(), "git {arguments:?}: {}", done.status);
    done.stdout
}

/// A command whose git sees no configuration and no repository but those it is told of.
pub fn neutral(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("GIT_") {
            command.env_remove(name);
        }
    }
    command
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("LC_ALL", "C.UTF-8");
    command
}

/// What `git blame` says of every text file of `main`.
pub fn by_git(repository: &Path, options: &Options) -> Lines {
    let mut arguments = vec!["blame", "--porcelain"];
    if options.whitespace == Whitespace::IgnoreAll {
        arguments.push("-w");
    }
    if options.first_parent {
        arguments.push("--first-parent");
    }
    let ignored: Vec<String> = options.ignored.iter().map(Oid::to_string).collect();
    for commit in &ignored {
        arguments.extend(["--ignore-rev", commit]);
    }
    let mut files = Lines::new();
    for entry in git(repository, &["ls-tree", "-r", "-z", "main"], b"").split(|&byte| byte == 0) {
        let entry = std::str::from_utf8(entry).expect("fixtures have paths in UTF-8");
        let Some((meta, path)) = entry.split_once('\t') else {
            continue;
        };
        let [_, kind, blob] = meta.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{meta}")
        };
        if kind != "blob" {
            continue;
        }
        let content = git(repository, &["cat-file", "blob", blob], b"");
        if content.iter().take(8000).any(|&byte| byte == 0) {
            continue;
        }
        let porcelain = git(
            repository,
            &[&arguments[..], &["main", "--", path]].concat(),
            b"",
        );
        files.insert(path.to_owned(), count(&porcelain));
    }
    files
}

/// Lines by commit in the porcelain format: each line has a header, known facts, and its text after a TAB.
pub fn count(porcelain: &[u8]) -> BTreeMap<String, u64> {
    let mut commits = BTreeMap::new();
    let mut header = true;
    for line in porcelain.split(|&byte| byte == b'\n') {
        if line.first() == Some(&b'\t') {
            header = true;
        } else if header && !line.is_empty() {
            *commits
                .entry(String::from_utf8_lossy(&line[..40]).into_owned())
                .or_default() += 1;
            header = false;
        }
    }
    commits
}

/// What the engine says of every text file of `main`.
pub fn by_engine(repository: &Path, options: &Options) -> Lines {
    let options = Options {
        per_commit: true,
        ..options.clone()
    };
    let head = git(repository, &["rev-parse", "main"], b"");
    let head = Oid::from_hex(head.trim_ascii()).unwrap();
    let repository = Repository::open(repository).unwrap();
    let outcome = blame::blame(
        &repository,
        head,
        &options,
        &|_| (),
        &AtomicBool::new(false),
    )
    .unwrap();
    assert_eq!((outcome.skipped, outcome.bounded), (Vec::new(), Vec::new()));
    let files = outcome.per_commit.unwrap();
    files
        .into_iter()
        .map(|file| {
            let commits = file
                .commits
                .into_iter()
                .map(|(commit, lines)| (commit.to_string(), lines));
            (String::from_utf8(file.path).unwrap(), commits.collect())
        })
        .collect()
}

/// The files on which both disagree, with what each says; empty when the engine is right.
pub fn differences(repository: &Path, options: &Options) -> String {
    let (expected, found) = (by_git(repository, options), by_engine(repository, options));
    let paths: std::collections::BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let mut text = String::new();
    for path in paths {
        let (expected, found) = (expected.get(path), found.get(path));
        if expected != found {
            text.push_str(&format!(
                "{path}:\n  git    {expected:?}\n  engine {found:?}\n"
            ));
        }
    }
    text
}
