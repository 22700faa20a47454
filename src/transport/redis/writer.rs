//! The one task that speaks on the command connection.
//!
//! It takes everything that waits, in order, puts a fetch behind it when there is room for
//! messages, and sends all of it as one pipeline: under load an acknowledgement costs no round
//! trip of its own. While one pipeline is on its way the next one collects. Operations that
//! must read before they write (requeue, quarantine, topic exchanges) end the pipeline and go
//! their own way, so the order holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Cmd, Pipeline, ServerError, Value};
use tokio::sync::oneshot;

use super::core::{Core, Fault, Fetched, Held, Op, Outgoing, Plan, Route, Settlement, now};
use super::message;
use super::reply::{is_fatal, refusal, refused, texts, transaction};
use super::script::Script;
use super::{fetch, keys, unacked};
use crate::transport::{Error, Tag};

/// Acknowledgements in one command; Lua's stack sets a limit.
const ACKS: usize = 500;
/// Pause after the server refused a fetch, for want of memory mostly.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// What is to be done with the replies of a part of the pipeline.
enum Pending {
    Acks(Vec<(Tag, Held)>),
    Cast,
    Publish(Option<oneshot::Sender<Result<(), Error>>>),
    Call(oneshot::Sender<Result<Vec<Value>, Error>>),
    Fetch(Plan, u64, u64),
}

#[derive(Default)]
struct Batch {
    pipeline: Pipeline,
    /// Number of replies, and what they are for.
    pending: Vec<(usize, Pending)>,
    acks: Vec<(Tag, Held)>,
}

/// See the module's page.
pub(super) struct Writer {
    core: Arc<Core>,
    connection: MultiplexedConnection,
    refusing: bool,
}

impl Writer {
    pub(super) fn new(core: Arc<Core>, connection: MultiplexedConnection) -> Self {
        Self {
            core,
            connection,
            refusing: false,
        }
    }

    /// Works until the channel ends.
    pub(super) async fn run(mut self) {
        let mut ended = self.core.ended();
        loop {
            let (ops, plan) = self.core.take_work();
            if ops.is_empty() && plan.is_none() {
                if *ended.borrow() {
                    return;
                }
                tokio::select! {
                    () = self.core.work.notified() => {}
                    _ = ended.changed() => {}
                }
                // Lets the consumer say what else it has to say: one pipeline instead of two.
                tokio::task::yield_now().await;
                continue;
            }
            if let Err(fault) = self.step(ops, plan).await {
                self.core.fail(fault, Vec::new());
                return;
            }
        }
    }

    async fn step(&mut self, ops: Vec<Op>, plan: Option<Plan>) -> Result<(), Fault> {
        let mut batch = Batch::default();
        let mut ops = VecDeque::from(ops);
        while let Some(op) = ops.pop_front() {
            let result = self.append(&mut batch, op).await;
            if let Err(fault) = result {
                // What was taken from the queue must not be forgotten.
                let rest = ops.into_iter().filter_map(|op| match op {
                    Op::Settle(tag, held, settlement) => Some((tag, held, settlement)),
                    _ => None,
                });
                self.core.fail(fault.clone(), rest.collect());
                return Err(fault);
            }
        }
        self.close_acks(&mut batch);
        if let Some(plan) = plan {
            let at = now();
            let sequence = self.core.ledger.sequence(plan.want);
            batch
                .pipeline
                .add_command(fetch::command(&self.core, &plan, at, sequence));
            batch.pending.push((1, Pending::Fetch(plan, at, sequence)));
        }
        self.send(&mut batch).await
    }

    async fn append(&mut self, batch: &mut Batch, op: Op) -> Result<(), Fault> {
        match op {
            Op::Settle(tag, held, Settlement::Ack) => {
                batch.acks.push((tag, held));
                if batch.acks.len() >= ACKS {
                    self.close_acks(batch);
                }
                return Ok(());
            }
            Op::Settle(tag, held, settlement) => {
                self.close_acks(batch);
                self.send(batch).await?;
                return self.put_back(tag, held, settlement).await;
            }
            _ => self.close_acks(batch),
        }
        match op {
            Op::Settle(..) => {}
            Op::Started(tag, held) => {
                let mut cmd = redis::cmd("HSET");
                cmd.arg(self.core.keys.owned(&self.core.ledger.owner))
                    .arg(&*tag.0)
                    .arg(held.owned_value());
                batch.add(vec![cmd], Pending::Cast);
            }
            Op::Call(commands, done) => batch.add(commands, Pending::Call(done)),
            Op::Publish(outgoing, done) => self.publish(batch, outgoing, done).await?,
        }
        Ok(())
    }

    /// Turns the collected acknowledgements into commands.
    fn close_acks(&self, batch: &mut Batch) {
        if batch.acks.is_empty() {
            return;
        }
        let acks = std::mem::take(&mut batch.acks);
        let keys = &self.core.keys;
        let owned = keys.owned(&self.core.ledger.owner);
        if self.core.scripted {
            let script = &self.core.scripts.ack;
            let mut cmd = script.call([&*keys.unacked, &keys.index, &owned].into_iter());
            for (tag, held) in &acks {
                cmd.arg(&*tag.0).arg(keys::score(held.score));
            }
            batch.add(vec![cmd], Pending::Acks(acks));
        } else {
            let commands = transaction(
                [
                    ("ZREM", &keys.index),
                    ("HDEL", &keys.unacked),
                    ("HDEL", &owned),
                ]
                .map(|(name, key)| {
                    let mut cmd = redis::cmd(name);
                    cmd.arg(key);
                    for (tag, _) in &acks {
                        cmd.arg(&*tag.0);
                    }
                    cmd
                }),
            );
            batch.add(commands, Pending::Acks(acks));
        }
    }

    async fn publish(
        &mut self,
        batch: &mut Batch,
        outgoing: Outgoing,
        done: Option<oneshot::Sender<Result<(), Error>>>,
    ) -> Result<(), Fault> {
        let Outgoing {
            route,
            payload,
            ttl,
        } = outgoing;
        let pending = match done {
            None => Pending::Cast,
            done => Pending::Publish(done),
        };
        match route {
            Route::Channel(channel) => {
                let mut cmd = redis::cmd("PUBLISH");
                cmd.arg(channel).arg(payload);
                batch.add(vec![cmd], pending);
            }
            Route::List(list) => batch.add(self.push(&list, &payload, ttl), pending),
            Route::Exchange {
                name,
                topic: false,
                routing_key,
                suffix,
            } if self.core.scripted => {
                let keys = &self.core.keys;
                let mut cmd = self
                    .core
                    .scripts
                    .route
                    .call([&*keys.binding(&name)].into_iter());
                cmd.arg(routing_key)
                    .arg(keys.sep())
                    .arg(keys.prefix())
                    .arg(suffix);
                cmd.arg(payload).arg(ttl.unwrap_or(0));
                batch.add(vec![cmd], pending);
            }
            Route::Exchange {
                name,
                topic,
                routing_key,
                suffix,
            } => {
                self.send(batch).await?;
                let mut cmd = redis::cmd("SMEMBERS");
                cmd.arg(self.core.keys.binding(&name));
                let members = match self.exchange(&mut Batch::of(vec![cmd])).await?.pop() {
                    Some(Value::ServerError(error)) => {
                        settle_publish(pending, Err(&error));
                        return Ok(());
                    }
                    Some(members) => texts(members),
                    None => Vec::new(),
                };
                let commands: Vec<Cmd> =
                    fetch::routed(&self.core.keys, &members, topic, &routing_key)
                        .into_iter()
                        .flat_map(|queue| {
                            let list = format!("{}{queue}{suffix}", self.core.keys.prefix());
                            self.push(&list, &payload, ttl)
                        })
                        .collect();
                if commands.is_empty() {
                    settle_publish(pending, Ok(()));
                } else {
                    batch.add(commands, pending);
                }
            }
        }
        Ok(())
    }

    fn push(&self, list: &str, payload: &[u8], ttl: Option<u64>) -> Vec<Cmd> {
        let Some(ttl) = ttl else {
            let mut cmd = redis::cmd("LPUSH");
            cmd.arg(list).arg(payload);
            return vec![cmd];
        };
        if self.core.scripted {
            let mut cmd = self.core.scripts.push.call([list].into_iter());
            cmd.arg(payload).arg(ttl);
            return vec![cmd];
        }
        let mut push = redis::cmd("LPUSH");
        push.arg(list).arg(payload);
        let mut expire = redis::cmd("PEXPIRE");
        expire.arg(list).arg(ttl);
        transaction([push, expire])
    }

    /// Requeues or quarantines: reads what is stored, then moves it unless it has changed.
    async fn put_back(
        &mut self,
        tag: Tag,
        held: Held,
        settlement: Settlement,
    ) -> Result<(), Fault> {
        let core = Arc::clone(&self.core);
        let mut cmd = redis::cmd("HGET");
        cmd.arg(&core.keys.unacked).arg(&*tag.0);
        let keep = |fault: Fault| {
            let unsent = vec![(tag.clone(), held.clone(), settlement.clone())];
            core.fail(fault.clone(), unsent);
            fault
        };
        let reply = self
            .exchange(&mut Batch::of(vec![cmd]))
            .await
            .map_err(keep)?
            .pop();
        let stored = match reply {
            Some(Value::BulkString(stored)) => stored,
            Some(Value::ServerError(error)) => {
                log::warn!("delivery {} stays unacknowledged: {error}", tag.0);
                return Ok(());
            }
            _ => {
                log::debug!("delivery {} was restored by somebody else", tag.0);
                return Ok(());
            }
        };
        let (list, value) = match &settlement {
            Settlement::Quarantine(reason) => {
                let raw = unacked::envelope_of(&stored);
                let entry = message::quarantined(reason, &held.queue, now(), raw);
                (core.keys.quarantine.clone(), entry)
            }
            _ => match message::returned(&stored, false) {
                Ok(returned) => (held.list.to_string(), returned.raw),
                Err(reason) => {
                    let entry = message::quarantined(&reason, &held.queue, now(), &stored);
                    (core.keys.quarantine.clone(), entry)
                }
            },
        };
        let owned = core.keys.owned(&core.ledger.owner);
        let item = unacked::Item {
            tag: tag.clone(),
            score: keys::score(held.score),
            stored,
            value,
            list,
        };
        let mut commands = if core.scripted {
            vec![unacked::give_back_command(&core, &owned, "LPUSH", &[item])]
        } else {
            unacked::give_back_transaction(&core, &owned, "LPUSH", &item)
        };
        if matches!(settlement, Settlement::Quarantine(_)) {
            commands.push(unacked::cap_quarantine(&core));
        }
        let replies = self
            .exchange(&mut Batch::of(commands))
            .await
            .map_err(keep)?;
        if let Some(error) = replies.iter().find_map(refusal) {
            log::warn!("delivery {} stays unacknowledged: {error}", tag.0);
        }
        Ok(())
    }

    /// Sends the batch and deals with the replies.
    async fn send(&mut self, batch: &mut Batch) -> Result<(), Fault> {
        if batch.pending.is_empty() {
            return Ok(());
        }
        let replies = self.exchange(batch).await;
        let pending = std::mem::take(&mut batch.pending);
        batch.pipeline.clear();
        let mut replies = match replies {
            Ok(replies) => replies.into_iter(),
            Err(fault) => {
                let unsent = pending
                    .into_iter()
                    .filter_map(|(_, pending)| match pending {
                        Pending::Acks(acks) => Some(acks),
                        _ => None,
                    });
                let unsent = unsent
                    .flatten()
                    .map(|(tag, held)| (tag, held, Settlement::Ack))
                    .collect();
                // Dropping the others' senders tells their callers; the fault must be known
                // before they look.
                self.core.fail(fault.clone(), unsent);
                return Err(fault);
            }
        };
        for (count, pending) in pending {
            let mut part: Vec<Value> = replies.by_ref().take(count).collect();
            match pending {
                Pending::Call(done) => {
                    let result = match part.iter().find_map(refusal) {
                        Some(error) => Err(refused("asking Redis", error)),
                        None => Ok(part),
                    };
                    // Whoever asked may have gone.
                    drop(done.send(result));
                }
                Pending::Acks(acks) => self.acknowledged(acks, part.pop()),
                Pending::Fetch(plan, at, sequence) => self.fetched(plan, at, sequence, part.pop()),
                pending => {
                    settle_publish(pending, part.iter().find_map(refusal).map_or(Ok(()), Err))
                }
            }
        }
        Ok(())
    }

    fn acknowledged(&self, acks: Vec<(Tag, Held)>, reply: Option<Value>) {
        match reply {
            Some(Value::ServerError(error)) => {
                log::warn!(
                    "{} acknowledgements will be sent again: {error}",
                    acks.len()
                );
                let core = Arc::clone(&self.core);
                self.core.spawn(async move {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                    for (tag, held) in acks {
                        if core
                            .push(Op::Settle(tag.clone(), held.clone(), Settlement::Ack))
                            .is_err()
                        {
                            core.ledger.left().unsent.push((tag, held, Settlement::Ack));
                        }
                    }
                });
            }
            Some(Value::Array(gone)) if self.core.scripted => {
                for tag in gone {
                    log::warn!(
                        "delivery {} was acknowledged too late: somebody else has it",
                        texts(Value::Array(vec![tag])).concat()
                    );
                }
            }
            _ => {}
        }
    }

    fn fetched(&mut self, plan: Plan, at: u64, sequence: u64, reply: Option<Value>) {
        let core = &self.core;
        let reply = match reply {
            Some(Value::Array(reply)) => reply,
            Some(Value::ServerError(error)) => {
                if !self.refusing {
                    log::warn!("fetching messages pauses because Redis refuses it: {error}");
                }
                self.refusing = true;
                core.state().promising = false;
                let core = Arc::clone(core);
                self.core.spawn(async move {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                    core.promise();
                });
                return;
            }
            _ => Vec::new(),
        };
        self.refusing = false;
        let taken = reply.len() / 3;
        let filled = taken == plan.want;
        {
            let mut state = core.state();
            state.filled = filled;
            state.promising &= filled;
        }
        if !filled {
            core.idle.notify_one();
        }
        if taken == 0 {
            return;
        }
        let width = plan.sources.len();
        let mut fetched = Vec::with_capacity(taken);
        let mut triples = reply.into_iter();
        let mut place = 0;
        while let (
            Some(Value::Int(list)),
            Some(Value::BulkString(tag)),
            Some(Value::BulkString(raw)),
        ) = (triples.next(), triples.next(), triples.next())
        {
            let index = usize::try_from(list - 1).unwrap_or(0);
            let source = index % width;
            let queue = &plan.sources[source].queue;
            if tag.is_empty() {
                log::error!(
                    "a message in queue {queue} cannot be decoded and was moved to {}: {}",
                    core.keys.quarantine,
                    String::from_utf8_lossy(&raw)
                );
            } else {
                fetched.push(Fetched {
                    source,
                    step: index / width,
                    tag: Tag(String::from_utf8_lossy(&tag).into()),
                    raw,
                    score: at + place,
                    sequence: sequence + place,
                });
            }
            place += 1;
        }
        core.admit(&plan, fetched);
    }

    /// Sends the commands of a batch and returns all replies, refusals among them. Only what
    /// ends the channel is an error.
    async fn exchange(&mut self, batch: &mut Batch) -> Result<Vec<Value>, Fault> {
        let count = batch.pipeline.len();
        let broken = |error: redis::RedisError| Fault::Broken {
            operation: "talking to Redis",
            reason: error.to_string(),
        };
        let mut replies = self
            .connection
            .send_packed_commands(&batch.pipeline, 0, count)
            .await
            .map_err(broken)?;
        if replies.len() != count {
            return Err(Fault::Broken {
                operation: "talking to Redis",
                reason: format!("{} replies to {count} commands", replies.len()),
            });
        }
        let mut loaded = false;
        for (at, reply) in replies.iter_mut().enumerate() {
            let Some(error) = refusal(reply) else {
                continue;
            };
            if error.code() == "NOSCRIPT" {
                // SCRIPT FLUSH, or a replica that took over: teach it and say it again.
                if !loaded {
                    let mut load = Pipeline::new();
                    for script in self.core.scripts.all() {
                        load.add_command(Script::load(script));
                    }
                    let length = load.len();
                    self.connection
                        .send_packed_commands(&load, 0, length)
                        .await
                        .map_err(broken)?;
                    loaded = true;
                }
                let command = batch.pipeline.cmd_iter().nth(at).cloned();
                if let Some(command) = command {
                    let mut again = Pipeline::new();
                    again.add_command(command);
                    let answer = self
                        .connection
                        .send_packed_commands(&again, 0, 1)
                        .await
                        .map_err(broken)?;
                    *reply = answer.into_iter().next().unwrap_or(Value::Nil);
                }
            } else if is_fatal(error) {
                return Err(Fault::Broken {
                    operation: "talking to Redis",
                    reason: error.to_string(),
                });
            }
        }
        Ok(replies)
    }
}

impl Batch {
    fn of(commands: Vec<Cmd>) -> Self {
        let mut batch = Self::default();
        for command in commands {
            batch.pipeline.add_command(command);
        }
        batch
    }

    fn add(&mut self, commands: Vec<Cmd>, pending: Pending) {
        self.pending.push((commands.len(), pending));
        for command in commands {
            self.pipeline.add_command(command);
        }
    }
}

fn settle_publish(pending: Pending, result: Result<(), &ServerError>) {
    match (pending, result) {
        (Pending::Publish(Some(done)), result) => {
            // Whoever published may have gone.
            drop(done.send(result.map_err(|error| refused("publishing a message", error))));
        }
        (_, Err(error)) => log::debug!("a message nobody waits for was refused: {error}"),
        (_, Ok(())) => {}
    }
}
