//! `celery.chord_unlock` delivered more than once, as when a worker dies before it acknowledges.

use std::sync::Arc;

use celeriac::backend::{self, Backend, Options, Taken};
use redis::Commands;
use serde_json::{Value, json};

use super::support::python::Python;
use super::support::raw::{Raw, envelope};
use super::support::worker::Worker;
use super::support::{services, unique};

/// Stores the parts of a header as Python stores them.
const STORE_PARTS: &str = "
for number, id in enumerate(sys.argv[1:]):
    app.backend.store_result(id, f'part {number}', 'SUCCESS')
answer(None)
";

const WAIT: &str = "answer(AsyncResult(sys.argv[1]).get(timeout=60))";

/// The claim of a worker that died, older than any claim lasts.
const LEAVE_CLAIM: &str = "
from datetime import datetime, timedelta, timezone
from sqlalchemy import text
session = app.backend.ResultSession()
when = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(hours=1)
session.execute(text('INSERT INTO celery_tasksetmeta (id, taskset_id, result, date_done) '
                     'VALUES (:id, :row, :token, :at)'),
                {'id': int(sys.argv[2]), 'row': 'chord-end-' + sys.argv[1],
                 'token': b'of a dead worker', 'at': when})
session.commit()
answer(None)
";

/// An hour goes by for a claim.
const AGE_CLAIM: &str = "
from datetime import timedelta
from celery.backends.database.models import TaskSet
session = app.backend.ResultSession()
row = session.query(TaskSet.__table__).filter_by(taskset_id='chord-end-' + sys.argv[1]).one()
session.execute(TaskSet.__table__.update().where(TaskSet.__table__.c.id == row.id).values(
    date_done=row.date_done - timedelta(hours=1)))
session.commit()
answer(None)
";

#[test]
fn a_claim_lasts_as_long_as_it_is_renewed() {
    let postgres = services::postgres();
    let directory = tempfile::tempdir().unwrap();
    let sqlite = format!("db+sqlite:///{}/results.db", directory.path().display());
    let server = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for url in [sqlite, server] {
        let client = Python::new("memory://", &url, "none");
        let connect = || backend::connect(&url, &Options::default(), None).unwrap();
        let (one, other) = (connect(), connect());
        let take = |backend: &Arc<dyn Backend>| runtime.block_on(backend.chord_take("g")).unwrap();
        let Taken::First(claim) = take(&one) else {
            panic!("nobody had it before");
        };
        let keep = || runtime.block_on(one.chord_keep("g", &claim)).unwrap();
        // Renewed after its end, but before another wanted it.
        client.run(AGE_CLAIM, &["g"]);
        assert!(keep());
        assert_eq!(take(&other), Taken::Claimed);
        client.run(AGE_CLAIM, &["g"]);
        let Taken::Left(theirs) = take(&other) else {
            panic!("the claim has ended");
        };
        assert!(!keep());
        assert!(runtime.block_on(other.chord_keep("g", &theirs)).unwrap());
        runtime.block_on(other.chord_done("g", &theirs)).unwrap();
        assert_eq!(take(&one), Taken::Done);
    }
}

fn unlock_message(queue: &str, group: &str, parts: &[String], body: &str) -> Value {
    let callback = json!({"task": "test_task", "args": [], "kwargs": {}, "immutable": false,
        "subtask_type": null, "options": {"task_id": body, "queue": queue}});
    let parts: Vec<Value> = parts.iter().map(|id| json!([[id, null], null])).collect();
    let arguments = json!([group, callback, null, null, parts]);
    envelope(
        queue,
        "celery.chord_unlock",
        &unique("unlock"),
        &arguments,
        &json!({}),
    )
}

#[test]
fn a_chord_that_is_watched_by_several_messages_has_one_body() {
    let redis = services::redis();
    let postgres = services::postgres();
    let directory = tempfile::tempdir().unwrap();
    let sqlite = format!("db+sqlite:///{}/results.db", directory.path().display());
    let server = postgres
        .url
        .replace("postgresql://", "db+postgresql+psycopg2://");
    for url in [sqlite, server] {
        let queue = unique("q");
        let client = Python::new(&redis.url, &url, &queue);
        let parts = [unique("part"), unique("part")];
        client.run(STORE_PARTS, &[&parts[0], &parts[1]]);
        let chords: Vec<[String; 2]> = (0..3).map(|_| [unique("group"), unique("body")]).collect();
        // Nothing is known of the first; workers died with the claims of the others, and the
        // body of the last has run.
        client.run(LEAVE_CLAIM, &[&chords[1][0], "900001"]);
        client.run(LEAVE_CLAIM, &[&chords[2][0], "900002"]);
        client.run(STORE_PARTS, &[&chords[2][1]]);
        let mut raw = Raw::new(&redis.url, &queue);
        let mut messages = Vec::new();
        for [group, body] in &chords {
            let one = unlock_message(&queue, group, &parts, body);
            let other = unlock_message(&queue, group, &parts, body);
            messages.extend([one.clone(), one, other].map(|one| one.to_string()));
        }
        let mut connection = redis.connect();
        let _: () = connection.lpush(&queue, &messages).unwrap();
        let worker = Worker::on(&redis.url)
            .queue(&queue)
            .backend(&url)
            .env("CELERY_RESULT_CHORD_RETRY_INTERVAL", "0.2")
            .start();
        let joined = "celeriac received: ['part 0', 'part 1']";
        for [_, body] in &chords[..2] {
            assert_eq!(worker.ask(WAIT, &[body]), joined);
        }
        raw.wait_drained();
        let log = worker.log();
        let runs = |body: &str| log.matches(&format!("test_task[{body}] received")).count();
        let runs: Vec<usize> = chords.iter().map(|[_, body]| runs(body)).collect();
        assert_eq!(runs, [1, 1, 0], "{log}");
    }
}
