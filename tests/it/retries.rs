//! Tasks that are tried again: what is published, stored, told and logged, beside a Python
//! worker whose tasks fail for the same reason, and how the tries end.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redis::Commands;
use serde_json::{Value, json};

use super::support::events::Events;
use super::support::python::Python;
use super::support::raw::{Raw, body, envelope, set_embed};
use super::support::redis_server::RedisServer;
use super::support::worker::Worker;
use super::support::{
    Broker, GitServer, Repository, on_brokers, project, services, unique, wait_for,
};

/// Seconds until the next try, for both.
const COUNTDOWN: &str = "300";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    repository
}

/// Everything a message can say, to be said again by its retry.
fn everything(id: &str) -> Value {
    json!({
        "shadow": "shown", "expires": "2999-01-01T00:00:00", "group": "g", "group_index": 4,
        "retries": 1, "timelimit": [900, 800.5], "root_id": "root", "parent_id": null,
        "origin": "gen7@client", "ignore_result": false, "replaced_task_nesting": 2,
        "stamped_headers": ["stage"], "stamps": {"stage": ["prod"]}, "stage": ["prod"],
        "custom": {"id": id}, "x-death": [{"count": 1}],
    })
}

/// What is sent to both, by the ids of the tasks.
fn messages(queue: &str, url: &str) -> BTreeMap<String, Value> {
    let arguments = json!([1, url]);
    let mut messages = BTreeMap::new();
    let mut add = |headers: &Value, change: &dyn Fn(&mut Value)| {
        let id = unique("t");
        let mut message = envelope(queue, "analyze_repo_task", &id, &arguments, headers);
        message["headers"]["argsrepr"] = format!("(1, '{url}')").into();
        change(&mut message);
        messages.insert(id, message);
    };
    add(&json!({}), &|_| ());
    let link = |name: &str| {
        json!({"task": name, "args": [], "kwargs": {}, "options": {},
        "subtask_type": null, "immutable": false})
    };
    let embed = json!({"callbacks": [link("one")], "errbacks": [link("two")],
        "chain": [link("three"), link("four")], "chord": link("five")});
    add(&everything("x"), &|message| {
        set_embed(message, &embed);
        message["properties"]["priority"] = json!(3);
    });
    add(
        &json!({"parent_id": "parent", "root_id": "root", "timelimit": [null, 900]}),
        &|_| (),
    );
    add(&json!({"ignore_result": true}), &|message| {
        message["properties"]
            .as_object_mut()
            .unwrap()
            .remove("reply_to");
        message["properties"]["correlation_id"] = json!("another");
    });
    add(
        &json!({"eta": "2001-01-01T00:00:00", "expires": "2999-01-01T00:00:00+02:00"}),
        &|_| (),
    );
    add(&json!({}), &|message| {
        let given = json!({"exchange": "elsewhere", "routing_key": "key"});
        message["properties"]["delivery_info"] = given;
        message["properties"]["delivery_mode"] = json!(1);
    });
    add(&json!({}), &|message| {
        // Protocol 1: everything is in the body.
        let engine = base64::engine::general_purpose::STANDARD;
        let id = message["headers"]["id"].take();
        message["headers"] = json!({});
        let body = json!({"task": "analyze_repo_task", "id": id, "args": arguments, "kwargs": {},
            "retries": 0, "eta": null, "expires": null, "utc": true, "callbacks": null,
            "errbacks": null, "timelimit": [null, null], "taskset": null, "chord": null});
        message["body"] = engine.encode(body.to_string()).into();
    });
    messages
}

/// One of the two: a database of the server.
struct Side {
    url: String,
    connection: redis::Connection,
    events: Events,
}

impl Side {
    fn new(server: &RedisServer, number: u8, queue: &str) -> Self {
        let url = format!("{}/{number}", server.url.trim_end_matches("/0"));
        let client = redis::Client::open(url.as_str()).unwrap();
        let mut connection = client.get_connection().unwrap();
        // The exchange that one message came by.
        let binding = format!("key\x06\x16\x06\x16{queue}");
        let _: () = connection
            .sadd("_kombu.binding.elsewhere", binding)
            .unwrap();
        let events = Events::new(&url, "celeryev");
        Self {
            url,
            connection,
            events,
        }
    }

    fn push(&mut self, queue: &str, messages: &BTreeMap<String, Value>) {
        for message in messages.values() {
            let _: () = self.connection.lpush(queue, message.to_string()).unwrap();
        }
    }

    /// What became of them, without what is different by nature.
    fn observed(&mut self, log: &dyn Fn() -> String, ids: &[&String]) -> BTreeMap<String, Value> {
        let events = self.events.wait("task-retried", ids.len());
        let told = |id: &str| events.iter().find(|event| event["uuid"] == id).cloned();
        let held = wait_for(
            "the messages of the next tries",
            Duration::from_secs(20),
            || {
                let held: Vec<String> = self.connection.hvals("unacked").unwrap();
                let held = held.iter().map(|text| serde_json::from_str(text).unwrap());
                let held: Vec<Value> = held.map(|mut noted: Value| noted[0].take()).collect();
                let is_next = |one: &&Value| one["headers"]["retries"].as_u64() > Some(0);
                let next: Vec<Value> = held.iter().filter(is_next).cloned().collect();
                (held.len() == ids.len() && next.len() == ids.len()).then_some(next)
            },
        );
        let mut raw = Raw::new(&self.url, "");
        let mut found = BTreeMap::new();
        for id in ids {
            let [message] = held
                .iter()
                .filter(|one| one["headers"]["id"] == json!(id))
                .collect::<Vec<_>>()
                .try_into()
                .expect("one message for each");
            let mut seen = json!({"message": message, "meta": raw.meta(id), "event": told(id)});
            seen["message"]["body"] = body(message);
            let line = format!("[{id}] retry: ");
            let log = log();
            let line = log
                .lines()
                .find(|one| one.contains(&line))
                .expect("a log line");
            seen["log"] = line[line.find("Task ").expect("Task")..].into();
            masked(&mut seen);
            found.insert((*id).clone(), seen);
        }
        found
    }
}

/// Hides times, names of processes, the words of a traceback, what Celery lets slip into messages
/// where nobody looks for it, and how long the broker may keep them, which we do not bound: a task
/// that expired is told to be.
fn masked(seen: &mut Value) {
    let message = &mut seen["message"];
    message["headers"].as_object_mut().unwrap().remove("meth");
    for name in ["origin", "redelivered", "expiration"] {
        message["properties"].as_object_mut().unwrap().remove(name);
    }
    // A worker's own names stand in for those that the client did not give.
    let own = [
        ("/message/headers/origin", "gen"),
        ("/message/properties/reply_to", ""),
    ];
    for (path, start) in own {
        let given = seen.pointer_mut(path).expect("a name");
        let text = given.as_str().expect("a text");
        if text.starts_with(start) && !["gen1@test", "gen7@client", "nobody"].contains(&text) {
            *given = json!("some");
        }
    }
    // Ours keeps the list that it shows of a message of protocol 1.
    let shown = &mut seen["message"]["headers"]["argsrepr"];
    *shown = shown
        .as_str()
        .expect("a text")
        .replace(['[', '('], "(")
        .replace([']', ')'], ")")
        .into();
    let paths = [
        "/message/properties/delivery_tag",
        "/message/headers/eta",
        "/event/hostname",
        "/event/pid",
        "/event/clock",
        "/event/timestamp",
        "/event/utcoffset",
        "/event/traceback",
        "/meta/traceback",
    ];
    for path in paths {
        if let Some(value) = seen.pointer_mut(path).filter(|value| !value.is_null()) {
            *value = json!("some");
        }
    }
}

#[test]
fn a_retry_is_published_stored_told_and_logged_as_python_does_it() {
    let server = RedisServer::start();
    let git = GitServer::start();
    let url = git.refusing(&repository(), 503);
    let queue = unique("q");
    let [mut left, mut right] = [1, 2].map(|number| Side::new(&server, number, &queue));
    let messages = messages(&queue, &url);
    let ids: Vec<&String> = messages.keys().collect();
    let worker = Worker::on(&right.url)
        .queue(&queue)
        .option("-E")
        .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
        .env("CELERY_WORKER_PREFETCH_MULTIPLIER", "0")
        .env("ANALYSIS_RETRY_BACKOFF", COUNTDOWN)
        .env("ANALYSIS_RETRY_BACKOFF_MAX", COUNTDOWN)
        .env("ANALYSIS_RETRY_JITTER", "0")
        .start();
    right.push(&queue, &messages);
    let ours = right.observed(&|| worker.log(), &ids);
    let cause = &ours.values().find(|seen| !seen["meta"].is_null()).unwrap()["meta"]["result"];
    let script = project().join("tests/it/scripts/retries.py");
    let script = script.to_string_lossy();
    let python = Python::new(&left.url, &left.url, &queue);
    let mut python = python.spawn(&[&script, &queue, &cause.to_string()]);
    left.push(&queue, &messages);
    let theirs = left.observed(&|| python.log(), &ids);
    for id in ids {
        let [ours, theirs] = [&ours[id], &theirs[id]];
        assert!(ours == theirs, "{ours:#}\n{theirs:#}");
    }
    let pid = Pid::from_raw(i32::try_from(python.pid()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    python.process().wait().unwrap();
}

on_brokers!(a_retry_says_all_that_the_first_message_said);
fn a_retry_says_all_that_the_first_message_said(broker: &Broker) {
    let url = GitServer::start();
    let url = url.refusing(&repository(), 503);
    let mut worker = broker
        .worker()
        .env("CELERY_WORKER_SEND_TASK_EVENTS", "true")
        // It is not to be due before the worker has handed it back.
        .env("ANALYSIS_RETRY_BACKOFF", COUNTDOWN)
        .env("ANALYSIS_RETRY_JITTER", "0")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let id = unique("t");
    let before = everything(&id);
    let arguments = json!([1, url]);
    let mut message = envelope(&worker.queue, "analyze_repo_task", &id, &arguments, &before);
    let link = |name: &str| {
        json!({"task": name, "args": [], "kwargs": {}, "options": {},
        "subtask_type": null, "immutable": false})
    };
    let embed = json!({"callbacks": [link("one")], "errbacks": [link("two")],
        "chain": [link("three"), link("four")], "chord": link("five")});
    set_embed(&mut message, &embed);
    message["properties"]["priority"] = json!(3);
    raw.push_envelope(&message);
    let meta = wait_for("the state RETRY", Duration::from_secs(20), || {
        (raw.status(&id) == "RETRY").then(|| raw.meta(&id))?
    });
    assert_eq!(meta["children"], json!([[[id, null], null]]));
    assert_eq!(meta["date_done"], Value::Null);
    assert!(meta["traceback"].is_string(), "{meta}");
    worker.wait_log(&format!("shown[{id}] retry: Retry in "));
    worker.stop();
    if broker.is_redis() {
        // Kombu's list for messages of priority 3.
        raw = broker.raw(&format!("{}\x06\x163", worker.queue));
    }
    let [again] = raw.messages().try_into().unwrap();
    let headers = &again["headers"];
    for name in [
        "shadow",
        "expires",
        "group",
        "group_index",
        "timelimit",
        "root_id",
        "origin",
        "ignore_result",
        "replaced_task_nesting",
        "stamped_headers",
        "stamps",
        "custom",
    ] {
        assert_eq!(headers[name], before[name], "{name}: {headers:#}");
    }
    assert_eq!(headers["retries"], 2);
    // As Celery: a task without a parent becomes its own.
    assert_eq!(headers["parent_id"], json!(id));
    assert_eq!(headers["x-death"], Value::Null);
    let eta = headers["eta"].as_str().unwrap();
    assert!(chrono::DateTime::parse_from_rfc3339(eta).unwrap() > chrono::Utc::now());
    assert_eq!(again["properties"]["priority"], 3);
    assert_eq!(again["properties"]["reply_to"], "nobody");
    assert_eq!(body(&again), json!([arguments, {}, embed]));
}

#[test]
fn tries_end_with_the_last_failure_after_as_many_as_are_allowed() {
    let redis = services::redis();
    let git = GitServer::start();
    let url = git.refusing(&repository(), 503);
    let annotations = json!({"analyze_repo_task": {"max_retries": 2, "retry_backoff": 0.1}});
    let worker = Worker::on(&redis.url)
        .env("CELERY_TASK_ANNOTATIONS", &annotations.to_string())
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let known = json!({"task": "test_task", "args": ["told"], "kwargs": {}, "immutable": true,
        "subtask_type": null, "options": {"task_id": unique("errback"), "queue": worker.queue}});
    let (failing, spent) = (unique("t"), unique("t"));
    for (id, retries) in [(&failing, 0), (&spent, 2)] {
        let headers = json!({"retries": retries});
        let mut message = envelope(
            &worker.queue,
            "analyze_repo_task",
            id,
            &json!([1, url]),
            &headers,
        );
        set_embed(&mut message, &json!({"errbacks": [known]}));
        raw.push_envelope(&message);
    }
    let own = raw.wait(&spent);
    let ended = raw.wait(&failing);
    assert_eq!(ended["status"], "FAILURE", "{ended}");
    // The failure itself, not that the tries are over.
    assert_eq!(ended["result"], own["result"]);
    assert_eq!(ended["result"]["exc_type"], "ConnectionError");
    assert_eq!(
        raw.value(known["options"]["task_id"].as_str().unwrap()),
        "celeriac received: told"
    );
    raw.wait_drained();
    let log = worker.log();
    let tries = |id: &str| log.matches(&format!("{id}] received")).count();
    assert_eq!([tries(&failing), tries(&spent)], [3, 1], "{log}");
}

#[test]
fn the_last_try_whose_child_is_killed_fails() {
    let redis = services::redis();
    let git = GitServer::start();
    let worker = Worker::on(&redis.url)
        .concurrency(1)
        .env("ANALYSIS_RETRY_BACKOFF", "0.1")
        .env("CELERY_TASK_RETRY_ON_WORKER_LOST", "true")
        .start();
    let (url, gate) = git.gated(&repository());
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let retries = json!({"retries": 2});
    let id = raw.send_with("analyze_repo_task", json!([1, url]), &retries);
    for arrivals in 1..=2 {
        gate.wait_arrivals(arrivals);
        let child = worker.ask(ACTIVE_CHILD, &[]).as_i64().unwrap();
        kill(
            Pid::from_raw(i32::try_from(child).unwrap()),
            Signal::SIGKILL,
        )
        .unwrap();
    }
    let ended = raw.wait(&id);
    assert_eq!(ended["result"]["exc_type"], "WorkerLostError", "{ended}");
    raw.wait_drained();
    gate.open();
}

const ACTIVE_CHILD: &str = "answer(next(iter(inspect.active().values()))[0]['worker_pid'])";
