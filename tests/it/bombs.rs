//! Small repositories that want to become large: each ends as it should, and what the worker's
//! children needed of memory for it stays within bounds.

use std::io::Write;
use std::process::Stdio;
use std::time::Instant;

use celeriac::git::Oid;
use serde_json::json;

use crate::support::{GitServer, Raw, Repository, Worker, repository, services};

/// Megabytes that a file becomes.
const SIZE: u64 = 200;

/// A pack in the making.
#[derive(Default)]
struct Pack {
    count: u32,
    entries: Vec<u8>,
}

impl Pack {
    /// Adds an object whose content may be told in pieces.
    fn add(&mut self, kind: &str, pieces: &mut dyn Iterator<Item = &[u8]>, size: u64) -> Oid {
        let number = ["", "commit", "tree", "blob"];
        let number = number.iter().position(|one| *one == kind).unwrap();
        let mut byte = u8::try_from(number << 4 | (size & 15) as usize).unwrap();
        let mut rest = size >> 4;
        while rest > 0 {
            self.entries.push(byte | 0x80);
            byte = (rest & 0x7f) as u8;
            rest >>= 7;
        }
        self.entries.push(byte);
        let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
        hasher.update(format!("{kind} {size}\0").as_bytes());
        let fast = flate2::Compression::fast();
        let mut deflated = flate2::write::ZlibEncoder::new(&mut self.entries, fast);
        for piece in pieces {
            hasher.update(piece);
            deflated.write_all(piece).unwrap();
        }
        deflated.finish().unwrap();
        self.count += 1;
        let id = hasher.try_finalize().unwrap();
        Oid::from_hex(id.to_string().as_bytes()).unwrap()
    }

    fn small(&mut self, kind: &str, bytes: &[u8]) -> Oid {
        self.add(kind, &mut std::iter::once(bytes), bytes.len() as u64)
    }

    fn tree(&mut self, entries: &[(&str, &str, Oid)]) -> Oid {
        let mut bytes = Vec::new();
        for (mode, name, id) in entries {
            bytes.extend(format!("{mode} {name}\0").into_bytes());
            bytes.extend(id.as_bytes());
        }
        self.small("tree", &bytes)
    }

    /// A repository whose HEAD has this tree.
    fn repository(mut self, tree: Oid) -> Repository {
        let commit = format!(
            "tree {tree}\nauthor Eve <eve@example.com> 1700000000 +0000\n\
             committer Eve <eve@example.com> 1700000000 +0000\n\none\n"
        );
        let commit = self.small("commit", commit.as_bytes());
        let mut bytes = b"PACK\0\0\0\x02".to_vec();
        bytes.extend(self.count.to_be_bytes());
        bytes.extend(self.entries);
        let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
        hasher.update(&bytes);
        bytes.extend(hasher.try_finalize().unwrap().as_slice());
        let made = Repository::new();
        let mut indexing = repository::command(made.path())
            .args(["index-pack", "--stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        indexing.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(indexing.wait().unwrap().success());
        made.git(&["update-ref", "HEAD", &commit.to_string()]);
        made
    }
}

/// Ten times ten times ten… files in a dozen objects.
fn of_trees() -> Repository {
    let mut pack = Pack::default();
    let mut below = ("100644", pack.small("blob", b"one file\n"));
    for _ in 0..10 {
        let names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
        let entries = names.map(|name| (below.0, name, below.1));
        below = ("40000", pack.tree(&entries));
    }
    pack.repository(below.1)
}

/// Directories in directories.
fn of_depth(levels: usize) -> Repository {
    let mut pack = Pack::default();
    let blob = pack.small("blob", b"one file\n");
    let mut tree = pack.tree(&[("100644", "f", blob)]);
    for _ in 0..levels {
        tree = pack.tree(&[("40000", "d", tree)]);
    }
    pack.repository(tree)
}

/// One file that says the same thing so many times.
fn of_one_byte(byte: u8, megabytes: u64) -> Repository {
    let mut pack = Pack::default();
    let piece = vec![byte; 1 << 20];
    let mut pieces = (0..megabytes).map(|_| piece.as_slice());
    let blob = pack.add("blob", &mut pieces, megabytes << 20);
    let tree = pack.tree(&[("100644", "f", blob)]);
    pack.repository(tree)
}

/// The most memory that any child of the worker has had so far, MiB.
fn peak(worker: &Worker) -> u64 {
    let peak = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kilobytes.unwrap_or(0) >> 10
    };
    worker
        .descendants()
        .into_iter()
        .map(peak)
        .max()
        .unwrap_or(0)
}

#[test]
fn bombs_end_as_they_should_and_within_memory() {
    let redis = services::redis();
    let server = GitServer::start();
    let zeros = of_one_byte(0, SIZE);
    for (name, bomb, most, expected) in [
        ("trees", &of_trees(), "", "4000000 files"),
        ("depth", &of_depth(100_000), "", "deeper than 2048"),
        ("zeros", &zeros, "", "success"),
        ("line ends", &of_one_byte(b'\n', SIZE), "", "success"),
        ("one line", &of_one_byte(b'x', SIZE), "", "success"),
        ("too large", &zeros, "100000000", "CLONE_MAX_OBJECT_SIZE"),
    ] {
        let worker = Worker::on(&redis.url)
            .concurrency(1)
            .env("CLONE_MAX_OBJECT_SIZE", most)
            .start();
        let mut raw = Raw::new(&redis.url, &worker.queue);
        // git itself cannot serve what is too deep.
        let url = match name {
            "depth" => bomb.url(),
            _ => server.open(bomb),
        };
        let began = Instant::now();
        let id = raw.send("analyze_repo_task", json!([1, url]));
        let meta = raw.wait(&id);
        let peak = peak(&worker);
        println!(
            "{name}: {:?}, {peak} MiB: {}",
            began.elapsed(),
            meta["result"]
        );
        assert!(
            meta["result"].to_string().contains(expected),
            "{name}: {meta}"
        );
        assert!(peak < 1024, "{name}: {peak} MiB");
    }
}
