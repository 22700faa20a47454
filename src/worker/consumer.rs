//! The connection's loop: connect, consume, and begin again when the broker was lost.
//!
//! One task owns everything that waits inside the worker: requests with an ETA, requests over
//! their rate limit, the queues consumed, the prefetch count. Requests that may run leave
//! through one channel, in order, to the dispatcher. Answers for `celery.worker.consumer`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::rate_limit::{Bucket, parse};
use super::request::{Phase, Request};
use super::timer::Timer;
use super::{Worker, execute, report, strategy};
use crate::transport::{Channel, Delivery, Error, Incoming, Queue, Transport};

mod held;

/// Signal that ends a child at once.
const SIGKILL: i32 = 9;
/// Signal that asks it to end.
const SIGTERM: i32 = 15;
/// Largest prefetch count of AMQP; beyond, there is no limit, as with kombu.
const PREFETCH_MAX: u64 = 65_535;
/// Requests that wait for the database do not keep others from being fetched, up to so many.
const MOST_BESIDE: u64 = 256;
/// Quick attempts before the ladder: most outages are restarts of a second or two.
const QUICK_ATTEMPTS: u32 = 12;
const QUICK_PAUSE: Duration = Duration::from_millis(150);
/// Between attempts afterwards. The ladder says how often that is told and counted; a broker
/// that is back must not wait for its next rung.
const LATER_PAUSE: Duration = Duration::from_millis(500);
/// Between attempts at a broker that lets us connect and then refuses.
const SLOWEST: Duration = Duration::from_secs(5);

/// What the rest of the worker asks of the loop.
#[derive(Debug)]
pub enum Command {
    /// Consume a queue as well.
    AddQueue(Box<Queue>),
    /// Stop consuming a queue.
    CancelQueue(String),
    /// The pool changed its size, or how many wait for others: so does the prefetch count.
    Resized,
    /// A rate limit changed.
    RateLimit(&'static str),
}

/// Why the loop ended for good.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The broker cannot be reached, and trying again is over or not wanted.
    #[error("cannot connect to {url}: {source}")]
    Broker {
        /// The broker, without its password.
        url: String,
        /// The last fault.
        source: Error,
    },
}

/// How consumption on one channel ended.
enum Ended {
    Stopped,
    Lost(Error),
}

struct Limited {
    bucket: Bucket,
    waiting: VecDeque<Arc<Request>>,
}

/// See the module.
pub struct Consumer {
    worker: Arc<Worker>,
    transport: Arc<dyn Transport>,
    queues: watch::Sender<Vec<Queue>>,
    timer: Timer,
    limited: HashMap<&'static str, Limited>,
    ready: mpsc::UnboundedSender<Arc<Request>>,
    commands: mpsc::UnboundedReceiver<Command>,
    prefetch: Option<u32>,
    /// What ran when the broker was lost and still runs.
    overlap: Vec<Weak<Request>>,
    connected: watch::Sender<u64>,
    purge: bool,
}

/// What the consumer is made of.
pub struct Parts {
    /// The worker it consumes for.
    pub worker: Arc<Worker>,
    /// The broker.
    pub transport: Arc<dyn Transport>,
    /// The queues; changes show here.
    pub queues: watch::Sender<Vec<Queue>>,
    /// Where requests go that may run.
    pub ready: mpsc::UnboundedSender<Arc<Request>>,
    /// What the rest of the worker asks.
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// Counts the connections made; the first makes the worker ready.
    pub connected: watch::Sender<u64>,
    /// Empty the queues at the first connection.
    pub purge: bool,
}

impl Consumer {
    /// A consumer that is not connected yet.
    pub fn new(parts: Parts) -> Self {
        Self {
            worker: parts.worker,
            transport: parts.transport,
            queues: parts.queues,
            timer: Timer::default(),
            limited: HashMap::new(),
            ready: parts.ready,
            commands: parts.commands,
            prefetch: None,
            overlap: Vec::new(),
            connected: parts.connected,
            purge: parts.purge,
        }
    }

    /// Runs until `stop`, or until the broker is given up. Consumption has ended when this
    /// returns and what waited is handed back; [`Consumer::drain`] looks after what still runs.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<Self, Fatal> {
        let mut first = true;
        let mut failures = 0;
        loop {
            let channel = tokio::select! {
                () = stopped(&mut stop) => return Ok(self),
                channel = connect(&self.worker, &*self.transport, first) => channel?,
            };
            log::info!("Connected to {}", self.transport.display_url());
            let ended = match self.establish(&channel).await {
                Ok(()) => {
                    first = false;
                    failures = 0;
                    self.connected.send_modify(|count| *count += 1);
                    self.consume(&channel, &mut stop).await
                }
                // A broker that refuses at the start is set up wrongly; one that did not refuse
                // before has a trouble that may pass, a full disk for one.
                Err(source) if first && !source.is_connection() => {
                    let url = self.transport.display_url();
                    return Err(Fatal::Broker { url, source });
                }
                Err(error) => {
                    failures += 1;
                    Ended::Lost(error)
                }
            };
            match ended {
                Ended::Stopped => {
                    let queues = self.queues.borrow().clone();
                    for queue in queues {
                        drop(channel.cancel(&queue.name).await);
                    }
                    self.hand_back(&channel).await;
                    return Ok(self);
                }
                Ended::Lost(error) => {
                    self.lost(&error);
                    self.cancel_unacknowledged();
                    self.reduce_prefetch(&*channel);
                }
            }
            if failures > 0 {
                let pause = (QUICK_PAUSE * failures * failures).min(SLOWEST);
                drop(tokio::time::timeout(pause, stopped(&mut stop)).await);
            }
        }
    }

    /// Makes a new channel usable: what is held is proved to be ours, the queues are declared
    /// and consumed, the rest of the worker gets the channel.
    async fn establish(&mut self, channel: &Arc<dyn Channel>) -> Result<(), Error> {
        self.take_up(channel).await?;
        let queues = self.queues.borrow().clone();
        for queue in &queues {
            channel.declare(queue).await?;
            if self.purge {
                let count = channel.purge(&queue.name).await?;
                log::warn!("purge: Erased {count} messages from {}", queue.name);
            }
        }
        self.purge = false;
        self.prefetch = None;
        self.set_prefetch(channel).await?;
        let settings = &self.worker.settings;
        // Where late acknowledgement is the user's choice, what runs is part of the count.
        if settings.task_acks_late != Some(true) && !settings.worker_disable_prefetch {
            let worker = Arc::downgrade(&self.worker);
            channel.set_idle_slots(Arc::new(move || {
                worker.upgrade().map_or(0, |worker| worker.pool.idle())
            }));
        }
        // Before the first task: what was revoked while this worker was away is not to run.
        super::control::recall_revoked(&self.worker, &**channel).await?;
        for queue in &queues {
            channel.consume(queue).await?;
        }
        Ok(())
    }

    async fn consume(
        &mut self,
        channel: &Arc<dyn Channel>,
        stop: &mut watch::Receiver<bool>,
    ) -> Ended {
        loop {
            let limited = self.next_token();
            let outcome = tokio::select! {
                biased;
                () = stopped(stop) => return Ended::Stopped,
                Some(command) = self.commands.recv() => self.command(channel, command).await,
                () = self.timer.wait() => {
                    self.fire();
                    self.set_prefetch(channel).await
                }
                () = wait_until(limited) => {
                    self.release_limited();
                    Ok(())
                }
                incoming = channel.next() => match incoming {
                    Ok(incoming) => self.incoming(channel, incoming).await,
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = outcome {
                return Ended::Lost(error);
            }
        }
    }

    async fn incoming(
        &mut self,
        channel: &Arc<dyn Channel>,
        incoming: Incoming,
    ) -> Result<(), Error> {
        match incoming {
            Incoming::Delivery(delivery) => {
                if let Some(request) = strategy::receive(&self.worker, &delivery) {
                    self.place(request, &delivery);
                    self.set_prefetch(channel).await?;
                }
                Ok(())
            }
            Incoming::Lost(tag) => {
                self.lease_lost(&tag);
                Ok(())
            }
            Incoming::Undecodable(delivery, reason) => {
                strategy::undecodable(&self.worker, &delivery, reason);
                Ok(())
            }
            Incoming::Cancelled(queue) => {
                log::warn!("The broker cancelled the consumer of {queue}; declaring it again");
                let found = self
                    .queues
                    .borrow()
                    .iter()
                    .find(|known| known.name == queue)
                    .cloned();
                match found {
                    Some(queue) => {
                        channel.declare(&queue).await?;
                        channel.consume(&queue).await
                    }
                    None => Ok(()),
                }
            }
        }
    }

    /// Puts a new request where it waits: for nothing, its time, or its rate limit.
    fn place(&mut self, request: Arc<Request>, delivery: &Delivery) {
        if let Some(verdict) = strategy::discarded(&self.worker, &request) {
            let worker = self.worker.clone();
            tokio::spawn(async move {
                execute::finish(&worker, &request, verdict, Duration::ZERO).await
            });
            return;
        }
        report::received(&self.worker, &request);
        if let Some(autoscaler) = &self.worker.autoscaler {
            autoscaler.look();
        }
        let ahead = request.message.eta.as_ref().and_then(|eta| {
            (eta.with_timezone(&chrono::Utc) - chrono::Utc::now())
                .to_std()
                .ok()
        });
        match ahead {
            Some(ahead) => {
                let state = &self.worker.state;
                state.scheduled.hold(request.serial, request.id(), delivery);
                state.set_aside(&request);
                // A date beyond the clock's range waits as long as the clock goes.
                let due = Instant::now().checked_add(ahead);
                let due = due.unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400 * 365));
                self.timer.push(due, request.serial);
            }
            None => self.admit(request),
        }
    }

    fn fire(&mut self) {
        for serial in self.timer.due(Instant::now()) {
            let Some(delivery) = self.worker.state.scheduled.take(serial) else {
                continue;
            };
            if let Some(request) = strategy::reread(&self.worker, serial, &delivery) {
                let request = Arc::new(request);
                self.worker.state.hold(&request);
                self.admit(request);
            }
        }
    }

    /// Lets a request run, as soon as its rate limit allows.
    fn admit(&mut self, request: Arc<Request>) {
        if !self.limited.contains_key(request.name) {
            self.rate_changed(request.name);
        }
        match self.limited.get_mut(request.name) {
            Some(limited) if !limited.waiting.is_empty() => limited.waiting.push_back(request),
            Some(limited) => match limited.bucket.take(Instant::now()) {
                Ok(()) => self.run_request(request),
                Err(_) => limited.waiting.push_back(request),
            },
            None => self.run_request(request),
        }
    }

    fn run_request(&self, request: Arc<Request>) {
        // The dispatcher is gone only when the worker is going down; the message goes back then.
        drop(self.ready.send(request));
    }

    fn rate_changed(&mut self, name: &'static str) {
        let Some(entry) = self.worker.registry.get(name) else {
            return;
        };
        let text = entry.options().rate_limit.unwrap_or_default();
        let wanted = !self.worker.settings.worker_disable_rate_limits;
        // What cannot be read was refused when it was set.
        let rate = parse(text.trim()).ok().flatten().filter(|_| wanted);
        match (rate, self.limited.get_mut(name)) {
            (Some(rate), Some(limited)) => limited.bucket.set_rate(rate),
            (Some(rate), None) => {
                let bucket = Bucket::new(rate, Instant::now());
                self.limited.insert(
                    name,
                    Limited {
                        bucket,
                        waiting: VecDeque::new(),
                    },
                );
            }
            (None, _) => {
                for request in self
                    .limited
                    .remove(name)
                    .map(|limited| limited.waiting)
                    .unwrap_or_default()
                {
                    self.run_request(request);
                }
            }
        }
    }

    fn next_token(&self) -> Option<Instant> {
        let waiting = self
            .limited
            .values()
            .filter(|limited| !limited.waiting.is_empty());
        waiting.map(|limited| limited.bucket.next()).min()
    }

    fn release_limited(&mut self) {
        let now = Instant::now();
        let mut released = Vec::new();
        for limited in self.limited.values_mut() {
            while !limited.waiting.is_empty() && limited.bucket.take(now).is_ok() {
                released.extend(limited.waiting.pop_front());
            }
        }
        for request in released
            .into_iter()
            .filter(|request| request.phase() != Phase::Settled)
        {
            self.run_request(request);
        }
    }

    async fn command(&mut self, channel: &Arc<dyn Channel>, command: Command) -> Result<(), Error> {
        match command {
            Command::AddQueue(queue) => {
                if self
                    .queues
                    .borrow()
                    .iter()
                    .any(|known| known.name == queue.name)
                {
                    return Ok(());
                }
                match channel.declare(&queue).await {
                    Ok(_) => {
                        channel.consume(&queue).await?;
                        log::info!("Started consuming from {}", queue.name);
                        self.queues.send_modify(|queues| queues.push(*queue));
                        Ok(())
                    }
                    // It was promised: the next connection has it.
                    Err(error) if error.is_connection() => {
                        self.queues.send_modify(|queues| queues.push(*queue));
                        Err(error)
                    }
                    // Whoever asked for it from afar must not cost the others their connection.
                    Err(error) => {
                        log::error!("Cannot consume from {}: {error}", queue.name);
                        Ok(())
                    }
                }
            }
            Command::CancelQueue(name) => {
                log::info!("Canceling queue {name}");
                self.queues
                    .send_modify(|queues| queues.retain(|queue| queue.name != name));
                channel.cancel(&name).await
            }
            Command::Resized => self.set_prefetch(channel).await,
            Command::RateLimit(name) => {
                self.rate_changed(name);
                Ok(())
            }
        }
    }

    /// Slots times the multiplier, less by what still runs from before a connection was lost
    /// ([`Consumer::reduce_prefetch`]), and one more for each request that waits for its ETA or its
    /// user's limit, or has stepped aside ([`execute::step_aside`]).
    async fn set_prefetch(&mut self, channel: &Arc<dyn Channel>) -> Result<(), Error> {
        self.forget_overlap();
        let settings = &self.worker.settings;
        let base = self.base();
        let wanted = if base == 0 {
            0
        } else {
            // As in Celery, the limit is one of the whole count, and the count starts above it
            // where the pool is larger.
            let limit = settings.worker_eta_task_limit.unwrap_or(u64::MAX);
            let waiting = self.worker.state.scheduled.len() as u64;
            let aside = self.worker.state.parked() + self.worker.state.beside().min(MOST_BESIDE);
            (base + waiting).min(limit).max(base) + aside
        };
        let wanted = if wanted > PREFETCH_MAX && self.transport.driver() == "amqp" {
            0
        } else {
            wanted
        };
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        if self.prefetch != Some(wanted) {
            channel.set_prefetch(wanted).await?;
            if wanted == 0 && base > 0 && self.prefetch.is_some() {
                log::warn!("QoS: Disabled: prefetch_count exceeds {PREFETCH_MAX}");
            }
            self.prefetch = Some(wanted);
            self.worker.state.set_prefetch(wanted);
        }
        Ok(())
    }
}

/// Waits for the wish to stop. Whoever could wish is gone: then nobody goes on either.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

async fn wait_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Connects, trying again as the settings say: a few quick attempts, then Celery's ladder of
/// 2, 4, 6 … 30 seconds for what is logged and counted, with attempts in between.
async fn connect(
    worker: &Worker,
    transport: &dyn Transport,
    first: bool,
) -> Result<Arc<dyn Channel>, Fatal> {
    let settings = &worker.settings;
    let on_startup = settings.broker_connection_retry_on_startup;
    let retry = if first {
        on_startup.unwrap_or(settings.broker_connection_retry)
    } else {
        settings.broker_connection_retry
    };
    let most = settings.broker_connection_max_retries;
    let mut quick = 0;
    let mut slow = 0_u64;
    let mut next_rung = Instant::now();
    loop {
        let source = match transport.connect().await {
            Ok(channel) => return Ok(channel),
            Err(source) => source,
        };
        if slow > 0 && source.is_connection() && Instant::now() < next_rung {
            tokio::time::sleep(LATER_PAUSE).await;
            continue;
        }
        let url = transport.display_url();
        let given_up = !retry || most.is_some_and(|most| slow >= most);
        if given_up || !source.is_connection() {
            return Err(Fatal::Broker { url, source });
        }
        if quick < QUICK_ATTEMPTS {
            if quick == 0 {
                log::error!("consumer: Cannot connect to {url}: {source}.\nTrying again...");
            }
            quick += 1;
            tokio::time::sleep(QUICK_PAUSE).await;
            continue;
        }
        slow += 1;
        let pause = Duration::from_secs((slow * 2).min(30));
        let of = most.map_or_else(|| "for ever".to_owned(), |most| most.to_string());
        log::error!(
            "consumer: Cannot connect to {url}: {source}.\nTrying again in {:.2} seconds... ({slow}/{of})\n",
            pause.as_secs_f64(),
        );
        next_rung = Instant::now() + pause;
        tokio::time::sleep(LATER_PAUSE).await;
    }
}
