//! Canvases: what celeriac publishes and stores for them, beside what a Python worker does.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::support::redis_server::RedisServer;
use super::support::worker::Worker;
use super::support::{Broker, on_brokers, project, python, unique, wait_for};

/// Chosen because they cover every kind of part, each nested in each other.
const FIXED: (u32, u32) = (1, 20);
/// How many more there are with every run, unless `CANVAS_SEEDS` says so; their seeds are printed
/// and can be run again with `CANVAS_FIRST`.
const FRESH: u32 = 20;
/// So many are in flight together.
const BATCH: u32 = 50;

/// A Python worker on a database of a server; ended when dropped.
pub fn python_worker(url: &str, queue: &str) -> python::Background {
    python_worker_of(python::Python::new(url, url, queue))
}

/// The same with a result backend of its own.
pub fn python_worker_of(client: python::Python) -> python::Background {
    let directory = project().join("examples/python-worker");
    let worker = client.spawn(&[
        "-m",
        "celery",
        "--workdir",
        &directory.to_string_lossy(),
        "-A",
        "python_worker",
        "worker",
        "--pool=solo",
        "--loglevel=info",
        "-n",
        &format!("{}@%h", unique("py")),
    ]);
    wait_for("the Python worker", Duration::from_secs(30), || {
        worker.log().contains(" ready.").then_some(())
    });
    worker
}

fn compare(left: &str, right: &str, queue: &str, (first, count): (u32, u32)) -> Value {
    let script = project().join("tests/it/scripts/canvas.py");
    let (script, first, count) = (
        script.to_string_lossy().into_owned(),
        first.to_string(),
        count.to_string(),
    );
    let client = python::Python::new(left, left, queue);
    let mut run = client.spawn(&[&script, left, right, queue, &first, &count]);
    let ended = wait_for("the canvases", Duration::from_secs(300), || {
        run.process().try_wait().expect("the script is our child")
    });
    let log = run.log();
    let answer = log.lines().find_map(|line| line.strip_prefix("answer: "));
    match answer {
        Some(answer) if ended.success() => serde_json::from_str(answer).expect("JSON"),
        _ => panic!("the script ended with {ended}:\n{log}"),
    }
}

#[test]
fn random_canvases_end_as_they_end_with_a_python_worker() {
    let server = RedisServer::start();
    let database = |number: u8| format!("{}/{number}", server.url.trim_end_matches("/0"));
    let (left, right) = (database(1), database(2));
    let queue = unique("q");
    let mut peer = python_worker(&left, &queue);
    let _worker = Worker::on(&right)
        .queue(&queue)
        .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
        .start();
    let count = std::env::var("CANVAS_SEEDS").map_or(FRESH, |count| count.parse().unwrap());
    let fresh = std::env::var("CANVAS_FIRST").map_or_else(
        |_| 1000 + u32::from(rand_u16()) * 10,
        |first| first.parse().unwrap(),
    );
    println!("fresh seeds: {fresh} to {}", fresh + count - 1);
    let batches = (0..count).step_by(BATCH as usize);
    let batches = batches.map(|start| (fresh + start, BATCH.min(count - start)));
    for seeds in [FIXED].into_iter().chain(batches) {
        let found = compare(&left, &right, &queue, seeds);
        let sent = found["sent"].as_u64().unwrap();
        assert!(sent > 10, "{found:#}");
        assert_eq!(found["different"], json!({}), "{found:#}");
    }
    let pid = Pid::from_raw(i32::try_from(peer.pid()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let _ = peer.process().wait();
}

fn rand_u16() -> u16 {
    let bytes = uuid::Uuid::new_v4().into_bytes();
    u16::from_le_bytes([bytes[0], bytes[1]])
}

const SEND_CHORDS: &str = "
from celery import chord
bodies = []
for size in map(int, sys.argv[1:]):
    body = app.signature('test_task', queue=QUEUE)
    header = [app.signature('test_task', args=(f'h{i}',), queue=QUEUE) for i in range(size)]
    bodies.append(chord(header, body).apply_async().id)
answer(bodies)
";

const WAIT_FOR_BODIES: &str = "
answer([AsyncResult(body).get(timeout=100).count('celeriac received: h') for body in sys.argv[1:]])
";

on_brokers!(the_body_of_a_chord_runs_once_although_its_worker_is_killed_in_between);
fn the_body_of_a_chord_runs_once_although_its_worker_is_killed_in_between(broker: &Broker) {
    let queue = unique("q");
    let start = || {
        broker
            .worker()
            .queue(&queue)
            .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
            .env("CELERY_TASK_ACKS_LATE", "true")
            .start()
    };
    let mut first = start();
    let bodies = first.ask(SEND_CHORDS, &["300", "10", "1", "10"]);
    let bodies: Vec<String> = serde_json::from_value(bodies).unwrap();
    wait_for("some parts", Duration::from_secs(20), || {
        (first.log().matches(" succeeded in ").count() > 40).then_some(())
    });
    first.kill();
    let second = start();
    let ids: Vec<&str> = bodies.iter().map(String::as_str).collect();
    let joined = second.ask(WAIT_FOR_BODIES, &ids);
    assert_eq!(joined, json!([300, 10, 1, 10]));
    for id in &bodies {
        let runs = [first.log(), second.log()]
            .map(|log| log.matches(&format!("test_task[{id}] succeeded")).count());
        assert_eq!(
            runs.iter().sum::<usize>(),
            1,
            "body {id} ran {runs:?} times"
        );
    }
}
