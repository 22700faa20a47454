//! Where a message that the worker sends goes, and sending it.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::events::Event;
use crate::protocol::exception::Exception;
use crate::protocol::publish::TaskCall;
use crate::protocol::serialization::Serializer;
use crate::protocol::time::format_iso;
use crate::transport::{Exchange, ExchangeKind, Publication};
use crate::worker::Worker;

/// Publishes a call; a broker that refuses becomes Celery's OperationalError.
pub(super) async fn send(worker: &Arc<Worker>, call: &TaskCall) -> Result<(), Exception> {
    let mut call = call.clone();
    if call.serializer == Serializer::Json
        && let Ok(serializer) = Serializer::parse(&worker.settings.task_serializer)
    {
        call.serializer = serializer;
    }
    if call.compression.is_none() {
        call.compression
            .clone_from(&worker.settings.task_compression);
    }
    if call.priority.is_none() {
        let default = worker.settings.task_default_priority;
        call.priority = default.and_then(|priority| u8::try_from(priority).ok());
    }
    let (exchange, routing_key) = route(worker, &call);
    let envelope = call
        .to_envelope()
        .map_err(|error| Exception::encode(&error.to_string()))?;
    let queue = if exchange.name.is_empty() {
        routing_key.clone()
    } else {
        exchange.name.clone()
    };
    let publication = Publication {
        exchange,
        routing_key: routing_key.clone(),
        envelope,
    };
    let exchange_name = publication.exchange.name.clone();
    worker.link.publish(publication).await.map_err(|error| {
        Exception::operational(format!(
            "cannot publish {}[{}] to {queue}: {error}",
            call.name, call.id
        ))
    })?;
    sent_event(worker, &call, &queue, &exchange_name, &routing_key);
    Ok(())
}

/// The exchange and routing key: the call's own, else `task_routes`, else the default queue.
fn route(worker: &Worker, call: &TaskCall) -> (Exchange, String) {
    if let Some(exchange) = call.exchange.as_deref().filter(|name| !name.is_empty()) {
        let key = call
            .routing_key
            .clone()
            .or_else(|| call.queue.clone())
            .unwrap_or_default();
        return (Exchange::new(exchange, ExchangeKind::Direct), key);
    }
    let queue = call
        .queue
        .clone()
        .or_else(|| call.routing_key.clone())
        .or_else(|| routed(&worker.settings.task_routes, &call.name))
        .unwrap_or_else(|| worker.settings.task_default_queue.clone());
    (Exchange::default_exchange(), queue)
}

/// `task_routes`: the queue of the first pattern that matches, `*` standing for any text.
pub fn routed(routes: &Value, name: &str) -> Option<String> {
    let routes: &Map<String, Value> = routes.as_object()?;
    let matches = |pattern: &str| match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    };
    let (_, route) = routes.iter().find(|(pattern, _)| matches(pattern))?;
    let queue = route
        .as_str()
        .or_else(|| route.get("queue").and_then(Value::as_str))?;
    Some(queue.to_owned())
}

/// `task_send_sent_event`.
fn sent_event(worker: &Worker, call: &TaskCall, queue: &str, exchange: &str, routing_key: &str) {
    if !worker.settings.task_send_sent_event {
        return;
    }
    let event = Event::new("task-sent")
        .with("uuid", call.id.as_str())
        .with("root_id", call.root_id.as_deref().unwrap_or(&call.id))
        .with("parent_id", call.parent_id.clone())
        .with("name", call.name.as_str())
        .with("args", call.shown_args())
        .with("kwargs", call.shown_kwargs())
        .with("retries", call.retries)
        .with("eta", call.eta.as_ref().map(format_iso))
        .with("expires", call.expires.clone())
        .with("queue", queue)
        .with("exchange", exchange)
        .with("routing_key", routing_key);
    worker.events.send(&event);
}

#[cfg(test)]
mod tests {
    use super::routed;
    use serde_json::json;

    #[test]
    fn routes_match_names_and_patterns_in_their_order() {
        let routes = json!({"a.b": {"queue": "exact"}, "a.*": "short", "*.log": {"queue": "end"}});
        assert_eq!(routed(&routes, "a.b").as_deref(), Some("exact"));
        assert_eq!(routed(&routes, "a.c").as_deref(), Some("short"));
        assert_eq!(routed(&routes, "x.log").as_deref(), Some("end"));
        assert_eq!(routed(&routes, "x.y"), None);
    }
}
