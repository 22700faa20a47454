//! Delaying messages inside RabbitMQ, as kombu does for quorum queues.
//!
//! A quorum queue has no channel-wide prefetch limit, so a worker that held its ETA tasks would
//! soon receive nothing else. Instead the delay in seconds is written as 28 binary digits in
//! front of the routing key and the message walks down 28 levels: at each level a 1 sends it
//! through a queue that keeps it for 2ⁿ seconds, a 0 past it.
//!
//! ```text
//!  celery_delayed_27 ── *…1.# ──▶ queue, ttl 2²⁷ s ──┐ dead-letters to
//!          │                                         ▼
//!          └──────────── *…0.# ─────────▶ celery_delayed_26 … ▶ celery_delayed_delivery
//!                                                                   │ #.<routing key>
//!                                                 the queue's own exchange ──▶ the queue
//! ```
//!
//! Direct exchanges cannot take part: their keys are compared as a whole, digits included.
//! Answers for `kombu/transport/native_delayed_delivery.py`.

use lapin::ExchangeKind as Kind;
use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};

use super::connect::Line;
use super::message::short;
use crate::transport::{Error, Exchange, ExchangeKind, Queue};

/// Digits of a delay.
const LEVELS: usize = 28;
/// Where a message is put when its time has come.
const DELIVERY: &str = "celery_delayed_delivery";

const DECLARING: &str = "declaring the queues that delay messages";

fn level(number: usize) -> String {
    format!("celery_delayed_{number}")
}

/// Where a delayed message is sent.
pub(super) fn exchange() -> Exchange {
    Exchange::new(level(LEVELS - 1), ExchangeKind::Topic)
}

/// Whether an exchange is one of the topology's: a retry goes to where its message came from.
pub(super) fn is_ours(exchange: &str) -> bool {
    exchange.starts_with("celery_delayed_")
}

/// The routing key without the digits of an earlier delay.
pub(super) fn bare(routing_key: &str) -> &str {
    let bytes = routing_key.as_bytes();
    let has_digits = bytes.len() > 2 * LEVELS
        && bytes[..2 * LEVELS]
            .chunks_exact(2)
            .all(|pair| matches!(pair, [b'0' | b'1', b'.']));
    if has_digits {
        &routing_key[2 * LEVELS..]
    } else {
        routing_key
    }
}

/// The routing key of a message that is to come in `seconds`.
pub(super) fn routing_key(seconds: u64, routing_key: &str) -> String {
    let most = (1_u64 << LEVELS) - 1;
    let mut key = String::with_capacity(2 * LEVELS + routing_key.len());
    for digit in format!("{:028b}", seconds.min(most)).chars() {
        key.push(digit);
        key.push('.');
    }
    key.push_str(bare(routing_key));
    key
}

/// Makes the levels, unless they are there.
pub(super) async fn declare(line: &Line, queue_type: &str) -> Result<(), Error> {
    let there = line.ask(DECLARING, |channel| async move {
        let options = ExchangeDeclareOptions {
            passive: true,
            ..durable_exchange()
        };
        channel
            .exchange_declare(DELIVERY.into(), Kind::Topic, options, FieldTable::default())
            .await
    });
    match there.await {
        Ok(()) => return Ok(()),
        // Not found; a lost connection shows in what follows.
        Err(error) => log::debug!("{error}"),
    }
    let queue_type = queue_type.to_owned();
    line.ask(DECLARING, |channel| async move {
        for number in (0..LEVELS).rev() {
            let name = level(number);
            channel
                .exchange_declare(
                    name.as_str().into(),
                    Kind::Topic,
                    durable_exchange(),
                    FieldTable::default(),
                )
                .await?;
            let options = QueueDeclareOptions {
                durable: true,
                ..QueueDeclareOptions::default()
            };
            channel
                .queue_declare(
                    name.as_str().into(),
                    options,
                    arguments(number, &queue_type),
                )
                .await?;
            let key = format!("{}1.#", "*.".repeat(LEVELS - 1 - number));
            channel
                .queue_bind(
                    name.as_str().into(),
                    name.as_str().into(),
                    key.into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
        }
        for number in (0..LEVELS).rev() {
            let next = if number == 0 {
                DELIVERY.to_owned()
            } else {
                level(number - 1)
            };
            if number == 0 {
                // Last of all, so that its presence means that everything is there.
                channel
                    .exchange_declare(
                        DELIVERY.into(),
                        Kind::Topic,
                        durable_exchange(),
                        FieldTable::default(),
                    )
                    .await?;
            }
            let key = format!("{}0.#", "*.".repeat(LEVELS - 1 - number));
            channel
                .exchange_bind(
                    next.into(),
                    level(number).into(),
                    key.into(),
                    ExchangeBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
        }
        Ok(())
    })
    .await
}

/// Lets delayed messages reach a queue through its own exchange.
pub(super) async fn bind(line: &Line, queue: &Queue) -> Result<(), Error> {
    if queue.exchange.name.is_empty() || queue.exchange.kind == ExchangeKind::Direct {
        log::warn!(
            "Queue {} has a direct exchange, through which RabbitMQ cannot deliver delayed \
             messages; its ETA tasks are held by the worker",
            queue.name
        );
        return Ok(());
    }
    let key = if queue.routing_key.starts_with('#') {
        queue.routing_key.clone()
    } else {
        format!("#.{}", queue.routing_key)
    };
    let (name, exchange, key) = (
        short(&queue.name)?,
        short(&queue.exchange.name)?,
        short(&key)?,
    );
    line.ask(DECLARING, |channel| async move {
        channel
            .exchange_bind(
                exchange.clone(),
                DELIVERY.into(),
                key.clone(),
                ExchangeBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
        channel
            .queue_bind(
                name,
                exchange,
                key,
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
    })
    .await
}

fn durable_exchange() -> ExchangeDeclareOptions {
    ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    }
}

fn arguments(number: usize, queue_type: &str) -> FieldTable {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let next = if number == 0 {
        DELIVERY.to_owned()
    } else {
        level(number - 1)
    };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text(queue_type));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments.insert(
        "x-message-ttl".into(),
        AMQPValue::LongLongInt((1_i64 << number) * 1000),
    );
    arguments.insert("x-dead-letter-exchange".into(), text(&next));
    if queue_type == "quorum" {
        arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_written_in_front_of_the_key_and_replaces_an_earlier_one() {
        let first = routing_key(5, "celery");
        assert_eq!(first, format!("{}1.0.1.celery", "0.".repeat(25)));
        assert_eq!(bare(&first), "celery");
        assert_eq!(
            routing_key(1, &first),
            format!("{}1.celery", "0.".repeat(27))
        );
        assert_eq!(routing_key(u64::MAX, "k"), format!("{}k", "1.".repeat(28)));
    }

    #[test]
    fn keys_that_only_look_like_a_delay_are_left_alone() {
        for key in [
            "",
            "0.1.celery",
            &"0.".repeat(28),
            &format!("{}é", "2.".repeat(30)),
        ] {
            assert_eq!(bare(key), key);
        }
    }
}
