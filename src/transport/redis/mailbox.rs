//! Queues of one's own that are lists: replies to remote control, results of `rpc://`.
//!
//! Each has a connection of its own that waits in `BRPOP` on the lists of its steps. Messages
//! are not acknowledged: who owns the queue is the only reader, and gone when it dies.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::core::{Core, until};
use super::{fetch, message};
use crate::transport::{Delivery, Tag};

/// Reads a queue until its stream is dropped or the channel ends.
pub(super) async fn run(
    core: Arc<Core>,
    mut connection: redis::aio::MultiplexedConnection,
    queue: String,
    sender: mpsc::Sender<Delivery>,
) {
    let lists = core.keys.lists(&queue);
    let mut ended = core.ended();
    loop {
        let popped = tokio::select! {
            popped = fetch::brpop(
                &mut connection,
                lists.iter().map(String::as_str),
                core.options.polling_interval,
                core.options.command_timeout,
            ) => popped,
            () = sender.closed() => return,
            () = until(&mut ended) => return,
        };
        let raw = match popped {
            Ok(Some((_, raw))) => raw,
            Ok(None) => continue,
            Err(error) => {
                core.fail_with(error);
                return;
            }
        };
        match message::decode(&raw) {
            Ok(decoded) if decoded.damage.is_none() => {
                let delivery = Delivery {
                    tag: Tag("".into()),
                    envelope: decoded.envelope,
                    queue: queue.clone(),
                    exchange: decoded.exchange,
                    routing_key: decoded.routing_key.unwrap_or_else(|| queue.clone()),
                    redelivered: decoded.redelivered,
                    deaths: decoded.deaths,
                };
                if sender.send(delivery).await.is_err() {
                    return;
                }
            }
            Ok(decoded) => log::warn!(
                "a message in {queue} cannot be decoded: {}",
                decoded.damage.unwrap_or_default()
            ),
            Err(reason) => log::warn!("a message in {queue} cannot be decoded: {reason}"),
        }
    }
}
