//! Settings of Celery about results, each by what it changes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::raw::Raw;
use super::support::worker::{Builder, Worker};
use super::support::{Broker, Proxy, fixed_port, services, unique, wait_for};

const PATIENCE: Duration = Duration::from_secs(40);

fn with(worker: Builder, settings: &[(&str, &str)]) -> Builder {
    let settings = settings.iter();
    settings.fold(worker, |worker, (name, value)| worker.env(name, value))
}

#[test]
fn a_result_is_tried_as_often_as_is_said() {
    let redis = services::redis();
    let nobody = format!("redis://127.0.0.1:{}/0", fixed_port());
    let policy = r#"{"retry_policy": {"max_retries": 5}}"#;
    let always = ("CELERY_RESULT_BACKEND_ALWAYS_RETRY", "true");
    let most = ("CELERY_RESULT_BACKEND_MAX_RETRIES", "7");
    let options = ("CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS", policy);
    let cases: [(&[(&str, &str)], &str); 6] = [
        (&[], "300"),
        (&[most], "7"),
        (&[always], "Inf"),
        (&[always, most], "7"),
        (&[options], "5"),
        (&[options, always], "Inf"),
    ];
    for (settings, most) in cases {
        let worker = with(Worker::on(&redis.url).backend(&nobody), settings).start();
        Raw::new(&redis.url, &worker.queue).send("test_task", json!(["a"]));
        worker.wait_log(&format!("Connection to Redis lost: Retry (1/{most})"));
    }
    let worker = Worker::on(&redis.url)
        .backend(&nobody)
        .env("CELERY_RESULT_BACKEND_MAX_RETRIES", "1")
        .start();
    let id = Raw::new(&redis.url, &worker.queue).send("test_task", json!(["a"]));
    worker.wait_log(&format!(
        "Cannot store the state SUCCESS of test_task[{id}]"
    ));
}

#[test]
fn a_redis_that_is_silent_is_given_up_after_the_times_that_are_said() {
    let redis = services::redis();
    // Where it is left at fifteen seconds each, neither comes to its end in time.
    let proxy = Proxy::before(&redis.url);
    let worker = Worker::on(&redis.url)
        .backend(&proxy.url(&redis.url))
        .env("CELERY_REDIS_SOCKET_TIMEOUT", "0.3")
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let mut done = || {
        let id = raw.send("test_task", json!(["a"]));
        raw.value(&id);
    };
    done();
    let began = Instant::now();
    for _ in 0..4 {
        // The connection is dead and does not know it; the next one works.
        proxy.strand();
        done();
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(45), "{took:?}");

    let proxy = Proxy::before(&redis.url);
    let worker = Worker::on(&redis.url)
        .backend(&proxy.url(&redis.url))
        .env("CELERY_REDIS_SOCKET_CONNECT_TIMEOUT", "0.2")
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let id = raw.send("test_task", json!(["a"]));
    raw.value(&id);
    proxy.stall();
    proxy.reset();
    raw.send("test_task", json!(["b"]));
    wait_for("four tries to connect", PATIENCE, || {
        let tries = worker.log().matches("Connection to Redis lost: ").count();
        (tries >= 4).then_some(())
    });
}

/// A chord with a part whose result is not stored, until somebody stores it after all, later than
/// chords are joined by default.
const LATE_PART: &str = "
import time
from celery import chain, chord, group
task = lambda *args: app.signature('test_task', args=args, queue=QUEUE)
parts = group(task(), task().set(ignore_result=True))
body = chord([chain(task('a'), parts), task('c')], task()).apply_async()
inner, last = body.parent.results
last.get(timeout=30)
time.sleep(4)
app.backend.store_result(inner.results[1].id, 'late', 'SUCCESS')
answer(body.get(timeout=60))
";

#[test]
fn a_chord_waits_for_its_results_as_long_as_is_said() {
    let redis = services::redis();
    let worker = Worker::on(&redis.url)
        .env("CELERY_RESULT_CHORD_JOIN_TIMEOUT", "60")
        .start();
    let joined = "celeriac received: \
                  [['celeriac received: celeriac received: a', 'late'], 'celeriac received: c']";
    assert_eq!(worker.ask(LATE_PART, &[]), joined);
}

#[test]
fn replies_outlive_the_broker_where_they_are_to() {
    for (persistent, mode) in [("false", 1), ("true", 2)] {
        let broker = Broker::rabbitmq();
        let (mut api, vhost) = broker.rabbit().unwrap();
        // Where the messages of these tests want their replies.
        api.request("PUT", &format!("queues/{vhost}/nobody"), &json!({}));
        let worker = broker
            .worker()
            .backend("rpc://")
            .env("CELERY_RESULT_PERSISTENT", persistent)
            .start();
        broker.raw(&worker.queue).send("test_task", json!(["a"]));
        let reply = wait_for("the reply", PATIENCE, || {
            api.messages(&vhost, "nobody").into_iter().next()
        });
        assert_eq!(reply["properties"]["delivery_mode"], mode, "{reply}");
    }
}

const MAKE_TABLES: &str = "answer(app.backend.store_result('first', 1, 'SUCCESS'))";

const READ: &str = "
app.conf.update(json.loads(sys.argv[2]))
answer(AsyncResult(sys.argv[1]).get(timeout=20))
";

#[test]
fn tables_of_results_are_made_where_and_when_is_said() {
    let redis = services::redis();
    let schemas = json!({"task": "mine", "group": "ours"});
    for (makes, schemas) in [(true, schemas), (false, json!({}))] {
        let postgres = services::postgres();
        for schema in ["mine", "ours"] {
            postgres.rows(&format!("CREATE SCHEMA {schema}"));
        }
        let url = postgres
            .url
            .replace("postgresql://", "db+postgresql+psycopg2://");
        let worker = Worker::on(&redis.url)
            .queue(&unique("q"))
            .backend(&url)
            .env("CELERY_DATABASE_TABLE_SCHEMAS", &schemas.to_string())
            .env("CELERY_DATABASE_CREATE_TABLES_AT_SETUP", &makes.to_string())
            .start();
        let mut raw = Raw::new(&redis.url, &worker.queue);
        let mut id = raw.send("test_task", json!(["a"]));
        if !makes {
            worker.wait_log("\"celery_taskmeta\" does not exist");
            worker.ask(MAKE_TABLES, &[]);
            id = raw.send("test_task", json!(["a"]));
        }
        let settings = json!({"database_table_schemas": schemas}).to_string();
        let value = worker.ask(READ, &[&id, &settings]);
        assert_eq!(value, "celeriac received: a");
        let tables = postgres.rows(
            "SELECT table_schema || '.' || table_name FROM information_schema.tables
             WHERE table_name LIKE 'celery_task%' ORDER BY 1",
        );
        let tables: Vec<Value> = tables.into_iter().flatten().map(Value::from).collect();
        let expected = match makes {
            true => ["mine.celery_taskmeta", "ours.celery_tasksetmeta"],
            false => ["public.celery_taskmeta", "public.celery_tasksetmeta"],
        };
        assert_eq!(json!(tables), json!(expected));
    }
}
