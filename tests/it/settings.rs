//! Settings of Celery that are honoured, each by what it changes.

use std::time::Duration;

use redis::Commands;
use serde_json::{Value, json};

use super::support::events::Events;
use super::support::raw::{Raw, envelope, set_embed};
use super::support::redis_server::RedisServer;
use super::support::worker::Worker;
use super::support::{GitServer, Repository, services, unique, wait_for};

fn raw_of(worker: &Worker) -> Raw {
    Raw::new(worker.broker(), &worker.queue)
}

/// A round trip through the worker, after which it has looked at its queue.
fn ping(worker: &Worker) -> Value {
    worker.ask("answer(inspect.ping())", &[])
}

const OPEN_CHORD: &str = "
from celery import chord
task = lambda queue: app.signature('test_task', args=('a',), queue=queue)
waiting = chord([task(QUEUE), task('nobody-' + QUEUE)], task(QUEUE)).apply_async()
waiting.parent[0].get(timeout=60)
answer(waiting.parent.id)
";

#[test]
fn results_are_kept_as_long_as_is_said() {
    let redis = services::redis();
    let worker = Worker::on(&redis.url)
        .env("CELERY_RESULT_EXPIRES", "1000")
        .env("CELERY_RESULT_FAILURE_EXPIRES", "500")
        .env("CELERY_RESULT_CHORD_EXPIRES", "300")
        .start();
    let mut raw = raw_of(&worker);
    let (good, bad) = (
        raw.send("test_task", json!(["a"])),
        raw.send("test_task", json!([])),
    );
    raw.wait(&good);
    raw.wait(&bad);
    let group = worker.ask(OPEN_CHORD, &[]);
    let group = group.as_str().unwrap();
    let keys = [
        format!("celery-task-meta-{good}"),
        format!("celery-task-meta-{bad}"),
        format!("celery-taskset-meta-{group}.j"),
    ];
    let left = keys.map(|key| raw.with(|connection| connection.ttl::<_, i64>(&key)));
    for (left, whole) in left.into_iter().zip([1000, 500, 300]) {
        assert!(left > whole - 100 && left <= whole, "{left} of {whole}");
    }
}

#[test]
fn ignored_results_are_stored_only_where_they_are_errors_and_these_are_wanted() {
    let redis = services::redis();
    for wanted in [false, true] {
        let worker = Worker::on(&redis.url)
            .concurrency(1)
            .env("CELERY_TASK_IGNORE_RESULT", "true")
            .env(
                "CELERY_TASK_STORE_ERRORS_EVEN_IF_IGNORED",
                &wanted.to_string(),
            )
            .env("CELERY_TASK_ACKS_LATE", "true")
            .start();
        let mut raw = raw_of(&worker);
        let (good, bad) = (
            raw.send("test_task", json!(["a"])),
            raw.send("test_task", json!([])),
        );
        worker.wait_log(&format!("{good}] succeeded"));
        worker.wait_log(&format!("{bad}] raised"));
        raw.wait_drained();
        let stored = [&good, &bad].map(|id| raw.status(id));
        assert_eq!(
            stored,
            ["PENDING", if wanted { "FAILURE" } else { "PENDING" }]
        );
    }
}

/// What a worker publishes for a callback of a message of priority 3.
fn called(worker: &Worker, options: Value) {
    let callback = json!({"task": "test_task", "args": [], "kwargs": {}, "immutable": false,
        "subtask_type": null, "options": options});
    let id = unique("t");
    let mut message = envelope(&worker.queue, "test_task", &id, &json!(["a"]), &json!({}));
    set_embed(&mut message, &json!({"callbacks": [callback]}));
    message["properties"]["priority"] = json!(3);
    let mut raw = raw_of(worker);
    raw.push_envelope(&message);
    raw.wait(&id);
}

#[test]
fn messages_of_the_worker_are_written_and_routed_as_is_said() {
    let redis = services::redis();
    let other = unique("other");
    let mut events = Events::new(&redis.url, "told");
    let routes = json!({"test_*": {"queue": other}});
    let start = |own: &[(&str, &str)]| {
        own.iter()
            .fold(Worker::on(&redis.url), |worker, (name, value)| {
                worker.env(name, value)
            })
            .env("CELERY_TASK_ROUTES", &routes.to_string())
            .start()
    };
    let only = |priority: u8| {
        let queue = match priority {
            0 => other.clone(),
            priority => format!("{other}\x06\x16{priority}"),
        };
        let [message] = Raw::new(&redis.url, &queue).messages().try_into().unwrap();
        message
    };
    let worker = start(&[
        ("CELERY_TASK_SERIALIZER", "msgpack"),
        ("CELERY_TASK_COMPRESSION", "gzip"),
        ("CELERY_TASK_DEFAULT_PRIORITY", "6"),
        ("CELERY_TASK_SEND_SENT_EVENT", "true"),
        ("CELERY_WORKER_SEND_TASK_EVENTS", "true"),
        ("CELERY_EVENT_EXCHANGE", "told"),
    ]);
    called(&worker, json!({}));
    let message = only(6);
    assert_eq!(message["content-type"], "application/x-msgpack");
    assert_eq!(message["headers"]["compression"], "application/x-gzip");
    let [sent] = events.wait("task-sent", 1).try_into().unwrap();
    assert_eq!(sent["queue"], json!(other), "{sent}");
    assert_eq!(sent["uuid"], message["headers"]["id"]);
    // What a call says itself wins.
    called(
        &worker,
        json!({"priority": 9, "serializer": "yaml", "compression": "bzip2"}),
    );
    let message = only(9);
    assert_eq!(message["content-type"], "application/x-yaml");
    assert_eq!(message["headers"]["compression"], "application/x-bz2");
    let heir = start(&[("CELERY_TASK_INHERIT_PARENT_PRIORITY", "true")]);
    called(&heir, json!({}));
    assert_eq!(only(3)["content-type"], "application/json");
}

#[test]
fn no_more_is_fetched_than_is_said() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    let (url, gate) = git.gated(&repository);
    let worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("CELERY_WORKER_DISABLE_PREFETCH", "true")
        .start();
    let mut raw = raw_of(&worker);
    let running = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let waiting = [(); 2].map(|()| raw.send("test_task", json!(["a"])));
    ping(&worker);
    assert_eq!(raw.waiting(), 2);
    gate.open();
    for id in waiting.iter().chain([&running]) {
        raw.value(id);
    }

    let worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("CELERY_WORKER_ETA_TASK_LIMIT", "3")
        .start();
    let mut raw = raw_of(&worker);
    let far = json!({"eta": "2999-01-01T00:00:00"});
    for _ in 0..6 {
        raw.send_with("test_task", json!(["a"]), &far);
    }
    wait_for("what is held", Duration::from_secs(20), || {
        (raw.unacked() == 3).then_some(())
    });
    ping(&worker);
    assert_eq!([raw.unacked(), raw.waiting()], [3, 3]);
}

#[test]
fn a_worker_ends_with_its_broker_where_it_is_not_to_connect_again() {
    let mut server = RedisServer::start();
    let mut worker = Worker::on(&server.url)
        .env("CELERY_BROKER_CONNECTION_RETRY", "false")
        .env("CELERY_WORKER_ENABLE_REMOTE_CONTROL", "false")
        .start();
    let mut raw = raw_of(&worker);
    let id = raw.send("test_task", json!(["a"]));
    raw.value(&id);
    let asked = worker.ask("answer(app.control.inspect(timeout=2).ping())", &[]);
    assert_eq!(asked, Value::Null);
    server.kill();
    assert!(!worker.wait().success(), "{}", worker.log());
    let mut late = Worker::on(&server.url)
        .env("CELERY_BROKER_CONNECTION_MAX_RETRIES", "1")
        .start_without_waiting();
    assert!(!late.wait().success(), "{}", late.log());
}

#[test]
fn the_tables_of_results_have_the_names_that_are_said() {
    let redis = services::redis();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("results.db");
    let worker = Worker::on(&redis.url)
        .backend(&format!("db+sqlite:///{}", file.display()))
        .env(
            "CELERY_DATABASE_TABLE_NAMES",
            r#"{"task": "mine", "group": "ours"}"#,
        )
        .start();
    let id = raw_of(&worker).send("test_task", json!(["a"]));
    worker.wait_log(&format!("{id}] succeeded"));
    let read = "
app.conf.database_table_names = {'task': 'mine', 'group': 'ours'}
import sqlite3
tables = sqlite3.connect(sys.argv[2]).execute('SELECT name FROM sqlite_master')
answer([AsyncResult(sys.argv[1]).get(timeout=60), sorted(
    name for name, in tables if name in ('mine', 'ours') or name.startswith('celery'))])
";
    let found = worker.ask(read, &[&id, &file.to_string_lossy()]);
    assert_eq!(found, json!(["celeriac received: a", ["mine", "ours"]]));
}
