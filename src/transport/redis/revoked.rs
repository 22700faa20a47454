//! Revoked ids that all workers of a database know, also those that start later.
//!
//! A sorted set by the time of revocation, bounded in number and gone with its youngest entry.
//! Python workers neither read nor write it; they are told by broadcast. Times are those of the
//! workers' clocks: a difference between them shifts only when an id is forgotten.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::Cmd;

use super::core::Core;
use super::keys::score;
use super::reply::{refusal, refused, texts, transaction};
use crate::transport::{Error, Notes};

/// Ids in one command, so that no other client waits for long.
const CHUNK: usize = 1000;

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Adds ids, and forgets what is too old or too much.
pub(super) async fn share(core: &Core, ids: &[String], notes: Notes) -> Result<(), Error> {
    const OPERATION: &str = "sharing revoked ids";
    let now = now();
    let key = &core.keys.revoked;
    let mut commands: Vec<Cmd> = Vec::new();
    for chunk in ids.chunks(CHUNK) {
        let mut add = redis::cmd("ZADD");
        add.arg(key);
        for id in chunk {
            add.arg(score(micros(now))).arg(id);
        }
        commands.push(add);
    }
    let mut old = redis::cmd("ZREMRANGEBYSCORE");
    old.arg(key)
        .arg("-inf")
        .arg(format!("({}", oldest(now, notes)));
    let mut many = redis::cmd("ZREMRANGEBYRANK");
    many.arg(key)
        .arg(0)
        .arg(-1 - i64::try_from(notes.most).unwrap_or(i64::MAX - 1));
    let mut expire = redis::cmd("PEXPIRE");
    expire.arg(key).arg(
        u64::try_from(notes.keep.as_millis())
            .unwrap_or(u64::MAX)
            .max(1),
    );
    commands.extend([old, many, expire]);
    let replies = core.call(OPERATION, transaction(commands)).await?;
    match replies.iter().find_map(refusal) {
        Some(error) => Err(refused(OPERATION, error)),
        None => Ok(()),
    }
}

/// Reads them, oldest first, with their age.
pub(super) async fn shared(core: &Core, notes: Notes) -> Result<Vec<(String, Duration)>, Error> {
    const OPERATION: &str = "reading revoked ids";
    let now = now();
    let mut read = redis::cmd("ZRANGEBYSCORE");
    read.arg(&core.keys.revoked)
        .arg(oldest(now, notes))
        .arg("+inf")
        .arg("WITHSCORES");
    let reply = core
        .call(OPERATION, vec![read])
        .await?
        .pop()
        .unwrap_or(redis::Value::Nil);
    if let Some(error) = refusal(&reply) {
        return Err(refused(OPERATION, error));
    }
    // The third version of the protocol pairs them up.
    let reply = match reply {
        redis::Value::Array(items) => {
            let flat = items.into_iter().flat_map(|item| match item {
                redis::Value::Array(pair) => pair,
                one => vec![one],
            });
            redis::Value::Array(flat.collect())
        }
        other => other,
    };
    let texts = texts(reply);
    let age = |score: &str| {
        let since = Duration::try_from_secs_f64(score.parse().ok()?).ok()?;
        Some(now.saturating_sub(since))
    };
    Ok(texts
        .chunks_exact(2)
        .filter_map(|pair| Some((pair[0].clone(), age(&pair[1])?)))
        .collect())
}

fn oldest(now: Duration, notes: Notes) -> String {
    score(micros(now.saturating_sub(notes.keep)))
}
