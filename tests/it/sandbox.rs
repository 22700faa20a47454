//! The fences around a child of the product: what a repository that takes it over could do.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{GitServer, Raw, Repository, Worker, project, python, services, wait_for};

/// Lets an idle child of the worker try everything; see the script.
fn canary(worker: &Worker) -> Value {
    let port = url::Url::parse(worker.broker()).unwrap().port().unwrap();
    let root = wait_for(
        "the children's directories",
        Duration::from_secs(10),
        || {
            let below = std::fs::read_dir(worker.clones()).ok()?.flatten();
            let mut workers = below.filter(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().starts_with("celeriac-worker-")
            });
            let clones = workers.next()?.path().join("clones");
            Some(std::fs::read_dir(clones).ok()?.flatten().next()?.path())
        },
    );
    let pid = worker.descendants()[0];
    let output = Command::new(python::interpreter())
        .arg(project().join("tests/it/scripts/canary.py"))
        .args([pid.to_string(), worker.pid().to_string(), port.to_string()])
        .arg(root)
        .output()
        .expect("python runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().find_map(|line| line.strip_prefix("answer: "));
    let answer = answer.unwrap_or_else(|| {
        panic!(
            "the canary did not sing: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    serde_json::from_str(answer).unwrap()
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_child_that_is_taken_over_reaches_nothing_and_without_the_sandbox_it_would() {
    let redis = services::redis();
    let fenced = Worker::on(&redis.url)
        .concurrency(1)
        .env("ALLOW_LOCAL_REPOS", "0")
        .start();
    let seen = canary(&fenced);
    println!("{seen:#}");
    for (what, answer) in seen.as_object().unwrap() {
        match what.as_str() {
            // A descriptor: this much it needs for its work. Its own directory is another's
            // where the spare child was asked.
            "open a TCP socket" => assert!(answer.is_u64(), "{what}: {answer}"),
            "write to its own directory" => {}
            _ => assert!(
                ["EACCES", "EPERM", "ENOSYS", "EAFNOSUPPORT"]
                    .contains(&answer.as_str().unwrap_or("done")),
                "{what}: {answer}"
            ),
        }
    }
    let open = Worker::on(&redis.url)
        .concurrency(1)
        .env("SANDBOX", "0")
        .start();
    let seen = canary(&open);
    for what in ["read /etc/shadow", "connect to Redis", "open a unix socket"] {
        assert!(
            seen[what].is_u64(),
            "{what} without a sandbox: {}",
            seen[what]
        );
    }
}

#[test]
fn real_clones_and_local_repositories_are_analysed_inside_the_sandbox() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let worker = Worker::on(&redis.url).start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    for url in [server.open(&repository), repository.url()] {
        let id = raw.send("analyze_repo_task", json!([1, url]));
        assert_eq!(raw.value(&id)["total_contributors"], 1, "{url}");
    }
    for pid in worker.descendants() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    let told = worker.log().matches("the sandbox is incomplete").count();
    assert!(told <= 1, "said once, not for every child");
}
