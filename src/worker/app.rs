//! The seam to rusty-celery: its app dispatches our tasks over our transport.
//!
//! The crate is the dispatcher: every task is registered with `register_task` and run by
//! `consume_from`. Its own brokers are never used. What it sees of a message is a synthetic
//! one, with the real id and task name and a ticket number for arguments, so that neither
//! arguments nor secrets enter the crate, and its own retry, ETA, expiry and time-limit code
//! has nothing to act on. The ticket leads to the [`Journey`] that the consumer deposited:
//! everything Celery's trace does, as one future.
//!
//! Nothing else in celeriac names the crate, so it can be replaced here in a day.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::TcpListener;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};

use async_trait::async_trait;
use celery::broker::{Broker, Delivery, DeliveryError, DeliveryStream};
use celery::error::{BrokerError, ProtocolError};
use celery::protocol::{Message, MessageHeaders, MessageProperties, TryDeserializeMessage};
use celery::task::{Request, Task, TaskOptions, TaskResult};
use futures::future::BoxFuture;
use futures::{FutureExt, Stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::tasks::{Accumulate, AnalyzeRepo, BackendCleanup, ChordUnlock, Definition, Test};

mod caller;

pub use caller::caller;

/// One task's way through the worker, from acceptance to its last effect.
pub struct Journey {
    /// Task id.
    pub id: String,
    /// Registered name.
    pub name: &'static str,
    /// Does everything; never fails, for a failing task is an outcome.
    pub run: BoxFuture<'static, ()>,
    /// The net: called with a text when `run` panicked or was never polled to its end.
    pub abandoned: Box<dyn FnOnce(String) + Send>,
}

/// Journeys deposited and not yet begun. The crate gives a task no context but its arguments,
/// hence the one static of the worker.
static TICKETS: OnceLock<Mutex<HashMap<u64, Journey>>> = OnceLock::new();
static NEXT_TICKET: AtomicU64 = AtomicU64::new(1);

fn tickets() -> std::sync::MutexGuard<'static, HashMap<u64, Journey>> {
    let tickets = TICKETS.get_or_init(Mutex::default);
    tickets.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands journeys to the running app.
#[derive(Clone)]
pub struct Dispatcher {
    sender: mpsc::UnboundedSender<Ticket>,
}

impl Dispatcher {
    /// Starts a journey as soon as the app's loop turns.
    pub fn submit(&self, journey: Journey) {
        let number = NEXT_TICKET.fetch_add(1, Ordering::Relaxed);
        let ticket = Ticket {
            number,
            id: journey.id.clone(),
            name: journey.name,
        };
        tickets().insert(number, journey);
        // A receiver that is gone drops the ticket, and its net reports the journey.
        drop(self.sender.send(ticket));
    }
}

/// The crate's app with our tasks registered.
pub struct App {
    app: Arc<celery::Celery>,
}

/// Why the app could not be made.
#[derive(Debug, thiserror::Error)]
#[error("rusty-celery: {0}")]
pub struct Error(String);

impl App {
    /// Builds the crate's app over our stream of tickets and registers every task.
    pub async fn build(node: &str) -> Result<(Self, Dispatcher), Error> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let tickets = Tickets {
            receiver: Mutex::new(Some(receiver)),
        };
        let app = Arc::new(app(node, "celery", Box::new(tickets)).await?);
        app.register_task::<Seam<AnalyzeRepo>>()
            .await
            .map_err(|e| Error(e.to_string()))?;
        app.register_task::<Seam<Test>>()
            .await
            .map_err(|e| Error(e.to_string()))?;
        app.register_task::<Seam<ChordUnlock>>()
            .await
            .map_err(|e| Error(e.to_string()))?;
        app.register_task::<Seam<BackendCleanup>>()
            .await
            .map_err(|e| Error(e.to_string()))?;
        app.register_task::<Seam<Accumulate>>()
            .await
            .map_err(|e| Error(e.to_string()))?;
        Ok((Self { app }, Dispatcher { sender }))
    }

    /// Runs the crate's loop. It ends only with an error; the worker drops it at shutdown,
    /// when no journey is under way.
    pub async fn run(&self) -> Result<(), Error> {
        self.app
            .consume_from(&["*"])
            .await
            .map_err(|e| Error(e.to_string()))
    }
}

/// An app of the crate over a broker of ours.
async fn app(node: &str, queue: &str, broker: Box<dyn Broker>) -> Result<celery::Celery, Error> {
    // The crate's only constructor connects at once: a listener that never accepts
    // satisfies it, and no byte is exchanged.
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| Error(e.to_string()))?;
    let port = listener
        .local_addr()
        .map_err(|e| Error(e.to_string()))?
        .port();
    let mut app = celery::CeleryBuilder::new("celeriac", &format!("redis://127.0.0.1:{port}/"))
        .hostname(node)
        .default_queue(queue)
        .broker_connection_max_retries(1)
        .task_max_retries(0)
        .acks_late(true)
        .build()
        .await
        .map_err(|e| Error(e.to_string()))?;
    drop(listener);
    app.broker = broker;
    Ok(app)
}

/// One generic task serves every definition.
struct Seam<D: Definition> {
    request: Request<Self>,
    options: TaskOptions,
    definition: PhantomData<D>,
}

/// All that the crate sees of a task's arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Params {
    ticket: u64,
}

#[async_trait]
impl<D: Definition> Task for Seam<D> {
    const NAME: &'static str = D::NAME;
    const ARGS: &'static [&'static str] = &["ticket"];
    type Params = Params;
    type Returns = ();

    fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
        Self {
            request,
            options,
            definition: PhantomData,
        }
    }

    fn request(&self) -> &Request<Self> {
        &self.request
    }

    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, params: Params) -> TaskResult<()> {
        let Some(journey) = tickets().remove(&params.ticket) else {
            return Ok(());
        };
        if let Err(panic) = AssertUnwindSafe(journey.run).catch_unwind().await {
            (journey.abandoned)(panic_text(&*panic));
        }
        Ok(())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a text".to_owned())
}

/// A delivery as the crate knows it.
#[derive(Debug)]
struct Ticket {
    number: u64,
    id: String,
    name: &'static str,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(journey) = tickets().remove(&self.number) {
            (journey.abandoned)("the dispatcher dropped the task before it began".to_owned());
        }
    }
}

impl TryDeserializeMessage for Ticket {
    fn try_deserialize_message(&self) -> Result<Message, ProtocolError> {
        Ok(Message {
            properties: MessageProperties {
                correlation_id: self.id.clone(),
                content_type: "application/json".to_owned(),
                content_encoding: "utf-8".to_owned(),
                reply_to: None,
            },
            headers: MessageHeaders {
                id: self.id.clone(),
                task: self.name.to_owned(),
                ..MessageHeaders::default()
            },
            raw_body: format!("[[],{{\"ticket\":{}}},{{}}]", self.number).into_bytes(),
        })
    }
}

#[async_trait]
impl Delivery for Ticket {
    async fn resend(
        &self,
        _: &dyn Broker,
        _: Option<chrono::DateTime<chrono::Utc>>,
    ) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn remove(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn ack(&self) -> Result<(), BrokerError> {
        Ok(())
    }
}

/// The crate's broker: a stream of tickets. Settling messages is the journey's own affair.
struct Tickets {
    receiver: Mutex<Option<mpsc::UnboundedReceiver<Ticket>>>,
}

struct TicketStream(mpsc::UnboundedReceiver<Ticket>);

#[expect(dead_code, reason = "names the error that a ticket stream never has")]
enum Never {}

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a ticket cannot fail")
    }
}

impl DeliveryError for Never {}

impl Stream for TicketStream {
    type Item = Result<Box<dyn Delivery>, Box<dyn DeliveryError>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.poll_recv(context) {
            Poll::Ready(Some(ticket)) => Poll::Ready(Some(Ok(Box::new(ticket)))),
            // An ended stream would make the crate's loop spin; the worker ends it by dropping.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

impl DeliveryStream for TicketStream {}

#[async_trait]
impl Broker for Tickets {
    fn safe_url(&self) -> String {
        "tickets://".to_owned()
    }

    async fn consume(
        &self,
        _: &str,
        _: Box<dyn Fn(BrokerError) + Send + Sync + 'static>,
    ) -> Result<(String, Box<dyn DeliveryStream>), BrokerError> {
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        match receiver.take() {
            Some(receiver) => Ok(("tickets".to_owned(), Box::new(TicketStream(receiver)))),
            None => Err(BrokerError::NotConnected),
        }
    }

    async fn cancel(&self, _: &str) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn ack(&self, _: &dyn Delivery) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn retry(
        &self,
        _: &dyn Delivery,
        _: Option<chrono::DateTime<chrono::Utc>>,
    ) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn send(&self, _: &Message, queue: &str) -> Result<(), BrokerError> {
        Err(BrokerError::UnknownQueue(queue.to_owned()))
    }

    async fn increase_prefetch_count(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn decrease_prefetch_count(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn close(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn reconnect(&self, _: u32) -> Result<(), BrokerError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journey(
        name: &'static str,
        run: BoxFuture<'static, ()>,
        report: &mpsc::UnboundedSender<String>,
    ) -> Journey {
        let report = report.clone();
        let abandoned = Box::new(move |text| drop(report.send(format!("abandoned: {text}"))));
        Journey {
            id: "some-id".to_owned(),
            name,
            run,
            abandoned,
        }
    }

    #[tokio::test]
    async fn journeys_run_through_the_crate_and_a_panic_is_reported() {
        let (app, dispatcher) = App::build("celery@test").await.unwrap();
        let (report, mut reports) = mpsc::unbounded_channel();
        let done = report.clone();
        let run = async move { drop(done.send("ran".to_owned())) }.boxed();
        dispatcher.submit(journey(Test::NAME, run, &report));
        let run = async { panic!("boom") }.boxed();
        dispatcher.submit(journey(AnalyzeRepo::NAME, run, &report));
        let run = async {}.boxed();
        dispatcher.submit(journey("not registered", run, &report));
        let collect = async {
            let mut seen = Vec::new();
            while seen.len() < 3 {
                seen.extend(reports.recv().await);
            }
            seen.sort();
            seen
        };
        let seen = tokio::select! {
            seen = collect => seen,
            ended = app.run() => panic!("the loop ended: {ended:?}"),
        };
        let dropped = "abandoned: the dispatcher dropped the task before it began";
        assert_eq!(seen, ["abandoned: boom", dropped, "ran"]);
    }
}
