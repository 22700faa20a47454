//! Taking messages, and learning that there are some.
//!
//! Messages are taken by a script that pops and records in one step (`script::FETCH`), sent by
//! the writer. What remains is to know when: a worker that is idle must not poll, and must not
//! pop before it can record.
//!
//! Idle waiting uses the server's key tracking: a second connection asks `EXISTS` for all
//! lists with tracking on, and the server tells it, unasked, when one of them changes. Nothing
//! is popped, so nothing can be lost, whatever dies in between; a message pushed between an
//! empty fetch and the `EXISTS` is seen by the latter. The price is that a Python peer that
//! waits in `BRPOP` gets a single message first, and that several idle workers all try to
//! fetch it. Servers without tracking (before Redis 6, some proxies) are waited on with
//! `BRPOP` and the record is written right after, as kombu does; a worker killed between the
//! two loses that one message.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::{ConnectionLike as _, MultiplexedConnection};
use redis::{Cmd, PushInfo, PushKind, Value};
use regex::Regex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::core::{Core, Fetched, Plan, now, ordered_lists};
use super::keys::{self, Keys};
use super::reply::transaction;
use super::{message, unacked};
use crate::transport::{Error, Tag};

/// Builds the call of the fetch script.
pub(super) fn command(core: &Core, plan: &Plan, at: u64, sequence: u64) -> Cmd {
    let keys = &core.keys;
    let owned = keys.owned(&core.ledger.owner);
    let lists = ordered_lists(&plan.sources);
    let names: Vec<&str> = [&*keys.unacked, &keys.index, &owned, &keys.quarantine]
        .into_iter()
        .chain(lists.iter().map(|list| &**list))
        .collect();
    let rotate = core.options.queue_order_strategy == super::options::QueueOrder::RoundRobin;
    let mut cmd = core.scripts.fetch.call(names.into_iter());
    cmd.arg(plan.want)
        .arg(plan.sources.len())
        .arg(u8::from(rotate))
        .arg(at)
        // A tag for messages that have none: unique, as the owner's sequence never repeats.
        .arg(format!("{}-{sequence}", core.ledger.owner))
        .arg(u8::from(core.options.ack_emulation))
        .arg(unacked::QUARANTINE_CAP);
    for source in &plan.sources {
        cmd.arg(&*source.queue);
    }
    cmd
}

/// The queues a message goes to, by the table of its exchange.
pub(super) fn routed(
    keys: &Keys,
    members: &[String],
    topic: bool,
    routing_key: &str,
) -> Vec<String> {
    members
        .iter()
        .filter_map(|member| keys.parse_member(member))
        .filter(|(key, pattern, _)| {
            if topic && !pattern.is_empty() {
                Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(routing_key))
            } else {
                *key == routing_key
            }
        })
        .map(|(_, _, queue)| queue.to_owned())
        .collect()
}

/// A connection that is told when lists change.
pub(super) struct Tracker {
    connection: MultiplexedConnection,
    pushes: mpsc::UnboundedReceiver<PushInfo>,
}

impl Tracker {
    /// Opens it; an error means that this server cannot do it.
    pub(super) async fn open(link: &super::connect::Link) -> Result<Self, Error> {
        let (sender, pushes) = mpsc::unbounded_channel();
        let mut connection = link.open(Some(sender)).await?;
        let tracking: Result<Value, _> = redis::cmd("CLIENT")
            .arg("TRACKING")
            .arg("ON")
            .query_async(&mut connection)
            .await;
        tracking.map_err(|error| super::connect::failed("asking for key tracking", &error))?;
        Ok(Self { connection, pushes })
    }

    /// Waits for messages whenever the writer found the lists empty.
    pub(super) async fn run(mut self, core: Arc<Core>) {
        loop {
            core.idle.notified().await;
            if let Err(error) = self.watch(&core).await {
                core.fail_with(error);
                return;
            }
        }
    }

    /// Returns when the lists hold something.
    async fn watch(&mut self, core: &Core) -> Result<(), Error> {
        let failed = |reason: String| Error::Connection {
            operation: "waiting for messages",
            reason,
        };
        loop {
            while self.pushes.try_recv().is_ok() {}
            let lists = core.lists();
            let mut cmd = redis::cmd(if lists.is_empty() { "PING" } else { "EXISTS" });
            for list in &lists {
                cmd.arg(&**list);
            }
            let reply: Value = cmd
                .query_async(&mut self.connection)
                .await
                .map_err(|error| failed(error.to_string()))?;
            if matches!(reply, Value::Int(count) if count > 0) {
                core.promise();
                return Ok(());
            }
            tokio::select! {
                push = self.pushes.recv() => match push {
                    Some(PushInfo { kind: PushKind::Invalidate, .. }) => {
                        core.promise();
                        return Ok(());
                    }
                    Some(PushInfo { kind: PushKind::Disconnection, .. }) | None => {
                        return Err(failed("the server closed the connection".to_owned()));
                    }
                    Some(_) => {}
                },
                // The queues have changed.
                () = core.idle.notified() => {}
                // Ask again: proves that the connection lives.
                () = tokio::time::sleep(core.options.health_check_interval) => {}
            }
        }
    }
}

/// Waits with BRPOP where nothing better can be had.
pub(super) struct Popper {
    connection: MultiplexedConnection,
}

impl Popper {
    pub(super) async fn open(link: &super::connect::Link) -> Result<Self, Error> {
        Ok(Self {
            connection: link.open_blocking().await?,
        })
    }

    pub(super) async fn run(mut self, core: Arc<Core>) {
        loop {
            // Said before looking at the queues: who cancels one waits until it is taken back.
            core.popping.send_replace(true);
            let (free, promising, sources) = {
                let state = core.state();
                (state.free(), state.promising, state.sources.clone())
            };
            // Where scripts run, the writer fetches until the lists are empty.
            if free == 0 || (core.scripted && promising) {
                core.popping.send_replace(false);
                tokio::select! {
                    () = core.idle.notified() => {}
                    () = tokio::time::sleep(core.options.health_check_interval) => {
                        if let Err(error) = self.ping(&core).await {
                            core.fail_with(error);
                            return;
                        }
                    }
                }
                continue;
            }
            let popped = self.pop(&core, sources).await;
            core.popping.send_replace(false);
            match popped {
                Ok(true) if core.scripted => core.promise(),
                Ok(_) => {}
                Err(error) => {
                    core.fail_with(error);
                    return;
                }
            }
        }
    }

    async fn ping(&mut self, core: &Core) -> Result<(), Error> {
        let ping = redis::cmd("PING");
        let reply = self.connection.req_packed_command(&ping);
        match timeout(core.options.command_timeout, reply).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(super::connect::failed("waiting for messages", &error)),
            Err(_) => Err(overdue()),
        }
    }

    /// Pops and records one message; false when there was none.
    async fn pop(&mut self, core: &Core, sources: Vec<super::core::Source>) -> Result<bool, Error> {
        let lists = ordered_lists(&sources);
        let popped = brpop(
            &mut self.connection,
            lists.iter().map(|list| &**list),
            core.options.polling_interval,
            core.options.command_timeout,
        )
        .await?;
        let Some((list, raw)) = popped else {
            return Ok(false);
        };
        let width = sources.len();
        let index = lists.iter().position(|name| **name == *list).unwrap_or(0);
        let queue = sources[index % width].queue.clone();
        let (score, sequence) = (now(), core.ledger.sequence(1));
        let decoded = match message::decode(&raw) {
            Ok(decoded) => decoded,
            Err(reason) => {
                log::error!(
                    "a message in queue {queue} cannot be decoded and was moved to {}: {reason}",
                    core.keys.quarantine
                );
                let entry = message::quarantined(&reason, &queue, score, &raw);
                let mut push = redis::cmd("LPUSH");
                push.arg(&core.keys.quarantine).arg(entry);
                self.execute(core, vec![push, unacked::cap_quarantine(core)])
                    .await?;
                return Ok(true);
            }
        };
        let tag = decoded
            .delivery_tag
            .unwrap_or_else(|| format!("{}-{sequence}", core.ledger.owner));
        if core.options.ack_emulation {
            let routing_key = decoded.routing_key.unwrap_or_else(|| queue.to_string());
            let mut record = Vec::with_capacity(raw.len() + 64);
            record.push(b'[');
            record.extend_from_slice(&raw);
            for text in [&decoded.exchange, &routing_key] {
                record.extend_from_slice(b", ");
                record.extend(
                    serde_json::Value::from(text.as_str())
                        .to_string()
                        .into_bytes(),
                );
            }
            record.push(b']');
            let mut index = redis::cmd("ZADD");
            index
                .arg(&core.keys.index)
                .arg(keys::score(score))
                .arg(&tag);
            let mut hash = redis::cmd("HSET");
            hash.arg(&core.keys.unacked).arg(&tag).arg(record);
            let mut owner = redis::cmd("HSET");
            owner
                .arg(core.keys.owned(&core.ledger.owner))
                .arg(&tag)
                .arg(keys::score(score));
            self.execute(core, transaction([index, hash, owner]))
                .await?;
        }
        let tag = Tag(tag.into());
        let plan = Plan { want: 1, sources };
        let fetched = Fetched {
            source: index % width,
            step: index / width,
            tag,
            raw,
            score,
            sequence,
        };
        core.admit(&plan, vec![fetched]);
        Ok(true)
    }

    async fn execute(&mut self, core: &Core, commands: Vec<Cmd>) -> Result<(), Error> {
        let mut pipeline = redis::Pipeline::new();
        for command in commands {
            pipeline.add_command(command);
        }
        let sent = timeout(
            core.options.command_timeout,
            pipeline.query_async::<Value>(&mut self.connection),
        );
        match sent.await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(super::connect::failed("recording a message", &error)),
            Err(_) => Err(overdue()),
        }
    }
}

fn overdue() -> Error {
    Error::Connection {
        operation: "waiting for messages",
        reason: "the server does not answer".to_owned(),
    }
}

/// One blocking pop: the list and the element, or None when none came. An answer that is
/// overdue is an error.
pub(super) async fn brpop(
    connection: &mut MultiplexedConnection,
    lists: impl Iterator<Item = &str>,
    interval: Option<Duration>,
    grace: Duration,
) -> Result<Option<(String, Vec<u8>)>, Error> {
    let mut cmd = redis::cmd("BRPOP");
    for list in lists {
        cmd.arg(list);
    }
    let wait = interval
        .unwrap_or(Duration::from_secs(1))
        .max(Duration::from_millis(10));
    if wait.subsec_nanos() == 0 {
        cmd.arg(wait.as_secs());
    } else {
        cmd.arg(wait.as_secs_f64());
    }
    match timeout(wait + grace, connection.req_packed_command(&cmd)).await {
        Err(_) => Err(overdue()),
        Ok(Err(error)) => Err(super::connect::failed("waiting for messages", &error)),
        Ok(Ok(Value::Array(pair))) => {
            let mut pair = pair.into_iter();
            match (pair.next(), pair.next()) {
                (Some(Value::BulkString(list)), Some(Value::BulkString(raw))) => {
                    Ok(Some((String::from_utf8_lossy(&list).into_owned(), raw)))
                }
                _ => Ok(None),
            }
        }
        Ok(Ok(Value::ServerError(error))) => Err(Error::Connection {
            operation: "waiting for messages",
            reason: error.to_string(),
        }),
        Ok(Ok(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::topic_pattern;
    use super::super::options::Options;
    use super::*;

    #[test]
    fn messages_are_routed_by_key_or_by_pattern() {
        let keys = Keys::new(&Options::default(), 0);
        let members = vec![
            keys.member("a", "", "direct"),
            keys.member("a.*", &topic_pattern("a.*"), "one"),
            keys.member("#", &topic_pattern("#"), "all"),
            "nonsense".to_owned(),
        ];
        assert_eq!(routed(&keys, &members, false, "a"), ["direct"]);
        assert_eq!(routed(&keys, &members, true, "a.b"), ["one", "all"]);
        assert_eq!(routed(&keys, &members, true, "c.d"), ["all"]);
    }
}
