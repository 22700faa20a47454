//! Remote control and events, as the real Python client sees them.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use redis::Commands as _;
use serde_json::{Value, json};

use crate::support::{Broker, GitServer, Repository, Worker, on_brokers, services, wait_for};

/// `call(name, arguments)`: the reply of the one worker, and whether there was one.
const CALL: &str = "\
node = sys.argv[1]
def call(method, **arguments):
    got = app.control.broadcast(method, arguments, destination=[node], reply=True, timeout=60)
    return got[0][node] if got else 'no reply'
";

pub(crate) fn calls(worker: &Worker, calls: &Value) -> Value {
    let script = format!(
        "{CALL}answer([call(method, **arguments) for method, arguments in json.loads(sys.argv[2])])"
    );
    worker.ask(&script, &[&worker.node, &calls.to_string()])
}

pub(crate) fn call(worker: &Worker, method: &str, arguments: Value) -> Value {
    calls(worker, &json!([[method, arguments]]))[0].clone()
}

/// A repository behind a gate: its analysis holds a slot until the gate opens.
fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    repository
}

fn send(worker: &Worker, script: &str) -> String {
    let script = format!("answer(app.send_task({script}, queue=QUEUE).id)");
    worker.ask(&script, &[]).as_str().unwrap().to_owned()
}

/// The keys in their order, and the types of the values, all the way down.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), shape(value)))
            .collect(),
        Value::Array(items) => items.iter().take(1).map(shape).collect(),
        Value::String(_) => "text".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "bool".into(),
        Value::Null => Value::Null,
    }
}

on_brokers!(replies_have_the_shape_of_celerys);
fn replies_have_the_shape_of_celerys(broker: &Broker) {
    let worker = broker.worker().start();
    let eta = send(&worker, "'test_task', args=['x'], countdown=600");
    let queue = json!({
        "name": "text",
        "exchange": {"name": "text", "type": "text", "arguments": null, "durable": "bool",
            "passive": "bool", "auto_delete": "bool", "delivery_mode": null, "no_declare": "bool"},
        "routing_key": "text", "queue_arguments": null, "binding_arguments": null,
        "consumer_arguments": null, "durable": "bool", "exclusive": "bool", "auto_delete": "bool",
        "no_ack": "bool", "alias": null, "bindings": [], "no_declare": null, "expires": null,
        "message_ttl": null, "max_length": null, "max_length_bytes": null, "max_priority": null,
    });
    let request = json!({
        "id": "text", "name": "text", "args": ["text"], "kwargs": {}, "type": "text",
        "hostname": "text", "time_start": null, "acknowledged": "bool",
        "delivery_info": {"exchange": "text", "routing_key": "text", "priority": "number",
            "redelivered": "bool"},
        "worker_pid": null,
    });
    let login = if broker.is_redis() {
        Value::Null
    } else {
        "text".into()
    };
    let stats = json!({
        "total": {}, "pid": "number", "clock": "text", "uptime": "number",
        "pool": {"implementation": "text", "max-concurrency": "number", "processes": ["number"],
            "max-tasks-per-child": "number", "put-guarded-by-semaphore": "bool",
            "timeouts": ["number"],
            "writes": {"total": "number", "avg": "text", "all": "text", "raw": "text",
                "strategy": "text", "inqueues": {"total": "number", "active": "number"}}},
        "broker": {"hostname": "text", "userid": login, "virtual_host": "text", "port": "number",
            "insist": "bool", "ssl": "bool", "transport": "text", "connect_timeout": "number",
            "transport_options": {}, "login_method": login, "uri_prefix": null,
            "heartbeat": "number", "failover_strategy": "text", "alternates": [],
            "credential_provider": null},
        "prefetch_count": "number",
        "rusage": {"utime": "number", "stime": "number", "maxrss": "number", "ixrss": "number",
            "idrss": "number", "isrss": "number", "minflt": "number", "majflt": "number",
            "nswap": "number", "inblock": "number", "oublock": "number", "msgsnd": "number",
            "msgrcv": "number", "nsignals": "number", "nvcsw": "number", "nivcsw": "number"},
    });
    worker.wait_log(&format!("[{eta}] received, ETA"));
    let got = calls(
        &worker,
        &json!([["active_queues", {}], ["scheduled", {}], ["stats", {}], ["clock", {}],
            ["hello", {"from_node": "other@host", "revoked": {"old-peer": 1.5}}],
            ["query_task", {"ids": eta}], ["report", {}], ["memdump", {}]]),
    );
    assert_eq!(shape(&got[0]), json!([queue]));
    assert_eq!(
        shape(&got[1]),
        json!([{"eta": "text", "priority": "number", "request": request}])
    );
    assert_eq!(got[1][0]["priority"], 6);
    assert_eq!(shape(&got[2]), stats, "{}", got[2]);
    let keys = |value: &Value| {
        value
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(keys(&got[2]), keys(&stats), "in this order");
    assert_eq!(shape(&got[3]), json!({"clock": "number"}));
    assert_eq!(
        shape(&got[4]),
        json!({"revoked": ["text"], "clock": "number"})
    );
    assert_eq!(got[4]["revoked"], json!(["old-peer"]));
    assert_eq!(got[5][&eta][0], "scheduled");
    assert!(
        got[6]["ok"]
            .as_str()
            .unwrap()
            .contains("software -> celeriac")
    );
    assert!(got[7].as_str().unwrap().starts_with("- rss: "));
}

on_brokers!(autoscale_follows_the_load_and_obeys_its_command);
fn autoscale_follows_the_load_and_obeys_its_command(broker: &Broker) {
    let worker = broker
        .worker()
        .option("--autoscale=1,3")
        .env("AUTOSCALE_KEEPALIVE", "0.5")
        .start();
    assert!(worker.log().contains("{min=1, max=3} (prefork)"));
    let stats = call(&worker, "stats", json!({}));
    assert_eq!(
        stats["autoscaler"],
        json!({"max": 3, "min": 1, "current": 1, "qty": 0})
    );
    assert_eq!(stats["prefetch_count"], 3);
    let (repository, server) = (repository(), GitServer::start());
    // One URL each: analyses of the same repository wait for each other.
    let gates: Vec<_> = (0..3).map(|_| server.gated(&repository)).collect();
    for (url, _) in &gates {
        send(&worker, &format!("'analyze_repo_task', args=[1, '{url}']"));
    }
    for (_, gate) in &gates {
        gate.wait_arrivals(1);
    }
    let stats = call(&worker, "stats", json!({}));
    assert_eq!(stats["autoscaler"]["current"], 3);
    assert_eq!(stats["pool"]["processes"].as_array().unwrap().len(), 3);
    let refused = |name: &str| json!({"error": format!("{name} is not supported with autoscale. Adjust autoscale range instead.")});
    assert_eq!(call(&worker, "pool_grow", json!({})), refused("pool_grow"));
    assert_eq!(
        call(&worker, "pool_shrink", json!({})),
        refused("pool_shrink")
    );
    for (_, gate) in &gates {
        gate.open();
    }
    // In one step or two: as the tasks end together or one after the other.
    wait_for(
        "a pool at its smallest size",
        Duration::from_secs(20),
        || {
            let stats = call(&worker, "stats", json!({}));
            (stats["autoscaler"]["current"] == 1).then_some(())
        },
    );
    worker.wait_log("Scaling down ");
    let reply = call(&worker, "autoscale", json!({"max": 5, "min": 2}));
    assert_eq!(reply, json!({"ok": "autoscale now max=5 min=2"}));
    let stats = call(&worker, "stats", json!({}));
    assert_eq!(
        stats["autoscaler"],
        json!({"max": 5, "min": 2, "current": 2, "qty": 0})
    );
    assert_eq!(stats["prefetch_count"], 5);
}

on_brokers!(revoked_ids_and_the_clock_survive_a_restart);
fn revoked_ids_and_the_clock_survive_a_restart(broker: &Broker) {
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("%n.state").to_string_lossy().into_owned();
    let on = |queue: &str| {
        // Not in the database of the broker, so that only the file can have kept it.
        broker
            .worker()
            .queue(queue)
            .name("kept")
            .option("--statedb")
            .option(&path)
    };
    let queue = crate::support::unique("q");
    let mut worker = on(&queue).start();
    call(&worker, "revoke", json!({"task_id": ["kept-1", "kept-2"]}));
    call(
        &worker,
        "revoke_by_stamped_headers",
        json!({"headers": {"batch": "b-17"}}),
    );
    let clock = call(&worker, "clock", json!({}))["clock"].as_u64().unwrap();
    worker.stop();
    let results = redis::Client::open(broker.results.as_str()).unwrap();
    let mut results = results.get_connection().unwrap();
    let _: () = results.del("celeriac.revoked").unwrap();
    let worker = on(&queue).start();
    assert_eq!(
        call(&worker, "revoked", json!({})),
        json!(["kept-1", "kept-2"])
    );
    assert!(call(&worker, "clock", json!({}))["clock"].as_u64().unwrap() > clock);
    let states = worker.ask(
        "from celery.exceptions import TaskRevokedError
def end(result):
    try:
        return result.get(timeout=60) and 'ran'
    except TaskRevokedError:
        return 'revoked'
stamped = app.signature('test_task', args=['x'], queue=QUEUE)
stamped.stamp(batch='b-17')
answer([end(app.send_task('test_task', args=['x'], task_id='kept-2', queue=QUEUE)),
        end(stamped.apply_async()), end(app.send_task('test_task', args=['x'], queue=QUEUE))])",
        &[],
    );
    assert_eq!(states, json!(["revoked", "revoked", "ran"]));
    // A crash a moment after a revocation.
    call(&worker, "revoke", json!({"task_id": "kept-3"}));
    let text = || std::fs::read_to_string(file.path().join("kept.state")).unwrap_or_default();
    wait_for("the state file", Duration::from_secs(10), || {
        text().contains("kept-3").then_some(())
    });
}

#[test]
fn workers_that_start_later_know_what_was_revoked() {
    let redis = services::redis();
    let first = Worker::on(&redis.url).start();
    call(&first, "revoke", json!({"task_id": ["shared-1"]}));
    let ttl = wait_for("the shared record", Duration::from_secs(5), || {
        let ttl: i64 = redis.connect().ttl("celeriac.revoked").unwrap();
        (ttl > 0).then_some(ttl)
    });
    assert!(ttl <= 10_800, "{ttl}");
    drop(first);
    let later = Worker::on(&redis.url).option("--without-mingle").start();
    assert_eq!(call(&later, "revoked", json!({})), json!(["shared-1"]));
}

on_brokers!(a_waiting_task_is_revoked_at_once_for_its_client_and_never_runs);
fn a_waiting_task_is_revoked_at_once_for_its_client_and_never_runs(broker: &Broker) {
    let worker = broker.worker().concurrency(1).start();
    let (repository, server) = (repository(), GitServer::start());
    let (url, gate) = server.gated(&repository);
    let eta = send(&worker, "'test_task', args=['x'], countdown=600");
    worker.wait_log(&format!("[{eta}] received, ETA"));
    let running = send(&worker, &format!("'analyze_repo_task', args=[1, '{url}']"));
    gate.wait_arrivals(1);
    let script = format!(
        "{CALL}results = [AsyncResult(id) for id in sys.argv[2:4]]
call('revoke', task_id=results[0].id)
app.control.revoke(results[1].id, terminate=True, destination=[node])
for result in results:
    try: result.get(timeout=60)
    except Exception: pass
answer([[result.state for result in results], call('active')])"
    );
    let got = worker.ask(&script, &[&worker.node, &eta, &running]);
    assert_eq!(got[0], json!(["REVOKED", "REVOKED"]));
    assert_eq!(got[1], json!([]));
}

on_brokers!(terminating_kills_the_childs_whole_group);
fn terminating_kills_the_childs_whole_group(broker: &Broker) {
    let worker = broker.worker().concurrency(1).start();
    let (repository, server) = (repository(), GitServer::start());
    let (url, gate) = server.gated(&repository);
    let id = send(&worker, &format!("'analyze_repo_task', args=[1, '{url}']"));
    gate.wait_arrivals(1);
    let child = call(&worker, "active", json!({}))[0]["worker_pid"]
        .as_u64()
        .unwrap();
    let message = broadcast("terminate", &json!({"task_id": id, "signal": "SIGTERM"}));
    broker.mail().send(message.as_bytes());
    let began = Instant::now();
    wait_for("the end of the child", Duration::from_secs(60), || {
        (!std::path::Path::new(&format!("/proc/{child}")).exists()).then_some(())
    });
    println!("gone after {:?}", began.elapsed());
    let state = worker.ask(
        "result = AsyncResult(sys.argv[1])
try: result.get(timeout=60)
except Exception: pass
answer(result.state)",
        &[&id],
    );
    assert_eq!(state, "REVOKED");
}

on_brokers!(a_time_limit_counts_for_tasks_that_are_already_reserved);
fn a_time_limit_counts_for_tasks_that_are_already_reserved(broker: &Broker) {
    let worker = broker
        .worker()
        .concurrency(1)
        .env("CELERY_WORKER_PREFETCH_MULTIPLIER", "2")
        .start();
    let (repository, server) = (repository(), GitServer::start());
    let (first, first_gate) = server.gated(&repository);
    let (second, second_gate) = server.gated(&repository);
    send(
        &worker,
        &format!("'analyze_repo_task', args=[1, '{first}']"),
    );
    first_gate.wait_arrivals(1);
    let id = send(
        &worker,
        &format!("'analyze_repo_task', args=[1, '{second}']"),
    );
    worker.wait_log(&format!("[{id}] received"));
    call(
        &worker,
        "time_limit",
        json!({"task_name": "analyze_repo_task", "hard": 1}),
    );
    first_gate.open();
    second_gate.wait_arrivals(1);
    worker.wait_log(&format!(
        "Hard time limit (1s) exceeded for analyze_repo_task[{id}]"
    ));
}

on_brokers!(a_rate_limit_changes_what_waits);
fn a_rate_limit_changes_what_waits(broker: &Broker) {
    let worker = broker
        .worker()
        .env("CELERY_WORKER_PREFETCH_MULTIPLIER", "20")
        .start();
    let seconds = worker.ask(
        &format!(
            "{CALL}import time
call('rate_limit', task_name='test_task', rate_limit='1/h')
results = [app.send_task('test_task', args=[str(n)], queue=QUEUE) for n in range(6)]
results[0].get(timeout=60)
waiting = [result.state for result in results[1:]]
began = time.time()
call('rate_limit', task_name='test_task', rate_limit='10/s')
for result in results[1:]: result.get(timeout=60)
answer([waiting, time.time() - began])"
        ),
        &[&worker.node],
    );
    assert_eq!(
        seconds[0],
        json!(["PENDING", "PENDING", "PENDING", "PENDING", "PENDING"])
    );
    let spent = seconds[1].as_f64().unwrap();
    assert!(spent >= 0.35, "{spent}");
}

on_brokers!(elections_end_with_one_winner_and_never_with_the_worker);
fn elections_end_with_one_winner_and_never_with_the_worker(broker: &Broker) {
    let queue = crate::support::unique("q");
    // Results outlive tests: an id that others have used may have one already.
    let id = crate::support::unique("elected-task");
    let received = format!("Task test_task[{id}] received");
    let workers = [
        broker.worker().queue(&queue).start(),
        broker.worker().queue(&queue).start(),
    ];
    let got = workers[0].ask(
        "from celery.result import AsyncResult
signature = app.signature('test_task', args=['elected'], queue=QUEUE, task_id=sys.argv[1])
app.control.broadcast('election', {'id': 'e1', 'topic': 'task', 'action': dict(signature)})
app.control.broadcast('election', {'id': 'e2', 'topic': 'nothing', 'action': None})
app.control.broadcast('election', {'id': ['odd'], 'topic': 3})
answer(AsyncResult(sys.argv[1]).get(timeout=60))",
        &[&id],
    );
    assert!(got.to_string().contains("elected"), "{got}");
    let logs = wait_for("the decision", Duration::from_secs(20), || {
        let logs = workers.iter().map(Worker::log).collect::<String>();
        let decided = |text: &str| logs.matches(text).count();
        let all = decided("I won the election 'e1'") + decided("elected for 'e1'");
        (all == 2 && decided(&received) > 0).then_some(logs)
    });
    assert_eq!(logs.matches("I won the election 'e1'").count(), 1, "{logs}");
    assert_eq!(logs.matches(&received).count(), 1);
    assert_eq!(
        workers[0].ask("answer(len(app.control.ping(timeout=60, limit=2)))", &[]),
        2
    );
}

on_brokers!(a_second_worker_of_the_same_name_is_pointed_out);
fn a_second_worker_of_the_same_name_is_pointed_out(broker: &Broker) {
    let first = broker.worker().name("twin").start();
    let second = broker.worker().name("twin").start();
    let warning = format!("A node named {} is already running", first.node);
    second.wait_log(&warning);
    first.wait_log(&warning);
}

on_brokers!(switched_off_commands_are_refused_by_every_name);
fn switched_off_commands_are_refused_by_every_name(broker: &Broker) {
    let worker = broker
        .worker()
        .env("CELERY_WORKER_DISABLED_COMMANDS", "shutdown,conf,pool_grow")
        .start();
    let got = calls(
        &worker,
        &json!([
            ["shutdown", {}],
            ["dump_conf", {}],
            ["pool_grow", {}],
            ["ping", {}]
        ]),
    );
    for refused in got.as_array().unwrap().iter().take(3) {
        let text = refused["error"]
            .as_str()
            .unwrap_or_else(|| panic!("{refused}"));
        assert!(text.contains("worker_disabled_commands"), "{text}");
    }
    assert_eq!(got[3], json!({"ok": "pong"}));
}

#[test]
fn clients_that_die_leave_no_key_without_an_end() {
    let redis = services::redis();
    let worker = Worker::start(&redis);
    let mut connection = redis.connect();
    let clients: Vec<String> = (0..200).map(|n| format!("dead-client-{n}")).collect();
    for client in &clients {
        let queue = format!("{client}.reply.celery.pidbox");
        let _: () = connection
            .sadd(
                "_kombu.binding.reply.celery.pidbox",
                format!("{client}\u{6}\u{16}\u{6}\u{16}{queue}"),
            )
            .unwrap();
        let message = request("ping", &json!({}), Some(client));
        let _: () = connection
            .publish(format!("/{}.celery.pidbox", database(&redis.url)), message)
            .unwrap();
    }
    for client in &clients {
        let list = format!("{client}.reply.celery.pidbox");
        let ttl = wait_for(&list, Duration::from_secs(20), || {
            let ttl: i64 = connection.ttl(&list).unwrap();
            (ttl > 0).then_some(ttl)
        });
        assert!(ttl <= 300, "{list}: {ttl}");
    }
    assert_eq!(call(&worker, "ping", json!({})), json!({"ok": "pong"}));
}

on_brokers!(no_bytes_in_the_mailbox_stop_the_worker);
fn no_bytes_in_the_mailbox_stop_the_worker(broker: &Broker) {
    let worker = broker.worker().start();
    let mut mail = broker.mail();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let end = Instant::now() + Duration::from_secs(5);
    let mut sent = 0;
    while Instant::now() < end {
        let message = match random.below(4) {
            0 => (0..random.below(300))
                .map(|_| random.below(256) as u8)
                .collect(),
            1 => random.json(4).to_string().into_bytes(),
            2 => {
                let body = random.json(4).to_string();
                envelope(&body, random.below(2) == 0).into_bytes()
            }
            _ => {
                const METHODS: [&str; 26] = [
                    "ping",
                    "active",
                    "reserved",
                    "scheduled",
                    "revoked",
                    "registered",
                    "stats",
                    "conf",
                    "report",
                    "clock",
                    "query_task",
                    "active_queues",
                    "hello",
                    "election",
                    "revoke",
                    "revoke_by_stamped_headers",
                    "terminate",
                    "rate_limit",
                    "time_limit",
                    "cancel_consumer",
                    "enable_events",
                    "disable_events",
                    "heartbeat",
                    "pool_shrink",
                    "autoscale",
                    "memdump",
                ];
                const NAMES: [&str; 14] = [
                    "task_id",
                    "terminate",
                    "signal",
                    "headers",
                    "task_name",
                    "rate_limit",
                    "soft",
                    "hard",
                    "n",
                    "ids",
                    "id",
                    "topic",
                    "from_node",
                    "revoked",
                ];
                let method = METHODS[random.below(26)];
                let arguments: Value = (0..random.below(5))
                    .map(|_| (NAMES[random.below(14)].to_owned(), random.json(3)))
                    .collect::<serde_json::Map<_, _>>()
                    .into();
                // The worker's own queue stays.
                request(method, &arguments, None).into_bytes()
            }
        };
        mail.send(&message);
        sent += 1;
        if sent % 200 == 0 {
            // As fast as the worker reads, so that nothing is skipped.
            assert_eq!(call(&worker, "ping", json!({})), json!({"ok": "pong"}));
        }
    }
    println!("{sent} messages");
    assert_eq!(call(&worker, "ping", json!({})), json!({"ok": "pong"}));
    let log = worker.log();
    assert!(!log.contains("panicked"), "{log}");
    let ran = worker.ask(
        "answer(str(app.send_task('test_task', args=['still here'], queue=QUEUE).get(timeout=60)))",
        &[],
    );
    assert!(ran.as_str().unwrap().contains("still here"));
}

on_brokers!(a_token_is_shown_nowhere);
fn a_token_is_shown_nowhere(broker: &Broker) {
    let mut worker = broker
        .worker()
        .concurrency(1)
        .option("-E")
        .env("CELERY_RESULT_EXTENDED", "1")
        .env("CELERY_WORKER_PREFETCH_MULTIPLIER", "20")
        .start();
    let (repository, server) = (repository(), GitServer::start());
    let (url, gate) = server.gated(&repository);
    let script = format!(
        "{CALL}import threading, time
from celery.events import EventReceiver
seen, ready = [], threading.Event()
def listen():
    with app.connection_for_read() as connection:
        receiver = EventReceiver(connection, handlers={{'*': seen.append}}, app=app)
        ready.set()
        try: receiver.capture(limit=None, timeout=60, wakeup=False)
        except Exception: pass
threading.Thread(target=listen, daemon=True).start()
ready.wait(10)
def wait(condition):
    end = time.time() + 60
    while time.time() < end and not condition():
        time.sleep(0.05)
# It listens once it has heard a heartbeat.
wait(lambda: seen)
url, mark = sys.argv[2], 'MARKER' + 'x7Q2v9Lp'
send = lambda *args, **options: app.send_task('analyze_repo_task', args=args, queue=QUEUE, **options)
held = send(1, url, mark)
later = send(1, url, kwargs={{'user_github_token': mark}}, countdown=600)
waits = [send(1, url, [mark]), send(1, url, kwargs={{'user_github_token': {{'deep': mark}}}}),
         send(1, url, mark, 'too', 'many'), send(1, url, mark, argsrepr=repr((1, url, mark))),
         send(1, 'https://user:' + mark + '@localhost:1/x', mark), send(1, None, mark)]
wait(lambda: call('active') and call('scheduled') and len(call('reserved')) >= 6)
shown = [call(method) for method in ('active', 'reserved', 'scheduled', 'stats', 'conf', 'report')]
shown.append(call('active', safe=True))
shown.append(call('query_task', ids=[one.id for one in waits + [held, later]]))
counts = [len(part) for part in shown[:3]]
print('ready', flush=True)
open(sys.argv[3], 'w').close()
for result in waits + [held]:
    try: result.get(timeout=60)
    except Exception: pass
shown.append([app.backend.get(app.backend.get_key_for_task(one.id)).decode() for one in waits + [held]])
ends = 'task-succeeded', 'task-failed', 'task-revoked'
wait(lambda: {{one.id for one in waits + [held]}} <= {{event['uuid'] for event in seen if event['type'] in ends}})
answer([counts, len([event for event in seen if event['type'].startswith('task-')]), mark in json.dumps([shown, seen], default=repr), [part for part in shown if mark in json.dumps(part, default=repr)], [event for event in seen if mark in json.dumps(event, default=repr)]])"
    );
    let flag = tempfile::tempdir().unwrap();
    let flag = flag.path().join("open");
    let opener = std::thread::spawn({
        let flag = flag.clone();
        move || {
            wait_for("the sign to open the gate", Duration::from_secs(60), || {
                flag.exists().then_some(())
            });
            gate.open();
        }
    });
    let got = worker.ask(&script, &[&worker.node, &url, &flag.to_string_lossy()]);
    opener.join().unwrap();
    assert_eq!(got[2], false, "{got}");
    assert_eq!(got[0], json!([1, 6, 1]), "all of them were looked at");
    assert!(got[1].as_u64().unwrap() > 14, "{got}");
    worker.signal(Signal::SIGUSR1);
    worker.stop();
    let log = worker.log();
    assert!(!log.contains("x7Q2v9Lp"), "{log}");
}

fn database(url: &str) -> &str {
    url.rsplit('/').next().unwrap()
}

fn broadcast(method: &str, arguments: &Value) -> String {
    request(method, arguments, None)
}

/// A request as kombu sends it.
fn request(method: &str, arguments: &Value, reply_to: Option<&str>) -> String {
    let mut body = json!({"method": method, "arguments": arguments, "destination": null,
        "pattern": null, "matcher": null});
    if let Some(oid) = reply_to {
        body["ticket"] = "ticket".into();
        body["reply_to"] = json!({"exchange": "reply.celery.pidbox", "routing_key": oid});
    }
    envelope(&body.to_string(), true)
}

fn envelope(body: &str, encoded: bool) -> String {
    use base64::Engine as _;
    let body = if encoded {
        base64::engine::general_purpose::STANDARD.encode(body)
    } else {
        body.to_owned()
    };
    json!({
        "body": body, "content-encoding": "utf-8", "content-type": "application/json",
        "headers": {"clock": 1, "expires": 0},
        "properties": {"delivery_mode": 2, "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
            "priority": 0, "body_encoding": "base64", "delivery_tag": crate::support::unique("t")},
    })
    .to_string()
}

/// A small generator with a fixed seed: a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit
    }

    fn json(&mut self, depth: usize) -> Value {
        const TEXTS: [&str; 10] = [
            "",
            "ping",
            "celery",
            "test_task",
            "glob",
            "*",
            "1/s",
            "SIGKILL",
            "a=b",
            "\u{0}\u{1f600}",
        ];
        match self.below(if depth == 0 { 6 } else { 9 }) {
            0 => Value::Null,
            1 => Value::Bool(self.below(2) == 0),
            2 => json!(self.below(1 << 40)),
            3 => json!(-1),
            4 => json!(1e300),
            5 => TEXTS[self.below(10)].into(),
            6 => (0..self.below(5)).map(|_| self.json(depth - 1)).collect(),
            _ => {
                const KEYS: [&str; 9] = [
                    "method",
                    "arguments",
                    "destination",
                    "pattern",
                    "matcher",
                    "ticket",
                    "reply_to",
                    "exchange",
                    "routing_key",
                ];
                let fields = (0..self.below(6)).map(|_| {
                    let key = KEYS[self.below(9)].to_owned();
                    (key, self.json(depth - 1))
                });
                Value::Object(fields.collect())
            }
        }
    }
}
