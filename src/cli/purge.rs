//! `celeriac purge`: empties task queues.

use std::collections::BTreeSet;
use std::io::BufRead;

use super::args::{Global, Purge};
use super::output::{print, print_error};
use super::paint::{Colour, Paint};
use super::{connect, python, remote, worker};
use crate::transport::Error;

/// Asks, then empties; returns the exit code.
pub(super) fn run(global: &Global, options: &Purge) -> anyhow::Result<i32> {
    let settings = remote::settings(global)?;
    let listed = |list: &Option<String>| list.as_deref().map(remote::names).unwrap_or_default();
    let mut names: BTreeSet<String> = listed(&options.queues).into_iter().collect();
    if names.is_empty() {
        let known = worker::configured_queues(&settings)?;
        names.extend(known.into_iter().map(|queue| queue.name));
    }
    for name in listed(&options.exclude_queues) {
        names.remove(&name);
    }
    if names.is_empty() {
        return Ok(0);
    }
    let count = names.len() as u64;
    let headline = python::plural(count, "queue");
    if !options.force && !confirmed(global, &headline, &names)? {
        print_error("Aborted!\n");
        return Ok(1);
    }
    let transport = connect::transport(&settings, "celeriac")?;
    let purged: Result<u64, Error> = remote::runtime()?.block_on(async {
        let channel = transport.connect().await?;
        let mut purged = 0;
        for name in &names {
            match channel.purge(name).await {
                Ok(messages) => purged += messages,
                // A queue that is not there is empty.
                Err(Error::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        drop(channel.close().await);
        Ok(purged)
    });
    match purged {
        Ok(0) => print(&format!("No messages purged from {count} {headline}.\n")),
        Ok(messages) => print(&format!(
            "Purged {messages} {} from {count} known task {headline}.\n",
            python::plural(messages, "message")
        )),
        Err(error) => return Ok(remote::broker_away(&error)),
    }
    Ok(0)
}

/// Asks the person; no answer is no.
fn confirmed(global: &Global, headline: &str, names: &BTreeSet<String>) -> anyhow::Result<bool> {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    print(&format!(
        "{}:This will remove all tasks from {headline}: {}.\n         \
         There is no undo for this operation!\n\n(to skip this prompt use the -f option)\n",
        Paint::stdout(global).text("WARNING", Colour::Red),
        names.join(", ")
    ));
    loop {
        print("Are you sure you want to delete all tasks? [y/N]: ");
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(false);
        }
        match line.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => return Ok(true),
            "" | "n" | "no" => return Ok(false),
            _ => print_error("Error: invalid input\n"),
        }
    }
}
