//! What `inspect`, `control` and `status` have in common: asking the workers and saying what
//! they answer, in Celery's layout and with its exit codes.
//!
//! Answers for `celery.bin.control`.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, anyhow};
use serde_json::{Map, Value};
use tokio::runtime::Runtime;

use super::args::{Global, Remote, Target};
use super::commands::Kind;
use super::output::{print, print_error};
use super::paint::{Colour, Paint};
use super::{connect, global_overrides, python};
use crate::config::{self, Settings};
use crate::pidbox::{self, Mailbox, Reply, Request};
use crate::protocol::saferepr;
use crate::protocol::serialization::Accept;
use crate::worker::heart;

/// Nobody answered, or the broker is away (`EX_UNAVAILABLE`).
const UNAVAILABLE: i32 = 69;

/// Longer than anybody waits, in seconds.
pub(super) const A_YEAR: f64 = 31_536_000.0;

/// Settings as the environment and the global options say them.
pub(super) fn settings(global: &Global) -> anyhow::Result<Settings> {
    Ok(config::load(&global_overrides(global))?.settings)
}

/// One thread is enough to ask something, and the quickest to start.
pub(super) fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// Tells the user that the broker is away; returns the exit code.
pub(super) fn broker_away(reason: &dyn std::fmt::Display) -> i32 {
    print_error(&format!(
        "Error: Could not connect to the message broker. Please make sure your broker (e.g., \
         RabbitMQ or Redis) is running and the connection settings are correct. Reason: {reason}\n"
    ));
    UNAVAILABLE
}

/// Tells the user what is wrong with the command line; returns the exit code.
pub(super) fn wrong_usage(command: &str, synopsis: &str, text: &str) -> i32 {
    print_error(&format!(
        "Usage: celeriac {command} [OPTIONS] {synopsis}\n\
         Try 'celeriac {command} --help' for help.\n\nError: {text}\n"
    ));
    super::USAGE
}

/// A mailbox for asking workers.
pub(super) fn mailbox(
    settings: &Settings,
    channel: std::sync::Arc<dyn crate::transport::Channel>,
) -> anyhow::Result<Mailbox> {
    let accept = Accept::from_names(settings.accept_content.iter().map(String::as_str))
        .map_err(|error| anyhow!("CELERY_ACCEPT_CONTENT: {error}"))?;
    Ok(Mailbox::new(channel, heart::addresses(settings), accept))
}

/// Asks, handing out each reply as it comes; returns all of them, or the exit code of what was
/// said to the user instead.
pub(super) fn ask(
    global: &Global,
    target: &Target,
    (name, method): (&str, &str),
    arguments: Map<String, Value>,
    mut each: impl FnMut(&Reply),
) -> anyhow::Result<Result<Vec<Reply>, i32>> {
    let settings = settings(global)?;
    let destination = target.destination.as_deref().map(names);
    let request = Request {
        arguments,
        destination: destination.filter(|names| !names.is_empty()),
        timeout: Duration::from_secs_f64(target.timeout.clamp(0.0, A_YEAR)),
        ..Request::new(method)
    };
    let transport = connect::transport(&settings, "celeriac")?;
    let mut replies: Vec<Reply> = Vec::new();
    let outcome = runtime()?.block_on(async {
        let channel = transport.connect().await?;
        let mailbox = mailbox(&settings, channel.clone())
            .map_err(|error| pidbox::Error::Shape(error.to_string()))?;
        let asked = mailbox
            .call_each(&request, |reply, _| {
                each(&reply);
                replies.push(reply);
            })
            .await;
        // What was made for the replies goes with the channel; without it, it would expire.
        drop(channel.close().await);
        asked
    });
    match outcome {
        Ok(()) if replies.is_empty() => {
            print_error("Error: No nodes replied within time constraint\n");
            Ok(Err(UNAVAILABLE))
        }
        Ok(()) => {
            warn_of_doubles(&replies);
            Ok(Ok(replies))
        }
        Err(pidbox::Error::Transport(error)) if error.is_connection() => {
            Ok(Err(broker_away(&error)))
        }
        Err(error) => {
            print_error(&format!(
                "Error: Unable to run the `{name}` command. Reason: {error}\n"
            ));
            Ok(Err(UNAVAILABLE))
        }
    }
}

/// `inspect` and `control`.
pub(super) fn run(global: &Global, kind: Kind, options: &Remote) -> anyhow::Result<i32> {
    let word = kind.word();
    if options.list {
        print(&kind.listing());
        return Ok(0);
    }
    let Some(name) = &options.command else {
        return Ok(wrong_usage(word, "COMMAND", "Missing argument 'COMMAND'."));
    };
    let compiled = kind
        .find(name)
        .and_then(|command| command.compile(&options.arguments));
    let mut arguments = match compiled {
        Ok(arguments) => arguments,
        Err(text) => return Ok(wrong_usage(word, "COMMAND", &text)),
    };
    if name == "hello" && arguments.is_empty() {
        arguments.insert("from_node".to_owned(), Value::from("celeriac-inspect"));
    }
    let (target, paint) = (&options.target, Paint::stdout(global));
    let shown = format!("{word} {name}");
    let asked = ask(global, target, (&shown, name), arguments, |reply| {
        if !target.json {
            say(global, paint, reply, true);
        }
    })?;
    let replies = match asked {
        Ok(replies) => replies,
        Err(code) => return Ok(code),
    };
    match (kind, target.json) {
        (Kind::Inspect, true) => print(&format!("{}\n", python::dumps(&merged(&replies), false))),
        (Kind::Control, true) => {
            let list = replies
                .iter()
                .map(|reply| merged(std::slice::from_ref(reply)))
                .collect();
            print(&format!("{}\n", python::dumps(&Value::Array(list), false)));
        }
        (Kind::Inspect, false) if !global.quiet => print(&online(&replies)),
        _ => {}
    }
    Ok(0)
}

/// The count of nodes at the end.
pub(super) fn online(replies: &[Reply]) -> String {
    let nodes: HashSet<&str> = replies.iter().map(|reply| reply.node.as_str()).collect();
    let count = nodes.len() as u64;
    format!("\n{count} {} online.\n", python::plural(count, "node"))
}

/// One object of all replies.
pub(super) fn merged(replies: &[Reply]) -> Value {
    let replies = replies
        .iter()
        .map(|reply| (reply.node.clone(), reply.value.clone()));
    Value::Object(replies.collect())
}

/// Says what a node answered.
pub(super) fn say(global: &Global, paint: Paint, reply: &Reply, with_body: bool) {
    let node = paint.text(&format!("{}: ", reply.node), Colour::Cyan);
    let (status, body) = pretty(paint, &reply.value);
    let arrow = if global.quiet {
        String::new()
    } else {
        format!("{} ", paint.text("->", Colour::BoldWhite))
    };
    let mut text = format!("{arrow} {node}{status}\n");
    if with_body {
        text.push_str(&python::indent(&body));
        text.push('\n');
    }
    print(&text);
}

/// OK or ERROR, and the value as text.
fn pretty(paint: Paint, value: &Value) -> (String, String) {
    let good = paint.text("OK", Colour::Green);
    match value {
        Value::Array(items) if items.is_empty() => (good, "- empty -".to_owned()),
        Value::Array(items) => {
            let mark = paint.text("*", Colour::White);
            let lines: Vec<String> = items
                .iter()
                .map(|item| format!("{mark} {}", saferepr::str(item)))
                .collect();
            (good, lines.join("\n"))
        }
        Value::Object(object) => match (object.get("ok"), object.get("error")) {
            (Some(value), _) => (good, python::indent(&pretty(paint, value).1)),
            (None, Some(value)) => (
                paint.text("ERROR", Colour::Red),
                python::indent(&pretty(paint, value).1),
            ),
            (None, None) => (good, python::dumps(value, true)),
        },
        other => (good, saferepr::str(other)),
    }
}

/// Words separated by commas.
pub(super) fn names(list: &str) -> Vec<String> {
    list.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn warn_of_doubles(replies: &[Reply]) {
    let mut seen = HashSet::new();
    let mut doubles: Vec<&str> = replies
        .iter()
        .map(|reply| reply.node.as_str())
        .filter(|node| !seen.insert(*node))
        .collect();
    doubles.dedup();
    if !doubles.is_empty() {
        print_error(&format!(
            "DuplicateNodenameWarning: Received multiple replies from node {}: {}.\n\
             Please make sure you give each node a unique nodename using\n\
             the celery worker `-n` option.\n",
            python::plural(doubles.len() as u64, "name"),
            doubles.join(", ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn replies_are_laid_out_as_celery_does() {
        let plain = Paint::none();
        let shown = |value: Value| pretty(plain, &value);
        assert_eq!(shown(json!([])), ("OK".into(), "- empty -".into()));
        assert_eq!(
            shown(json!({"ok": "pong"})),
            ("OK".into(), "    pong".into())
        );
        assert_eq!(
            shown(json!({"error": "no\nway"})),
            ("ERROR".into(), "    no\n    way".into())
        );
        assert_eq!(shown(json!(["a", {"id": null}])).1, "* a\n* {'id': None}");
        assert_eq!(shown(json!({"clock": 7})).1, "{\n    \"clock\": 7\n}");
        assert_eq!(shown(Value::Null).1, "None");
    }

    #[test]
    fn names_are_separated_by_commas() {
        assert_eq!(names("a@h, b@h,"), ["a@h", "b@h"]);
    }
}
