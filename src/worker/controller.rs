//! Starts a worker, runs it, and takes it down again.
//!
//! ```text
//!   TERM, first INT, remote shutdown          QUIT, second INT
//!            │                                      │
//!   stop consuming ── worker-offline ── wait ───────┤ (soft shutdown: wait a while first)
//!            │        for running tasks             │ end running tasks
//!            └── hand back what is held ────────────┴── flush, close ── exit
//! ```
//!
//! Answers for `celery.apps.worker` and `celery.worker.worker`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::app::App;
use super::autoscale::{self, Autoscaler};
use super::consumer::{Consumer, Fatal, Parts};
use super::request::{Phase, Request};
use super::revoked::Revoked;
use super::scratch::Scratch;
use super::shutdown::Wish;
use super::statedb::{self, StateDb};
use super::{Worker, execute};
use crate::backend::Backend;
use crate::config::Settings;
use crate::database::{Database, Keys};
use crate::pool::{self, Pool};
use crate::protocol::clock::Clock;
use crate::protocol::serialization::Accept;
use crate::protocol::zone::Zones;
use crate::tasks::Registry;
use crate::transport::{Queue, Transport};

/// How long the last messages may take to reach the broker.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a worker is made of, all of it checked.
pub struct Blueprint {
    /// Every setting.
    pub settings: Settings,
    /// In which zones times are shown.
    pub zones: Zones,
    /// Node name.
    pub node: String,
    /// The broker.
    pub transport: Arc<dyn Transport>,
    /// Where results go.
    pub backend: Arc<dyn Backend>,
    /// Where analyses are kept.
    pub database: Database,
    /// Keys of encrypted tokens.
    pub token_keys: Keys,
    /// Serializers that are accepted.
    pub accept: Accept,
    /// Queues to consume.
    pub queues: Vec<Queue>,
    /// The pool's options.
    pub pool: pool::Options,
    /// The sizes between which the pool follows the load; it starts with the smallest.
    pub autoscale: Option<autoscale::Range>,
    /// What is to outlive this process.
    pub state_db: Option<StateDb>,
    /// Clones are made below this directory.
    pub scratch: Scratch,
    /// Empty the queues first.
    pub purge: bool,
    /// Heartbeats, gossip and mingle.
    pub neighbours: Neighbours,
}

/// How the worker shows itself to others.
#[derive(Debug, Clone, Copy)]
pub struct Neighbours {
    /// Seconds between heartbeats; `None`: no heartbeats.
    pub heartbeat: Option<f64>,
    /// Listen to other workers' events.
    pub gossip: bool,
    /// Look for other workers at start.
    pub mingle: bool,
}

/// Why a worker could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The dispatcher could not be made.
    #[error(transparent)]
    App(#[from] super::app::Error),
    /// The children could not be started.
    #[error(transparent)]
    Pool(#[from] pool::Error),
    /// What an earlier process left cannot be read.
    #[error("--statedb: cannot {0}")]
    StateDb(#[from] statedb::Error),
    /// The broker was given up.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Runs a worker until a wish ends it; returns the exit code.
pub async fn run(
    blueprint: Blueprint,
    mut wishes: mpsc::UnboundedReceiver<Wish>,
    wish: mpsc::UnboundedSender<Wish>,
) -> Result<i32, Error> {
    let clock = Clock::new(0);
    let revoked = revoked(&blueprint.settings);
    if let Some(file) = &blueprint.state_db {
        file.load(&revoked, &clock)?;
    }
    let (app, dispatcher) = App::build(&blueprint.node).await?;
    let pool = Pool::start(blueprint.pool)?;
    let (commands, command_receiver) = mpsc::unbounded_channel();
    let driver = blueprint.transport.driver();
    let events = super::heart::dispatcher(
        &blueprint.settings,
        &blueprint.node,
        driver,
        clock.clone(),
        &blueprint.neighbours,
    );
    let worker = Arc::new(Worker {
        registry: Registry::new(&blueprint.settings),
        link: super::link::Link::new(&blueprint.settings),
        permits: super::permits::Permits::new(
            &blueprint.settings,
            blueprint.database.url().clone(),
        ),
        flights: super::reuse::Flights::default(),
        token_keys: blueprint.token_keys,
        autoscaler: autoscaler(&blueprint.settings, blueprint.autoscale),
        elections: super::election::Elections::default(),
        heartbeat: blueprint.neighbours.heartbeat,
        listens: blueprint.neighbours.gossip,
        revoked,
        settings: blueprint.settings,
        zones: blueprint.zones,
        node: blueprint.node,
        state: super::state::State::default(),
        pool,
        backend: blueprint.backend,
        accept: blueprint.accept.clone(),
        oid: uuid::Uuid::new_v4().to_string(),
        database: blueprint.database,
        migrated: tokio::sync::OnceCell::new(),
        events,
        clock,
        temporary: blueprint.scratch.clones(),
        commands,
        wishes: wish,
    });
    let (stop, stopping) = watch::channel(false);
    let (ready, ready_receiver) = mpsc::unbounded_channel();
    let (connected, connections) = watch::channel(0);
    let queues = watch::Sender::new(blueprint.queues);
    let consumer = Consumer::new(Parts {
        worker: worker.clone(),
        transport: blueprint.transport.clone(),
        queues: queues.clone(),
        ready,
        commands: command_receiver,
        connected,
        purge: blueprint.purge,
    });
    tokio::spawn(prepare_database(worker.clone()));
    tokio::spawn(super::permits::keep(worker.clone()));
    tokio::spawn(autoscale::run(worker.clone(), stopping.clone()));
    if let Some(file) = blueprint.state_db.clone() {
        tokio::spawn(statedb::keep(worker.clone(), file));
    }
    tokio::spawn(super::fairness::dispatch(
        worker.clone(),
        ready_receiver,
        dispatcher,
        stopping.clone(),
    ));
    super::heart::start(super::heart::Parts {
        worker: worker.clone(),
        transport: blueprint.transport,
        queues,
        connections,
        stopping: stopping.clone(),
        neighbours: blueprint.neighbours,
        accept: blueprint.accept,
    });
    let mut consuming = tokio::spawn(consumer.run(stopping));
    let app_runs = app.run();
    let mut life = std::pin::pin!(live(&worker, &mut wishes, &mut consuming, &stop));
    let code = tokio::select! {
        code = &mut life => code,
        // The crate's loop has no reason to end; should it ever, no task would start again.
        ended = app_runs => {
            log::error!("Unrecoverable error: the dispatcher ended: {ended:?}");
            Ok(1)
        }
    };
    worker.state.close();
    worker.permits.give_back().await;
    if let Some(file) = blueprint.state_db
        && let Err(error) = file.save(&worker.revoked, &worker.clock)
    {
        log::error!("Cannot {error}. Revoked tasks may run again after a restart.");
    }
    worker.pool.kill().await;
    drop(blueprint.scratch);
    code
}

fn revoked(settings: &Settings) -> Revoked {
    let most = usize::try_from(settings.worker_revokes_max).unwrap_or(usize::MAX);
    let keep = crate::tasks::registry::seconds(settings.worker_revoke_expires);
    Revoked::new(most, keep.unwrap_or_default())
}

fn autoscaler(settings: &Settings, range: Option<autoscale::Range>) -> Option<Autoscaler> {
    let keepalive = crate::tasks::registry::seconds(settings.autoscale_keepalive);
    range.map(|range| Autoscaler::new(range, keepalive.unwrap_or_default()))
}

/// Brings the schema up to date, as soon as the database answers.
async fn prepare_database(worker: Arc<Worker>) {
    let mut pause = Duration::from_millis(500);
    while let Err(error) = worker.database().await {
        log::error!(
            "Cannot prepare the database: {error}. Analyses wait for it with their results."
        );
        if !error.is_transient() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(30));
    }
}

/// The net below a journey that panicked: its client is told, its message settled.
pub(super) fn abandoned(
    worker: Arc<Worker>,
    request: Arc<Request>,
) -> Box<dyn FnOnce(String) + Send> {
    Box::new(move |text| {
        let text = request.mask(&format!("internal error of the worker: {text}"));
        log::error!(
            "Task {}: {text}. This is a bug of celeriac; please report it.",
            request.label()
        );
        tokio::spawn(async move {
            let exception = crate::protocol::exception::Exception::builtin("RuntimeError", text);
            let verdict = super::effects::Verdict::Failure(exception);
            execute::finish(&worker, &request, verdict, Duration::ZERO).await;
        });
    })
}

async fn live(
    worker: &Arc<Worker>,
    wishes: &mut mpsc::UnboundedReceiver<Wish>,
    consuming: &mut tokio::task::JoinHandle<Result<Consumer, Fatal>>,
    stop: &watch::Sender<bool>,
) -> Result<i32, Error> {
    let wish = loop {
        let wish = tokio::select! {
            Some(wish) = wishes.recv() => wish,
            ended = &mut *consuming => return unrecoverable(ended),
        };
        match wish {
            Wish::Dump => dump(worker),
            Wish::Restart => {
                log::warn!("Restarting on HUP is left to the supervisor; TERM ends the worker")
            }
            wish => break wish,
        }
    };
    announce(wish);
    stop.send_replace(true);
    // Consumption ends at once; an attempt to connect is given up.
    let consumer = tokio::time::timeout(FAREWELL, consuming).await;
    let drain = match consumer {
        Ok(Ok(Ok(consumer))) => Some(tokio::spawn(consumer.drain())),
        _ => None,
    };
    super::heart::offline(worker);
    let code = match wish {
        Wish::Warm { interrupted } => {
            if !warm(worker, wishes).await {
                cold(worker).await;
            }
            i32::from(interrupted)
        }
        _ => {
            soft(worker, wishes).await;
            cold(worker).await;
            0
        }
    };
    // Without a channel what was just finished would run again.
    drop(tokio::time::timeout(FAREWELL, worker.link.back()).await);
    if let Some(drain) = drain {
        drain.abort();
    }
    farewell(worker).await;
    Ok(code)
}

fn unrecoverable(
    ended: Result<Result<Consumer, Fatal>, tokio::task::JoinError>,
) -> Result<i32, Error> {
    match ended {
        Ok(Ok(_)) => Ok(0),
        Ok(Err(fatal)) => {
            log::error!("Unrecoverable error: {fatal}");
            Ok(1)
        }
        Err(panic) => {
            // The text of a panic may quote a message.
            let why = if panic.is_panic() {
                "it panicked"
            } else {
                "it was given up"
            };
            log::error!("Unrecoverable error: the consumer ended: {why}");
            Ok(1)
        }
    }
}

fn announce(wish: Wish) {
    let line = match wish {
        Wish::Warm { interrupted: true } => {
            "\nworker: Hitting Ctrl+C again will initiate cold shutdown, terminating all running tasks!\n\n\
             worker: Warm shutdown (MainProcess)\n"
        }
        Wish::Warm { .. } => "\nworker: Warm shutdown (MainProcess)\n",
        _ => "\nworker: Cold shutdown (MainProcess)\n",
    };
    crate::logging::announce(line);
}

/// Waits for running tasks. `false`: somebody lost patience.
async fn warm(worker: &Worker, wishes: &mut mpsc::UnboundedReceiver<Wish>) -> bool {
    loop {
        tokio::select! {
            () = worker.state.idle() => return true,
            Some(wish) = wishes.recv() => match wish {
                Wish::Cold => {
                    announce(wish);
                    return false;
                }
                Wish::Dump => dump(worker),
                _ => {}
            },
        }
    }
}

/// `worker_soft_shutdown_timeout`: running tasks get a last while.
async fn soft(worker: &Worker, wishes: &mut mpsc::UnboundedReceiver<Wish>) {
    let settings = &worker.settings;
    let busy = worker.state.active() > 0 || settings.worker_enable_soft_shutdown_on_idle;
    let Some(patience) = crate::tasks::registry::seconds(settings.worker_soft_shutdown_timeout)
    else {
        return;
    };
    if !busy {
        return;
    }
    log::warn!(
        "Initiating Soft Shutdown, terminating in {} seconds",
        patience.as_secs_f64()
    );
    drop(tokio::time::timeout(patience, warm(worker, wishes)).await);
}

/// Ends running tasks. Late-acknowledged ones go back to their queue with the rest.
async fn cold(worker: &Worker) {
    for request in worker.state.in_phase(Phase::Active) {
        request.cancel(super::effects::Cancel::Shutdown);
        worker.pool.terminate(request.id(), 9);
    }
    drop(tokio::time::timeout(FAREWELL, worker.state.idle()).await);
}

/// Hands back what is held, and lets the last messages reach the broker.
async fn farewell(worker: &Worker) {
    let Some(channel) = worker.link.channel() else {
        return;
    };
    let last = async {
        // What an earlier channel left goes with the rest.
        channel.adopt(&[]).await?;
        channel.flush().await?;
        let count = channel.restore(&[]).await?;
        if count > 0 {
            log::info!("Restoring {count} unacknowledged message(s)");
        }
        worker.events.flush();
        channel.close().await
    };
    match tokio::time::timeout(FAREWELL, last).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::warn!("While closing the connection to the broker: {error}"),
        Err(_) => log::warn!("The broker did not answer; what was held is redelivered by itself"),
    }
}

/// USR1: what every slot does.
fn dump(worker: &Worker) {
    let active = worker.state.in_phase(Phase::Active);
    log::warn!(
        "{} active, {} reserved, {} scheduled",
        active.len(),
        worker.state.in_phase(Phase::Reserved).len(),
        worker.state.scheduled.len()
    );
    for request in active {
        log::warn!("  {} {}", request.label(), request.info(&worker.node, true));
    }
}
