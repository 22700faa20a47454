//! Deliveries that are not settled: their lease, and what becomes of them when their worker
//! cannot settle them any more.
//!
//! ```text
//!            fetch                   every VT/3                 ack, reject
//!  list ───────────────▶ unacked ───────────────▶ unacked ──────────────────▶ (gone, or list)
//!                        index = now   lease      index = now
//!                        owned + tag                 │
//!                                                    │ owner silent for 3 s, seen twice
//!                                                    ▼
//!                             other celeriac: RPUSH newest first, redelivered
//! ```
//!
//! The score in the index is the lease: whoever delivers the message anew writes another one,
//! so a holder whose score is no longer there knows that it has lost it. Renewed scores keep the
//! order of delivery, a microsecond apart. Every process that consumes keeps
//! `celeriac.alive.<owner>` alive and notes its tags and their scores in the hash
//! `celeriac.owned.<owner>`; a `!` behind the score marks a delivery that somebody works on, and
//! only those count as deaths when the process dies. Finding the dead is the business of
//! `janitor`.

use std::collections::HashSet;

use redis::{Cmd, Value};
use serde::de::IgnoredAny;

use super::core::{Arrival, Core, Held, now};
use super::fetch;
use super::keys;
use super::message::{self, Returned};
use super::reply::{texts, transaction};
use crate::transport::{Error, Tag};

/// How many messages the quarantine list keeps.
pub(super) const QUARANTINE_CAP: u32 = 10_000;
/// Deliveries in one script call.
pub(super) const CHUNK: usize = 100;

/// One delivery on its way back.
pub(super) struct Item {
    pub(super) tag: Tag,
    /// The score it must still have, as the server wrote it: Python's have more digits than
    /// microseconds.
    pub(super) score: String,
    /// The value it must still have in the hash.
    pub(super) stored: Vec<u8>,
    /// What is pushed.
    pub(super) value: Vec<u8>,
    /// Where to.
    pub(super) list: String,
}

/// The call that moves items back in one step each.
pub(super) fn give_back_command(core: &Core, owned: &str, side: &str, items: &[Item]) -> Cmd {
    let keys = &core.keys;
    let mut cmd = core
        .scripts
        .give_back
        .call([&*keys.unacked, &keys.index, owned].into_iter());
    cmd.arg(side);
    for item in items {
        cmd.arg(&*item.tag.0)
            .arg(&item.score)
            .arg(&item.stored)
            .arg(&item.value)
            .arg(&item.list);
    }
    cmd
}

/// The same without a script; whoever calls it has looked at the value just before.
pub(super) fn give_back_transaction(core: &Core, owned: &str, side: &str, item: &Item) -> Vec<Cmd> {
    let command = |name: &str, key: &str, argument: &[u8]| {
        let mut cmd = redis::cmd(name);
        cmd.arg(key).arg(argument);
        cmd
    };
    let tag = item.tag.0.as_bytes();
    transaction([
        command("ZREM", &core.keys.index, tag),
        command("HDEL", &core.keys.unacked, tag),
        command("HDEL", owned, tag),
        command(side, &item.list, &item.value),
    ])
}

/// Keeps the quarantine list from growing without end.
pub(super) fn cap_quarantine(core: &Core) -> Cmd {
    let mut cmd = redis::cmd("LTRIM");
    cmd.arg(&core.keys.quarantine)
        .arg(0)
        .arg(QUARANTINE_CAP - 1);
    cmd
}

/// The bytes of the envelope in a value of the `unacked` hash.
pub(super) fn envelope_of(stored: &[u8]) -> &[u8] {
    let Some(rest) = stored.strip_prefix(b"[") else {
        return stored;
    };
    let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
    match values.next() {
        Some(Ok(_)) => rest[..values.byte_offset()].trim_ascii(),
        _ => stored,
    }
}

impl Core {
    /// Deliveries that are ours by the server's account and that nobody here knows of, newest
    /// first: they were taken, and the reply that brought them was lost with its connection.
    pub(super) async fn unknown(&self) -> Result<Vec<Unknown>, Error> {
        let mut read = redis::cmd("HGETALL");
        read.arg(self.keys.owned(&self.ledger.owner));
        let flat = self.call("looking for lost deliveries", vec![read]).await?;
        let flat = flat.into_iter().next().map(texts).unwrap_or_default();
        let state = self.state();
        let left = self.ledger.left();
        let known = |tag: &Tag| {
            state.held.contains_key(tag)
                || left.orphans.contains_key(tag)
                || left.unsent.iter().any(|(unsent, ..)| unsent == tag)
        };
        let mut unknown: Vec<Unknown> = flat
            .chunks_exact(2)
            .map(|pair| Unknown {
                tag: Tag(pair[0].as_str().into()),
                score: pair[1].trim_end_matches('!').to_owned(),
            })
            .filter(|unknown| !known(&unknown.tag))
            .collect();
        unknown.sort_by_key(|unknown| std::cmp::Reverse(micros(&unknown.score)));
        Ok(unknown)
    }

    /// Hands such deliveries back. What was settled in the meantime is not there any more.
    pub(super) async fn hand_back_unknown(&self, unknown: Vec<Unknown>) -> Result<(), Error> {
        let owned = self.keys.owned(&self.ledger.owner);
        for chunk in unknown.chunks(CHUNK) {
            let wanted = chunk
                .iter()
                .map(|unknown| Wanted {
                    tag: unknown.tag.clone(),
                    score: unknown.score.clone(),
                    list: None,
                    died: false,
                })
                .collect();
            let count = self.move_to_queues(wanted, &owned).await?;
            if count > 0 {
                log::info!("{count} messages whose delivery was cut off went back to their queues");
            }
        }
        Ok(())
    }

    /// Hands back everything held except `keep`, oldest to be delivered first.
    pub(super) async fn restore(&self, keep: &[Tag]) -> Result<u64, Error> {
        // A fetch may be on its way.
        self.call("waiting for Redis", vec![redis::cmd("PING")])
            .await?;
        let keep: HashSet<&Tag> = keep.iter().collect();
        let returning: Vec<(Tag, Held)> = {
            let mut state = self.state();
            state.inbound.retain(
                |arrival| !matches!(arrival, Arrival::Raw { tag, .. } if !keep.contains(tag)),
            );
            state
                .held
                .extract_if(|tag, _| !keep.contains(tag))
                .collect()
        };
        self.hand_back(returning).await
    }

    pub(super) async fn hand_back(&self, mut returning: Vec<(Tag, Held)>) -> Result<u64, Error> {
        if !self.options.ack_emulation {
            return Ok(0);
        }
        returning.sort_by_key(|(_, held)| std::cmp::Reverse(held.sequence));
        let owned = self.keys.owned(&self.ledger.owner);
        let mut restored = 0;
        for chunk in returning.chunks(CHUNK) {
            let wanted = chunk
                .iter()
                .map(|(tag, held)| Wanted {
                    tag: tag.clone(),
                    score: keys::score(held.score),
                    list: Some(held.list.to_string()),
                    died: false,
                })
                .collect();
            let result = self.move_to_queues(wanted, &owned).await;
            match result {
                Ok(count) => restored += count,
                Err(error) => {
                    // Still ours: the next channel may hand them back.
                    self.ledger.left().orphans.extend(chunk.iter().cloned());
                    return Err(error);
                }
            }
        }
        Ok(restored)
    }

    /// Reads what is stored and pushes it to the consuming end of its list, in the order given.
    pub(super) async fn move_to_queues(
        &self,
        wanted: Vec<Wanted>,
        owned: &str,
    ) -> Result<u64, Error> {
        if wanted.is_empty() {
            return Ok(0);
        }
        let mut read = redis::cmd("HMGET");
        read.arg(&self.keys.unacked);
        for item in &wanted {
            read.arg(&*item.tag.0);
        }
        let values = match self.call("restoring messages", vec![read]).await?.pop() {
            Some(Value::Array(values)) => values,
            _ => Vec::new(),
        };
        let mut items = Vec::new();
        let mut vanished = Vec::new();
        for (item, value) in wanted.into_iter().zip(values) {
            let Value::BulkString(stored) = value else {
                if self.scripted {
                    // The script looks again and tidies up.
                    items.push(Item {
                        tag: item.tag,
                        score: item.score,
                        stored: Vec::new(),
                        value: Vec::new(),
                        list: String::new(),
                    });
                } else {
                    vanished.push(item.tag);
                }
                continue;
            };
            match message::returned(&stored, item.died) {
                Ok(returned) => {
                    let lists = match &item.list {
                        Some(list) => vec![list.clone()],
                        None => self.lists_for(&returned).await?,
                    };
                    for list in lists {
                        items.push(Item {
                            tag: item.tag.clone(),
                            score: item.score.clone(),
                            stored: stored.clone(),
                            value: returned.raw.clone(),
                            list,
                        });
                    }
                }
                Err(reason) => {
                    log::error!(
                        "delivery {} cannot be restored and was moved to {}: {reason}",
                        item.tag.0,
                        self.keys.quarantine
                    );
                    items.push(Item {
                        tag: item.tag,
                        score: item.score,
                        value: message::quarantined(&reason, "", now(), envelope_of(&stored)),
                        stored,
                        list: self.keys.quarantine.clone(),
                    });
                }
            }
        }
        let mut moved = 0;
        if self.scripted {
            let cmd = give_back_command(self, owned, "RPUSH", &items);
            if let Some(Value::Int(count)) = self.call("restoring messages", vec![cmd]).await?.pop()
            {
                moved += u64::try_from(count).unwrap_or(0);
            }
        } else {
            for item in &items {
                moved += u64::from(self.move_watched(item, owned).await?);
            }
        }
        if !vanished.is_empty() {
            let mut index = redis::cmd("ZREM");
            index.arg(&self.keys.index);
            let mut owner = redis::cmd("HDEL");
            owner.arg(owned);
            for tag in &vanished {
                index.arg(&*tag.0);
                owner.arg(&*tag.0);
            }
            self.call("restoring messages", vec![index, owner]).await?;
        }
        Ok(moved)
    }

    /// kombu's way: watches the hash, looks again, moves.
    async fn move_watched(&self, item: &Item, owned: &str) -> Result<bool, Error> {
        for _ in 0..5 {
            let mut watch = redis::cmd("WATCH");
            watch.arg(&self.keys.unacked);
            let mut read = redis::cmd("HGET");
            read.arg(&self.keys.unacked).arg(&*item.tag.0);
            let reply = self
                .call("restoring messages", vec![watch, read])
                .await?
                .pop();
            if !matches!(reply, Some(Value::BulkString(stored)) if stored == item.stored) {
                self.call("restoring messages", vec![redis::cmd("UNWATCH")])
                    .await?;
                return Ok(false);
            }
            let commands = give_back_transaction(self, owned, "RPUSH", item);
            if let Some(Value::Array(_)) = self.call("restoring messages", commands).await?.pop() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The lists a message of somebody else goes back to.
    async fn lists_for(&self, returned: &Returned) -> Result<Vec<String>, Error> {
        let list = |queue: &str| self.keys.list(queue, returned.priority);
        if returned.exchange.is_empty() {
            return Ok(vec![list(&returned.routing_key)]);
        }
        let mut read = redis::cmd("SMEMBERS");
        read.arg(self.keys.binding(&returned.exchange));
        let members = self
            .call("reading bindings", vec![read])
            .await?
            .pop()
            .map(texts);
        let members = members.unwrap_or_default();
        let topic = members
            .iter()
            .filter_map(|member| self.keys.parse_member(member))
            .any(|(_, pattern, _)| !pattern.is_empty());
        let queues = fetch::routed(&self.keys, &members, topic, &returned.routing_key);
        if queues.is_empty() {
            // kombu drops it; a queue of that name is the better guess.
            return Ok(vec![list(&returned.routing_key)]);
        }
        // One delivery becomes one delivery again, even if several queues are bound.
        Ok(queues
            .first()
            .map(|queue| list(queue))
            .into_iter()
            .collect())
    }
}

/// A delivery whose reply never arrived.
#[derive(Debug, PartialEq)]
pub(super) struct Unknown {
    tag: Tag,
    score: String,
}

/// A delivery to be handed back.
pub(super) struct Wanted {
    pub(super) tag: Tag,
    pub(super) score: String,
    /// The list it came from, if known; otherwise by its exchange, routing key and priority.
    pub(super) list: Option<String>,
    /// Its worker died while working on it.
    pub(super) died: bool,
}

/// A score as microseconds.
pub(super) fn micros(score: &str) -> Option<u64> {
    let seconds: f64 = score.parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0).then(|| (seconds * 1e6).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelope_is_cut_out_of_its_record() {
        assert_eq!(
            envelope_of(b"[{\"a\": [1, 2]}, \"\", \"q\"]"),
            b"{\"a\": [1, 2]}"
        );
        assert_eq!(envelope_of(b"[nonsense"), b"[nonsense");
        assert_eq!(envelope_of(b""), b"");
    }

    #[test]
    fn scores_of_kombu_become_microseconds() {
        assert_eq!(micros("1795390659.751005"), Some(1_795_390_659_751_005));
        assert_eq!(micros("-inf"), None);
    }
}
