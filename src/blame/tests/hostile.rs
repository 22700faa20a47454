//! Repositories that are broken or want too much.

use std::io::Write;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;

use super::fixture::{Fixture, text};
use super::{lines, random, tree};
use crate::blame::{Error, Limits, Options, Outcome, blame};
use crate::git::{Oid, Repository, objects};

#[test]
fn another_object_format_is_refused_by_its_name() {
    let fixture = Fixture::new();
    fixture.git(&["init", "-q", "--bare", "--object-format=sha256", "other"]);
    let error = Repository::open(&fixture.path().join("other")).unwrap_err();
    assert!(error.to_string().contains("sha256"), "{error}");
}

#[test]
fn damaged_packs_end_in_an_error_or_an_answer_but_never_in_a_panic() {
    let fixture = random::history(6000, 40, true);
    let folder = fixture.path().join("objects/pack");
    let files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let mut random = random::Random::new(7);
    let mut errors = 0;
    for extension in ["pack", "idx"] {
        let path = files
            .iter()
            .find(|path| path.extension().is_some_and(|found| found == extension));
        let path = path.unwrap();
        let sound = std::fs::read(path).unwrap();
        for round in 0..60 {
            let mut damaged = sound.clone();
            match round % 3 {
                0 => damaged.truncate(random.below(sound.len())),
                _ => {
                    for _ in 0..1 + round {
                        let at = random.below(sound.len());
                        damaged[at] = random.below(256) as u8;
                    }
                }
            }
            // A mapped file must not change in place: replace it.
            std::fs::remove_file(path).unwrap();
            std::fs::write(path, &damaged).unwrap();
            let Ok(repository) = Repository::open(fixture.path()) else {
                continue;
            };
            let Ok(Some(head)) = repository.head() else {
                errors += 1;
                continue;
            };
            let flag = AtomicBool::new(false);
            let answer = blame(&repository, head, &Options::default(), &|_| (), &flag);
            errors += u32::from(answer.is_err());
        }
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, &sound).unwrap();
    }
    assert!(errors > 30, "{errors}");
    fixture.check();
}

#[test]
fn a_bomb_of_nested_trees_is_refused() {
    let fixture = Fixture::new();
    // Ten directories, each ten times the one before: 10^12 files in 12 trees.
    let mut object = write(&fixture, "blob", b"one file\n");
    for level in 0..12 {
        let mut bytes = Vec::new();
        for name in b'0'..=b'9' {
            let mode = if level == 0 { "100644" } else { "40000" };
            bytes.extend(format!("{mode} {}\0", name as char).into_bytes());
            bytes.extend(Oid::from_hex(object.as_bytes()).unwrap().as_bytes());
        }
        object = write(&fixture, "tree", &bytes);
    }
    let limits = Limits {
        max_files: 20_000,
        ..Limits::default()
    };
    let error = explain(&fixture, &object, limits).unwrap_err();
    assert!(error.to_string().contains("20000 files"), "{error}");
}

#[test]
fn trees_nested_too_deep_are_refused() {
    let fixture = Fixture::new();
    let mut bytes = b"100644 file\0".to_vec();
    let blob = write(&fixture, "blob", b"one file\n");
    bytes.extend(Oid::from_hex(blob.as_bytes()).unwrap().as_bytes());
    let mut directory = Trees::default();
    let mut tree = directory.add(&bytes);
    for _ in 0..2_100 {
        let mut bytes = b"40000 d\0".to_vec();
        bytes.extend(tree.as_bytes());
        tree = directory.add(&bytes);
    }
    directory.write(&fixture);
    let error = explain(&fixture, &tree.to_string(), Limits::default()).unwrap_err();
    assert!(error.to_string().contains("deeper than 2048"), "{error}");
}

#[test]
fn paths_too_long_are_refused() {
    let fixture = Fixture::new();
    let blob = write(&fixture, "blob", b"one file\n");
    let root = |name: &[u8]| {
        let mut bytes = b"100644 file\0".to_vec();
        bytes.extend(Oid::from_hex(blob.as_bytes()).unwrap().as_bytes());
        let mut directory = Trees::default();
        let inner = directory.add(&bytes);
        let mut bytes = b"40000 ".to_vec();
        bytes.extend(name);
        bytes.push(0);
        bytes.extend(inner.as_bytes());
        let tree = directory.add(&bytes);
        directory.write(&fixture);
        tree.to_string()
    };
    let longest = explain(&fixture, &root(&[b'd'; 4_091]), Limits::default());
    assert!(longest.is_ok(), "{longest:?}");
    let error = explain(&fixture, &root(&[b'd'; 4_092]), Limits::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("more than 4096 bytes in the path"),
        "{error}"
    );
}

#[test]
fn files_beyond_the_limits_are_named_not_explained() {
    let mut fixture = Fixture::new();
    let large = lines("large", 2_000);
    let one = fixture.commit(&[], 0, &tree(&[("a", &large), ("b", "b\n")]));
    let two = fixture.commit(&[one], 10, &tree(&[("a", "large 3\n"), ("b", &large)]));
    fixture.import(two, true);
    let outcome = fixture.ours(&Options {
        limits: Limits {
            max_file_bytes: 1_000,
            objects: objects::Limits {
                blob_bytes: 1_000,
                ..objects::Limits::default()
            },
            ..Limits::default()
        },
        ..Options::default()
    });
    assert_eq!(outcome.skipped.len(), 1);
    assert_eq!(outcome.skipped[0].path, b"b");
    assert_eq!(outcome.bounded.len(), 1);
    assert_eq!(outcome.bounded[0].path, b"a");
    assert_eq!((outcome.files, outcome.lines), (1, 1));
}

#[test]
fn files_of_too_many_lines_are_named_not_explained() {
    let mut fixture = Fixture::new();
    let long = lines("long", 300);
    let one = fixture.commit(&[], 0, &tree(&[("a", &long), ("b", "b\n")]));
    let two = fixture.commit(&[one], 10, &tree(&[("a", "long 3\n"), ("b", &long)]));
    fixture.import(two, true);
    let outcome = fixture.ours(&Options {
        limits: Limits {
            max_file_lines: 200,
            ..Limits::default()
        },
        ..Options::default()
    });
    assert_eq!(outcome.skipped.len(), 1);
    assert_eq!(outcome.skipped[0].path, b"b");
    assert!(outcome.skipped[0].reason.contains("300"), "{outcome:?}");
    assert_eq!(outcome.bounded.len(), 1);
    assert_eq!(outcome.bounded[0].path, b"a");
    assert_eq!((outcome.files, outcome.lines), (1, 1));
}

#[test]
fn large_loose_objects_are_read_in_steps() {
    let fixture = Fixture::new();
    let large = lines("a line of a large file", 100_000);
    let blob = write(&fixture, "blob", large.as_bytes());
    let mut bytes = b"100644 file\0".to_vec();
    bytes.extend(Oid::from_hex(blob.as_bytes()).unwrap().as_bytes());
    let tree = write(&fixture, "tree", &bytes);
    let outcome = explain(&fixture, &tree, Limits::default()).unwrap();
    assert_eq!(outcome.lines, 100_000);

    let path = fixture
        .path()
        .join("objects")
        .join(&blob[..2])
        .join(&blob[2..]);
    let sound = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &sound[..sound.len() / 2]).unwrap();
    let error = explain(&fixture, &tree, Limits::default()).unwrap_err();
    assert!(error.to_string().contains(&blob), "{error}");
}

/// Trees whose names we compute with libgit2, written as loose objects.
#[derive(Default)]
struct Trees {
    trees: Vec<Vec<u8>>,
}

impl Trees {
    fn add(&mut self, bytes: &[u8]) -> Oid {
        self.trees.push(bytes.to_vec());
        let name = git2::Oid::hash_object(git2::ObjectType::Tree, bytes).unwrap();
        Oid::from_bytes(name.as_bytes()).unwrap()
    }

    fn write(&self, fixture: &Fixture) {
        let repository = git2::Repository::open(fixture.path()).unwrap();
        let odb = repository.odb().unwrap();
        for bytes in &self.trees {
            odb.write(git2::ObjectType::Tree, bytes).unwrap();
        }
    }
}

fn write(fixture: &Fixture, kind: &str, bytes: &[u8]) -> String {
    let mut child = fixture
        .command(&["hash-object", "-t", kind, "-w", "--stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    text(&output.stdout).trim().to_owned()
}

fn explain(fixture: &Fixture, tree: &str, limits: Limits) -> Result<Outcome, Error> {
    let commit = format!("tree {tree}\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\n\n");
    let commit = write(fixture, "commit", commit.as_bytes());
    let repository = Repository::open(fixture.path()).unwrap();
    let options = Options {
        limits,
        ..Options::default()
    };
    let commit = Oid::from_hex(commit.as_bytes()).unwrap();
    blame(
        &repository,
        commit,
        &options,
        &|_| (),
        &AtomicBool::new(false),
    )
}
