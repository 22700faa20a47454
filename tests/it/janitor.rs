//! What a dead worker or a full disk leaves behind: nothing, after the next start.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::{GitServer, Raw, Repository, Worker, services, unique, wait_for};

const TASK: &str = "analyze_repo_task";

/// A size that a variable may raise for a run by hand.
fn scaled(variable: &str, small: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.map_or(small, |text| text.parse().expect("a number"))
}

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
fn after_many_kills_no_directory_process_or_lease_is_left() {
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
    for round in 0..scaled("KILLS", 20) {
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

/// Bytes that no compression makes fewer.
fn noise(length: usize) -> Vec<u8> {
    let mut noise = vec![0; length];
    let mut source = std::fs::File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut source, &mut noise).unwrap();
    noise
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
    // The pack has as many megabytes, its index is small.
    let size: u64 = scaled("ENOSPC_MEGABYTES", 5);
    for number in 0..size {
        repository.write(&format!("noise-{number}"), &noise(1 << 20));
    }
    repository.commit("Ada <ada@example.com>", &[]);
    // So that the server need not look for deltas in noise every time.
    repository.git(&["repack", "-adq", "--window=0"]);
    let server = GitServer::start();
    let url = server.open(&repository);
    let mut worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("TMPDIR", disk.0.path().to_str().unwrap())
        .env("CLONE_DISK_RESERVE", "0")
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let mut failed = 0;
    let most = size * 8 / 5;
    for megabytes in 1..=most {
        disk.mount(&format!("remount,size={megabytes}m"));
        let id = raw.send(TASK, json!([1, url]));
        let meta = raw.wait(&id);
        if meta["status"] == "SUCCESS" {
            assert!(megabytes >= size, "{megabytes} MB were enough: {meta}");
            continue;
        }
        failed += 1;
        assert_eq!(meta["status"], "FAILURE", "{megabytes} MB: {meta}");
        let text = meta["result"]["exc_message"][0].as_str().unwrap();
        assert!(
            text.contains("No space left on device") && text.contains("check free space"),
            "{megabytes} MB: {text}"
        );
        wait_for("no clone to be left", Duration::from_secs(20), || {
            (walk(disk.0.path()) == 0).then_some(())
        });
    }
    println!("{failed} of {most} sizes of the disk were too small for {size} MB");
    assert!(
        (size - 1..most).contains(&failed),
        "{failed} of {most} failed"
    );
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

#[test]
fn a_clone_ends_at_its_quota_and_before_the_reserve_with_the_settings_named() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let url = server.open(&repository);
    for (name, value, retries, told) in [
        (
            "CLONE_DISK_QUOTA",
            "1100",
            0,
            "raise CLONE_DISK_QUOTA to analyse it",
        ),
        (
            "CLONE_DISK_RESERVE",
            "1000000000000000",
            1,
            "are to stay free (CLONE_DISK_RESERVE)",
        ),
        (
            "CLONE_MAX_OBJECTS",
            "2",
            0,
            "raise CLONE_MAX_OBJECTS to analyse it",
        ),
        (
            "CLONE_MAX_BYTES",
            "100",
            0,
            "raise CLONE_MAX_BYTES to analyse it",
        ),
        (
            "CLONE_MAX_OBJECT_SIZE",
            "3",
            0,
            "raise CLONE_MAX_OBJECT_SIZE to analyse it",
        ),
        (
            "CLONE_MAX_INFLATED",
            "10",
            0,
            "raise CLONE_MAX_INFLATED to analyse it",
        ),
    ] {
        let worker = Worker::on(&redis.url)
            .concurrency(1)
            .env(name, value)
            .env("ANALYSIS_MAX_RETRIES", "1")
            .start();
        let mut raw = Raw::new(&redis.url, &worker.queue);
        let id = raw.send(TASK, json!([1, url]));
        let meta = raw.wait(&id);
        assert_eq!(meta["status"], "FAILURE", "{name}: {meta}");
        let text = meta["result"]["exc_message"][0].as_str().unwrap();
        assert!(text.contains(told), "{name}: {text}");
        let retried = worker.log().matches(&format!("{TASK}[{id}] retry")).count();
        assert_eq!(retried, retries, "{name}: waiting helps a full disk only");
        wait_for("no clone to be left", Duration::from_secs(20), || {
            (walk(&worker.clones()) == 0).then_some(())
        });
    }
}

/// Where a process works, and whether it is one of these tests' below `place`.
fn processes_in(place: &Path) -> Vec<String> {
    let is_number = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    std::fs::read_dir("/proc")
        .expect("there is a /proc")
        .flatten()
        .filter(|entry| is_number(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| {
            let directory = std::fs::read_link(entry.path().join("cwd")).ok()?;
            let below = directory.starts_with(place);
            below.then(|| entry.file_name().to_string_lossy().into_owned())
        })
        .collect()
}

/// Locks that somebody holds on a file below `place`.
fn locks_in(place: &Path) -> usize {
    use std::os::unix::fs::MetadataExt;
    let locks = std::fs::read_to_string("/proc/locks").expect("there is a /proc/locks");
    let mut held = 0;
    let mut directories = vec![place.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                directories.push(entry.path());
            } else if let Ok(file) = entry.metadata() {
                let inode = format!(":{} ", file.ino());
                held += locks.lines().filter(|line| line.contains(&inode)).count();
            }
        }
    }
    held
}

#[test]
fn kills_at_random_moments_leave_no_directory_process_or_lock() {
    let redis = services::redis();
    let shared = tempfile::tempdir().unwrap();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    // Long enough to be killed in every step of it.
    repository.write("noise", &noise(12 << 20));
    for number in 0..50 {
        let name = format!("f{number}.txt");
        repository.commit("Ada <ada@example.com>", &[(&name, "one\ntwo\n")]);
    }
    repository.git(&["repack", "-adq", "--window=0"]);
    let server = GitServer::start();
    let url = server.open(&repository);
    let queue = unique("q");
    let begin = || {
        Worker::on(&redis.url)
            .queue(&queue)
            .concurrency(2)
            .env("TMPDIR", shared.path().to_str().unwrap())
    };
    let rounds = scaled("KILLS", 8);
    let mut sent = Vec::new();
    let mut raw = Raw::new(&redis.url, &queue);
    let (mut most, mut cloning) = (0, 0);
    for round in 0..rounds {
        sent.extend((0..2).map(|part| raw.send(TASK, json!([format!("{round}-{part}"), url]))));
        // From before the ready line to after the results; every other one amid the work.
        let within = if round % 2 == 0 { 1200 } else { 300 };
        let moment = Duration::from_millis(uuid::Uuid::new_v4().as_u128() as u64 % within);
        let mut worker = begin().start_without_waiting();
        std::thread::sleep(moment);
        let family = worker.descendants();
        cloning += usize::from(walk_any(shared.path(), "pack") > 0);
        worker.kill();
        wait_for("its children to be gone", Duration::from_secs(10), || {
            (!family.iter().any(|pid| alive(*pid))).then_some(())
        });
        wait_for("nobody to be left", Duration::from_secs(10), || {
            processes_in(shared.path()).is_empty().then_some(())
        });
        assert_eq!(locks_in(shared.path()), 0, "round {round}");
        most = most.max(entries(shared.path()).len());
    }
    let mut worker = begin().start();
    assert_eq!(entries(shared.path()).len(), 1, "only its own");
    let mut states = std::collections::BTreeMap::new();
    for id in &sent {
        let state = raw.wait(id)["status"].as_str().unwrap().to_owned();
        *states.entry(state).or_insert(0) += 1;
    }
    raw.wait_drained();
    assert!(worker.stop().success());
    println!(
        "{rounds} kills, {cloning} in a clone, at most {most} directories between: {states:?}"
    );
    assert_eq!(entries(shared.path()), Vec::<String>::new());
    assert_eq!(processes_in(shared.path()), Vec::<String>::new());
    // A queue's bindings are permanent, as those of kombu.
    let mut left = redis.keys();
    left.retain(|key| key.contains(&queue) && !key.starts_with("_kombu.binding"));
    assert_eq!(left, Vec::<String>::new());
}

/// Files whose name contains the word, anywhere below.
fn walk_any(directory: &Path, word: &str) -> usize {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            let named = entry.file_name().to_string_lossy().contains(word);
            usize::from(is_file && named) + walk_any(&entry.path(), word)
        })
        .sum()
}
