//! Blame of random histories: whatever the history, the engine says what git says.
//!
//! The seeds are fresh in every run. A failure names its seed and the shortest beginning of the history that still
//! fails, and leaves that as a stream for `git fast-import`; `BLAME_HISTORY_SEED=… ` runs one seed again.

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use celeriac::blame::{Options, Whitespace};
use celeriac::git::Oid;
use tempfile::TempDir;

use crate::blame_oracle::{differences, git};
use crate::histories::{Numbers, stream};

/// Histories in a run; `BLAME_HISTORIES` asks for another number.
const HISTORIES: usize = 36;

/// A bare repository with a history.
fn import(stream: &[u8]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    git(
        directory.path(),
        &["init", "-q", "--bare", "-b", "main"],
        b"",
    );
    git(
        directory.path(),
        &["fast-import", "--quiet", "--force", "--done"],
        stream,
    );
    directory
}

fn commits(seed: u64) -> usize {
    [12, 40, 80, 160][(seed % 4) as usize]
}

/// What the engine is asked for.
#[derive(Debug, Clone)]
struct Question {
    options: Options,
    /// Of a hundred commits, so many do not count.
    ignored: usize,
}

/// Nothing when the engine agrees with git.
fn disagreement(seed: u64, commits: usize, question: &Question) -> Option<String> {
    let repository = import(&stream(seed, commits));
    let mut options = question.options.clone();
    let listed = git(repository.path(), &["rev-list", "main"], b"");
    let mut numbers = Numbers::new(seed);
    for name in listed.split(|&byte| byte == b'\n') {
        if numbers.below(100) < question.ignored {
            options.ignored.extend(Oid::from_hex(name));
        }
    }
    let text = differences(repository.path(), &options);
    (!text.is_empty()).then_some(text)
}

fn question(index: usize) -> Question {
    Question {
        options: options(index),
        ignored: match index % 5 {
            2 => 30,
            4 => 90,
            _ => 0,
        },
    }
}

fn options(index: usize) -> Options {
    let options = Options {
        threads: 1 + index % 2,
        cache_bytes: [1 << 24, 1 << 12][index / 2 % 2],
        ..Options::default()
    };
    match index % 9 {
        3 => Options {
            whitespace: Whitespace::IgnoreAll,
            ..options
        },
        7 => Options {
            first_parent: true,
            ..options
        },
        _ => options,
    }
}

/// The shortest beginning of a history that fails, as text for the report.
fn shrink(seed: u64, question: &Question) -> String {
    let (length, text) = (1..=commits(seed))
        .find_map(|length| Some((length, disagreement(seed, length, question)?)))
        .expect("the whole history failed");
    let kept: PathBuf = std::env::temp_dir().join(format!("celeriac-history-{seed}.fast-import"));
    std::fs::write(&kept, stream(seed, length)).unwrap();
    format!(
        "seed {seed}, {length} commits, kept as {}\n{question:?}\n{text}",
        kept.display()
    )
}

#[test]
fn random_histories_are_blamed_as_git_blames_them() {
    let chosen: Option<u64> = std::env::var("BLAME_HISTORY_SEED")
        .ok()
        .map(|seed| seed.parse().unwrap());
    let count = std::env::var("BLAME_HISTORIES").map_or(HISTORIES, |count| count.parse().unwrap());
    let seeds: Vec<u64> = match chosen {
        Some(seed) => vec![seed; 18],
        None => (0..count)
            .map(|index| RandomState::new().hash_one(index))
            .collect(),
    };
    eprintln!("seeds: {seeds:?}");

    let next = AtomicUsize::new(0);
    let failures: Vec<String> = std::thread::scope(|scope| {
        let walk = || {
            let mut failures = Vec::new();
            while let Some((index, &seed)) = Some(next.fetch_add(1, Ordering::Relaxed))
                .and_then(|index| Some((index, seeds.get(index)?)))
            {
                let question = question(index);
                if disagreement(seed, commits(seed), &question).is_some() {
                    failures.push(shrink(seed, &question));
                }
            }
            failures
        };
        let threads = [scope.spawn(walk), scope.spawn(walk)];
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(
        failures.is_empty(),
        "{} histories differ\n{}",
        failures.len(),
        failures.join("\n")
    );
}
