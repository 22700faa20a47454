//! Result backends: stored here, read by the real Python client, and the other way round.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use celeriac::backend::{
    self, Backend, ChordPart, ChordStatus, Extended, Meta, Options, PartResult, ReplyTo, Stored,
};
use serde_json::{Value, json};

use crate::support::python::Python;
use crate::support::{services, unique, wait_for};

const NOBODY: ReplyTo<'static> = ReplyTo {
    reply_to: None,
    correlation_id: None,
};

fn connect(url: &str, options: &Options) -> Arc<dyn Backend> {
    backend::connect(url, options, None).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// A document that is done.
fn done(id: &str, status: &str, result: Value) -> Meta {
    let date_done = Some(chrono::Utc::now().fixed_offset());
    Meta {
        date_done,
        ..Meta::new(id, status, result)
    }
}

fn transport_options(options: Value) -> serde_json::Map<String, Value> {
    options.as_object().unwrap().clone()
}

/// What `AsyncResult` says about each id: state, result (or the exception's type and args),
/// traceback, number of children, whether it is ready, whether it has a date.
const READ: &str = "
if len(sys.argv) > 2:
    app.conf.update(json.loads(sys.argv[2]))
rows = []
for id in json.loads(sys.argv[1]):
    r = app.AsyncResult(id)
    value = r.result
    if isinstance(value, BaseException):
        value = [type(value).__name__, type(value).__module__, list(value.args)]
    rows.append([r.state, value, r.traceback, len(r.children or []), r.ready(), r.date_done is not None])
answer(rows)
";

/// One document for each state, with the row READ gives for it.
fn states(prefix: &str) -> Vec<(Meta, Value)> {
    let id = |name: &str| format!("{prefix}-{name}");
    let exception = |kind: &str, module: &str, args: Value| json!({"exc_type": kind, "exc_message": args, "exc_module": module});
    let traceback = "Traceback (most recent call last):\nValueError: ('boom', 42)\n";
    let mut failure = done(
        &id("failure"),
        "FAILURE",
        exception("ValueError", "builtins", json!(["boom", 42])),
    );
    failure.traceback = Some(traceback.into());
    let mut retry = Meta::new(
        id("retry"),
        "RETRY",
        exception("KeyError", "builtins", json!(["later"])),
    );
    retry.traceback = Some("celery.exceptions.Retry: Retry in 1s: KeyError('later')\n".into());
    let mut parent = done(&id("parent"), "SUCCESS", json!(3));
    parent.children = json!([
        [["c-1", null], null],
        [["g-1", null], [[["c-2", null], null]]]
    ]);
    parent.group_id = Some("g".into());
    parent.parent_id = Some("p".into());
    let revoked = exception(
        "TaskRevokedError",
        "celery.exceptions",
        json!(["terminated"]),
    );
    vec![
        (
            done(
                &id("success"),
                "SUCCESS",
                json!({"b": "héllo 😀", "a": [1, 2.5, null]}),
            ),
            json!(["SUCCESS", {"b": "héllo 😀", "a": [1, 2.5, null]}, null, 0, true, true]),
        ),
        (
            Meta::new(
                id("progress"),
                "PROGRESS",
                json!({"status": "분석 중... (45%)"}),
            ),
            json!(["PROGRESS", {"status": "분석 중... (45%)"}, null, 0, false, false]),
        ),
        (
            Meta::new(
                id("started"),
                "STARTED",
                json!({"pid": 7, "hostname": "w@h"}),
            ),
            json!(["STARTED", {"pid": 7, "hostname": "w@h"}, null, 0, false, false]),
        ),
        (
            failure,
            json!([
                "FAILURE",
                ["ValueError", "builtins", ["boom", 42]],
                traceback,
                0,
                true,
                true
            ]),
        ),
        (
            retry.clone(),
            json!([
                "RETRY",
                ["KeyError", "builtins", ["later"]],
                retry.traceback,
                0,
                false,
                false
            ]),
        ),
        (
            done(&id("revoked"), "REVOKED", revoked),
            json!([
                "REVOKED",
                ["TaskRevokedError", "celery.exceptions", ["terminated"]],
                null,
                0,
                true,
                true
            ]),
        ),
        (parent, json!(["SUCCESS", 3, null, 2, true, true])),
        (
            Meta::new(id("absent"), "", Value::Null),
            json!(["PENDING", null, null, 0, false, false]),
        ),
    ]
}

/// Stores every state and compares what Python reads; `dated` backends date all of them.
fn python_reads_every_state(url: &str, options: &Options, conf: &Value, dated: bool) {
    let backend = connect(url, options);
    let states = states(&unique("t"));
    let runtime = runtime();
    for (meta, _) in states.iter().filter(|(meta, _)| !meta.status.is_empty()) {
        assert_eq!(
            runtime.block_on(backend.store(meta, &NOBODY)).unwrap(),
            Stored::Written
        );
        let mut read = runtime
            .block_on(backend.get(&meta.task_id))
            .unwrap()
            .unwrap();
        // The database backend keeps neither of the two and dates every state.
        if dated {
            read.group_id = meta.group_id.clone();
            read.parent_id = meta.parent_id.clone();
            if read.children.is_null() {
                read.children = json!([]);
            }
        }
        if dated && meta.date_done.is_none() {
            read.date_done = None;
        }
        let micros = |meta: &Meta| meta.date_done.map(|time| time.timestamp_micros());
        assert_eq!(micros(&read), micros(meta));
        read.date_done = meta.date_done;
        assert_eq!(&read, meta);
    }
    let ids: Vec<_> = states
        .iter()
        .map(|(meta, _)| meta.task_id.as_str())
        .collect();
    let python = Python::new("memory://", url, "none");
    let rows = python.run(READ, &[&json!(ids).to_string(), &conf.to_string()]);
    for ((meta, expected), row) in states.iter().zip(rows.as_array().unwrap()) {
        let mut expected = expected.clone();
        if dated && !meta.status.is_empty() {
            expected[5] = json!(true);
        }
        assert_eq!(row, &expected, "{}", meta.task_id);
    }
    let gone = &states[0].0.task_id;
    runtime.block_on(backend.forget(gone)).unwrap();
    assert_eq!(runtime.block_on(backend.get(gone)).unwrap(), None);
}

#[test]
fn python_reads_every_state_from_redis() {
    let redis = services::redis();
    python_reads_every_state(&redis.url, &Options::default(), &json!({}), false);
}

#[test]
fn python_reads_every_serializer_and_compression_and_prefix() {
    for (serializer, compression, prefix) in [
        ("msgpack", None, "one"),
        ("yaml", Some("bzip2"), "two:"),
        ("json", Some("gzip"), "three"),
    ] {
        let redis = services::redis();
        let prefix = format!("{}{prefix}", unique("p"));
        let options = Options {
            serializer: serializer.into(),
            compression: compression.map(str::to_owned),
            transport_options: transport_options(json!({"global_keyprefix": prefix})),
            ..Options::default()
        };
        let conf = json!({
            "result_serializer": serializer,
            "result_accept_content": [serializer],
            "result_compression": compression,
            "result_backend_transport_options": {"global_keyprefix": prefix},
        });
        python_reads_every_state(&redis.url, &options, &conf, false);
        assert!(redis.keys().iter().any(|key| key.starts_with(&prefix)));
    }
}

#[test]
fn python_reads_every_state_from_celerys_tables() {
    let postgres = services::postgres();
    let directory = tempfile::tempdir().unwrap();
    let file = format!("sqlite:///{}/results.db", directory.path().display());
    let server = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    for url in [server, format!("db+{file}")] {
        python_reads_every_state(&url, &Options::default(), &json!({}), true);
    }
}

#[test]
fn tables_made_by_python_are_shared_with_python() {
    let postgres = services::postgres();
    let directory = tempfile::tempdir().unwrap();
    let file = format!("db+sqlite:///{}/results.db", directory.path().display());
    let server = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    let runtime = runtime();
    for url in [server, file] {
        let python = Python::new("memory://", &url, "none");
        let store = "
app.conf.result_extended = True
app.backend.store_result(sys.argv[1], {'a': 1}, 'SUCCESS')
app.backend.store_result(sys.argv[2], {'status': 'x'}, 'PROGRESS')
answer(None)
";
        python.run(store, &["py-1", "py-2"]);
        let options = Options {
            extended: true,
            ..Options::default()
        };
        let backend = connect(&url, &options);
        let read = runtime.block_on(backend.get("py-1")).unwrap().unwrap();
        assert_eq!(
            (read.status.as_str(), read.result),
            ("SUCCESS", json!({"a": 1}))
        );
        let late = done(
            "py-1",
            "FAILURE",
            json!({"exc_type": "E", "exc_message": []}),
        );
        let outcome = runtime.block_on(backend.store(&late, &NOBODY)).unwrap();
        assert_eq!(outcome, Stored::AlreadySuccessful);
        let mut ours = done("py-2", "SUCCESS", json!(5));
        ours.extended = Some(Extended {
            name: json!("celery_app.add"),
            args: json!([1, 2]),
            kwargs: json!({"k": "v"}),
            worker: json!("w@h"),
            retries: json!(1),
            queue: json!("celery"),
            stamped_headers: Some(vec!["mark".into()]),
            stamps: transport_options(json!({"mark": "x"})),
        });
        runtime.block_on(backend.store(&ours, &NOBODY)).unwrap();
        let read = runtime.block_on(backend.get("py-2")).unwrap().unwrap();
        assert_eq!(read.extended, ours.extended);
        let meta = python.run(
            "
app.conf.result_extended = True
m = app.AsyncResult('py-2')._get_task_meta()
answer([m[k] for k in ('status', 'result', 'name', 'args', 'kwargs', 'worker', 'retries', 'queue', 'mark')])
",
            &[],
        );
        let expected =
            json!(["SUCCESS", 5, "celery_app.add", [1, 2], {"k": "v"}, "w@h", 1, "celery", "x"]);
        assert_eq!(meta, expected);

        runtime
            .block_on(backend.save_group("g-1", &json!([["g-1", null], [[["py-1", null], null]]])))
            .unwrap();
        let group = python.run(
            "answer([r.id for r in app.GroupResult.restore('g-1')])",
            &[],
        );
        assert_eq!(group, json!(["py-1"]));
        assert_eq!(runtime.block_on(backend.cleanup()).unwrap(), 0);
        let short = Options {
            expires: Duration::from_nanos(1),
            ..options
        };
        assert_eq!(
            runtime.block_on(connect(&url, &short).cleanup()).unwrap(),
            3
        );
    }
}

#[test]
fn extended_results_are_read_by_python() {
    let redis = services::redis();
    let id = unique("t");
    let mut meta = done(&id, "SUCCESS", json!(1));
    meta.extended = Some(Extended {
        name: json!("n"),
        args: json!([1]),
        kwargs: json!({"a": 2}),
        worker: json!("w@h"),
        retries: json!(2),
        queue: json!("q"),
        stamped_headers: None,
        stamps: Default::default(),
    });
    runtime()
        .block_on(connect(&redis.url, &Options::default()).store(&meta, &NOBODY))
        .unwrap();
    let python = Python::new("memory://", &redis.url, "none");
    let row = python.run(
        "
r = app.AsyncResult(sys.argv[1])
answer([r.name, r.args, r.kwargs, r.worker, r.retries, r.queue])
",
        &[&id],
    );
    assert_eq!(row, json!(["n", [1], {"a": 2}, "w@h", 2, "q"]));
}

#[test]
fn a_success_is_never_replaced_whoever_wrote_it() {
    let runtime = runtime();
    for (serializer, compression) in [("json", None), ("msgpack", None), ("json", Some("zstd"))] {
        let redis = services::redis();
        let options = Options {
            serializer: serializer.into(),
            compression: compression.map(str::to_owned),
            ..Options::default()
        };
        let backend = connect(&redis.url, &options);
        let (ours, theirs) = (unique("ours"), unique("theirs"));
        let python = Python::new("memory://", &redis.url, "none");
        python.run(
            "
app.conf.update(json.loads(sys.argv[2]))
app.backend.store_result(sys.argv[1], 'first', 'SUCCESS')
answer(None)
",
            &[
                &theirs,
                &json!({"result_serializer": serializer, "result_accept_content": [serializer],
                    "result_compression": compression})
                .to_string(),
            ],
        );
        let progress = Meta::new(&ours, "PROGRESS", json!({"n": 1}));
        for _ in 0..2 {
            let stored = runtime.block_on(backend.store(&progress, &NOBODY)).unwrap();
            assert_eq!(stored, Stored::Written);
        }
        let first = done(&ours, "SUCCESS", json!("first"));
        assert_eq!(
            runtime.block_on(backend.store(&first, &NOBODY)).unwrap(),
            Stored::Written
        );
        for id in [&ours, &theirs] {
            for status in ["SUCCESS", "FAILURE", "PROGRESS"] {
                let late = done(id, status, json!("late"));
                let stored = runtime.block_on(backend.store(&late, &NOBODY)).unwrap();
                assert_eq!(
                    stored,
                    Stored::AlreadySuccessful,
                    "{serializer} {compression:?} {status}"
                );
            }
            let read = runtime.block_on(backend.get(id)).unwrap().unwrap();
            assert_eq!(read.result, json!("first"));
        }
        // A failure is not final, and neither is what nobody can read.
        let failed = unique("failed");
        redis::cmd("SET")
            .arg(format!("celery-task-meta-{failed}"))
            .arg(b"\x80garbage")
            .exec(&mut redis.connect())
            .unwrap();
        for status in ["FAILURE", "REVOKED", "SUCCESS"] {
            let next = done(&failed, status, json!(status));
            assert_eq!(
                runtime.block_on(backend.store(&next, &NOBODY)).unwrap(),
                Stored::Written
            );
        }
    }
}

#[test]
fn results_expire_as_the_settings_say() {
    let redis = services::redis();
    let runtime = runtime();
    let ttl = |options: &Options, status: &str| -> i64 {
        let id = unique("t");
        let meta = done(&id, status, Value::Null);
        runtime
            .block_on(connect(&redis.url, options).store(&meta, &NOBODY))
            .unwrap();
        let key = format!("celery-task-meta-{id}");
        redis::cmd("TTL")
            .arg(key)
            .query(&mut redis.connect())
            .unwrap()
    };
    assert!((86_390..=86_400).contains(&ttl(&Options::default(), "SUCCESS")));
    let hour = Options {
        failure_expires: Some(Duration::from_secs(3600)),
        ..Options::default()
    };
    assert!((3590..=3600).contains(&ttl(&hour, "FAILURE")));
    assert!((86_390..=86_400).contains(&ttl(&hour, "SUCCESS")));
    let for_ever = Options {
        expires: Duration::ZERO,
        ..Options::default()
    };
    assert_eq!(ttl(&for_ever, "SUCCESS"), -1);
}

#[test]
fn a_python_client_that_waits_is_woken_by_the_store() {
    let redis = services::redis();
    let id = unique("t");
    let python = Python::new("memory://", &redis.url, "none");
    let script = format!(
        "from celery_app import celery_app as app\n\
         print('got', app.AsyncResult({id:?}).get(timeout=60), flush=True)"
    );
    let waiting = python.spawn(&["-c", &script]);
    let channel = format!("celery-task-meta-{id}");
    let mut connection = redis.connect();
    wait_for("the client's subscription", Duration::from_secs(60), || {
        let counts: Vec<(String, i64)> = redis::cmd("PUBSUB")
            .arg("NUMSUB")
            .arg(&channel)
            .query(&mut connection)
            .unwrap();
        (counts[0].1 > 0).then_some(())
    });
    let meta = done(&id, "SUCCESS", json!("woken"));
    runtime()
        .block_on(connect(&redis.url, &Options::default()).store(&meta, &NOBODY))
        .unwrap();
    wait_for("the client's answer", Duration::from_secs(10), || {
        waiting.log().contains("got woken").then_some(())
    });
}

/// Passes connections on to Redis while it is open, and ends them while it is not.
struct Door {
    url: String,
    open: tokio::sync::watch::Sender<bool>,
    passing: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
}

impl Door {
    async fn to(redis_url: &str) -> Self {
        let target = url::Url::parse(redis_url).unwrap();
        let address = format!("{}:{}", target.host_str().unwrap(), target.port().unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut url = target.clone();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        let (open, mut is_open) = tokio::sync::watch::channel(true);
        let (passing, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (now_passing, now_refused) = (Arc::clone(&passing), Arc::clone(&refused));
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                if !*is_open.borrow_and_update() {
                    now_refused.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                let mut far = tokio::net::TcpStream::connect(&address).await.unwrap();
                let (mut is_open, passing) = (is_open.clone(), Arc::clone(&now_passing));
                passing.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = is_open.wait_for(|open| !open) => {}
                    }
                    passing.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            url: url.into(),
            open,
            passing,
            refused,
        }
    }

    /// Returns when nothing passes any more.
    async fn shut(&self) {
        self.open.send(false).unwrap();
        while self.passing.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[test]
fn a_result_outlives_an_absence_of_the_backend() {
    let redis = services::redis();
    let runtime = runtime();
    runtime.block_on(async {
        let door = Door::to(&redis.url).await;
        let backend = connect(&door.url, &Options::default());
        let before = done(&unique("t"), "SUCCESS", json!(1));
        backend.store(&before, &NOBODY).await.unwrap();
        door.shut().await;
        let ids: Vec<_> = (0..50).map(|_| unique("t")).collect();
        let stores: Vec<_> = ids
            .iter()
            .map(|id| {
                let (backend, meta) = (Arc::clone(&backend), done(id, "SUCCESS", json!(2)));
                tokio::spawn(async move { backend.store(&meta, &NOBODY).await })
            })
            .collect();
        // Each refusal is a try; the pauses between them are a second.
        while door.refused.load(Ordering::SeqCst) < 4 {
            if let Some(ended) = stores.iter().position(|store| store.is_finished()) {
                let outcome = stores.into_iter().nth(ended).unwrap().await.unwrap();
                panic!("a store did not wait for the backend: {outcome:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(stores.iter().all(|store| !store.is_finished()));
        door.open.send(true).unwrap();
        for store in stores {
            assert_eq!(store.await.unwrap().unwrap(), Stored::Written);
        }
        for id in &ids {
            assert_eq!(backend.get(id).await.unwrap().unwrap().result, json!(2));
        }
        // An attempt serves all fifty.
        assert!(door.refused.load(Ordering::SeqCst) < 50);
    });
}

#[test]
fn tries_end_and_the_error_says_that_it_may_heal() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let options = Options {
        transport_options: transport_options(
            json!({"retry_policy": {"max_retries": 2, "interval_max": 0}}),
        ),
        ..Options::default()
    };
    let backend = connect(&format!("redis://:geheim@{unused}/0"), &options);
    let meta = done("t", "SUCCESS", Value::Null);
    let error = runtime()
        .block_on(backend.store(&meta, &NOBODY))
        .unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(!error.to_string().contains("geheim"), "{error}");
}

fn part<'a>(group: &'a str, id: &'a str, index: i64, result: &'a Value) -> ChordPart<'a> {
    ChordPart {
        group_id: group,
        task_id: id,
        group_index: Some(index),
        state: "SUCCESS",
        result,
    }
}

fn ready(status: ChordStatus) -> (backend::Claim, Vec<Value>) {
    match status {
        ChordStatus::Ready { claim, parts } => {
            (claim, parts.into_iter().map(|part| part.result).collect())
        }
        other => panic!("not ready: {other:?}"),
    }
}

/// A part of a chord returned by Celery's own backend; answers the bodies it published.
const PYTHON_PART: &str = "
from types import SimpleNamespace
from celery import Signature
app.conf.update(task_default_queue=sys.argv[4])
published = []
import celery.canvas
def record(self, args=None, *rest, **more):
    published.append(args)
celery.canvas.Signature.apply_async = record
celery.canvas.Signature.delay = lambda self, *args: published.append(args)
body = app.signature('test_task', options={'task_id': 'body'})
request = SimpleNamespace(id=sys.argv[2], group=sys.argv[1], group_index=int(sys.argv[3]), chord=dict(body),
    root_id=None, parent_id=None)
if len(sys.argv) > 5:
    app.backend.set_chord_size(sys.argv[1], int(sys.argv[5]))
app.backend.on_chord_part_return(request, 'SUCCESS', 'python')
answer(published)
";

#[test]
fn a_chord_is_counted_by_python_and_by_us_together() {
    let redis = services::redis();
    let runtime = runtime();
    let backend = connect(&redis.url, &Options::default());
    let python = Python::new("memory://", &redis.url, "none");
    let ours = json!({"from": "rust"});

    // Python began it and returned the last index first; we complete it.
    let group = unique("g");
    assert_eq!(
        python.run(PYTHON_PART, &[&group, "t-py", "1", "q", "2"]),
        json!([])
    );
    let status = runtime
        .block_on(backend.chord_part(&part(&group, "t-rs", 0, &ours)))
        .unwrap();
    let (claim, results) = ready(status);
    assert_eq!(results, [ours.clone(), json!("python")]);
    assert!(
        runtime
            .block_on(backend.chord_extend(&group, &claim))
            .unwrap()
    );
    runtime
        .block_on(backend.chord_done(&group, &claim))
        .unwrap();
    assert_eq!(
        python.run(PYTHON_PART, &[&group, "t-py", "1", "q"]),
        json!([])
    );
    let late = runtime
        .block_on(backend.chord_part(&part(&group, "t-rs", 0, &ours)))
        .unwrap();
    assert_eq!(late, ChordStatus::Done);
    let left: Vec<_> = redis
        .keys()
        .into_iter()
        .filter(|key| key.contains(&group))
        .collect();
    assert_eq!(left, [format!("celery-taskset-meta-{group}.c")]);

    // We began it and returned a part twice; Python completes it.
    let group = unique("g");
    runtime.block_on(backend.chord_start(&group, 2)).unwrap();
    for _ in 0..2 {
        let status = runtime
            .block_on(backend.chord_part(&part(&group, "t-rs", 0, &ours)))
            .unwrap();
        assert_eq!(status, ChordStatus::Waiting);
    }
    let published = python.run(PYTHON_PART, &[&group, "t-py", "1", "q"]);
    assert_eq!(published, json!([[[ours, "python"]]]));
    let late = runtime
        .block_on(backend.chord_part(&part(&group, "t-rs", 0, &ours)))
        .unwrap();
    assert_eq!(late, ChordStatus::Done);
}

#[test]
fn exactly_one_of_many_returns_completes_a_chord() {
    let redis = services::redis();
    runtime().block_on(async {
        let backend = connect(&redis.url, &Options::default());
        let group = unique("g");
        backend.chord_start(&group, 200).await.unwrap();
        let returns = (0..400).map(|turn: i64| {
            let (backend, group) = (Arc::clone(&backend), group.clone());
            tokio::spawn(async move {
                let index = turn % 200;
                let result = json!(index);
                let id = format!("t-{index}");
                backend
                    .chord_part(&part(&group, &id, index, &result))
                    .await
                    .unwrap()
            })
        });
        let mut completions = Vec::new();
        for status in futures::future::join_all(returns).await {
            match status.unwrap() {
                ChordStatus::Ready { claim, parts } => completions.push((claim, parts)),
                status => assert!(matches!(
                    status,
                    ChordStatus::Waiting | ChordStatus::Claimed
                )),
            }
        }
        assert_eq!(completions.len(), 1);
        let (claim, parts) = completions.pop().unwrap();
        let expected: Vec<_> = (0..200)
            .map(|index| PartResult {
                task_id: format!("t-{index}"),
                state: "SUCCESS".into(),
                result: json!(index),
            })
            .collect();
        assert_eq!(parts, expected);
        // Somebody else's claim does not end the chord, and a given-up chord stays open.
        let key = format!("celery-taskset-meta-{group}");
        let mut look = redis.connect();
        redis::cmd("SET")
            .arg(format!("{key}.c"))
            .arg("other")
            .exec(&mut look)
            .unwrap();
        assert!(!backend.chord_extend(&group, &claim).await.unwrap());
        backend.chord_done(&group, &claim).await.unwrap();
        assert!(redis.keys().contains(&format!("{key}.s")));
        backend.chord_fail(&group).await.unwrap();
        assert!(!redis.keys().contains(&format!("{key}.s")));
    });
}

#[test]
fn a_nested_header_hands_its_saved_group_to_the_worker() {
    let redis = services::redis();
    runtime().block_on(async {
        let backend = connect(&redis.url, &Options::default());
        let group = unique("g");
        let tuple = json!([[group, null], [[["a", null], null]]]);
        backend.save_group(&group, &tuple).await.unwrap();
        assert_eq!(
            backend.restore_group(&group).await.unwrap(),
            Some(tuple.clone())
        );
        backend.chord_start(&group, 1).await.unwrap();
        match backend
            .chord_part(&part(&group, "a", 0, &json!(1)))
            .await
            .unwrap()
        {
            ChordStatus::ReadyNested { group, parts, .. } => {
                assert_eq!((group, parts.len()), (tuple, 1));
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn where_scripts_are_refused_results_and_chords_work_step_by_step() {
    let redis = services::redis();
    let user = unique("noscript");
    let mut admin = redis.connect();
    redis::cmd("ACL")
        .arg(&[
            "SETUSER",
            &user,
            "on",
            ">pw",
            "~*",
            "&*",
            "+@all",
            "-@scripting",
        ])
        .exec(&mut admin)
        .unwrap();
    let mut url = url::Url::parse(&redis.url).unwrap();
    url.set_username(&user).unwrap();
    url.set_password(Some("pw")).unwrap();
    runtime().block_on(async {
        for ordered in [true, false] {
            let options = Options {
                transport_options: transport_options(json!({"result_chord_ordered": ordered})),
                ..Options::default()
            };
            let backend = connect(url.as_str(), &options);
            let id = unique("t");
            let first = done(&id, "SUCCESS", json!("first"));
            assert_eq!(
                backend.store(&first, &NOBODY).await.unwrap(),
                Stored::Written
            );
            let late = done(&id, "FAILURE", json!("late"));
            assert_eq!(
                backend.store(&late, &NOBODY).await.unwrap(),
                Stored::AlreadySuccessful
            );
            let group = unique("g");
            backend.chord_start(&group, 2).await.unwrap();
            let (one, two) = (json!(1), json!(2));
            let waiting = backend
                .chord_part(&part(&group, "b", 1, &two))
                .await
                .unwrap();
            assert_eq!(waiting, ChordStatus::Waiting);
            let status = backend
                .chord_part(&part(&group, "a", 0, &one))
                .await
                .unwrap();
            let (claim, results) = ready(status);
            assert_eq!(
                results,
                if ordered {
                    [json!(1), json!(2)]
                } else {
                    [json!(2), json!(1)]
                }
            );
            assert!(backend.chord_extend(&group, &claim).await.unwrap());
            backend.chord_done(&group, &claim).await.unwrap();
            assert!(!redis.keys().iter().any(|key| key.contains(&group)));
        }
    });
    redis::cmd("ACL")
        .arg(&["DELUSER", &user])
        .exec(&mut admin)
        .unwrap();
}
