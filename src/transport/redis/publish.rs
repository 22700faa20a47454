//! Turning a publication into bytes and a place to push them to.

use super::core::{Core, Outgoing, Route};
use super::message;
use crate::transport::{ExchangeKind, Publication};

/// How long a reply waits for a client that may be gone.
const REPLY_TTL: u64 = 60_000;
/// How long a transient message waits in a queue of which nothing is known.
const TRANSIENT_TTL: u64 = 86_400_000;

/// Turns a publication into what the writer sends.
pub(super) fn outgoing(core: &Core, publication: &Publication) -> Vec<Outgoing> {
    let Publication {
        exchange,
        routing_key,
        envelope,
    } = publication;
    let delivery_tag = uuid::Uuid::new_v4().to_string();
    let payload = message::encode(envelope, &exchange.name, routing_key, &delivery_tag);
    let priority = envelope.properties.priority.unwrap_or(0);
    if exchange.kind == ExchangeKind::Fanout && !exchange.name.is_empty() {
        let mut sent = Vec::with_capacity(1);
        if let Some(old) = &core.old_keys {
            let route = Route::Channel(old.channel(&exchange.name, routing_key));
            sent.push(Outgoing {
                route,
                payload: payload.clone(),
                ttl: None,
            });
        }
        let route = Route::Channel(core.keys.channel(&exchange.name, routing_key));
        sent.push(Outgoing {
            route,
            payload,
            ttl: None,
        });
        return sent;
    }
    // No list that its reader may never empty is left without an end: replies, and
    // whatever else is marked as transient.
    let transient = !exchange.durable || envelope.properties.delivery_mode == Some(1);
    let ttl = transient.then(|| {
        let given = envelope
            .properties
            .expiration
            .as_deref()
            .and_then(|text| text.parse().ok());
        let usual = if exchange.durable {
            TRANSIENT_TTL
        } else {
            REPLY_TTL
        };
        given.filter(|ttl| *ttl > 0).unwrap_or(usual)
    });
    if exchange.name.is_empty() {
        let expires = core
            .bindings()
            .iter()
            .find(|binding| binding.queue == *routing_key)
            .and_then(|binding| binding.expires);
        let route = Route::List(core.keys.list(routing_key, priority));
        return vec![Outgoing {
            route,
            payload,
            ttl: expires.or(ttl),
        }];
    }
    let route = Route::Exchange {
        name: exchange.name.clone(),
        topic: exchange.kind == ExchangeKind::Topic,
        routing_key: routing_key.clone(),
        suffix: core.keys.suffix(priority),
    };
    vec![Outgoing {
        route,
        payload,
        ttl,
    }]
}
