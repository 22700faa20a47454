//! What is particular to RabbitMQ: a Python worker as a peer, lost connections, quorum queues,
//! time limits of deliveries, alarms.
//!
//! Tests that stop the broker or close its connections have a server of their own.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::worker::Worker;
use crate::support::{GitServer, Proxy, RabbitServer, Repository, services, unique, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// Sends `test_task` n times; answers how often each result came, by asking for all of them.
const MANY: &str = "
n = int(sys.argv[1])
results = [app.send_task('test_task', args=[f'm{i}'], queue=QUEUE) for i in range(n)]
values = [str(r.get(timeout=90)) for r in results]
answer(sum(f'm{i}' in v for i, v in enumerate(values)))
";

/// A Python worker that has the same tasks; it says who it is.
const PEER: &str = "
import os, sys
from celery import Celery
app = Celery('peer', broker=os.environ['QUEUE_BROKER_URL'], backend='rpc://')
app.conf.worker_prefetch_multiplier = 1
@app.task(name='test_task')
def test_task(message):
    return 'python says ' + message
app.worker_main(['worker', '--pool=solo', '--loglevel=info', '-Q', os.environ['ANALYSIS_QUEUE'],
                 '-n', 'peer@%h'])
";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ann <ann@example.com>", &[("a.txt", "one\ntwo\nthree\n")]);
    repository
}

/// Sends an analysis and returns its id at once.
const ANALYSE: &str = "
r = app.send_task('analyze_repo_task', args=[1, sys.argv[1]], queue=QUEUE, reply_to=None)
answer(r.id)
";

fn succeeded(worker: &Worker, id: &str) -> usize {
    let done = format!("[{id}] succeeded in");
    worker.log().matches(&done).count()
}

#[test]
fn python_and_celeriac_share_a_queue_and_run_each_task_once() {
    let broker = services::rabbitmq();
    let ours = Worker::on(&broker).start();
    let python = ours.python();
    let peer = python.spawn(&["-c", PEER]);
    wait_for("the Python worker", PATIENCE, || {
        peer.log().contains("ready.").then_some(())
    });
    assert_eq!(ours.ask(MANY, &["200"]), json!(200));
    let by_python = peer.log().matches("succeeded in").count();
    let by_us = ours.log().matches("succeeded in").count();
    assert_eq!(by_python + by_us, 200, "{by_python} + {by_us}");
    assert!(by_python > 0 && by_us > 0, "{by_python} + {by_us}");
    assert!(
        !peer.log().contains("PRECONDITION_FAILED"),
        "{}",
        peer.log()
    );
}

#[test]
fn a_broker_that_is_stopped_and_started_under_load_loses_nothing() {
    let rabbit = RabbitServer::start();
    let worker = Worker::on(&rabbit.url).start();
    let send = "
for i in range(int(sys.argv[1])):
    app.send_task('test_task', args=[f'm{i}'], queue=QUEUE, ignore_result=True, retry=True)
answer(None)
";
    worker.ask(send, &["300"]);
    rabbit.restart();
    worker.ask(send, &["100"]);
    wait_for("all tasks", PATIENCE, || {
        (worker.log().matches("succeeded in").count() >= 400).then_some(())
    });
    wait_for("an empty queue", PATIENCE, || {
        (rabbit.counts(&worker.queue) == (0, 0)).then_some(())
    });
    // A task that was acknowledged while the broker went down may have come again.
    let log = worker.log();
    let mut runs: BTreeMap<&str, usize> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("succeeded in")) {
        let id = line
            .split(['[', ']'])
            .find(|part| part.len() == 36)
            .unwrap();
        *runs.entry(id).or_default() += 1;
    }
    assert_eq!(runs.len(), 400);
    assert!(runs.values().all(|count| *count == 1), "{runs:?}");
}

#[test]
fn a_task_that_runs_while_its_connection_is_closed_is_committed_once() {
    let rabbit = RabbitServer::start();
    let postgres = services::postgres();
    let worker = Worker::on(&rabbit.url).database(&postgres).start();
    let repository = repository();
    let git = GitServer::start();
    let (url, gate) = git.gated(&repository);
    let id = worker.ask(ANALYSE, &[&url]);
    gate.wait_arrivals(1);
    for _ in 0..2 {
        let before = worker.log().matches("Connected to").count();
        rabbit.close_connections();
        wait_for("a new connection", PATIENCE, || {
            (worker.log().matches("Connected to").count() > before).then_some(())
        });
    }
    // The message is with us again before the task ends, or it ends first: both must do.
    gate.open();
    let id = id.as_str().unwrap();
    wait_for("the result", PATIENCE, || {
        (succeeded(&worker, id) > 0).then_some(())
    });
    wait_for("an empty queue", PATIENCE, || {
        (rabbit.counts(&worker.queue) == (0, 0)).then_some(())
    });
    assert_eq!(succeeded(&worker, id), 1);
    assert_eq!(postgres.rows_with(&url).len(), 1);
    assert_eq!(worker.ask(MANY, &["5"]), json!(5), "it goes on");
}

#[test]
fn consumer_timeout_costs_a_connection_but_neither_the_task_nor_the_worker() {
    let rabbit = RabbitServer::with(
        "[{rabbit, [{consumer_timeout, 3000}, {channel_tick_interval, 1000}]}].",
    );
    let postgres = services::postgres();
    let worker = Worker::on(&rabbit.url).database(&postgres).start();
    let repository = repository();
    let git = GitServer::start();
    let (url, gate) = git.gated(&repository);
    let id = worker.ask(ANALYSE, &[&url]);
    gate.wait_arrivals(1);
    worker.wait_log("consumer_timeout of 3 seconds");
    wait_for("a new connection", PATIENCE, || {
        (worker.log().matches("Connected to").count() > 1).then_some(())
    });
    gate.open();
    let id = id.as_str().unwrap();
    wait_for("the result", PATIENCE, || {
        (succeeded(&worker, id) > 0).then_some(())
    });
    wait_for("an empty queue", PATIENCE, || {
        (rabbit.counts(&worker.queue) == (0, 0)).then_some(())
    });
    assert_eq!(succeeded(&worker, id), 1);
    assert_eq!(postgres.rows_with(&url).len(), 1);
}

#[test]
fn quorum_queues_do_not_stop_at_tasks_that_wait_for_their_eta() {
    let broker = services::rabbitmq();
    let queue = unique("quorum");
    let worker = Worker::on(&broker)
        .queue(&queue)
        .env("CELERY_TASK_CREATE_MISSING_QUEUE_TYPE", "quorum")
        .start();
    let script = "
app.conf.task_create_missing_queue_type = 'quorum'
later = [app.send_task('test_task', args=[f'later{i}'], queue=QUEUE, countdown=600) for i in range(30)]
now = app.send_task('test_task', args=['now'], queue=QUEUE)
value = str(now.get(timeout=60))
app.control.revoke([r.id for r in later])
answer(value)
";
    let value = worker.ask(script, &[]);
    assert!(value.as_str().unwrap().contains("now"), "{value}");
    worker.wait_log("Global QoS is disabled");
}

#[test]
fn a_topic_queue_of_the_quorum_type_gets_delayed_messages_from_the_broker() {
    let broker = services::rabbitmq();
    let queue = unique("topical");
    let queues = json!([{
        "name": queue, "exchange": queue, "exchange_type": "topic", "routing_key": queue,
        "queue_arguments": {"x-queue-type": "quorum"},
    }]);
    let worker = Worker::on(&broker)
        .queue(&queue)
        .env("CELERY_TASK_QUEUES", &queues.to_string())
        .start();
    let script = "
import time
from kombu import Exchange, Queue
app.conf.task_queues = [Queue(QUEUE, Exchange(QUEUE, type='topic'), routing_key=QUEUE,
                              queue_arguments={'x-queue-type': 'quorum'})]
start = time.monotonic()
r = app.send_task('test_task', args=['delayed'], queue=QUEUE, countdown=3)
value = str(r.get(timeout=60))
answer([value, time.monotonic() - start])
";
    let answer = worker.ask(script, &[]);
    assert!(answer[0].as_str().unwrap().contains("delayed"), "{answer}");
    assert!(answer[1].as_f64().unwrap() >= 2.5, "{answer}");
    assert!(!worker.log().contains("Native delayed delivery will not"));
}

#[test]
fn a_memory_alarm_stops_publishing_but_not_work() {
    let rabbit = RabbitServer::start();
    let worker = Worker::on(&rabbit.url).start();
    assert_eq!(worker.ask(MANY, &["1"]), json!(1));
    let send = "
for i in range(20):
    app.send_task('test_task', args=[f'a{i}'], queue=QUEUE, ignore_result=True,
                  countdown=5 if i else 0)
answer(None)
";
    worker.ask(send, &[]);
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.000001"]);
    worker.wait_log("RabbitMQ takes no messages at present");
    // Those with a countdown fall due under the alarm and are acknowledged all the same.
    wait_for("the work", PATIENCE, || {
        (worker.log().matches("succeeded in").count() >= 21).then_some(())
    });
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.4"]);
    worker.wait_log("RabbitMQ takes messages again");
    assert_eq!(worker.ask(MANY, &["3"]), json!(3));
    assert_eq!(worker.log().matches("Connected to").count(), 1);
}

#[test]
fn what_nobody_can_process_is_kept_in_the_quarantine_queue() {
    let rabbit = RabbitServer::start();
    let worker = Worker::on(&rabbit.url).start();
    let script = "
with app.connection_for_write() as connection:
    producer = connection.Producer()
    producer.publish(b'{nonsense', routing_key=QUEUE, exchange='', content_type='application/json',
                     content_encoding='utf-8', headers={'task': 'test_task', 'id': 'bad-1'})
answer(None)
";
    worker.ask(script, &[]);
    wait_for("the message in quarantine", PATIENCE, || {
        let list = rabbit.ctl(&["list_queues", "name", "messages"]);
        list.lines()
            .any(|line| line.split_whitespace().eq(["celeriac.quarantine", "1"]))
            .then_some(())
    });
    let headers = worker.ask(
        "
with app.connection_for_write() as connection:
    message = connection.default_channel.basic_get('celeriac.quarantine', no_ack=True)
body = message.body
answer([message.headers, body if isinstance(body, str) else bytes(body).decode()])
",
        &[],
    );
    assert_eq!(headers[1], Value::from("{nonsense"));
    assert_eq!(
        headers[0]["celeriac_queue"],
        Value::from(worker.queue.as_str())
    );
    assert!(headers[0]["celeriac_reason"].is_string(), "{headers}");
    assert_eq!(worker.ask(MANY, &["2"]), json!(2));
}

#[test]
fn the_next_address_of_the_list_is_used_when_the_first_does_not_answer() {
    let broker = services::rabbitmq();
    let list = format!("amqp://guest:guest@127.0.0.1:9//;{broker}");
    let worker = Worker::on(&list).start();
    assert_eq!(worker.ask(MANY, &["3"]), json!(3));
    assert!(worker.log().contains("guest:**@"), "{}", worker.log());
}

#[test]
fn priorities_of_a_queue_are_those_of_rabbitmq() {
    let broker = services::rabbitmq();
    let queue = unique("priority");
    let python = crate::support::python::Python::new(&broker, "rpc://", &queue);
    let declared = format!(
        "
from kombu import Exchange, Queue
queue = Queue('{queue}', Exchange('{queue}'), routing_key='{queue}', max_priority=9)
app.conf.task_queues = [queue]
ids = {{}}
for priority in [1, 9, 5]:
    ids[priority] = app.send_task('test_task', args=['p'], queue=queue, priority=priority).id
answer([ids[9], ids[5], ids[1]])
"
    );
    let sent = python.run(&declared, &[]);
    // Declared with the same argument, or the broker refuses.
    let worker = Worker::on(&broker)
        .queue(&queue)
        .concurrency(1)
        .env("CELERY_TASK_QUEUE_MAX_PRIORITY", "9")
        .start();
    wait_for("three tasks", PATIENCE, || {
        (worker.log().matches("succeeded in").count() == 3).then_some(())
    });
    let log = worker.log();
    let received = |id: &Value| log.find(&format!("[{}] received", id.as_str().unwrap()));
    let order: Vec<_> = sent.as_array().unwrap().iter().map(received).collect();
    assert!(
        order[0].is_some() && order.is_sorted(),
        "{order:?} in {log}"
    );
}

#[test]
fn certificates_are_checked_and_a_private_authority_can_be_named() {
    let rabbit = RabbitServer::secure();
    // The client has no such option in its address: it reads what the queue holds over TCP.
    let worker = Worker::on(&rabbit.url).start();
    let plain = rabbit.plain_url();
    let python = crate::support::python::Python::new(&plain, "rpc://", &worker.queue);
    let script = format!("QUEUE = '{}'\n{MANY}", worker.queue);
    assert_eq!(python.run(&script, &["3"]), json!(3));
    drop(worker);

    let (trusting, _) = rabbit.url.split_once('?').unwrap();
    let worker = Worker::on(trusting).start_without_waiting();
    worker.wait_log("invalid peer certificate");
    assert!(!worker.log().contains("guest:guest"), "{}", worker.log());
}

#[test]
fn a_connection_on_which_nothing_comes_any_more_is_made_again() {
    let broker = services::rabbitmq();
    let proxy = Proxy::before(&broker);
    let through = format!("{}?heartbeat=1", proxy.url(&broker));
    let queue = unique("silent");
    let worker = Worker::on(&through).queue(&queue).start();
    let python = crate::support::python::Python::new(&broker, "rpc://", &queue);
    let script = format!("QUEUE = '{queue}'\n{MANY}");
    assert_eq!(python.run(&script, &["1"]), json!(1));
    proxy.strand();
    worker.wait_log("Connection to broker lost");
    assert_eq!(python.run(&script, &["5"]), json!(5));
}
