//! `celeriac list bindings`: which queues hang on the exchanges of tasks.

use std::collections::BTreeSet;

use super::args::Global;
use super::{connect, output, remote, worker};
use crate::transport::Error;

/// Prints the table; returns the exit code.
pub(super) fn bindings(global: &Global) -> anyhow::Result<i32> {
    let settings = remote::settings(global)?;
    let queues = worker::configured_queues(&settings)?;
    let transport = connect::transport(&settings, "celeriac")?;
    let found: Result<_, Error> = remote::runtime()?.block_on(async {
        let channel = transport.connect().await?;
        let mut rows = BTreeSet::new();
        for queue in &queues {
            channel.declare(queue).await?;
        }
        for queue in &queues {
            let exchange = &queue.exchange.name;
            for (key, bound) in channel.bindings(exchange).await? {
                rows.insert((exchange.clone(), bound, key));
            }
        }
        drop(channel.close().await);
        Ok(rows)
    });
    let rows = match found {
        Err(error) if error.is_connection() => return Ok(remote::broker_away(&error)),
        found => found?,
    };
    let line = |queue: &str, exchange: &str, key: &str| {
        output::print(&format!("{queue:<28} {exchange:<28} {key}\n"));
    };
    let rule = "-".repeat(16);
    line("Queue", "Exchange", "Routing Key");
    line(&rule, &rule, &rule);
    for (exchange, queue, key) in &rows {
        line(queue, exchange, key);
    }
    Ok(0)
}
