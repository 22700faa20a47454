//! Canvases: what celeriac publishes and stores for them, beside what a Python worker does.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::support::redis_server::RedisServer;
use super::support::worker::Worker;
use super::support::{Broker, on_brokers, project, python, services, unique, wait_for};

/// Chosen because they cover every kind of part, each nested in each other.
const FIXED: (u32, u32) = (1, 20);
/// How many more there are with every run, unless `CANVAS_SEEDS` says so; their seeds are printed
/// and can be run again with `CANVAS_FIRST`.
const FRESH: u32 = 20;
/// So many are in flight together.
const BATCH: u32 = 50;

/// A Python worker on a database of a server; ended when dropped.
pub fn python_worker(url: &str, queue: &str) -> python::Background {
    python_worker_of(python::Python::new(url, url, queue), queue)
}

/// The same with a result backend of its own, and maybe several queues, with commas.
pub fn python_worker_of(client: python::Python, queues: &str) -> python::Background {
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
        "-Q",
        queues,
        "-n",
        &format!("{}@%h", unique("py")),
    ]);
    wait_for("the Python worker", Duration::from_secs(30), || {
        worker.log().contains(" ready.").then_some(())
    });
    worker
}

fn compare(left: &str, right: &str, queues: &str, (first, count): (u32, u32)) -> Value {
    let script = project().join("tests/it/scripts/canvas.py");
    let (script, first, count) = (
        script.to_string_lossy().into_owned(),
        first.to_string(),
        count.to_string(),
    );
    let client = python::Python::new(left, left, queues);
    let mut run = client.spawn(&[&script, left, right, queues, &first, &count]);
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

/// Random canvases whose tasks are spread over the queues: all of Python's on the left, the last
/// of celeriac's on the right and the others of Python's.
fn compare_many(queues: &[String]) {
    let server = RedisServer::start();
    let database = |number: u8| format!("{}/{number}", server.url.trim_end_matches("/0"));
    let (left, right) = (database(1), database(2));
    let all = queues.join(",");
    let python = |url: &str, queues: &[String]| {
        let client = python::Python::new(url, url, &queues[0]);
        python_worker_of(client, &queues.join(","))
    };
    let mut peer = python(&left, queues);
    let (ours, theirs) = queues.split_last().expect("a queue");
    let mut partner = (!theirs.is_empty()).then(|| python(&right, theirs));
    let _worker = Worker::on(&right)
        .queue(ours)
        .env("CELERY_TASK_DEFAULT_QUEUE", &queues[0])
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
        let found = compare(&left, &right, &all, seeds);
        assert!(found["different"] == json!({}), "{found:#}");
        let stuck = found["stuck"].as_array().unwrap();
        println!("{seeds:?}: raced {}, stuck {stuck:?}", found["raced"]);
        let judged = found["sent"].as_u64().unwrap() - stuck.len() as u64;
        assert!(
            judged > 10 || seeds.1 < FRESH || !stuck.is_empty(),
            "{found:#}"
        );
        if !stuck.is_empty() {
            peer = python(&left, queues);
            partner = partner.map(|_| python(&right, theirs));
        }
    }
    for python in [Some(&mut peer), partner.as_mut()].into_iter().flatten() {
        let pid = Pid::from_raw(i32::try_from(python.pid()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        let _ = python.process().wait();
    }
}

#[test]
fn random_canvases_end_as_they_end_with_a_python_worker() {
    compare_many(&[unique("q")]);
}

#[test]
fn random_canvases_that_python_and_celeriac_share_end_as_with_python_alone() {
    compare_many(&[unique("py"), unique("rs")]);
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

on_brokers!(the_body_of_a_chord_runs_once_although_workers_are_killed_in_between);
fn the_body_of_a_chord_runs_once_although_workers_are_killed_in_between(broker: &Broker) {
    // RabbitMQ gives the last part of a chord to another worker the moment its worker is dead. If
    // that is Python's, it finds the claim of the dead, and forgets the chord, as it does among
    // workers of its own kind.
    chords_through_kills(broker, &broker.results, broker.is_redis());
}

/// A Python worker that suffers a power cut between its claim of a chord and the body.
const DIES_WITH_THE_CLAIM: &str = "
import os, signal
from celery import Celery
app = Celery('dies', broker=os.environ['QUEUE_BROKER_URL'],
             backend=os.environ['CELERY_RESULT_BACKEND'])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1)
@app.task(name='test_task')
def test_task(message):
    return f'celeriac received: {message}'
app.amqp._retry_publish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
app.worker_main(['worker', '--pool=solo', '--loglevel=info', '-Q', os.environ['ANALYSIS_QUEUE'],
                 '-n', 'dies@%h'])
";

#[test]
fn a_chord_is_ended_although_a_python_worker_died_with_its_claim() {
    let broker = Broker::rabbitmq();
    let queue = unique("q");
    let client = python::Python::new(&broker.url, &broker.results, &queue);
    let mut dying = client.spawn(&["-c", DIES_WITH_THE_CLAIM]);
    let bodies = client.run(&format!("QUEUE = '{queue}'\n{SEND_CHORDS}"), &["2"]);
    let body = bodies[0].as_str().unwrap();
    wait_for("its end", Duration::from_secs(60), || {
        dying.process().try_wait().expect("it is our child")
    });
    // RabbitMQ hands out at once what it held.
    let worker = broker
        .worker()
        .queue(&queue)
        .env("CELERY_TASK_ACKS_LATE", "true")
        .start();
    assert_eq!(worker.ask(WAIT_FOR_BODIES, &[body]), json!([2]));
    let runs = worker.log().matches(&format!("{body}] received")).count();
    assert_eq!(runs, 1, "{}", worker.log());
}

#[test]
fn a_chord_whose_parts_nobody_counts_outlives_killed_workers_too() {
    let broker = Broker::redis();
    let directory = tempfile::tempdir().unwrap();
    let sqlite = format!("db+sqlite:///{}/results.db", directory.path().display());
    chords_through_kills(&broker, &sqlite, false);
    let postgres = services::postgres();
    let url = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    chords_through_kills(&broker, &url, true);
}

fn chords_through_kills(broker: &Broker, results: &str, with_peer: bool) {
    let queue = unique("q");
    let start = || {
        broker
            .worker()
            .queue(&queue)
            .backend(results)
            .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
            .env("CELERY_TASK_ACKS_LATE", "true")
            .env("CELERY_RESULT_CHORD_RETRY_INTERVAL", "0.2")
            .start()
    };
    let given = |name: &str, usual: &str| std::env::var(name).unwrap_or(usual.to_owned());
    let sizes = given("CHORD_SIZES", "200,10,1,10");
    let kills: usize = given("CHORD_KILLS", "2").parse().unwrap();
    let sizes: Vec<&str> = sizes.split(',').collect();
    let expected: Vec<usize> = sizes.iter().map(|size| size.parse().unwrap()).collect();
    let parts: usize = expected.iter().sum();
    let mut workers = vec![start(), start()];
    // Celery's takes its share, and may have the body.
    let peer = with_peer.then(|| {
        let client = python::Python::new(&broker.url, results, &queue);
        python_worker_of(client, &queue)
    });
    let bodies = workers[0].ask(SEND_CHORDS, &sizes);
    let bodies: Vec<String> = serde_json::from_value(bodies).unwrap();
    let runs = |workers: &[Worker], what: &str| {
        let logs = workers
            .iter()
            .map(Worker::log)
            .chain(peer.iter().map(python::Background::log));
        logs.map(|log| log.matches(what).count())
            .collect::<Vec<_>>()
    };
    for kill in 0..kills {
        wait_for("some more parts", Duration::from_secs(60), || {
            let done: usize = runs(&workers, " succeeded in ").iter().sum();
            (done > parts * (kill + 1) / (kills + 2)).then_some(())
        });
        let killed = workers.len() - 2;
        workers[killed].kill();
        workers.push(start());
    }
    let ids: Vec<&str> = bodies.iter().map(String::as_str).collect();
    let joined = workers[kills].ask(WAIT_FOR_BODIES, &ids);
    assert_eq!(joined, json!(expected));
    for id in &bodies {
        let runs = runs(&workers, &format!("test_task[{id}] succeeded"));
        assert_eq!(
            runs.iter().sum::<usize>(),
            1,
            "body {id} ran {runs:?} times"
        );
    }
}

const TIME_CHORD: &str = "
import time
from celery import chord
size = int(sys.argv[1])
body = app.signature('test_task', queue=QUEUE)
header = [app.signature('test_task', args=(f'h{i}',), queue=QUEUE) for i in range(size)]
began = time.monotonic()
joined = chord(header, body).apply_async().get(timeout=100)
answer([joined.count('celeriac received: h'), time.monotonic() - began])
";

#[test]
fn a_part_of_a_chord_costs_the_same_however_many_there_are() {
    let server = RedisServer::start();
    let worker = Worker::on(&server.url).start();
    let mut connection = server.connect();
    let mut commands = || {
        let stats: redis::InfoDict = redis::cmd("INFO")
            .arg("stats")
            .query(&mut connection)
            .unwrap();
        stats.get::<u64>("total_commands_processed").unwrap()
    };
    let mut costs = Vec::new();
    for size in [10, 100, 1000] {
        let before = commands();
        let found = worker.ask(TIME_CHORD, &[&size.to_string()]);
        assert_eq!(found[0], size, "{found}");
        let commands = (commands() - before) / size;
        let milliseconds =
            found[1].as_f64().unwrap() * 1e3 / f64::from(u32::try_from(size).unwrap());
        println!("{size} parts: {milliseconds:.2} ms and {commands} commands of Redis for each");
        costs.push(commands);
    }
    // What each looked at of all the others would be ten times as much.
    assert!(costs[2] < 2 * costs[1], "{costs:?}");
}
