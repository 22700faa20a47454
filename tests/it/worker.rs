//! Analyses from the client's call to the rows, and the limits of a task.

use std::time::Duration;

use serde_json::json;

use crate::support::{Broker, GitServer, Repository, Worker, on_brokers, services, wait_for};

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository
        .commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\nthree\n")])
        .commit("Bob <bob@example.com>", &[("b.txt", "four\n")]);
    repository
}

/// Nothing of a task is left: no process but the idle ones, no clone.
#[track_caller]
fn assert_clean(worker: &Worker, processes: usize) {
    wait_for(
        &format!("{processes} children and no clone"),
        Duration::from_secs(10),
        || {
            let children = worker.descendants();
            let clones = walk(&worker.clones());
            (children.len() <= processes && clones == 0).then_some(())
        },
    );
}

/// Directories named as clones are, anywhere below.
fn walk(directory: &std::path::Path) -> usize {
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

on_brokers!(a_python_client_gets_progress_result_and_rows);
fn a_python_client_gets_progress_result_and_rows(broker: &Broker) {
    let postgres = services::postgres();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let worker = broker.worker().database(&postgres).start();
    let id = worker.ask(
        "from features.v1.github_analysis.worker_tasks import enqueue_analysis_task\n\
         answer(enqueue_analysis_task(7, sys.argv[1], None)['task_id'])",
        &[&url],
    );
    let id = id.as_str().unwrap();
    gate.wait_arrivals(1);
    let seen = wait_for("the state PROGRESS", Duration::from_secs(20), || {
        let seen = worker.ask(
            "from features.v1.github_analysis.worker_tasks import get_task_status\n\
             answer(get_task_status(sys.argv[1]))",
            &[id],
        );
        (seen["status"] == "PROGRESS").then_some(seen)
    });
    assert!(
        seen["info"]["status"].as_str().unwrap().contains('%'),
        "{seen}"
    );
    gate.open();
    let value = worker.ask(
        "answer(AsyncResult(sys.argv[1], app=app).get(timeout=30))",
        &[id],
    );
    assert_eq!(
        value,
        json!({
            "status": "success", "repo_url": url, "total_contributors": 2,
            "result": {"ada@example.com": 3, "bob@example.com": 1},
        })
    );
    let rows =
        postgres.rows("SELECT state, user_id, total_contributors, total_lines FROM analyses");
    let row: Vec<&str> = rows[0].iter().flatten().map(String::as_str).collect();
    assert_eq!((rows.len(), row), (1, vec!["SUCCESS", "7", "2", "4"]));
    assert_eq!(postgres.rows_with("ada@example.com").len(), 2);
    assert_clean(&worker, 3);
}

on_brokers!(time_limits_of_settings_options_and_messages_end_a_task_and_free_its_slot);
fn time_limits_of_settings_options_and_messages_end_a_task_and_free_its_slot(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    let open = server.open(&repository);
    let hard = broker
        .worker()
        .concurrency(1)
        .env("CELERY_TASK_TIME_LIMIT", "4")
        .start();
    let soft = broker
        .worker()
        .concurrency(1)
        .option("--soft-time-limit=4")
        .option("--time-limit=60")
        .start();
    let (url, _never_opened) = server.gated(&repository);
    let (mut raw, mut other) = (broker.raw(&hard.queue), broker.raw(&soft.queue));
    let by_setting = raw.send("analyze_repo_task", json!([1, url]));
    let by_option = other.send("analyze_repo_task", json!([1, url]));
    // Celery's limit is the message's where it has one: the hard one is first here.
    let message = json!({"timelimit": [1, 30]});
    let by_message = other.send_with("analyze_repo_task", json!([1, url]), &message);

    let meta = raw.wait(&by_setting);
    assert_eq!(meta["result"]["exc_type"], "TimeLimitExceeded", "{meta}");
    assert_eq!(meta["result"]["exc_message"], json!([4]));
    let meta = other.wait(&by_option);
    assert_eq!(
        meta["result"]["exc_type"], "SoftTimeLimitExceeded",
        "{meta}"
    );
    let meta = other.wait(&by_message);
    assert_eq!(meta["result"]["exc_type"], "TimeLimitExceeded", "{meta}");
    for (worker, raw) in [(&hard, &mut raw), (&soft, &mut other)] {
        let next = raw.send("analyze_repo_task", json!([1, open]));
        assert_eq!(raw.value(&next)["total_contributors"], 2);
        raw.wait_drained();
        assert_clean(worker, 2);
    }
    assert!(
        hard.log()
            .contains("Hard time limit (4s) exceeded for analyze_repo_task")
    );
    assert!(
        soft.log()
            .contains("Soft time limit (4s) exceeded for analyze_repo_task")
    );
}

/// The child that works for this worker: the one with a clone of its own.
fn busy_child(worker: &Worker) -> u32 {
    let children = worker.descendants();
    let open = |pid: &&u32| {
        let connections = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let sockets = connections.into_iter().flatten().flatten().filter(|entry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
        });
        sockets.count() > 2
    };
    let busy = children.iter().find(open);
    *busy.unwrap_or_else(|| panic!("none of {children:?} has a connection"))
}

on_brokers!(a_child_that_dies_is_a_failure_or_goes_back_as_the_settings_say);
fn a_child_that_dies_is_a_failure_or_goes_back_as_the_settings_say(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    // The third death in a row is one too many.
    for (reject, deaths, status) in [
        ("false", 1, "FAILURE"),
        ("true", 1, "SUCCESS"),
        ("true", 3, "FAILURE"),
    ] {
        let worker = broker
            .worker()
            .concurrency(1)
            .env("CELERY_TASK_REJECT_ON_WORKER_LOST", reject)
            .start();
        let (url, gate) = server.gated(&repository);
        let mut raw = broker.raw(&worker.queue);
        let id = raw.send("analyze_repo_task", json!([1, url]));
        for death in 1..=deaths {
            gate.wait_arrivals(death);
            let child = i32::try_from(busy_child(&worker)).unwrap();
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child),
                nix::sys::signal::Signal::SIGKILL,
            )
            .unwrap();
        }
        if status == "SUCCESS" {
            gate.wait_arrivals(deaths + 1);
        }
        gate.open();
        let meta = raw.wait(&id);
        assert_eq!(meta["status"], status, "{meta}");
        if status == "FAILURE" {
            assert_eq!(meta["result"]["exc_type"], "WorkerLostError");
        }
        raw.wait_drained();
        wait_for("what is set aside", Duration::from_secs(20), || {
            (raw.quarantined() == usize::from(deaths == 3)).then_some(())
        });
        let next = raw.send("analyze_repo_task", json!([1, url]));
        assert_eq!(raw.value(&next)["total_contributors"], 2);
        raw.wait_drained();
        assert_clean(&worker, 2);
    }
}

on_brokers!(children_are_replaced_after_their_tasks_or_their_memory_without_a_loss);
fn children_are_replaced_after_their_tasks_or_their_memory_without_a_loss(broker: &Broker) {
    let repository = repository();
    let url = format!("file://{}", repository.path().display());
    for option in ["--max-tasks-per-child=2", "--max-memory-per-child=1"] {
        let worker = broker.worker().concurrency(1).option(option).start();
        let mut raw = broker.raw(&worker.queue);
        let first = worker.descendants();
        let ids: Vec<String> = (0..6)
            .map(|_| raw.send("analyze_repo_task", json!([1, url])))
            .collect();
        for id in &ids {
            assert_eq!(raw.value(id)["total_contributors"], 2);
        }
        raw.wait_drained();
        assert_clean(&worker, 2);
        let now = worker.descendants();
        assert!(
            now.iter().all(|pid| !first.contains(pid)),
            "{option}: {first:?} {now:?}"
        );
    }
}
