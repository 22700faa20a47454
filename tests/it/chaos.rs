//! Workers, brokers and networks that die, with nothing lost and nothing done twice.
//!
//! The law of every test: what was sent is done or kept, a commit happens once for each id, and
//! in the end no message is held and no process or clone is left. The last test deals out
//! random faults; `CHAOS_SEED` replays a run and `CHAOS_SECONDS` makes it longer.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::python::{Python, interpreter};
use crate::support::services::Postgres;
use crate::support::{
    Broker, GitServer, Proxy, Raw, RedisServer, Repository, Worker, on_brokers, project, services,
    unique, wait_for,
};

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\ntwo\n")]);
    repository
}

fn address(repository: &Repository) -> String {
    format!("file://{}", repository.path().display())
}

/// Every analysis of the database: id, state and attempts.
fn rows(postgres: &Postgres) -> Vec<(String, String)> {
    let rows = postgres.rows("SELECT task_id, state FROM analyses ORDER BY task_id");
    rows.into_iter()
        .map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap()))
        .collect()
}

on_brokers!(an_analysis_goes_on_elsewhere_soon_after_a_kill);
fn an_analysis_goes_on_elsewhere_soon_after_a_kill(broker: &Broker) {
    let postgres = services::postgres();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut first = broker.worker().database(&postgres).start();
    let mut raw = broker.raw(&first.queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let second = broker
        .worker()
        .database(&postgres)
        .queue(&first.queue)
        .start();
    let killed = Instant::now();
    first.kill();
    gate.wait_arrivals(2);
    let took = killed.elapsed();
    // Three to five seconds; a machine that does much else may need longer, never an hour.
    eprintln!("running again after {took:?}");
    gate.open();
    assert_eq!(raw.value(&id)["total_contributors"], 1);
    assert_eq!(rows(&postgres), [(id.clone(), "SUCCESS".to_owned())]);
    raw.wait_drained();
    if broker.is_redis() {
        let gone = "is gone; 1 of its messages went back";
        second.wait_log(gone);
    }
    assert_eq!(second.log().matches(&format!("[{id}] received")).count(), 1);
}

on_brokers!(a_task_that_kills_three_workers_is_given_up);
fn a_task_that_kills_three_workers_is_given_up(broker: &Broker) {
    let postgres = services::postgres();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let queue = unique("q");
    let start = || broker.worker().queue(&queue).database(&postgres).start();
    let mut raw = broker.raw(&queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    for death in 1..=3 {
        let mut worker = start();
        gate.wait_arrivals(death);
        worker.kill();
    }
    let worker = start();
    let meta = raw.wait(&id);
    assert_eq!(meta["status"], "FAILURE");
    assert_eq!(meta["result"]["exc_type"], "WorkerLostError");
    assert_eq!(rows(&postgres), [(id, "FAILURE".to_owned())]);
    raw.wait_drained();
    assert_eq!(raw.quarantined(), 1);
    // It stands in nobody's way.
    let next = raw.send("test_task", json!(["next"]));
    raw.value(&next);
    gate.open();
    drop(worker);
}

/// RabbitMQ does not say why a message comes again; whoever lives says that it was no death.
#[test]
fn workers_that_lose_their_connections_are_not_counted_as_dead() {
    let (broker, postgres) = (Broker::rabbitmq(), services::postgres());
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let queue = unique("q");
    let workers = [(), ()].map(|()| broker.worker().queue(&queue).database(&postgres).start());
    let mut raw = broker.raw(&queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    for _ in 0..5 {
        let connected = || {
            let logs = workers.iter().map(Worker::log);
            logs.map(|log| log.matches("Connected to").count())
        };
        let before: Vec<usize> = connected().collect();
        wait_for("new connections", Duration::from_secs(40), || {
            broker.close_connections();
            connected()
                .zip(&before)
                .all(|(now, before)| now > *before)
                .then_some(())
        });
        wait_for("the message to be held", Duration::from_secs(20), || {
            (raw.unacked() == 1).then_some(())
        });
        wait_for("no death", Duration::from_secs(20), || {
            let deaths = postgres.rows("SELECT deaths FROM analyses");
            (deaths == [[Some("0".to_owned())]]).then_some(())
        });
    }
    gate.open();
    assert_eq!(raw.value(&id)["total_contributors"], 1);
    raw.wait_drained();
    assert_eq!(rows(&postgres), [(id, "SUCCESS".to_owned())]);
    assert_eq!(raw.quarantined(), 0);
}

/// RabbitMQ would drop the message after the last delivery the queue grants, and tell nobody.
#[test]
fn a_task_is_given_up_before_a_quorum_queue_drops_it() {
    let broker = Broker::rabbitmq();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let queue = unique("limited");
    let queues = json!([{
        "name": queue, "exchange": queue, "routing_key": queue,
        "queue_arguments": {"x-queue-type": "quorum", "x-delivery-limit": 2},
    }]);
    let start = || {
        let worker = broker.worker().queue(&queue);
        worker
            .env("CELERY_TASK_QUEUES", &queues.to_string())
            .start()
    };
    let mut worker = start();
    let mut raw = broker.raw(&queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    // The first delivery and one more; the second more is the last that the queue grants.
    for death in 1..=2 {
        gate.wait_arrivals(death);
        worker.kill();
        worker = start();
    }
    let meta = raw.wait(&id);
    assert_eq!(meta["status"], "FAILURE");
    assert_eq!(meta["result"]["exc_type"], "WorkerLostError");
    // The queue itself says nothing: counts of quorum queues are seconds old.
    wait_for("the message in quarantine", Duration::from_secs(20), || {
        (raw.quarantined() == 1).then_some(())
    });
    let next = raw.send("test_task", json!(["next"]));
    raw.value(&next);
    gate.open();
}

on_brokers!(a_worker_that_was_stopped_longer_than_its_lease_commits_nothing);
fn a_worker_that_was_stopped_longer_than_its_lease_commits_nothing(broker: &Broker) {
    let postgres = services::postgres();
    // RabbitMQ closes connections on which three heartbeats are missing.
    let start = |queue: &str, heartbeat: &str| {
        let worker = broker.worker().database(&postgres).queue(queue);
        worker.env("CELERY_BROKER_HEARTBEAT", heartbeat).start()
    };
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let mut first = start(&unique("q"), "2");
    let mut raw = broker.raw(&first.queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let mut second = start(&first.queue, "60");
    first.signal(Signal::SIGSTOP);
    gate.wait_arrivals(2);
    // The first one's child finishes meanwhile, and its report waits for its parent.
    gate.open();
    let value = raw.value(&id);
    assert_eq!(value["total_contributors"], 1);
    let stored = raw.meta(&id);
    let row = || postgres.rows("SELECT state, worker, finished_at::text FROM analyses");
    let entered = row();
    first.signal(Signal::SIGCONT);
    if broker.is_redis() {
        first.wait_log("lost its lease");
    } else {
        first.wait_log("Connection to broker lost");
    }
    let next = raw.send("test_task", json!(["next"]));
    raw.value(&next);
    raw.wait_drained();
    assert!(first.stop().success() && second.stop().success());
    assert!(second.log().contains(&format!("[{id}] succeeded in")));
    assert_eq!(row(), entered, "it was committed again");
    if broker.is_redis() {
        // RabbitMQ cannot be asked whose a message is: there the same value is stored again.
        assert_eq!(raw.meta(&id), stored, "the result was written twice");
        assert!(!first.log().contains(&format!("[{id}] succeeded in")));
    }
}

/// kombu's lock of the sweep lasts five minutes, so that of a worker that died in the middle of one
/// would keep what others have left for as long.
#[test]
fn a_worker_that_died_with_the_lock_of_the_sweep_delays_nobody_for_long() {
    let redis = services::redis();
    let mut raw = Raw::new(&redis.url, &unique("q"));
    let queue = raw.queue().to_owned();
    let id = raw.send("test_task", json!(["left behind"]));
    raw.with(|connection| {
        let message: String = redis::cmd("RPOP").arg(&queue).query(connection)?;
        let envelope: Value = serde_json::from_str(&message).unwrap();
        let tag = envelope["properties"]["delivery_tag"].as_str().unwrap();
        redis::pipe()
            .hset("unacked", tag, format!("[{message}, \"\", \"{queue}\"]"))
            .zadd("unacked_index", tag, 1_700_000_000)
            .set_ex("unacked_mutex", "a dead worker's", 300)
            .exec(connection)
    });
    let options = "{\"unacked_restore_interval\": 1}";
    let _worker = Worker::on(&redis.url)
        .queue(&queue)
        .env("CELERY_BROKER_TRANSPORT_OPTIONS", options)
        .start();
    raw.value(&id);
    raw.wait_drained();
}

// `FLEET_TASKS=500` makes it longer; `FLEET_KILLS=celeriac` or `python` kills one kind alone.
on_brokers!(a_mixed_fleet_does_each_task_once_when_one_of_each_kind_is_killed);
fn a_mixed_fleet_does_each_task_once_when_one_of_each_kind_is_killed(broker: &Broker) {
    let given = std::env::var("FLEET_TASKS").ok();
    let kills = std::env::var("FLEET_KILLS").unwrap_or_else(|_| "celeriac python".to_owned());
    let count: usize = given.map_or(300, |text| text.parse().unwrap());
    let repository = repository();
    let url = address(&repository);
    let start = |queue: &str| {
        broker
            .worker()
            .queue(queue)
            .env("VISIBILITY_TIMEOUT", "6")
            .env(
                "CELERY_BROKER_TRANSPORT_OPTIONS",
                "{\"unacked_restore_interval\": 1}",
            )
            .start()
    };
    let mut first = start(&crate::support::unique("q"));
    let second = start(&first.queue);
    let mut python = python_worker(&broker.url, &broker.results, &first.queue);
    let mut raw = broker.raw(&first.queue);
    wait_for("the Python worker", Duration::from_secs(40), || {
        python.0.log().contains("ready.").then_some(())
    });
    let ends = Successes::watch(&broker.results);
    let ids: Vec<String> = (0..count)
        .map(|_| raw.send("analyze_repo_task", json!([1, url])))
        .collect();
    let done = |raw: &mut Raw| {
        let ready = |id: &&String| raw.status(id) == "SUCCESS";
        ids.iter().filter(ready).count()
    };
    wait_for("some results of both", Duration::from_secs(40), || {
        let both = done(&mut raw) > 30 && python.0.log().contains("succeeded in");
        both.then_some(())
    });
    if kills.contains("celeriac") {
        first.kill();
    }
    if kills.contains("python") && broker.is_redis() {
        python.kill_where_kombu_loses_nothing(&mut raw, &ids);
    } else if kills.contains("python") {
        python.kill();
    }
    for id in &ids {
        raw.value(id);
    }
    raw.wait_drained();
    let ends = ends.finish();
    let times = |id: &String| ends.get(id).copied().unwrap_or_default();
    let wrong: Vec<_> = ids.iter().filter(|id| times(id) != 1).collect();
    assert!(wrong.is_empty(), "not one SUCCESS each: {wrong:?}");
    if broker.is_redis() && kills.contains("celeriac") {
        second.wait_log("is gone");
    } else {
        assert!(!second.log().contains("is gone"), "{}", second.log());
    }
}

/// Counts how often each task succeeded: every result is published when it is stored.
struct Successes {
    results: redis::Client,
    last: String,
    listener: std::thread::JoinHandle<HashMap<String, usize>>,
}

impl Successes {
    fn watch(results: &str) -> Self {
        const PREFIX: &str = "celery-task-meta-";
        let results = redis::Client::open(results).unwrap();
        let mut connection = results.get_connection().unwrap();
        let last = format!("{PREFIX}{}", unique("last"));
        let until = last.clone();
        let (ready, subscribed) = std::sync::mpsc::channel();
        let listener = std::thread::spawn(move || {
            let mut channels = connection.as_pubsub();
            channels.psubscribe(format!("{PREFIX}*")).unwrap();
            ready.send(()).unwrap();
            let mut counts = HashMap::new();
            loop {
                let message = channels.get_message().unwrap();
                let channel = message.get_channel_name();
                if channel == until {
                    return counts;
                }
                let meta: Option<Value> = serde_json::from_slice(message.get_payload_bytes()).ok();
                if meta.is_some_and(|meta| meta["status"] == "SUCCESS") {
                    let id = channel[PREFIX.len()..].to_owned();
                    *counts.entry(id).or_default() += 1;
                }
            }
        });
        subscribed.recv().unwrap();
        Self {
            results,
            last,
            listener,
        }
    }

    /// What was told until now, by task id.
    fn finish(self) -> HashMap<String, usize> {
        let mut connection = self.results.get_connection().unwrap();
        redis::Commands::publish::<_, _, ()>(&mut connection, &self.last, "").unwrap();
        self.listener.join().unwrap()
    }
}

/// A Python worker that acknowledges late; it leads a process group of its own.
struct PythonWorker(crate::support::python::Background);

impl PythonWorker {
    fn kill(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.0.pid()).unwrap());
        killpg(group, Signal::SIGKILL).unwrap();
        let _ = self.0.process().wait();
    }

    /// kombu pops a message and writes down afterwards that it did: killed in between, it loses it,
    /// and nobody else can know. So it is held still, Redis takes back what it promised to a
    /// stopped client, and it is killed only when every message is somewhere then.
    fn kill_where_kombu_loses_nothing(&mut self, raw: &mut Raw, ids: &[String]) {
        let group = Pid::from_raw(i32::try_from(self.0.pid()).unwrap());
        wait_for("all messages in Redis", Duration::from_secs(20), || {
            killpg(group, Signal::SIGSTOP).unwrap();
            wait_for("the group to stand still", Duration::from_secs(20), || {
                is_stopped(group).then_some(())
            });
            raw.end_blocked_pops();
            let seen = raw.ids();
            let is_there = |id: &String| seen.contains(id) || raw.status(id) == "SUCCESS";
            if ids.iter().all(is_there) {
                return Some(());
            }
            killpg(group, Signal::SIGCONT).unwrap();
            None
        });
        self.kill();
    }
}

/// Whether every thread of a process group has stopped: a signal takes its time.
fn is_stopped(group: Pid) -> bool {
    let threads = std::fs::read_dir("/proc").unwrap().flatten();
    let threads = threads.filter_map(|process| std::fs::read_dir(process.path().join("task")).ok());
    threads.flatten().flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let mut words = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let state = words.next().unwrap_or("X");
        // D: it waits in the kernel, as for the end of a vfork, and stops when it comes back.
        words.nth(1) != Some(&group.to_string()) || matches!(state, "T" | "D" | "Z" | "X")
    })
}

fn python_worker(broker: &str, results: &str, queue: &str) -> PythonWorker {
    const SCRIPT: &str = "
import os, sys
os.setpgid(0, 0)
sys.path.insert(0, sys.argv[1])
from python_worker import app
app.conf.task_acks_late = True
if app.conf.broker_url.startswith('redis'):
    app.conf.broker_transport_options = {'visibility_timeout': 6}
app.worker_main(['worker', '--concurrency=2', '--loglevel=info', '-Q', sys.argv[2],
                 '--without-gossip', '--without-mingle', '--without-heartbeat'])
";
    drop(interpreter());
    let directory = project().join("examples/python-worker");
    let directory = directory.to_str().unwrap();
    let python = Python::new(broker, results, queue);
    PythonWorker(python.spawn(&["-c", SCRIPT, directory, queue]))
}

/// Most tasks that are sent and have not ended.
const AHEAD: usize = 40;

/// Sends a task every few milliseconds until the end of `disturb`, then waits for all of them;
/// returns those that were sent more than once.
fn under_load(
    broker: &mut Broker,
    worker: &Worker,
    calls: &[(&str, Value)],
    every: Duration,
    disturb: impl FnOnce(&mut Broker, &mut Raw),
) -> HashSet<String> {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let mut raw = broker.raw(&worker.queue);
    let calls: Vec<(String, Value)> = calls
        .iter()
        .map(|(name, arguments)| ((*name).to_owned(), arguments.clone()))
        .collect();
    let sender = std::thread::spawn(move || {
        let mut ids = Vec::new();
        for (name, arguments) in calls.iter().cycle() {
            ids.push(raw.send(name, arguments.clone()));
            // On a busy machine more and more would stand before what `disturb` waits for.
            if let Some(earlier) = ids.len().checked_sub(AHEAD) {
                raw.wait(&ids[earlier]);
            }
            let pause = stopped.recv_timeout(every);
            let timeout = std::sync::mpsc::RecvTimeoutError::Timeout;
            if pause != Err(timeout) && ids.len() >= 60 {
                break;
            }
        }
        (ids, raw.resent)
    });
    let mut raw = broker.raw(&worker.queue);
    disturb(broker, &mut raw);
    drop(stop);
    let (ids, resent) = sender.join().unwrap();
    for id in &ids {
        raw.value(id);
    }
    raw.wait_drained();
    resent
}

on_brokers!(a_broker_restarts_under_load_and_work_resumes, own);
fn a_broker_restarts_under_load_and_work_resumes(broker: &mut Broker) {
    let given = std::env::var("BROKER_RESTARTS").ok();
    let given: Option<u32> = given.map(|text| text.parse().unwrap());
    let postgres = services::postgres();
    let repository = repository();
    let worker = broker.worker().database(&postgres).start();
    let calls = [
        ("test_task", json!(["load"])),
        ("analyze_repo_task", json!([1, address(&repository)])),
        ("test_task", json!(["more"])),
    ];
    // RabbitMQ needs seconds for each.
    let rounds = given.unwrap_or(if broker.is_redis() { 5 } else { 2 });
    // What is sent in many rounds must not pile up before what is waited for.
    let every = Duration::from_millis(if given.is_some() { 50 } else { 5 });
    let mut resumed = Vec::new();
    let resent = under_load(broker, &worker, &calls, every, |broker, raw| {
        for round in 0..rounds {
            let warm = raw.send("test_task", json!([round]));
            raw.value(&warm);
            // Any moment of what is under way is as good as another.
            std::thread::sleep(Duration::from_millis(rand_seed() % 200));
            broker.restart();
            let up = Instant::now();
            let again = raw.send("test_task", json!([round]));
            raw.value(&again);
            resumed.push(up.elapsed());
        }
    });
    committed_once(&postgres, &worker, &resent);
    resumed.sort();
    eprintln!("resumed after {resumed:?}");
}

/// Every analysis is there, and was begun once unless its client sent it again.
#[track_caller]
fn committed_once(postgres: &Postgres, worker: &Worker, resent: &HashSet<String>) {
    let states: HashSet<String> = rows(postgres).into_iter().map(|row| row.1).collect();
    assert_eq!(states, HashSet::from(["SUCCESS".to_owned()]));
    let twice = postgres.rows("SELECT task_id FROM analyses WHERE attempts > 1");
    let log = worker.log();
    let ids = twice.iter().filter_map(|row| row[0].as_deref());
    let ids: Vec<&str> = ids.filter(|id| !resent.contains(*id)).collect();
    let about = |line: &&str| ids.iter().any(|id| line.contains(id)) || line.contains("onnect");
    let lines: Vec<&str> = log.lines().filter(about).collect();
    assert!(ids.is_empty(), "ran twice: {ids:?}\n{}", lines.join("\n"));
}

on_brokers!(
    closed_connections_are_made_again_and_nothing_is_lost_or_done_twice,
    own
);
fn closed_connections_are_made_again_and_nothing_is_lost_or_done_twice(broker: &mut Broker) {
    let postgres = services::postgres();
    let repository = repository();
    let worker = broker.worker().database(&postgres).start();
    let calls = [
        ("test_task", json!(["load"])),
        ("analyze_repo_task", json!([1, address(&repository)])),
    ];
    let every = Duration::from_millis(5);
    let resent = under_load(broker, &worker, &calls, every, |broker, raw| {
        for round in 0..20 {
            broker.close_connections();
            let id = raw.send("test_task", json!([round]));
            raw.value(&id);
        }
    });
    committed_once(&postgres, &worker, &resent);
}

on_brokers!(a_connection_that_leads_nowhere_is_given_up);
fn a_connection_that_leads_nowhere_is_given_up(broker: &Broker) {
    let proxy = Proxy::before(&broker.url);
    let worker = Worker::on(&proxy.url(&broker.url))
        .backend(&broker.results)
        .start();
    let mut raw = broker.raw(&worker.queue);
    let before = raw.send("test_task", json!(["before"]));
    raw.value(&before);
    proxy.strand();
    let began = Instant::now();
    let ids: Vec<String> = (0..5)
        .map(|number| raw.send("test_task", json!([number])))
        .collect();
    for id in &ids {
        raw.value(id);
    }
    // Within 15 seconds: RabbitMQ needs three heartbeats for what it delivered into the void.
    eprintln!("resumed after {:?}", began.elapsed());
    raw.wait_drained();
}

on_brokers!(an_answer_cut_off_at_any_byte_loses_no_message);
fn an_answer_cut_off_at_any_byte_loses_no_message(broker: &Broker) {
    let proxy = Proxy::before(&broker.url);
    let worker = Worker::on(&proxy.url(&broker.url))
        .backend(&broker.results)
        .start();
    let mut raw = broker.raw(&worker.queue);
    for round in 0..12 {
        let ready = raw.send("test_task", json!(["ready"]));
        raw.value(&ready);
        let connections = proxy.accepted();
        proxy.cut_after_answer_bytes(60 * round);
        let ids: Vec<String> = (0..4)
            .map(|number| raw.send("test_task", json!([number])))
            .collect();
        wait_for("the cut and a new attempt", Duration::from_secs(20), || {
            (proxy.accepted() > connections).then_some(())
        });
        proxy.heal();
        for id in &ids {
            raw.value(id);
        }
        raw.wait_drained();
    }
}

on_brokers!(a_database_that_is_away_delays_the_success_of_its_task_alone);
fn a_database_that_is_away_delays_the_success_of_its_task_alone(broker: &Broker) {
    let postgres = services::postgres();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let proxy = Proxy::before(&postgres.url);
    let worker = broker
        .worker()
        .concurrency(1)
        .env("DATABASE_URL", &proxy.url(&postgres.url))
        .start();
    let mut raw = broker.raw(&worker.queue);
    let ids: Vec<String> = (0..3)
        .map(|_| raw.send("analyze_repo_task", json!([1, url])))
        .collect();
    gate.wait_arrivals(1);
    wait_for("the row", Duration::from_secs(20), || {
        (rows(&postgres).len() == 1).then_some(())
    });
    proxy.cut();
    gate.open();
    worker.wait_log("trying again in");
    let away = Instant::now();
    while away.elapsed() < Duration::from_secs(5) {
        let id = raw.send("test_task", json!(["meanwhile"]));
        raw.value(&id);
        assert!(ids.iter().all(|id| raw.status(id) != "SUCCESS"));
        std::thread::sleep(Duration::from_millis(200));
    }
    proxy.heal();
    for id in &ids {
        raw.value(id);
    }
    let found = rows(&postgres);
    assert_eq!(found.len(), 3);
    assert!(found.iter().all(|row| row.1 == "SUCCESS"), "{found:?}");
    raw.wait_drained();
}

on_brokers!(a_result_is_stored_when_its_backend_is_back_and_settled_only_then);
fn a_result_is_stored_when_its_backend_is_back_and_settled_only_then(broker: &Broker) {
    let mut results = RedisServer::durable();
    let repository = repository();
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let worker = broker.worker().backend(&results.url).start();
    let mut raw = broker.raw(&worker.queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    results.kill();
    gate.open();
    worker.wait_log("Connection to Redis lost: Retry");
    assert_eq!(raw.unacked(), 1);
    assert!(!worker.log().contains("succeeded in"));
    results.restart();
    let mut stored = Raw::new(&results.url, &worker.queue);
    assert_eq!(stored.value(&id)["total_contributors"], 1);
    raw.wait_drained();
}

/// A fault of the random test.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// kill -9 of a worker; another one is started.
    Kill,
    /// A pause that is shorter or longer than the lease.
    Stop,
    /// Warm shutdown; another one is started.
    Term,
    /// Cold shutdown; another one is started.
    Quit,
    /// The broker is killed and started again, or RabbitMQ stopped and started.
    Restart,
    /// The broker drops its clients.
    Drop,
}

const FAULTS: [Fault; 6] = [
    Fault::Kill,
    Fault::Stop,
    Fault::Term,
    Fault::Quit,
    Fault::Restart,
    Fault::Drop,
];

on_brokers!(random_faults_lose_nothing_and_commit_nothing_twice, own);
fn random_faults_lose_nothing_and_commit_nothing_twice(broker: &mut Broker) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed: u64 = variable("CHAOS_SEED").unwrap_or_else(rand_seed);
    let length = Duration::from_secs(variable("CHAOS_SECONDS").unwrap_or(20));
    eprintln!("CHAOS_SEED={seed} CHAOS_SECONDS={}", length.as_secs());
    let mut state = seed.max(1);
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };

    let postgres = services::postgres();
    let repository = repository();
    let (url, results) = (broker.url.clone(), broker.results.clone());
    let queue = crate::support::unique("q");
    let start = || {
        let builder = Worker::on(&url).backend(&results);
        let builder = builder.database(&postgres).queue(&queue);
        // Both kinds of tasks are acknowledged late: only those cannot be lost.
        builder
            .env("CELERY_TASK_ACKS_LATE", "true")
            .start_without_waiting()
    };
    let mut fleet = [start(), start()];
    let mut raw = broker.raw(&queue);
    let mut sent: HashMap<String, &str> = HashMap::new();
    let mut faults = 0;
    let began = Instant::now();
    while began.elapsed() < length {
        for _ in 0..random(12) {
            let (name, arguments) = if random(3) == 0 {
                ("analyze_repo_task", json!([1, address(&repository)]))
            } else {
                ("test_task", json!(["chaos"]))
            };
            sent.insert(raw.send(name, arguments), name);
        }
        let victim = &mut fleet[usize::try_from(random(2)).unwrap()];
        let fault = FAULTS[usize::try_from(random(FAULTS.len() as u64)).unwrap()];
        let pause = Duration::from_millis(random(700));
        eprintln!("{:?} {fault:?} {pause:?}", began.elapsed());
        faults += 1;
        match fault {
            Fault::Kill => {
                victim.kill();
                *victim = start();
            }
            Fault::Stop => {
                victim.signal(Signal::SIGSTOP);
                let lease = if random(4) == 0 { 5000 } else { random(2500) };
                std::thread::sleep(Duration::from_millis(lease));
                victim.signal(Signal::SIGCONT);
            }
            Fault::Term | Fault::Quit => {
                // One that was started a moment ago may not have its handlers yet.
                wait_for("its banner", Duration::from_secs(20), || {
                    victim.log().contains("[tasks]").then_some(())
                });
                let warm = matches!(fault, Fault::Term);
                victim.signal(if warm {
                    Signal::SIGTERM
                } else {
                    Signal::SIGQUIT
                });
                assert_eq!(victim.wait().code(), Some(0), "{}", victim.log());
                *victim = start();
            }
            Fault::Restart => broker.restart(),
            Fault::Drop => broker.close_connections(),
        }
        std::thread::sleep(pause);
    }
    eprintln!("{} tasks, {faults} faults", sent.len());
    for id in sent.keys() {
        raw.value(id);
    }
    raw.wait_drained();
    assert_eq!(raw.quarantined(), 0);
    let analyses: HashSet<&String> = sent
        .iter()
        .filter(|(_, name)| **name == "analyze_repo_task")
        .map(|(id, _)| id)
        .collect();
    let found = rows(&postgres);
    assert!(found.iter().all(|row| row.1 == "SUCCESS"), "{found:?}");
    assert_eq!(
        found.iter().map(|row| &row.0).collect::<HashSet<_>>(),
        analyses
    );
    for worker in &mut fleet {
        let log = worker.log();
        assert!(
            !log.contains("panicked") && !log.contains("bug of celeriac"),
            "{log}"
        );
        let children = worker.descendants();
        assert!(worker.stop().success());
        wait_for("the end of its children", Duration::from_secs(20), || {
            let alive = |pid: &u32| kill(Pid::from_raw(*pid as i32), None).is_ok();
            (!children.iter().any(alive)).then_some(())
        });
    }
    if !broker.is_redis() {
        return;
    }
    // A worker that has left takes its keys along, and the dead were buried by the living.
    let kept: Vec<String> =
        raw.with(|connection| redis::cmd("KEYS").arg("celeriac.*").query(connection));
    let endless: Vec<&String> = kept
        .iter()
        .filter(|key| {
            raw.with(|connection| redis::cmd("TTL").arg(key.as_str()).query::<i64>(connection)) < 0
        })
        .collect();
    assert_eq!(endless, Vec::<&String>::new());
}

fn rand_seed() -> u64 {
    u64::try_from(uuid::Uuid::new_v4().as_u128() & 0xffff_ffff).unwrap()
}
