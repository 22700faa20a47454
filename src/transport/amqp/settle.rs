//! The one that speaks on the channel of the task consumers: settlements go out in the order in
//! which they were asked for, and so do changes of what is consumed.

use std::sync::Arc;

use futures::future::join_all;
use lapin::options::{BasicAckOptions, BasicRejectOptions, ConfirmSelectOptions};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::consume::Consumption;
use super::core::{Core, Held, Op, lock};
use super::error::broken;
use super::{QUARANTINE, QUARANTINE_MOST};
use crate::transport::{Error, Exchange, Publication, Queue};

/// Settlements that are written at once. They are handed to lapin in order; up to this number
/// `join_all` polls its futures one after the other.
const BATCH: usize = 30;

const SETTLING: &str = "acknowledging";

/// Runs until the channel ends.
pub(super) async fn run(core: Arc<Core>, mut ops: mpsc::UnboundedReceiver<Op>) {
    let mut kept = JoinSet::new();
    let mut batch = Vec::with_capacity(BATCH);
    let mut consumption = Consumption::default();
    loop {
        let count = tokio::select! {
            biased;
            () = core.life.over() => return,
            Some(outcome) = kept.join_next() => {
                // A panic in there would be a bug; the broker gives the message back then.
                if let Ok(op) = outcome {
                    core.push(op);
                }
                continue;
            }
            count = ops.recv_many(&mut batch, BATCH) => count,
        };
        if count == 0 {
            return;
        }
        if let Err(error) = say(&core, batch.drain(..), &mut kept, &mut consumption).await {
            core.life.fail(error);
            return;
        }
    }
}

async fn say(
    core: &Arc<Core>,
    ops: impl Iterator<Item = Op>,
    kept: &mut JoinSet<Op>,
    consumption: &mut Consumption,
) -> Result<(), Error> {
    // What is settled was delivered, so the channel is there.
    let Some(side) = core.consuming_now() else {
        for op in ops {
            if let Op::Flush(done) = op {
                let _ = done.send(());
            }
        }
        return Ok(());
    };
    let channel = &side.channel;
    let mut settlements = Vec::new();
    for op in ops {
        match op {
            Op::Ack(number) => settlements.push(settle(channel, number, None)),
            Op::Reject(number, requeue) => settlements.push(settle(channel, number, Some(requeue))),
            Op::Quarantine(number, held, reason) => {
                kept.spawn(keep(core.clone(), number, held, reason));
            }
            Op::Consume(queue, done) => {
                write(std::mem::take(&mut settlements)).await?;
                let _ = done.send(consumption.start(core, side, &queue).await);
            }
            Op::Cancel(queue, done) => {
                write(std::mem::take(&mut settlements)).await?;
                let _ = done.send(consumption.cancel(core, side, &queue).await);
            }
            Op::Prefetch(count, done) => {
                write(std::mem::take(&mut settlements)).await?;
                let _ = done.send(consumption.limit(core, side, count).await);
            }
            Op::Flush(done) => {
                write(std::mem::take(&mut settlements)).await?;
                while let Some(outcome) = kept.join_next().await {
                    match outcome {
                        Ok(Op::Ack(number)) => write(vec![settle(channel, number, None)]).await?,
                        Ok(Op::Reject(number, requeue)) => {
                            write(vec![settle(channel, number, Some(requeue))]).await?;
                        }
                        _ => {}
                    }
                }
                barrier(channel).await?;
                let _ = done.send(());
            }
        }
    }
    write(settlements).await
}

async fn settle(channel: &lapin::Channel, number: u64, requeue: Option<bool>) -> lapin::Result<()> {
    match requeue {
        None => channel.basic_ack(number, BasicAckOptions::default()).await,
        Some(requeue) => {
            channel
                .basic_reject(number, BasicRejectOptions { requeue })
                .await
        }
    }
}

async fn write(settlements: Vec<impl Future<Output = lapin::Result<()>>>) -> Result<(), Error> {
    for outcome in join_all(settlements).await {
        outcome.map_err(|error| broken(SETTLING, &error))?;
    }
    Ok(())
}

/// A request with an answer: when it is there, everything said before has been read. Asking to
/// confirm publications is harmless on a channel that never publishes.
async fn barrier(channel: &lapin::Channel) -> Result<(), Error> {
    let answer = channel
        .confirm_select(ConfirmSelectOptions::default())
        .await;
    answer.map_err(|error| broken(SETTLING, &error))
}

/// Puts a message into the quarantine queue; then it is acknowledged.
async fn keep(core: Arc<Core>, number: u64, held: Box<Held>, reason: String) -> Op {
    let queue = held.queue.clone();
    match publish(&core, *held, reason).await {
        Ok(()) => Op::Ack(number),
        Err(error) if error.is_connection() => {
            log::error!("A message of {queue} could not be put into {QUARANTINE}: {error}");
            Op::Reject(number, true)
        }
        Err(error) => {
            log::error!(
                "A message of {queue} cannot be put into {QUARANTINE} and is dropped: {error}"
            );
            Op::Reject(number, false)
        }
    }
}

async fn publish(core: &Arc<Core>, held: Held, reason: String) -> Result<(), Error> {
    let Held {
        mut envelope,
        queue,
        exchange,
        routing_key,
    } = held;
    let mut place = Queue::task(QUARANTINE);
    place.exchange = Exchange::default_exchange();
    place
        .arguments
        .insert("x-max-length".to_owned(), Value::from(QUARANTINE_MOST));
    super::publish::ensure_queue(core, &place).await?;
    for (name, text) in [
        ("celeriac_reason", reason),
        ("celeriac_queue", queue),
        ("celeriac_exchange", exchange),
        ("celeriac_routing_key", routing_key),
        ("celeriac_quarantined_at", chrono::Utc::now().to_rfc3339()),
    ] {
        envelope.headers.insert(name.to_owned(), text.into());
    }
    // What is kept for a person must neither vanish nor be lost by a restart.
    envelope.properties.expiration = None;
    envelope.properties.delivery_mode = Some(2);
    let publication = Publication {
        exchange: Exchange::default_exchange(),
        routing_key: QUARANTINE.to_owned(),
        envelope,
    };
    if !super::publish::confirmed(core, &publication, true).await? {
        // Somebody deleted it since it was declared.
        lock(&core.declared).clear();
        super::publish::ensure_queue(core, &place).await?;
        super::publish::confirmed(core, &publication, true).await?;
    }
    Ok(())
}
