//! Calls and what the settings make of them: zones, repeated and cancelled tasks, chords that
//! are watched, ETA tasks, and Rust programs that call.

use std::time::Duration;

use serde_json::{Value, json};

use super::support::{
    Broker, GitServer, Repository, on_brokers, python, services, unique, wait_for,
};

/// What a Rust program declares in order to call.
#[allow(non_local_definitions, reason = "the crate's macro writes them")]
mod declared {
    #[celery::task(name = "test_task")]
    pub(super) async fn test_task(message: String) -> celery::task::TaskResult<String> {
        Ok(message)
    }
}

on_brokers!(a_rust_program_calls_python_and_celeriac_alike);
fn a_rust_program_calls_python_and_celeriac_alike(broker: &Broker) {
    let queue = unique("q");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let transport = broker.transport();
    let app = runtime
        .block_on(celeriac::worker::app::caller(transport, &queue))
        .unwrap();
    let send = |text: &str| {
        let call = declared::test_task::new(text.to_owned()).with_time_limit(30);
        runtime.block_on(app.send_task(call)).unwrap().task_id
    };
    let first = send("to whom it concerns");
    let mut raw = broker.raw(&queue);
    let [message] = raw.messages().try_into().unwrap();
    let headers = &message["headers"];
    assert_eq!(headers["argsrepr"], "()");
    assert_eq!(headers["kwargsrepr"], "{'message': 'to whom it concerns'}");
    assert_eq!(headers["timelimit"], json!([30, null]));
    assert_eq!(headers["root_id"], json!(first));
    {
        let client = python::Python::new(&broker.url, &broker.results, &queue);
        let _python = super::canvas::python_worker_of(client, &queue);
        assert_eq!(raw.value(&first), "celeriac received: to whom it concerns");
    }
    let worker = broker.worker().queue(&queue).start();
    let second = send("안녕");
    let value = worker.ask(
        "answer(AsyncResult(sys.argv[1]).get(timeout=30))",
        &[&second],
    );
    assert_eq!(value, "celeriac received: 안녕");
    runtime.block_on(app.close()).unwrap();
}

on_brokers!(times_are_shown_in_the_zone_of_the_settings);
fn times_are_shown_in_the_zone_of_the_settings(broker: &Broker) {
    let cases = [
        (vec![("CELERY_TIMEZONE", "Asia/Seoul")], "+09:00", "+09:00"),
        (
            vec![("CELERY_ENABLE_UTC", "false"), ("TZ", "Asia/Kolkata")],
            "+05:30",
            "+00:00",
        ),
        (vec![("TZ", "Asia/Kolkata")], "+00:00", "+00:00"),
    ];
    for (variables, own, naive) in cases {
        let mut worker = broker.worker();
        for (name, value) in &variables {
            worker = worker.env(name, value);
        }
        let worker = worker.start();
        let mut raw = broker.raw(&worker.queue);
        let id = raw.send("test_task", json!(["now"]));
        let done = raw.wait(&id)["date_done"].as_str().unwrap().to_owned();
        assert!(done.ends_with(own), "{variables:?}: {done}");
        // A retry, and with it any countdown, is dated alike: seen in what a link publishes.
        let callback = json!({"task": "test_task", "args": [], "kwargs": {}, "immutable": false,
            "subtask_type": null, "options": {"countdown": 3600, "task_id": unique("later"), "queue": worker.queue}});
        let embed = json!({"callbacks": [callback]});
        let headers = json!({"eta": "2999-01-01T00:00:00", "expires": "2999-01-02T00:00:00"});
        let far = raw.send_with("test_task", json!(["far"]), &headers);
        let mut linked = super::support::raw::envelope(
            &worker.queue,
            "test_task",
            &unique("t"),
            &json!(["a"]),
            &json!({}),
        );
        super::support::raw::set_embed(&mut linked, &embed);
        raw.push_envelope(&linked);
        let scheduled = wait_for("both ETA tasks", Duration::from_secs(20), || {
            let scheduled = worker.ask("answer(next(iter(inspect.scheduled().values())))", &[]);
            (scheduled.as_array()?.len() == 2).then_some(scheduled)
        });
        for entry in scheduled.as_array().unwrap() {
            let eta = entry["eta"].as_str().unwrap();
            let expected = if entry["request"]["id"] == json!(far) {
                naive
            } else {
                own
            };
            assert!(eta.ends_with(expected), "{variables:?}: {entry}");
        }
    }
    let mut refused = broker
        .worker()
        .env("CELERY_TIMEZONE", "Mars/Olympus")
        .start_without_waiting();
    assert!(!refused.wait().success());
    assert!(refused.log().contains("Mars/Olympus"), "{}", refused.log());
}

on_brokers!(a_task_that_waits_for_its_eta_is_shown_found_revoked_and_run);
fn a_task_that_waits_for_its_eta_is_shown_found_revoked_and_run(broker: &Broker) {
    let worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let ask = |script: &str, id: &str| worker.ask(script, &[id]);
    let far = json!({"eta": "2999-01-01T00:00:00+02:00", "custom": {"a": [1, 2.5]}});
    let revoked = raw.send_with("test_task", json!([{"deep": ["ä", null]}]), &far);
    let soon = chrono::Utc::now() + Duration::from_secs(4);
    let soon = json!({"eta": soon.to_rfc3339()});
    let runs = raw.send_with("test_task", json!(["soon"]), &soon);
    worker.wait_log(&format!("{runs}] received"));
    let found = ask(
        "answer(next(iter(inspect.query_task([sys.argv[1]]).values())))",
        &revoked,
    );
    assert_eq!(found[&revoked][0], "scheduled", "{found}");
    assert_eq!(found[&revoked][1]["args"], json!([{"deep": ["ä", null]}]));
    let told = ask(
        "answer(app.control.terminate(sys.argv[1], reply=True, timeout=60, limit=1)[0])",
        &revoked,
    );
    let told = told[&worker.node]["ok"].as_str().unwrap().to_owned();
    assert_eq!(told, format!("terminate: {revoked}"));
    assert_eq!(raw.value(&runs), "celeriac received: soon");
    assert_eq!(raw.wait(&revoked)["status"], "REVOKED");
}

on_brokers!(a_task_that_succeeded_before_is_not_run_and_calls_nothing_again);
fn a_task_that_succeeded_before_is_not_run_and_calls_nothing_again(broker: &Broker) {
    let queue = unique("q");
    let start = || {
        let worker = broker.worker().queue(&queue);
        worker
            .env("CELERY_WORKER_DEDUPLICATE_SUCCESSFUL_TASKS", "true")
            .env("CELERY_TASK_ACKS_LATE", "true")
            .start()
    };
    let mut raw = broker.raw(&queue);
    let (id, called) = (unique("t"), unique("called"));
    let callback = json!({"task": "test_task", "args": [], "kwargs": {}, "immutable": false,
        "subtask_type": null, "options": {"task_id": called, "queue": queue}});
    let message = |redelivered: bool| {
        let headers = json!({"redelivered": redelivered});
        let arguments = json!(["once"]);
        let mut message =
            super::support::raw::envelope(&queue, "test_task", &id, &arguments, &headers);
        super::support::raw::set_embed(&mut message, &json!({"callbacks": [callback]}));
        message["properties"]["delivery_info"]["redelivered"] = json!(redelivered);
        message
    };
    let mut first = start();
    raw.push_envelope(&message(false));
    raw.wait(&id);
    raw.wait(&called);
    raw.wait_drained();
    first.stop();
    raw.push_envelope(&message(true));
    // RabbitMQ itself marks what was handed out and came back, as by looking at it here.
    assert_eq!(raw.messages().len(), 1);
    let second = start();
    second.wait_log("ignored: Task already completed successfully.");
    raw.wait_drained();
    let log = first.log() + &second.log();
    assert_eq!(log.matches(&format!("{id}] succeeded")).count(), 1);
    assert_eq!(log.matches(&format!("{called}] received")).count(), 1);
}

on_brokers!(a_lost_broker_ends_late_tasks_where_the_settings_say_so, own);
fn a_lost_broker_ends_late_tasks_where_the_settings_say_so(broker: &mut Broker) {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    for cancels in [true, false] {
        let worker = broker
            .worker()
            .concurrency(1)
            .env(
                "CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS",
                if cancels { "true" } else { "false" },
            )
            .start();
        let (url, gate) = git.gated(&repository);
        let mut raw = broker.raw(&worker.queue);
        let id = raw.send("analyze_repo_task", json!([1, url]));
        gate.wait_arrivals(1);
        broker.close_connections();
        worker.wait_log("Connection to broker lost");
        if cancels {
            // Ended, told, and begun anew with the message that came again.
            worker.wait_log(
                "cannot be acknowledged after a connection loss since late acknowledgement is enabled",
            );
            wait_for("its second coming", Duration::from_secs(20), || {
                let text = format!("{id}] received");
                (worker.log().matches(&text).count() == 2).then_some(())
            });
        }
        wait_for("the next connection", Duration::from_secs(20), || {
            (worker.log().matches("Connected to").count() > 1).then_some(())
        });
        gate.open();
        let mut raw = broker.raw(&worker.queue);
        assert_eq!(raw.value(&id)["total_contributors"], 1);
        raw.wait_drained();
        let log = worker.log();
        let received = log.matches(&format!("{id}] received")).count();
        assert_eq!(received, if cancels { 2 } else { 1 }, "{log}");
        assert_eq!(log.contains("Terminating it instead."), cancels);
        let skipped = log.contains("Skipping prefetch count reduction");
        assert_eq!(skipped, broker.is_redis());
    }
}

/// A chord, a chord that is a step of a chain, one with a nested header, and one that fails.
const CHORDS: &str = "
from celery import chain, chord, group
app.tasks['test_task'].typing = False
task = lambda *args: app.signature('test_task', args=args, queue=QUEUE)
plain = chord([task('a'), task('b')], task()).apply_async()
step = chain(task('c'), group(task(), task()), task()).apply_async()
nested = chord([task('d'), chain(task('e'), task())], task()).apply_async()
failing = chord([task('f'), task('g', 'wrong')], task()).apply_async()
single = chord([task('h')], group(task(), task())).apply_async()
values = [one.get(timeout=60) for one in (plain, step, nested, single)]
try:
    app.AsyncResult(failing.id).get(timeout=60)
except Exception as error:
    values.append([type(error).__name__, str(error).split(' raised ')[-1]])
answer(values)
";

on_brokers!(chords_are_joined_on_result_backends_that_cannot_count);
fn chords_are_joined_on_result_backends_that_cannot_count(broker: &Broker) {
    let postgres = services::postgres();
    let directory = tempfile::tempdir().unwrap();
    let sqlite = format!("db+sqlite:///{}/results.db", directory.path().display());
    let server = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    let received = |text: &str| format!("celeriac received: {text}");
    let twice = |text: &str| received(&received(text));
    let of = |parts: [String; 2]| received(&format!("['{}', '{}']", parts[0], parts[1]));
    let expected = json!([
        of([received("a"), received("b")]),
        of([twice("c"), twice("c")]),
        of([received("d"), twice("e")]),
        [
            received(&format!("['{}']", received("h"))),
            received(&format!("['{}']", received("h")))
        ],
        [
            "ChordError",
            "TypeError('test_task() takes 1 positional argument but 2 were given')"
        ],
    ]);
    for (url, with_peer) in [(&sqlite, false), (&server, true)] {
        let queue = unique("q");
        let worker = broker
            .worker()
            .queue(&queue)
            .backend(url)
            .env("CELERY_TASK_DEFAULT_QUEUE", &queue)
            .env("CELERY_RESULT_CHORD_RETRY_INTERVAL", "0.2")
            .start();
        // The two take turns, whoever is first.
        let _peer = with_peer.then(|| {
            let client = python::Python::new(&broker.url, url, &queue);
            super::canvas::python_worker_of(client, &queue)
        });
        let script = format!("app.conf.task_default_queue = QUEUE\n{CHORDS}");
        assert_eq!(worker.ask(&script, &[]), expected, "{url}");
    }
    let registered = {
        let worker = broker.worker().start();
        worker.ask(
            "
ask = lambda **kw: next(iter(app.control.broadcast('registered', arguments=kw, reply=True,
                                                   limit=1, timeout=60)[0].values()))
answer([ask(taskinfoitems=[]), ask(taskinfoitems=[], builtins=True)])
",
            &[],
        )
    };
    assert_eq!(registered[0], json!(["analyze_repo_task", "test_task"]));
    let all = registered[1].as_array().unwrap();
    assert!(all.contains(&Value::from("celery.chord_unlock")), "{all:?}");
}

on_brokers!(a_late_task_that_fails_or_takes_too_long_is_settled_as_the_settings_say);
fn a_late_task_that_fails_or_takes_too_long_is_settled_as_the_settings_say(broker: &Broker) {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    // (settings, runs until it is over)
    let cases: [(&[&str], usize); 4] = [
        (&[], 1),
        (&["CELERY_TASK_ACKS_ON_FAILURE_OR_TIMEOUT"], 2),
        (&["CELERY_TASK_ACKS_ON_TIMEOUT"], 2),
        (&["CELERY_TASK_ACKS_ON_FAILURE"], 1),
    ];
    for (off, runs) in cases {
        let worker = off
            .iter()
            .fold(broker.worker(), |worker, name| worker.env(name, "false"));
        let worker = worker
            .concurrency(1)
            .env("CELERY_TASK_ACKS_LATE", "true")
            // The second run has to end within it.
            .env("CELERY_TASK_TIME_LIMIT", "4")
            .start();
        let mut raw = broker.raw(&worker.queue);
        let failed = raw.send("test_task", json!([]));
        assert_eq!(raw.wait(&failed)["status"], "FAILURE");
        raw.wait_drained();
        assert_eq!(
            worker.log().matches(&format!("{failed}] received")).count(),
            1
        );
        let (url, gate) = git.gated(&repository);
        let slow = raw.send("analyze_repo_task", json!([1, url]));
        let received = format!("{slow}] received");
        wait_for("its runs", Duration::from_secs(20), || {
            (worker.log().matches(&received).count() == runs).then_some(())
        });
        if runs > 1 {
            gate.open();
            assert_eq!(raw.value(&slow)["total_contributors"], 1, "{off:?}");
        } else {
            assert_eq!(raw.wait(&slow)["result"]["exc_type"], "TimeLimitExceeded");
        }
        raw.wait_drained();
        assert_eq!(worker.log().matches(&received).count(), runs, "{off:?}");
    }
}

on_brokers!(a_lost_child_is_a_retry_where_the_settings_say_so);
fn a_lost_child_is_a_retry_where_the_settings_say_so(broker: &Broker) {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let git = GitServer::start();
    let worker = broker
        .worker()
        .concurrency(1)
        .env("CELERY_TASK_RETRY_ON_WORKER_LOST", "true")
        // Long enough to see the state, which ends with the pause.
        .env("ANALYSIS_RETRY_BACKOFF", "8")
        .env("ANALYSIS_RETRY_JITTER", "0")
        .start();
    let (url, gate) = git.gated(&repository);
    let mut raw = broker.raw(&worker.queue);
    let id = raw.send("analyze_repo_task", json!([1, url]));
    gate.wait_arrivals(1);
    let inspect = "answer(next(iter(inspect.active().values()))[0]['worker_pid'])";
    let child = worker.ask(inspect, &[]).as_i64().unwrap();
    let child = nix::unistd::Pid::from_raw(i32::try_from(child).unwrap());
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
    let retried = wait_for("the state RETRY", Duration::from_secs(20), || {
        (raw.status(&id) == "RETRY").then(|| raw.meta(&id))?
    });
    assert_eq!(
        retried["result"]["exc_type"], "WorkerLostError",
        "{retried}"
    );
    assert_eq!(retried["children"], json!([[[id, null], null]]));
    gate.open();
    assert_eq!(raw.value(&id)["total_contributors"], 1);
    raw.wait_drained();
}

/// Sends each value to the check, and says where the answer is not what Python would say.
const VALUES: &str = "
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from kombu.utils.json import dumps, loads
seoul = timezone(timedelta(hours=9))
values = [datetime(2024, 1, 2, 3, 4, 5, 6, seoul), datetime(2024, 1, 2, 3, 4, tzinfo=timezone.utc),
          datetime(2024, 1, 2, 3, 4, 5), date(2024, 1, 2), time(3, 4, 5), Decimal('1.50'), b'it is',
          bytes([255, 0]), uuid.UUID('02fbfa3d-a302-4e33-815e-c58fbf8e6123'), None, True, 1e300, -0.0,
          2**70, '안녕 \\U0001f980 \\x00 \\u2028', {'ä': [date(2024, 1, 2), {}]}, [[[]], '\\'\"']]
sent = [(value, app.send_task('test_task', args=(value,), queue=QUEUE)) for value in values]
found = [(f'celeriac received: {loads(dumps(value))}', result.get(timeout=200)) for value, result in sent]
answer([len(found), [pair for pair in found if pair[0] != pair[1]]])
";

/// The most that a call may carry, in letters that JSON writes three times as long.
const LARGE: &str = "
text = 'ß' * (25 << 20)
large = app.send_task('test_task', args=(text,), queue=QUEUE, argsrepr='large', compression='zlib')
assert large.get(timeout=200) == 'celeriac received: ' + text
answer(len(text.encode()))
";

on_brokers!(values_of_every_kind_and_size_arrive_as_they_were_sent);
fn values_of_every_kind_and_size_arrive_as_they_were_sent(broker: &Broker) {
    let worker = broker.worker().start();
    assert_eq!(worker.ask(VALUES, &[]), json!([17, []]));
    assert_eq!(worker.ask(LARGE, &[]), 50 << 20);
    assert!(!worker.log().contains("ßßßß"));
}
