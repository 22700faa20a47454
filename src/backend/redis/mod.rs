//! Results in Redis, in the keys and forms of Celery 5.3 to 5.7.
//!
//! | key | content |
//! |---|---|
//! | `celery-task-meta-<task>` | a task's document, also published on the channel of that name |
//! | `celery-taskset-meta-<group>` | a saved group |
//! | the same with `.s` `.j` `.t` `.d` `.c` | a chord: size, parts, extra size, counted, claim |
//!
//! A store is one round trip: the script looks whether the task has succeeded, stores and
//! publishes. Where scripts are refused the steps are sent one by one, as Celery sends them;
//! chords are then counted as Celery up to 5.6 counted them. Every command has a deadline; a
//! connection that broke is replaced, and the store tried again until the policy's tries are
//! used up. Answers for `celery/backends/redis.py` and `KeyValueStoreBackend` of `base.py`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use redis::{Pipeline, Value as Reply};
use serde_json::{Value, json};
use uuid::Uuid;

use self::address::Address;
use self::link::{Fault, Link, Request, read};
use self::script::{Script, Scripts};
use super::retry::Retrier;
use super::{
    Backend, ChordPart, ChordStatus, Claim, Codec, Error, Meta, Options, PartResult, ReplyTo,
    RetryPolicy, Stored,
};

mod address;
mod link;
mod script;

/// The largest value Redis takes.
const LARGEST: usize = 512 * 1024 * 1024;

/// How long a claim lasts while the body is being published: the publisher's own retries fit
/// in. Celery computes it from its publish policy and arrives at the same by default.
const PUBLISH_CLAIM: u64 = 21;

const STORE: &str = "store the result";
const READ: &str = "read the result";
const CHORD: &str = "count a part of the chord";

/// The Redis backend.
pub struct Redis {
    link: Link,
    codec: Codec,
    scripts: Scripts,
    /// Set for good when the server refused to run a script.
    scripts_refused: AtomicBool,
    retrier: Retrier,
    prefix: String,
    expires: u64,
    failure_expires: u64,
    chord_expires: u64,
    chord_ordered: bool,
    claim_seconds: u64,
}

/// The keys of one chord.
struct ChordKeys {
    group: String,
    size: String,
    parts: String,
    extra: String,
    counted: String,
    claim: String,
}

impl Redis {
    /// The backend of a URL; connects when first used.
    pub fn new(url: &str, options: &Options) -> Result<Self, Error> {
        let address = Address::parse(url, options)?;
        let transport = &options.transport_options;
        let mut prefix = transport
            .get("global_keyprefix")
            .and_then(Value::as_str)
            .unwrap_or("")
            .to_owned();
        if !prefix.is_empty() && !prefix.ends_with([':', '_', '-', '.']) {
            prefix.push('_');
        }
        let policy = RetryPolicy::of(options);
        let expires = options.expires.as_secs();
        let join = match options.chord_join_timeout {
            Duration::ZERO => Duration::from_secs(5),
            given => given,
        };
        Ok(Self {
            link: Link::new(address, options),
            codec: Codec::new(&options.serializer, options.compression.as_deref())?,
            scripts: Scripts::new(),
            scripts_refused: AtomicBool::new(false),
            retrier: Retrier::new(policy, "Redis"),
            prefix,
            expires,
            failure_expires: options
                .failure_expires
                .map_or(expires, |given| given.as_secs()),
            chord_expires: options
                .chord_expires
                .map_or(expires, |given| given.as_secs()),
            chord_ordered: transport
                .get("result_chord_ordered")
                .and_then(Value::as_bool)
                .unwrap_or(true),
            claim_seconds: (join * 2).as_secs().max(5),
        })
    }

    fn task_key(&self, task_id: &str) -> String {
        format!("{}celery-task-meta-{task_id}", self.prefix)
    }

    fn group_key(&self, group_id: &str) -> String {
        format!("{}celery-taskset-meta-{group_id}", self.prefix)
    }

    fn chord_keys(&self, group_id: &str) -> ChordKeys {
        let group = self.group_key(group_id);
        ChordKeys {
            size: format!("{group}.s"),
            parts: format!("{group}.j"),
            extra: format!("{group}.t"),
            counted: format!("{group}.d"),
            claim: format!("{group}.c"),
            group,
        }
    }

    /// Runs `script` unless the server refuses scripts; then `None`.
    async fn scripted<'a>(
        &self,
        script: &Script,
        keys: &[&str],
        arguments: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Option<Result<Reply, Fault>> {
        if self.scripts_refused.load(Ordering::Relaxed) {
            return None;
        }
        match self.link.script(script, keys, arguments).await {
            Err(fault) if fault.refuses_scripts() => {
                if !self.scripts_refused.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "the result backend {} refuses Lua scripts: results are stored in several \
                         steps, and chords are counted as Celery 5.6 does",
                        self.link.shown()
                    );
                }
                None
            }
            outcome => Some(outcome),
        }
    }

    async fn store_once(&self, key: &str, payload: &[u8], expires: u64) -> Result<Stored, Error> {
        let expires_text = expires.to_string();
        let mut known: Vec<u8> = Vec::new();
        loop {
            let arguments = [payload, expires_text.as_bytes(), known.as_slice()];
            let reply = self
                .scripted(&self.scripts.store, &[key], arguments.into_iter())
                .await;
            let Some(reply) = reply else {
                return self.store_stepwise(key, payload, expires).await;
            };
            match reply.map_err(|fault| fault.of(STORE))? {
                Reply::Int(0) => return Ok(Stored::AlreadySuccessful),
                Reply::BulkString(there) => {
                    // An earlier try arrived and its answer was lost.
                    if there == payload {
                        return Ok(Stored::Written);
                    }
                    if self.tells_of_success(key, &there) {
                        return Ok(Stored::AlreadySuccessful);
                    }
                    known = there;
                }
                _ => return Ok(Stored::Written),
            }
        }
    }

    /// What cannot be read is no success and may be written over.
    fn tells_of_success(&self, key: &str, document: &[u8]) -> bool {
        let document = self.codec.decode(key, document).ok();
        document
            .and_then(Meta::from_value)
            .is_some_and(|meta| meta.is_success())
    }

    async fn store_stepwise(
        &self,
        key: &str,
        payload: &[u8],
        expires: u64,
    ) -> Result<Stored, Error> {
        if let Some(there) = self.read_key(STORE, key).await?
            && there != payload
            && self.tells_of_success(key, &there)
        {
            return Ok(Stored::AlreadySuccessful);
        }
        self.set_and_publish(STORE, key, payload, expires).await?;
        Ok(Stored::Written)
    }

    async fn set_and_publish(
        &self,
        operation: &'static str,
        key: &str,
        payload: &[u8],
        expires: u64,
    ) -> Result<(), Error> {
        let mut pipeline = Pipeline::new();
        pipeline.atomic();
        match expires {
            0 => pipeline.set(key, payload),
            seconds => pipeline.set_ex(key, payload, seconds),
        };
        pipeline.publish(key, payload);
        self.transaction(operation, &pipeline).await.map(|_| ())
    }

    async fn transaction(
        &self,
        operation: &'static str,
        pipeline: &Pipeline,
    ) -> Result<Reply, Error> {
        let outcome = self.link.send(Request::Pipeline(pipeline)).await;
        outcome.map_err(|fault| fault.of(operation))
    }

    async fn read_key(&self, operation: &'static str, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let mut command = redis::cmd("GET");
        command.arg(key);
        let reply = self.link.send(Request::Command(&command)).await;
        read(operation, reply.map_err(|fault| fault.of(operation))?)
    }

    /// A part as Celery keeps it, and its index as Redis reads it.
    fn encode_part(&self, part: &ChordPart<'_>) -> Result<(Vec<u8>, String), Error> {
        let member = json!([1, part.task_id, part.state, part.result]);
        let index = part
            .group_index
            .map_or_else(|| "+inf".to_owned(), |index| index.to_string());
        Ok((self.codec.encode(&member)?, index))
    }

    fn decode_part(&self, group_id: &str, member: &[u8]) -> Result<PartResult, Error> {
        let wrong = || Error::Decode {
            what: format!("chord {group_id}"),
            reason: "a part is not [1, task id, state, result]".to_owned(),
        };
        let Value::Array(fields) = self.codec.decode(&format!("chord {group_id}"), member)? else {
            return Err(wrong());
        };
        match <[Value; 4]>::try_from(fields) {
            Ok([_, Value::String(task_id), Value::String(state), result]) => Ok(PartResult {
                task_id,
                state,
                result,
            }),
            _ => Err(wrong()),
        }
    }

    async fn part_once(
        &self,
        part: &ChordPart<'_>,
        member: &[u8],
        index: &str,
        token: &str,
    ) -> Result<ChordStatus, Error> {
        let keys = self.chord_keys(part.group_id);
        let group_expires = match (self.chord_expires, self.expires) {
            (0, _) | (_, 0) => 0,
            (chord, result) => chord.max(result),
        };
        let numbers =
            [self.chord_expires, group_expires, self.claim_seconds].map(|n| n.to_string());
        let arguments = [
            part.task_id.as_bytes(),
            member,
            index.as_bytes(),
            if self.chord_ordered { b"1" } else { b"0" },
            numbers[0].as_bytes(),
            numbers[1].as_bytes(),
            numbers[2].as_bytes(),
            token.as_bytes(),
        ];
        let names = [
            &keys.parts,
            &keys.extra,
            &keys.size,
            &keys.counted,
            &keys.group,
            &keys.claim,
        ];
        let names = names.map(String::as_str);
        let reply = self
            .scripted(&self.scripts.part, &names, arguments.into_iter())
            .await;
        let Some(reply) = reply else {
            return self.part_stepwise(part, &keys, member, index).await;
        };
        let Reply::Array(mut fields) = reply.map_err(|fault| fault.of(CHORD))? else {
            return Ok(ChordStatus::Waiting);
        };
        match (fields.first(), fields.len()) {
            (Some(Reply::Int(-1)), _) => Ok(ChordStatus::Done),
            (Some(Reply::Int(2)), _) => Ok(ChordStatus::Claimed),
            (Some(Reply::Int(1)), 3) => {
                let members: Vec<Vec<u8>> = read(CHORD, fields.remove(2))?;
                let group: Option<Vec<u8>> = read(CHORD, fields.remove(1))?;
                self.ready(part.group_id, Claim(token.to_owned()), group, &members)
            }
            _ => Ok(ChordStatus::Waiting),
        }
    }

    fn ready(
        &self,
        group_id: &str,
        claim: Claim,
        group: Option<Vec<u8>>,
        members: &[Vec<u8>],
    ) -> Result<ChordStatus, Error> {
        let parts = members
            .iter()
            .map(|member| self.decode_part(group_id, member));
        let parts = parts.collect::<Result<_, _>>()?;
        let saved = match group {
            Some(bytes) => self.saved_group(group_id, &bytes)?,
            None => None,
        };
        Ok(match saved {
            Some(group) => ChordStatus::ReadyNested {
                claim,
                group,
                parts,
            },
            None => ChordStatus::Ready { claim, parts },
        })
    }

    fn saved_group(&self, group_id: &str, bytes: &[u8]) -> Result<Option<Value>, Error> {
        match self.codec.decode(&format!("group {group_id}"), bytes)? {
            Value::Object(mut document) => Ok(document.remove("result")),
            _ => Ok(None),
        }
    }

    /// Celery's way up to 5.6: whoever sees the last part finishes the chord. A part that
    /// returns twice counts once because it is the same member of a sorted set.
    async fn part_stepwise(
        &self,
        part: &ChordPart<'_>,
        keys: &ChordKeys,
        member: &[u8],
        index: &str,
    ) -> Result<ChordStatus, Error> {
        let mut pipeline = Pipeline::new();
        pipeline.atomic();
        if self.chord_ordered {
            pipeline
                .cmd("ZADD")
                .arg(&keys.parts)
                .arg(index)
                .arg(member)
                .ignore();
            pipeline.zcard(&keys.parts);
        } else {
            pipeline.rpush(&keys.parts, member).ignore();
            pipeline.llen(&keys.parts);
        }
        pipeline.get(&keys.extra).get(&keys.size).get(&keys.group);
        if self.chord_ordered {
            pipeline.zrange(&keys.parts, 0, -1);
        } else {
            pipeline.lrange(&keys.parts, 0, -1);
        }
        if let Ok(seconds @ 1..) = i64::try_from(self.chord_expires) {
            for key in [&keys.parts, &keys.extra, &keys.size] {
                pipeline.expire(key, seconds).ignore();
            }
        }
        let reply = self.transaction(CHORD, &pipeline).await?;
        type Answer = (u64, Option<u64>, Option<u64>, Option<Vec<u8>>, Vec<Vec<u8>>);
        let (there, extra, size, group, members): Answer = read(CHORD, reply)?;
        match size {
            Some(size) if there == size + extra.unwrap_or(0) => {
                self.ready(part.group_id, Claim(String::new()), group, &members)
            }
            _ => Ok(ChordStatus::Waiting),
        }
    }

    async fn delete(&self, operation: &'static str, keys: &[&str]) -> Result<(), Error> {
        let mut command = redis::cmd("DEL");
        command.arg(keys);
        let attempt = || async {
            let outcome = self.link.send(Request::Command(&command)).await;
            outcome.map(|_| ()).map_err(|fault| fault.of(operation))
        };
        self.retrier.run(attempt).await
    }
}

#[async_trait]
impl Backend for Redis {
    async fn store(&self, meta: &Meta, _: &ReplyTo<'_>) -> Result<Stored, Error> {
        let payload = self.codec.encode(&meta.to_value())?;
        if payload.len() > LARGEST {
            return Err(Error::TooLarge {
                size: payload.len(),
                limit: LARGEST,
            });
        }
        let key = self.task_key(&meta.task_id);
        let expires = match meta.status.as_str() {
            "FAILURE" => self.failure_expires,
            _ => self.expires,
        };
        self.retrier
            .run(|| self.store_once(&key, &payload, expires))
            .await
    }

    async fn get(&self, task_id: &str) -> Result<Option<Meta>, Error> {
        let key = self.task_key(task_id);
        let Some(bytes) = self.retrier.run(|| self.read_key(READ, &key)).await? else {
            return Ok(None);
        };
        let document = self.codec.decode(task_id, &bytes)?;
        Meta::from_value(document)
            .map(Some)
            .ok_or_else(|| Error::Decode {
                what: task_id.to_owned(),
                reason: "it is no result document".to_owned(),
            })
    }

    async fn forget(&self, task_id: &str) -> Result<(), Error> {
        self.delete("forget the result", &[&self.task_key(task_id)])
            .await
    }

    async fn chord_start(&self, group_id: &str, size: u64) -> Result<(), Error> {
        let keys = self.chord_keys(group_id);
        let mut pipeline = Pipeline::new();
        pipeline.atomic();
        pipeline.del(&keys.claim);
        match self.chord_expires {
            0 => pipeline.set(&keys.size, size),
            seconds => pipeline.set_ex(&keys.size, size, seconds),
        };
        const OPERATION: &str = "store the size of the chord";
        self.retrier
            .run(|| self.transaction(OPERATION, &pipeline))
            .await
            .map(|_| ())
    }

    async fn chord_part(&self, part: &ChordPart<'_>) -> Result<ChordStatus, Error> {
        let (member, index) = self.encode_part(part)?;
        // One token for all tries: a claim whose answer was lost is found again by the next.
        let token = Uuid::new_v4().simple().to_string();
        self.retrier
            .run(|| self.part_once(part, &member, &index, &token))
            .await
    }

    async fn chord_extend(&self, group_id: &str, claim: &Claim) -> Result<bool, Error> {
        const OPERATION: &str = "renew the claim on the chord";
        let keys = self.chord_keys(group_id);
        let seconds = self.claim_seconds.max(PUBLISH_CLAIM).to_string();
        let arguments = [claim.0.as_bytes(), seconds.as_bytes()];
        let names = [keys.claim.as_str(), keys.size.as_str()];
        let attempt = || async {
            match self
                .scripted(&self.scripts.extend, &names, arguments.into_iter())
                .await
            {
                Some(reply) => {
                    let held: i64 = read(OPERATION, reply.map_err(|fault| fault.of(OPERATION))?)?;
                    Ok(held == 1)
                }
                None => Ok(true),
            }
        };
        self.retrier.run(attempt).await
    }

    async fn chord_done(&self, group_id: &str, claim: &Claim) -> Result<(), Error> {
        const OPERATION: &str = "forget the chord";
        let keys = self.chord_keys(group_id);
        let remember = (self.claim_seconds * 2).max(300).to_string();
        let arguments = [claim.0.as_bytes(), remember.as_bytes()];
        let names = [
            &keys.claim,
            &keys.parts,
            &keys.extra,
            &keys.size,
            &keys.counted,
        ];
        let names = names.map(String::as_str);
        let attempt = || async {
            match self
                .scripted(&self.scripts.done, &names, arguments.into_iter())
                .await
            {
                Some(reply) => reply.map(|_| ()).map_err(|fault| fault.of(OPERATION)),
                None => self.delete(OPERATION, &names[1..]).await,
            }
        };
        self.retrier.run(attempt).await
    }

    async fn chord_fail(&self, group_id: &str) -> Result<(), Error> {
        self.delete("give the chord up", &[&self.chord_keys(group_id).size])
            .await
    }

    async fn save_group(&self, group_id: &str, tuple: &Value) -> Result<(), Error> {
        let payload = self.codec.encode(&json!({ "result": tuple }))?;
        let key = self.group_key(group_id);
        const OPERATION: &str = "save the group";
        let attempt = || self.set_and_publish(OPERATION, &key, &payload, self.expires);
        self.retrier.run(attempt).await
    }

    async fn restore_group(&self, group_id: &str) -> Result<Option<Value>, Error> {
        let key = self.group_key(group_id);
        match self
            .retrier
            .run(|| self.read_key("read the group", &key))
            .await?
        {
            Some(bytes) => self.saved_group(group_id, &bytes),
            None => Ok(None),
        }
    }

    fn supports_chords(&self) -> bool {
        true
    }

    fn display_url(&self) -> String {
        self.link.shown().to_owned()
    }

    fn driver(&self) -> &'static str {
        "redis"
    }
}
