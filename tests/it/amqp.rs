//! What is particular to RabbitMQ: a Python worker as a peer, lost connections, quorum queues,
//! time limits of deliveries, alarms.
//!
//! Tests that stop the broker or close its connections have a server of their own.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::worker::Worker;
use crate::support::{
    Broker, GitServer, Proxy, RabbitServer, Repository, services, unique, wait_for,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Sends `test_task` n times; answers how often each result came, by asking for all of them.
const MANY: &str = "
n = int(sys.argv[1])
results = [app.send_task('test_task', args=[f'm{i}'], queue=QUEUE) for i in range(n)]
values = [str(r.get(timeout=90)) for r in results]
answer(sum(f'm{i}' in v for i, v in enumerate(values)))
";

/// A Python worker that has the same task.
const PEER: &str = "
import json, os
from celery import Celery
app = Celery('peer', broker=os.environ['QUEUE_BROKER_URL'], backend='rpc://')
app.conf.update(json.loads(os.environ['PEER_SETTINGS']))
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
fn a_task_that_runs_while_its_connection_is_closed_is_committed_once() {
    let broker = Broker::rabbitmq();
    let postgres = services::postgres();
    let worker = broker.worker().database(&postgres).start();
    let mut raw = broker.raw(&worker.queue);
    let repository = repository();
    let git = GitServer::start();
    let (url, gate) = git.gated(&repository);
    let id = worker.ask(ANALYSE, &[&url]);
    gate.wait_arrivals(1);
    for _ in 0..2 {
        let before = worker.log().matches("Connected to").count();
        wait_for("a new connection", PATIENCE, || {
            broker.close_connections();
            (worker.log().matches("Connected to").count() > before).then_some(())
        });
    }
    // The message is with us again before the task ends, or it ends first: both must do.
    gate.open();
    let id = id.as_str().unwrap();
    wait_for("the result", PATIENCE, || {
        (succeeded(&worker, id) > 0).then_some(())
    });
    raw.wait_drained();
    assert_eq!(succeeded(&worker, id), 1);
    assert_eq!(postgres.rows_with(&url).len(), 1);
    assert_eq!(worker.ask(MANY, &["5"]), json!(5), "it goes on");
}

/// `CONSUMER_TIMEOUT=10` makes it 10 seconds and the tasks three times as long.
#[test]
fn consumer_timeout_costs_a_connection_but_neither_the_task_nor_the_worker() {
    let given = std::env::var("CONSUMER_TIMEOUT").ok();
    let seconds: u64 = given.as_ref().map_or(3, |text| text.parse().unwrap());
    let rabbit = RabbitServer::with(&format!(
        "[{{rabbit, [{{consumer_timeout, {}}}, {{channel_tick_interval, 1000}}]}}].",
        seconds * 1000
    ));
    let postgres = services::postgres();
    let repository = repository();
    let git = GitServer::start();
    let began = Instant::now();
    let held = ["classic", "quorum"].map(|kind| {
        let worker = Worker::on(&rabbit.url)
            .database(&postgres)
            .env("CELERY_TASK_CREATE_MISSING_QUEUE_TYPE", kind)
            .start();
        let (url, gate) = git.gated(&repository);
        let script = format!("app.conf.task_create_missing_queue_type = '{kind}'{ANALYSE}");
        let id = worker.ask(&script, &[&url]).as_str().unwrap().to_owned();
        gate.wait_arrivals(1);
        (worker, url, gate, id)
    });
    for (worker, ..) in &held {
        let limit = format!("consumer_timeout of {seconds} seconds");
        worker.wait_log(&limit);
        wait_for("a new connection", PATIENCE, || {
            (worker.log().matches("Connected to").count() > 1).then_some(())
        });
    }
    if given.is_some() {
        wait_for("the end of the tasks", Duration::from_secs(600), || {
            (began.elapsed() > Duration::from_secs(3 * seconds)).then_some(())
        });
    }
    for (worker, url, gate, id) in &held {
        gate.open();
        wait_for("the result", PATIENCE, || {
            (succeeded(worker, id) > 0).then_some(())
        });
        wait_for("an empty queue", PATIENCE, || {
            (rabbit.counts(&worker.queue) == (0, 0)).then_some(())
        });
        assert_eq!(succeeded(worker, id), 1);
        assert_eq!(postgres.rows_with(url).len(), 1);
        let connections = worker.log().matches("Connected to").count();
        eprintln!("{connections} connections after {:?}", began.elapsed());
    }
    for (kind, (worker, ..)) in ["classic", "quorum"].iter().zip(&held) {
        let script = format!("app.conf.task_create_missing_queue_type = '{kind}'{MANY}");
        assert_eq!(worker.ask(&script, &["3"]), json!(3), "it goes on");
    }
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
    let broker = Broker::rabbitmq();
    let worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let script = "
with app.connection_for_write() as connection:
    producer = connection.Producer()
    producer.publish(b'{nonsense', routing_key=QUEUE, exchange='', content_type='application/json',
                     content_encoding='utf-8', headers={'task': 'test_task', 'id': 'bad-1'})
answer(None)
";
    worker.ask(script, &[]);
    wait_for("the message in quarantine", PATIENCE, || {
        (raw.quarantined() == 1).then_some(())
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

    let (address, files) = rabbit.url.split_once('?').unwrap();
    let (authority, own) = files.split_once('&').unwrap();
    let refused = |url: &str| {
        let worker = Worker::on(url).start_without_waiting();
        worker.wait_log("Cannot connect to amqps://guest:**@127.0.0.");
        let log = worker.log();
        assert!(!log.contains("guest:guest"), "{log}");
        log
    };
    let log = refused(&format!("{address}?{own}"));
    assert!(log.contains("UnknownIssuer"), "another authority: {log}");
    let elsewhere = rabbit.url.replacen("127.0.0.1", "127.0.0.2", 1);
    let log = refused(&elsewhere);
    assert!(log.contains("not valid for"), "another name: {log}");
    let log = refused(&format!("{address}?{authority}"));
    assert!(
        log.to_lowercase().contains("certificate"),
        "no certificate of one's own: {log}"
    );
}

#[test]
fn queues_that_are_deleted_are_made_again_for_who_consumes_and_for_who_publishes() {
    let broker = Broker::rabbitmq();
    let next = unique("next");
    let worker = broker
        .worker()
        .env("CELERY_TASK_DEFAULT_QUEUE", &next)
        .start();
    let delete = "
with app.connection_for_write() as connection:
    for name in sys.argv[1:]:
        connection.default_channel.queue_delete(name)
answer(None)
";
    worker.ask(delete, &[&worker.queue]);
    worker.wait_log("The broker cancelled the consumer of");
    assert_eq!(worker.ask(MANY, &["3"]), json!(3));

    // What follows a task goes to a queue that the worker itself made; nobody consumes it.
    let chain = "
from celery import chain
step = lambda queue: app.signature('test_task', args=['x'], queue=queue, immutable=True)
result = chain(step(QUEUE), step(sys.argv[1])).apply_async()
result.parent.get(timeout=30)
answer(None)
";
    for _ in 0..2 {
        worker.ask(chain, &[&next]);
        let mut raw = broker.raw(&next);
        wait_for("the next task", PATIENCE, || {
            (raw.waiting() == 1).then_some(())
        });
        worker.ask(delete, &[&next]);
    }
    assert_eq!(worker.log().matches("Connected to").count(), 1);
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

#[test]
fn a_quorum_queue_can_be_added_to_a_worker_of_classic_queues() {
    let broker = Broker::rabbitmq();
    let worker = broker.worker().start();
    let (quorum, other) = (unique("quorum"), unique("other"));
    let add = "
quorum, other = sys.argv[1:]
def add(name, **options):
    app.control.broadcast('add_consumer', {'queue': name, **options}, reply=True, timeout=60, limit=1)
later = app.send_task('test_task', args=['later'], queue=QUEUE, countdown=600)
add(quorum, queue_arguments={'x-queue-type': 'quorum'})
add(other)
answer(later.id)
";
    let later = worker.ask(add, &[&quorum, &other]);
    worker.wait_log(&format!("Started consuming from {other}"));
    let script = "
quorum, other, later = sys.argv[1:]
app.conf.task_create_missing_queues = False
from kombu import Queue
queues = [Queue(QUEUE, no_declare=True), Queue(quorum, no_declare=True), Queue(other, no_declare=True)]
app.conf.task_queues = queues
results = [app.send_task('test_task', args=[f'{n}'], queue=q) for n in range(10) for q in queues]
values = [str(r.get(timeout=30)) for r in results]
app.control.revoke(later)
answer(len(values))
";
    let later = later.as_str().unwrap();
    assert_eq!(worker.ask(script, &[&quorum, &other, later]), json!(30));
    worker.wait_log("Global QoS is disabled");
    assert_eq!(worker.log().matches("Connected to").count(), 1);
}

/// What RabbitMQ itself says of the queues whose names begin so.
fn declared(broker: &Broker, start: &str) -> Vec<(String, Value)> {
    let (mut api, vhost) = broker.rabbit().unwrap();
    let path = format!("queues/{vhost}?disable_stats=true&enable_queue_totals=true");
    let all = api.request("GET", &path, &Value::Null);
    let named = all.as_array().unwrap().iter();
    let named = named.map(|queue| (queue["name"].as_str().unwrap(), queue));
    let found = named.filter(|(name, _)| name.starts_with(start));
    let about = |queue: &Value| {
        let mut about = json!({"arguments": queue["arguments"]});
        // Added by RabbitMQ 4 itself.
        about["arguments"]
            .as_object_mut()
            .unwrap()
            .remove("x-queue-type");
        for name in ["durable", "auto_delete", "exclusive"] {
            about[name] = queue[name].clone();
        }
        about
    };
    found
        .map(|(name, queue)| (name.to_owned(), about(queue)))
        .collect()
}

/// RabbitMQ refuses a declaration that differs from what is there: Python makes ours again, then
/// listens and asks; a Python worker beside us does the same.
const SAME_SETTINGS: &str = "
from celery.app.control import Control
conf, node, events = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
app.conf.update(conf)
with app.connection() as connection:
    again = []
    if conf:
        # Otherwise they belong to the worker's connection.
        again.append(Control(app).mailbox.get_queue(node)(connection.default_channel))
        again.append(app.events.Receiver(connection.channel(), node_id=events.split('.', 1)[1]).queue)
        again = [queue(connection.default_channel).queue_declare()[0] for queue in again]
    heard = []
    def note(event):
        heard.append(event['hostname'])
        receiver.should_stop = len(set(heard)) == 2
    receiver = app.events.Receiver(connection.channel(), handlers={'worker-heartbeat': note})
    receiver.capture(limit=None, timeout=60)
pongs = app.control.ping(timeout=60, limit=2)
answer([again, sorted(set(heard)), len(pongs)])
";

#[test]
fn queues_of_control_and_events_are_made_as_the_settings_say() {
    let usual = json!({
        "control": {"durable": false, "auto_delete": true, "exclusive": true,
            "arguments": {"x-message-ttl": 300_000, "x-expires": 10_000}},
        "events": {"durable": false, "auto_delete": true, "exclusive": true,
            "arguments": {"x-message-ttl": 5000, "x-expires": 60_000}},
    });
    let given = json!({
        "control_queue_exclusive": false, "control_queue_durable": true,
        "control_queue_ttl": 100.0, "control_queue_expires": 20.0,
        "event_queue_exclusive": false, "event_queue_durable": true,
        "event_queue_ttl": 7.0, "event_queue_expires": 30.0, "event_queue_prefix": "watch",
    });
    let wanted = json!({
        "control": {"durable": true, "auto_delete": false, "exclusive": false,
            "arguments": {"x-message-ttl": 100_000, "x-expires": 20_000}},
        "events": {"durable": true, "auto_delete": false, "exclusive": false,
            "arguments": {"x-message-ttl": 7000, "x-expires": 30_000}},
    });
    for (settings, wanted, prefix) in [(json!({}), usual, "celeryev"), (given, wanted, "watch")] {
        let broker = Broker::rabbitmq();
        let mut worker = broker.worker();
        for (name, value) in settings.as_object().unwrap() {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            worker = worker.env(&format!("CELERY_{}", name.to_uppercase()), &text);
        }
        let worker = worker.start();
        let one = |start: &str| {
            wait_for("one queue of that name", PATIENCE, || {
                <[_; 1]>::try_from(declared(&broker, start)).ok()
            })
        };
        let [(control, about)] = one(&worker.node);
        assert_eq!(control, format!("{}.celery.pidbox", worker.node));
        assert_eq!(about, wanted["control"]);
        let [(events, about)] = one(prefix);
        assert_eq!(about, wanted["events"]);

        let text = settings.to_string();
        let python = worker.python().env("PEER_SETTINGS", &text);
        let peer = python.spawn(&["-c", PEER]);
        wait_for("the Python worker", PATIENCE, || {
            peer.log().contains("ready.").then_some(())
        });
        let answer = worker.ask(SAME_SETTINGS, &[&text, &worker.node, &events]);
        let both = [control, events];
        let again = if text == "{}" { &both[..0] } else { &both };
        assert_eq!(answer[0], json!(again));
        assert_eq!(answer[1].as_array().unwrap().len(), 2, "{answer}");
        assert_eq!(answer[2], 2, "{answer}");
        for log in [worker.log(), peer.log()] {
            assert!(
                !log.contains("PRECONDITION") && !log.contains("LOCKED"),
                "{log}"
            );
        }
    }
    let both = Worker::on(&services::rabbitmq())
        .env("CELERY_EVENT_QUEUE_DURABLE", "true")
        .start_without_waiting();
    both.wait_log("CELERY_EVENT_QUEUE_EXCLUSIVE=false");
}

#[test]
fn what_is_wrong_with_the_address_is_said_without_its_password() {
    let right = url::Url::parse(&services::rabbitmq()).unwrap();
    let wrong = |change: fn(&mut url::Url)| {
        let mut url = right.clone();
        change(&mut url);
        url.to_string()
    };
    let cases = [
        (
            wrong(|url| url.set_password(Some("hunter2")).unwrap()),
            "ACCESS_REFUSED",
        ),
        (wrong(|url| url.set_path("/elsewhere")), "elsewhere"),
        (wrong(|url| url.set_port(Some(9)).unwrap()), "refused"),
    ];
    for (url, said) in cases {
        let worker = Worker::on(&url).start_without_waiting();
        worker.wait_log("Cannot connect to amqp://guest:**@127.0.0.1:");
        let log = worker.log();
        assert!(log.contains(said), "{said}: {log}");
        assert!(
            !log.contains("hunter2") && !log.contains("guest:guest"),
            "{log}"
        );
    }
}

#[test]
fn a_queue_that_is_there_with_other_attributes_is_pointed_out() {
    let broker = Broker::rabbitmq();
    let (mut api, vhost) = broker.rabbit().unwrap();
    let (queue, exchange) = (unique("other"), unique("other"));
    let attributes = json!({"durable": true, "arguments": {"x-max-priority": 5}});
    api.request("PUT", &format!("queues/{vhost}/{queue}"), &attributes);
    let attributes = json!({"type": "topic", "durable": true});
    api.request("PUT", &format!("exchanges/{vhost}/{exchange}"), &attributes);
    for name in [&queue, &exchange] {
        let mut refused = broker.worker().queue(name).start_without_waiting();
        assert_eq!(refused.wait().code(), Some(1));
        let log = refused.log();
        assert!(
            log.contains(name) && log.contains("exists with other attributes"),
            "{log}"
        );
    }

    // It costs a worker that has other queues nothing.
    let worker = broker.worker().start();
    let add = "
answer(app.control.broadcast('add_consumer', {'queue': sys.argv[1]}, reply=True, timeout=60, limit=1))
";
    worker.ask(add, &[&queue]);
    worker.wait_log(&format!("Cannot consume from {queue}"));
    assert!(worker.log().contains("exists with other attributes"));

    // Made anew under a worker that does not look: tried until it is put right.
    let path = format!("queues/{vhost}/{}", worker.queue);
    let before = worker.log().matches("exists with other attributes").count();
    worker.signal(Signal::SIGSTOP);
    api.request("DELETE", &path, &Value::Null);
    let attributes = json!({"durable": true, "arguments": {"x-max-priority": 5}});
    api.request("PUT", &path, &attributes);
    worker.signal(Signal::SIGCONT);
    wait_for("refusals", PATIENCE, || {
        let refusals = worker.log().matches("exists with other attributes").count();
        (refusals >= before + 2).then_some(())
    });
    api.request("DELETE", &path, &Value::Null);
    assert_eq!(worker.ask(MANY, &["3"]), json!(3));
}
