//! How a worker starts, stops and refuses to start.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Broker, GitServer, Repository, Worker, on_brokers, services, wait_for};

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\n")]);
    repository
}

/// Some time of the future as a message has it.
fn in_an_hour() -> String {
    (chrono::Utc::now() + chrono::Duration::hours(1)).to_rfc3339()
}

on_brokers!(warm_shutdown_hands_back_what_waits_and_keeps_what_runs);
fn warm_shutdown_hands_back_what_waits_and_keeps_what_runs(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut worker = broker
        .worker()
        .concurrency(1)
        .option("--prefetch-multiplier=3")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let running = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let later = raw.send_with("test_task", json!(["later"]), &json!({"eta": in_an_hour()}));
    let waiting: Vec<String> = (0..6)
        .map(|number| raw.send("test_task", json!([number])))
        .collect();
    wait_for(
        "three messages fetched ahead, and the one of later",
        Duration::from_secs(20),
        || (raw.unacked() == 5).then_some(()),
    );
    worker.signal(Signal::SIGTERM);
    wait_for(
        "the messages back in their queue",
        Duration::from_secs(10),
        || (raw.unacked() == 1).then_some(()),
    );
    let back = raw.messages();
    let order: Vec<&Value> = back
        .iter()
        .map(|message| &message["headers"]["id"])
        .collect();
    let wanted: Vec<&String> = std::iter::once(&later).chain(&waiting).collect();
    assert_eq!(order, wanted, "in the order in which they were sent");
    let redelivered = |message: &&Value| {
        message["headers"]["redelivered"] == true
            || message["properties"]["delivery_info"]["redelivered"] == true
    };
    assert_eq!(back.iter().filter(redelivered).count(), 4);

    // Others take them while the first still runs, and do not take it for dead.
    let second = broker.worker().queue(&worker.queue).start();
    for (number, id) in waiting.iter().enumerate() {
        assert_eq!(raw.value(id), format!("celeriac received: {number}"));
    }
    let silent = Instant::now();
    wait_for("longer than a lease lasts", Duration::from_secs(10), || {
        (silent.elapsed() > Duration::from_secs(5)).then_some(())
    });
    gate.open();
    assert_eq!(raw.value(&running)["total_contributors"], 1);
    assert!(worker.wait().success());
    assert!(!second.log().contains("is gone"), "it was taken for dead");
    assert_eq!(raw.status(&later), "PENDING");
    assert_eq!(
        raw.with(|connection| redis::cmd("EXISTS")
            .arg("celeriac.fenced")
            .query::<u64>(connection)),
        0
    );
}

on_brokers!(
    a_running_task_survives_a_broker_that_restarts_during_warm_shutdown,
    own
);
fn a_running_task_survives_a_broker_that_restarts_during_warm_shutdown(broker: &mut Broker) {
    let repository = repository();
    let server = GitServer::start();
    let postgres = services::postgres();
    let (url, gate) = server.gated(&repository);
    let mut worker = broker.worker().concurrency(1).database(&postgres).start();
    let mut raw = broker.raw(&worker.queue);
    let running = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    worker.signal(Signal::SIGTERM);
    worker.wait_log("Warm shutdown");
    broker.restart();
    gate.open();
    raw.value(&running);
    assert!(worker.wait().success());
    if !broker.is_redis() {
        // RabbitMQ took the message back, and nobody was left to acknowledge it: the next worker
        // finds that it is done.
        let next = broker.worker().queue(&worker.queue).database(&postgres);
        let _next = next.start();
        raw.wait_drained();
        let attempts = postgres.rows("SELECT attempts FROM analyses");
        assert_eq!(attempts, [[Some("1".to_owned())]], "it ran again");
    }
    assert_eq!(
        (raw.waiting(), raw.unacked()),
        (0, 0),
        "it was acknowledged"
    );
}

on_brokers!(the_second_interrupt_ends_running_tasks_and_late_ones_go_back);
fn the_second_interrupt_ends_running_tasks_and_late_ones_go_back(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut worker = broker.worker().concurrency(1).start();
    let mut raw = broker.raw(&worker.queue);
    let running = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let children = worker.descendants();
    assert!(!children.is_empty());
    worker.signal(Signal::SIGINT);
    worker.wait_log("Hitting Ctrl+C again will initiate cold shutdown");
    worker.signal(Signal::SIGINT);
    assert_eq!(worker.wait().code(), Some(1));
    assert!(worker.log().contains("worker: Cold shutdown (MainProcess)"));
    assert_eq!((raw.waiting(), raw.unacked()), (1, 0));
    let message = &raw.messages()[0];
    assert_eq!(message["headers"]["id"], running.as_str());
    assert!(message.to_string().contains("\"redelivered\":true"));
    assert_ne!(raw.status(&running), "FAILURE");
    wait_for("the end of its children", Duration::from_secs(20), || {
        let alive = |pid: &u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
        (!children.iter().any(alive)).then_some(())
    });
    assert_eq!(clones(&worker), Vec::<String>::new());
}

/// What is left in the worker's temporary directory.
fn clones(worker: &Worker) -> Vec<String> {
    let entries = std::fs::read_dir(worker.clones()).unwrap();
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

on_brokers!(cold_shutdown_tells_the_client_of_a_task_that_was_acknowledged_early);
fn cold_shutdown_tells_the_client_of_a_task_that_was_acknowledged_early(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut worker = broker
        .worker()
        .concurrency(1)
        .env("CELERY_TASK_ACKS_LATE", "false")
        .env("REMAP_SIGTERM", "SIGQUIT")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let running = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.wait().code(), Some(0));
    assert!(worker.log().contains("worker: Cold shutdown (MainProcess)"));
    assert_eq!((raw.waiting(), raw.unacked()), (0, 0));
    assert_eq!(raw.status(&running), "RETRY");
}

on_brokers!(soft_shutdown_gives_running_tasks_a_last_while);
fn soft_shutdown_gives_running_tasks_a_last_while(broker: &Broker) {
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut worker = broker
        .worker()
        .concurrency(2)
        .env("CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT", "8")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let done = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let (url, shut) = server.gated(&repository);
    let cut = raw.send("analyze_repo_task", json!([1, url]));
    shut.wait_arrivals(1);
    let began = Instant::now();
    worker.signal(Signal::SIGQUIT);
    worker.wait_log("Initiating Soft Shutdown, terminating in 8 seconds");
    gate.open();
    raw.value(&done);
    assert_eq!(worker.wait().code(), Some(0));
    assert!(began.elapsed() >= Duration::from_secs(8));
    assert_eq!((raw.waiting(), raw.unacked()), (1, 0));
    assert_eq!(raw.messages()[0]["headers"]["id"], cut.as_str());
}

#[test]
fn the_pid_and_the_log_go_where_they_are_wanted() {
    let redis = services::redis();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (pidfile, logfile) = (path("pid"), path("%n.log"));
    let mut worker = Worker::on(&redis.url)
        .option(&format!("--pidfile={pidfile}"))
        .option(&format!("--logfile={logfile}"))
        .start_without_waiting();
    let name = worker.node.split('@').next().unwrap().to_owned();
    let logfile = path(&format!("{name}.log"));
    wait_for(
        "the ready line in the file",
        Duration::from_secs(20),
        || {
            let text = std::fs::read_to_string(&logfile).ok()?;
            text.contains(&format!("{} ready.", worker.node))
                .then_some(())
        },
    );
    let written = std::fs::read_to_string(&pidfile).unwrap();
    assert_eq!(written.trim(), worker.pid().to_string());

    let mut second = Worker::on(&redis.url)
        .option(&format!("--pidfile={pidfile}"))
        .start_without_waiting();
    assert!(!second.wait().success());
    assert!(
        second.log().contains(&worker.pid().to_string()),
        "{}",
        second.log()
    );
    assert!(worker.stop().success());
    assert!(!std::path::Path::new(&pidfile).exists());
}

/// Runs `celeriac worker` with nothing but these variables and options.
fn refuse(options: &[&str], environment: &[(&str, &str)]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    Command::new("timeout")
        .arg("60")
        .arg(env!("CARGO_BIN_EXE_celeriac"))
        .arg("worker")
        .args(options)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", directory.path())
        .env("QUEUE_BROKER_URL", "redis://127.0.0.1:1/0")
        .envs(environment.iter().copied())
        .current_dir(directory.path())
        .output()
        .unwrap()
}

#[test]
fn an_unknown_option_is_named_and_ends_with_2() {
    let output = refuse(&["--concurency=4"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--concurency"));
}

#[test]
fn what_is_set_wrongly_is_named_with_its_value_and_a_correct_one() {
    // (variable, value, what of the value is shown, what the example contains)
    let cases = [
        ("QUEUE_BROKER_URL", "redis//:hunter2@host", "", "redis://"),
        (
            "QUEUE_BROKER_URL",
            "http://user:hunter2@host:80/",
            "http",
            "redis://",
        ),
        (
            "QUEUE_BROKER_URL",
            "redis://:hunter2@host:70000/0",
            "port",
            "redis://",
        ),
        (
            "QUEUE_BROKER_URL",
            "redis://:hunter2@host/first",
            "first",
            "redis://",
        ),
        (
            "CELERY_RESULT_BACKEND",
            "redi://:hunter2@host/0",
            "redi",
            "redis://",
        ),
        (
            "DATABASE_URL",
            "mysql://u:hunter2@host/db",
            "mysql",
            "postgresql://",
        ),
        (
            "DATABASE_URL",
            "postgresql://u:hunter2@host:port/db",
            "port",
            "postgresql://",
        ),
        (
            "CELERY_TASK_TIME_LIMIT",
            "soon",
            "soon",
            "CELERY_TASK_TIME_LIMIT=",
        ),
        (
            "CELERY_TASK_ACKS_LATE",
            "perhaps",
            "perhaps",
            "CELERY_TASK_ACKS_LATE=",
        ),
        (
            "CELERY_BROKER_TRANSPORT_OPTIONS",
            "{\"visibility_timeout\": ",
            "",
            "visibility_timeout",
        ),
        ("CELERY_ACCEPT_CONTENT", "json,jsno", "jsno", "json"),
        (
            "VISIBILITY_TIMEOUT",
            "an hour",
            "an hour",
            "VISIBILITY_TIMEOUT=",
        ),
        ("CELERY_TASK_DEFAULT_RATE_LIMIT", "10/x", "10/x", "=10/m"),
        (
            "REPO_HOSTS",
            "github.com,https://gitlab.com/",
            "https://gitlab.com/",
            "REPO_HOSTS=github.com",
        ),
        ("REPO_HOSTS", "git.example.org:ssh", ":ssh", ":8443"),
    ];
    for (variable, value, shown, example) in cases {
        let output = refuse(&[], &[(variable, value)]);
        let text = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code();
        assert!(
            !matches!(code, Some(0 | 124) | None),
            "{variable}={value}: {code:?} {text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains(variable), "{variable}={value}: {text}");
        assert!(
            text.contains(shown),
            "{variable}={value} shows no {shown}: {text}"
        );
        assert!(
            text.contains(example),
            "{variable}={value} gives no example {example}: {text}"
        );
        assert_eq!(text.trim_end().lines().count(), 1, "one line: {text}");
    }
    let output = refuse(&["--time-limit=never"], &[]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--time-limit"));
}

on_brokers!(
    a_broker_that_is_not_there_is_waited_for_unless_the_settings_say_no,
    own
);
fn a_broker_that_is_not_there_is_waited_for_unless_the_settings_say_no(broker: &mut Broker) {
    broker.stop();
    let output = refuse(
        &[],
        &[
            ("QUEUE_BROKER_URL", &broker.url),
            ("CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP", "false"),
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("Unrecoverable error"), "{text}");

    let worker = broker.worker().start_without_waiting();
    worker.wait_log("Cannot connect to ");
    broker.restart();
    let mut raw = broker.raw(&worker.queue);
    let id = raw.send("test_task", json!(["at last"]));
    assert_eq!(raw.value(&id), "celeriac received: at last");
    worker.wait_log(&format!("{} ready.", worker.node));
}
