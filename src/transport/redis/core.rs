//! What the tasks of one channel share: the queue of outgoing operations, the deliveries held,
//! what has arrived, and the one fault that ends everything.
//!
//! The lock is held for a few instructions and never over an await. An acknowledgement takes
//! the score of its lease out of the table at the moment of the call; because operations keep
//! their order and a renewal changes the table when it is queued, the score is the right one
//! when the operation is executed.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redis::{Cmd, Value};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;

use super::connect::Link;
use super::keys::Keys;
pub(super) use super::ledger::{Held, Ledger, Settlement};
use super::options::{Options, QueueOrder};
use super::script::Scripts;
use crate::transport::url::Scheme;
use crate::transport::{Error, IdleSlots, Incoming, Tag};

/// How many messages one fetch takes at most.
pub(super) const BATCH: usize = 64;
/// How many undelivered messages are kept ready when prefetch is without limit.
const READY: usize = 256;

/// Something to be done in order.
pub(super) enum Op {
    Settle(Tag, Held, Settlement),
    /// A worker started on it.
    Started(Tag, Held),
    Publish(Outgoing, Option<oneshot::Sender<Result<(), Error>>>),
    Call(Vec<Cmd>, oneshot::Sender<Result<Vec<Value>, Error>>),
}

/// A message ready to be sent.
pub(super) struct Outgoing {
    pub(super) route: Route,
    pub(super) payload: Vec<u8>,
    /// Milliseconds the list shall live; None for ever.
    pub(super) ttl: Option<u64>,
}

/// Where a message goes.
pub(super) enum Route {
    /// A pub/sub channel.
    Channel(String),
    /// A list.
    List(String),
    /// Lists found in the table of an exchange.
    Exchange {
        name: String,
        topic: bool,
        routing_key: String,
        suffix: String,
    },
}

/// What `next` will yield.
pub(super) enum Arrival {
    /// Not yet decoded, so that the consumer's thread does it.
    Raw {
        tag: Tag,
        queue: Arc<str>,
        raw: Vec<u8>,
    },
    Event(Incoming),
}

/// A queue being consumed.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) queue: Arc<str>,
    pub(super) lists: Vec<Arc<str>>,
}

/// A member of a binding table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Binding {
    pub(super) exchange: String,
    pub(super) member: String,
    pub(super) queue: String,
    /// `x-expires` of the queue in milliseconds.
    pub(super) expires: Option<u64>,
}

/// Why a channel ended.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    Broken {
        operation: &'static str,
        reason: String,
    },
    Closed,
}

impl Fault {
    pub(super) fn error(&self) -> Error {
        match self {
            Self::Broken { operation, reason } => Error::Connection {
                operation,
                reason: reason.clone(),
            },
            Self::Closed => Error::Closed,
        }
    }
}

pub(super) struct State {
    pub(super) ops: Vec<Op>,
    pub(super) held: HashMap<Tag, Held>,
    pub(super) inbound: VecDeque<Arrival>,
    /// The queues being consumed, next one first.
    pub(super) sources: Vec<Source>,
    pub(super) prefetch: u32,
    pub(super) idle_slots: Option<IdleSlots>,
    /// The last fetch brought as much as it was to.
    pub(super) filled: bool,
    /// The lists may hold something.
    pub(super) promising: bool,
    pub(super) fault: Option<Fault>,
}

/// A fetch about to be made.
pub(super) struct Plan {
    pub(super) want: usize,
    pub(super) sources: Vec<Source>,
}

/// See the module's page.
pub(super) struct Core {
    pub(super) keys: Keys,
    pub(super) options: Options,
    pub(super) scripts: Scripts,
    pub(super) ledger: Arc<Ledger>,
    pub(super) link: Link,
    /// The server lets us run scripts.
    pub(super) scripted: bool,
    /// Idle waiting pops instead of being told.
    pub(super) blocking: AtomicBool,
    /// A blocking pop is on its way.
    pub(super) popping: watch::Sender<bool>,
    /// Counted among the consumers of the ledger.
    consuming: AtomicBool,
    /// Something waits for messages, by tracking or popping.
    pub(super) watching: AtomicBool,
    /// From now on silence means death.
    pub(super) settled_at: tokio::time::Instant,
    bindings: Mutex<Vec<Binding>>,
    /// Queues of one's own that go with the channel.
    subscriptions: Mutex<Vec<(String, Vec<Binding>)>>,
    /// Names of the channels kombu before 5.4 uses behind sentinels.
    pub(super) old_keys: Option<Keys>,
    state: Mutex<State>,
    /// Wakes the writer.
    pub(super) work: Notify,
    /// Wakes `next`.
    pub(super) arrived: Notify,
    /// Wakes whoever waits for messages while idle.
    pub(super) idle: Notify,
    ended: watch::Sender<bool>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Core {
    pub(super) fn new(
        keys: Keys,
        options: Options,
        ledger: Arc<Ledger>,
        link: Link,
        scripted: bool,
    ) -> Self {
        let mut settled_at = tokio::time::Instant::now();
        if ledger.is_reconnect() {
            settled_at += super::janitor::GRACE;
        }
        let old_keys = (link.url.scheme == Scheme::Sentinel && options.sentinel_fanout_compat)
            .then(|| keys.with_literal_database(&options));
        Self {
            keys,
            options,
            scripts: Scripts::new(),
            ledger,
            link,
            scripted,
            blocking: AtomicBool::new(false),
            popping: watch::Sender::new(false),
            consuming: AtomicBool::new(false),
            watching: AtomicBool::new(false),
            settled_at,
            bindings: Mutex::default(),
            subscriptions: Mutex::default(),
            old_keys,
            state: Mutex::new(State {
                ops: Vec::new(),
                held: HashMap::new(),
                inbound: VecDeque::new(),
                sources: Vec::new(),
                prefetch: 0,
                idle_slots: None,
                filled: false,
                promising: false,
                fault: None,
            }),
            work: Notify::new(),
            arrived: Notify::new(),
            idle: Notify::new(),
            ended: watch::Sender::new(false),
            tasks: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a task until the channel ends.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let handle = tokio::spawn(task).abort_handle();
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(handle);
    }

    /// Ends every task at its next await.
    pub(super) fn abort(&self) {
        for task in self
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            task.abort();
        }
    }

    /// Becomes true when the channel ends.
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// The bindings this channel has declared.
    pub(super) fn bindings(&self) -> MutexGuard<'_, Vec<Binding>> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queues of one's own that are to be deleted at the end.
    pub(super) fn subscriptions(&self) -> MutexGuard<'_, Vec<(String, Vec<Binding>)>> {
        self.subscriptions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts this channel among those that consume.
    pub(super) fn count_consumer(&self) {
        if !self.consuming.swap(true, Ordering::Relaxed) {
            let mut left = self.ledger.left();
            left.consumers += 1;
            left.consumed = true;
        }
    }

    /// Ends the counting; true when no other channel consumes.
    pub(super) fn uncount_consumer(&self) -> bool {
        if !self.consuming.swap(false, Ordering::Relaxed) {
            return false;
        }
        let mut left = self.ledger.left();
        left.consumers = left.consumers.saturating_sub(1);
        left.consumers == 0
    }

    /// The commands that declare a binding.
    pub(super) fn bind_commands(&self, binding: &Binding) -> Vec<Cmd> {
        let table = self.keys.binding(&binding.exchange);
        let Some(expires) = binding.expires else {
            return [table, self.keys.permanent(&binding.exchange)]
                .into_iter()
                .map(|key| {
                    let mut cmd = redis::cmd("SADD");
                    cmd.arg(key).arg(&binding.member);
                    cmd
                })
                .collect();
        };
        // kombu keeps tables of expiring queues for an hour at least.
        let ttl = expires.saturating_mul(2).max(3_600_000);
        if self.scripted {
            let mut cmd = self
                .scripts
                .bind
                .call([&*table, &self.keys.deadlines].into_iter());
            cmd.arg(&binding.member).arg(&binding.exchange).arg(ttl);
            return vec![cmd];
        }
        let mut add = redis::cmd("SADD");
        add.arg(table).arg(&binding.member);
        let mut deadline = redis::cmd("ZADD");
        deadline
            .arg(&self.keys.deadlines)
            .arg(now() / 1000 + ttl)
            .arg(&binding.exchange);
        vec![add, deadline]
    }

    /// Queues an operation, unless the channel has ended.
    pub(super) fn push(&self, op: Op) -> Result<(), Error> {
        {
            let mut state = self.state();
            if let Some(fault) = &state.fault {
                return Err(fault.error());
            }
            state.ops.push(op);
        }
        self.work.notify_one();
        Ok(())
    }

    /// Executes commands in order with everything else and waits for their replies. The
    /// first error among the replies is the error.
    pub(super) async fn call(
        &self,
        operation: &'static str,
        commands: Vec<Cmd>,
    ) -> Result<Vec<Value>, Error> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let (done, replies) = oneshot::channel();
        self.push(Op::Call(commands, done))?;
        self.replies(operation, replies).await
    }

    /// Waits for the replies of an operation that is already queued.
    pub(super) async fn replies(
        &self,
        operation: &'static str,
        replies: oneshot::Receiver<Result<Vec<Value>, Error>>,
    ) -> Result<Vec<Value>, Error> {
        match replies.await {
            Ok(Err(Error::Refused { reason, .. })) => Err(Error::Refused { operation, reason }),
            Ok(result) => result,
            Err(_) => Err(self.fault()),
        }
    }

    /// Why the channel ended.
    pub(super) fn fault(&self) -> Error {
        self.state()
            .fault
            .as_ref()
            .map_or(Error::Closed, Fault::error)
    }

    /// Settles a delivery. What this channel does not hold may be left from an earlier one;
    /// what nobody holds has been given away and is ignored.
    pub(super) fn settle(&self, tag: &Tag, settlement: Settlement) {
        {
            let mut state = self.state();
            let held = match state.held.remove(tag) {
                Some(held) => Some(held),
                None => self.ledger.left().orphans.remove(tag),
            };
            let Some(held) = held else {
                log::debug!("delivery {} is settled already or was given away", tag.0);
                return;
            };
            if state.fault.is_some() {
                // The next channel of this transport sends it.
                self.ledger
                    .left()
                    .unsent
                    .push((tag.clone(), held, settlement));
                return;
            }
            if self.options.ack_emulation {
                state.ops.push(Op::Settle(tag.clone(), held, settlement));
            }
        }
        self.work.notify_one();
        if self.blocking.load(Ordering::Relaxed) {
            self.idle.notify_one();
        }
    }

    /// Notes that somebody works on a delivery.
    pub(super) fn started(&self, tag: &Tag) {
        {
            let mut state = self.state();
            let Some(held) = state.held.get_mut(tag) else {
                return;
            };
            if held.started || !self.options.ack_emulation {
                return;
            }
            held.started = true;
            let held = held.clone();
            state.ops.push(Op::Started(tag.clone(), held));
        }
        self.work.notify_one();
    }

    /// Says that the lists may hold something.
    pub(super) fn promise(&self) {
        self.state().promising = true;
        self.work.notify_one();
    }

    /// Ends the channel; the first fault counts. What is held and what was not sent goes to
    /// the ledger.
    pub(super) fn fail(&self, fault: Fault, in_flight: Vec<(Tag, Held, Settlement)>) {
        {
            let mut state = self.state();
            let mut left = self.ledger.left();
            left.unsent.extend(in_flight);
            let ops = std::mem::take(&mut state.ops);
            for op in ops {
                if let Op::Settle(tag, held, settlement) = op {
                    left.unsent.push((tag, held, settlement));
                }
            }
            left.orphans.extend(state.held.drain());
            state.inbound.clear();
            if state.fault.is_none() {
                state.fault = Some(fault);
            }
        }
        self.ended.send_replace(true);
        self.arrived.notify_one();
        self.work.notify_one();
    }

    /// Ends the channel because of an error of one of its connections.
    pub(super) fn fail_with(&self, error: Error) {
        let fault = match error {
            Error::Connection { operation, reason } | Error::Refused { operation, reason } => {
                Fault::Broken { operation, reason }
            }
            Error::Url(reason) => Fault::Broken {
                operation: "connecting to Redis",
                reason,
            },
            Error::Closed => Fault::Closed,
        };
        self.fail(fault, Vec::new());
    }

    /// The operations that wait and the fetch that may be made.
    pub(super) fn take_work(&self) -> (Vec<Op>, Option<Plan>) {
        let mut state = self.state();
        let ops = std::mem::take(&mut state.ops);
        let want = if self.scripted && state.promising {
            (state.free() + state.ahead()).min(BATCH)
        } else {
            0
        };
        let plan = (want > 0).then(|| Plan {
            want,
            sources: state.sources.clone(),
        });
        (ops, plan)
    }

    /// Lists of the queues being consumed, in the order kombu asks them.
    pub(super) fn lists(&self) -> Vec<Arc<str>> {
        ordered_lists(&self.state().sources)
    }

    /// Takes note of fetched messages: (number of the source, list, tag, envelope).
    pub(super) fn admit(&self, plan: &Plan, fetched: Vec<Fetched>) {
        let mut state = self.state();
        for item in fetched {
            let source = &plan.sources[item.source];
            state.rotate(&source.queue, self.options.queue_order_strategy);
            let held = Held {
                score: item.score,
                sequence: item.sequence,
                list: source.lists[item.step].clone(),
                queue: source.queue.clone(),
                started: false,
            };
            state.held.insert(item.tag.clone(), held);
            state.inbound.push_back(Arrival::Raw {
                tag: item.tag,
                queue: source.queue.clone(),
                raw: item.raw,
            });
        }
        drop(state);
        self.arrived.notify_one();
    }
}

/// Waits until the channel has ended.
pub(super) async fn until(ended: &mut watch::Receiver<bool>) {
    // An error means that nothing of the channel is left.
    drop(ended.wait_for(|ended| *ended).await);
}

/// One message a fetch brought.
pub(super) struct Fetched {
    pub(super) source: usize,
    pub(super) step: usize,
    pub(super) tag: Tag,
    pub(super) raw: Vec<u8>,
    pub(super) score: u64,
    pub(super) sequence: u64,
}

impl State {
    /// How many more messages may be taken.
    pub(super) fn free(&self) -> usize {
        if self.sources.is_empty() || self.fault.is_some() {
            0
        } else if self.prefetch == 0 {
            READY.saturating_sub(self.inbound.len())
        } else {
            (self.prefetch as usize).saturating_sub(self.held.len())
        }
    }

    /// How many more than the prefetch count may be taken: as many as start at once, if the last
    /// fetch was not enough and nothing of it waits. Tasks of a millisecond cost a round trip for
    /// twice as many of them; what waits for a rate limit or its time is not taken ahead.
    fn ahead(&self) -> usize {
        match &self.idle_slots {
            Some(idle) if self.filled && self.prefetch > 0 && self.held.is_empty() => idle(),
            _ => 0,
        }
    }

    fn rotate(&mut self, queue: &Arc<str>, order: QueueOrder) {
        if order == QueueOrder::RoundRobin
            && self.sources.len() > 1
            && let Some(at) = self
                .sources
                .iter()
                .position(|source| source.queue == *queue)
        {
            let source = self.sources.remove(at);
            self.sources.push(source);
        }
    }
}

/// For each step all queues in order.
pub(super) fn ordered_lists(sources: &[Source]) -> Vec<Arc<str>> {
    let steps = sources.first().map_or(0, |source| source.lists.len());
    let mut lists = Vec::with_capacity(steps * sources.len());
    for step in 0..steps {
        lists.extend(sources.iter().map(|source| source.lists[step].clone()));
    }
    lists
}

/// Microseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}
