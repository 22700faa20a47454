//! For Rust programs that call tasks: the crate's `send_task` over our transports.
//!
//! The crate's message is turned into one of ours, with every header that a Python client
//! writes, so that Python workers and this one run it and inspection shows it. A caller
//! consumes nothing.

use std::collections::HashSet;
use std::sync::Arc;

use celery::error::BrokerError;
use celery::protocol::Message;
use serde_json::Value;
use tokio::sync::Mutex;

use super::{Broker, Delivery, DeliveryStream, Error, app};
use crate::protocol::message::Embed;
use crate::protocol::publish::TaskCall;
use crate::protocol::signature::Signature;
use crate::protocol::time::format_iso;
use crate::protocol::{Limits, json};
use crate::transport::{self, Channel, Exchange, Publication, Queue, Transport};

/// An app of the crate that sends what it is given through a transport; `queue` is where tasks
/// without a route of their own go.
pub async fn caller(transport: Arc<dyn Transport>, queue: &str) -> Result<celery::Celery, Error> {
    let outbox = Outbox {
        transport,
        open: Mutex::default(),
        reply_to: uuid::Uuid::new_v4().to_string(),
    };
    app("celeriac", queue, Box::new(outbox)).await
}

/// The crate's broker for sending.
struct Outbox {
    transport: Arc<dyn Transport>,
    open: Mutex<Open>,
    reply_to: String,
}

/// The channel, and which queues are known to be there.
#[derive(Default)]
struct Open {
    channel: Option<Arc<dyn Channel>>,
    declared: HashSet<String>,
}

impl Outbox {
    /// Publishes on the open channel or a new one.
    async fn publish(&self, publication: &Publication) -> Result<(), transport::Error> {
        let mut open = self.open.lock().await;
        let channel = match &open.channel {
            Some(channel) => channel.clone(),
            None => {
                let channel = self.transport.connect().await?;
                *open = Open {
                    channel: Some(channel.clone()),
                    declared: HashSet::new(),
                };
                channel
            }
        };
        let published = publish(&*channel, &mut open.declared, publication).await;
        let lost = |error: &transport::Error| error.is_connection();
        if published.as_ref().is_err_and(lost) {
            open.channel = None;
        }
        published
    }
}

async fn publish(
    channel: &dyn Channel,
    declared: &mut HashSet<String>,
    publication: &Publication,
) -> Result<(), transport::Error> {
    let queue = &publication.routing_key;
    if !declared.contains(queue) {
        channel.declare(&Queue::task(queue)).await?;
        declared.insert(queue.clone());
    }
    channel.publish(publication.clone()).await
}

/// The crate's message as ours; the error says what about it cannot be read.
fn call(message: &Message, reply_to: &str) -> Result<TaskCall, String> {
    let body = json::parse(&message.raw_body, &Limits::default()).map_err(|it| it.to_string())?;
    let Value::Array(parts) = body else {
        return Err("the body is no array".to_owned());
    };
    let mut parts = parts.into_iter();
    let (Some(Value::Array(args)), Some(Value::Object(kwargs))) = (parts.next(), parts.next())
    else {
        return Err("the body has no arguments".to_owned());
    };
    let follows = parts.next().unwrap_or_default();
    let list = |name| Signature::list(follows.get(name).cloned().unwrap_or_default());
    let chord = follows.get("chord").filter(|chord| !chord.is_null());
    let headers = &message.headers;
    let mut call = TaskCall::new(&headers.id, &headers.task, args, kwargs);
    call.embed = Embed {
        callbacks: list("callbacks")?,
        errbacks: list("errbacks")?,
        chain: list("chain")?,
        chord: chord.cloned().map(Signature::from_value).transpose()?,
    };
    let text = |time: chrono::DateTime<chrono::Utc>| format_iso(&time.fixed_offset());
    call.eta = headers.eta.map(|eta| eta.fixed_offset());
    call.expires = headers.expires.map(text);
    call.shadow.clone_from(&headers.shadow);
    call.group.clone_from(&headers.group);
    call.root_id.clone_from(&headers.root_id);
    call.parent_id.clone_from(&headers.parent_id);
    call.retries = headers.retries.unwrap_or(0).into();
    // The crate counts as its documentation says Python does: the soft one first.
    let (soft, hard) = headers.timelimit;
    (call.time_limit, call.soft_time_limit) = (hard.map(f64::from), soft.map(f64::from));
    let sender = headers.origin.clone();
    call.origin = sender.unwrap_or_else(|| format!("gen{}@rust", std::process::id()));
    let asked = message.properties.reply_to.as_deref();
    call.reply_to = asked.unwrap_or(reply_to).to_owned();
    Ok(call)
}

#[async_trait::async_trait]
impl Broker for Outbox {
    fn safe_url(&self) -> String {
        self.transport.display_url()
    }

    async fn consume(
        &self,
        _: &str,
        _: Box<dyn Fn(BrokerError) + Send + Sync + 'static>,
    ) -> Result<(String, Box<dyn DeliveryStream>), BrokerError> {
        Err(BrokerError::NotConnected)
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

    /// The crate's errors have no room for a reason, so that is logged.
    async fn send(&self, message: &Message, queue: &str) -> Result<(), BrokerError> {
        let task = format!("{}[{}]", message.headers.task, message.headers.id);
        let unreadable = |text: String| {
            log::error!("Cannot send {task}: {text}");
            BrokerError::UnknownQueue(format!("{queue}: {text}"))
        };
        let call = call(message, &self.reply_to).map_err(unreadable)?;
        let envelope = call.to_envelope();
        let envelope = envelope.map_err(|error| unreadable(error.to_string()))?;
        let publication = Publication {
            exchange: Exchange::default_exchange(),
            routing_key: queue.to_owned(),
            envelope,
        };
        let published = match self.publish(&publication).await {
            // The connection may have ended long ago without anybody using it.
            Err(error) if error.is_connection() => self.publish(&publication).await,
            other => other,
        };
        published.map_err(|error| {
            log::error!("Cannot send {task}: {error}");
            BrokerError::NotConnected
        })
    }

    async fn increase_prefetch_count(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn decrease_prefetch_count(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    async fn close(&self) -> Result<(), BrokerError> {
        let channel = self.open.lock().await.channel.take();
        if let Some(channel) = channel
            && let Err(error) = channel.close().await
        {
            log::warn!("While closing the connection to the broker: {error}");
        }
        Ok(())
    }

    async fn reconnect(&self, _: u32) -> Result<(), BrokerError> {
        Ok(())
    }
}
