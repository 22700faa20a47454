//! What a dead worker or a full disk leaves behind: nothing, after the next start.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::{GitServer, Raw, Repository, Worker, services, unique, wait_for};

const TASK: &str = "analyze_repo_task";

fn entries(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).expect("the directory is there");
    let mut names: Vec<String> = names
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie whose new parent has not looked yet holds nothing any more.
    !stat.is_empty() && !stat.contains(") Z ")
}

#[test]
fn after_20_kills_no_directory_process_or_lease_is_left() {
    let redis = services::redis();
    let shared = tempfile::tempdir().unwrap();
    let place = shared.path().to_str().unwrap();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let queue = unique("q");
    let start = || {
        Worker::on(&redis.url)
            .queue(&queue)
            .concurrency(1)
            .env("TMPDIR", place)
            .env("USER_MAX_RUNNING", "1")
            .start()
    };
    let mut gates = Vec::new();
    let mut sent = Vec::new();
    for round in 0..20 {
        let mut worker = start();
        let dirs = entries(shared.path());
        assert_eq!(dirs.len(), 1, "round {round}: only its own: {dirs:?}");
        let (url, gate) = server.gated(&repository);
        let mut raw = Raw::new(&redis.url, &queue);
        // A user of its own each, so that all of them can be at work when the worker dies.
        let user = format!("u{round}");
        sent.push(raw.send(TASK, json!([user, url])));
        gate.wait_arrivals(1);
        gates.push(gate);
        let family = worker.descendants();
        assert!(!family.is_empty());
        worker.kill();
        wait_for("its children to be gone", Duration::from_secs(10), || {
            (!family.iter().any(|pid| alive(*pid))).then_some(())
        });
        // What was killed is not killed again in the next round: it goes through.
        for gate in &gates {
            gate.open();
        }
    }
    let mut worker = start();
    let mut raw = Raw::new(&redis.url, &queue);
    for id in &sent {
        assert_eq!(raw.value(id)["total_contributors"], 1);
    }
    raw.wait_drained();
    assert!(worker.stop().success());
    assert_eq!(entries(shared.path()), Vec::<String>::new());
    let keys: Vec<String> = redis
        .keys()
        .into_iter()
        .filter(|key| key.contains("celeriac.running") || key.contains("celeriac.alive"))
        .filter(|key| key.contains("running") || key.contains(&queue))
        .collect();
    assert_eq!(keys, Vec::<String>::new());
}

/// A file system of a few megabytes, gone with the test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        disk.mount("size=1m");
        disk
    }

    fn mount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(self.0.path())
            .status()
            .expect("mount is there");
        assert!(
            status.success(),
            "a small file system cannot be mounted: run this test as root, in a container with \
             --cap-add SYS_ADMIN"
        );
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .args(["-l"])
            .arg(self.0.path())
            .status();
    }
}

#[test]
fn a_full_disk_at_every_megabyte_is_a_failure_that_says_so_and_leaves_nothing() {
    let redis = services::redis();
    let disk = SmallDisk::new();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    // Random bytes do not shrink: the pack has five megabytes, its index is small.
    for number in 0..5 {
        let mut noise = vec![0_u8; 1 << 20];
        std::io::Read::read_exact(
            &mut std::fs::File::open("/dev/urandom").unwrap(),
            &mut noise,
        )
        .unwrap();
        repository.write(&format!("noise-{number}"), &noise);
    }
    repository.commit("Ada <ada@example.com>", &[]);
    let server = GitServer::start();
    let url = server.open(&repository);
    let mut worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("TMPDIR", disk.0.path().to_str().unwrap())
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let mut failed = 0;
    for megabytes in 1..=8 {
        disk.mount(&format!("remount,size={megabytes}m"));
        let id = raw.send(TASK, json!([1, url]));
        let meta = raw.wait(&id);
        if meta["status"] == "SUCCESS" {
            assert!(megabytes > 4, "{megabytes} MB were enough: {meta}");
            continue;
        }
        failed += 1;
        assert_eq!(meta["status"], "FAILURE", "{megabytes} MB: {meta}");
        let text = meta["result"]["exc_message"][0].as_str().unwrap();
        assert!(
            text.contains("No space left on device") && text.contains("check free space"),
            "{megabytes} MB: {text}"
        );
        let clones = walk(disk.0.path());
        assert_eq!(clones, 0, "{megabytes} MB: a clone is left");
    }
    assert!((4..8).contains(&failed), "{failed} of 8 failed");
    // With nothing left at all, the worker can neither be started quietly nor leave a trace.
    worker.kill();
    let filler = disk.0.path().join("filler");
    let fill = || {
        let mut file = std::fs::File::create(&filler).unwrap();
        std::io::copy(&mut std::io::repeat(0), &mut file).unwrap_err();
    };
    fill();
    let mut next = Worker::on(&redis.url)
        .concurrency(1)
        .env("TMPDIR", disk.0.path().to_str().unwrap())
        .start();
    assert!(next.stop().success());
    assert_eq!(entries(disk.0.path()), ["filler"]);
}

/// Directories named as clones are, anywhere below.
fn walk(directory: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    let count = |entry: std::fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let own = name.starts_with("celeriac-") && !name.starts_with("celeriac-worker-");
        usize::from(own) + walk(&entry.path())
    };
    entries.flatten().map(count).sum()
}
