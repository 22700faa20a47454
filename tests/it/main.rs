//! Integration tests: one binary, one module per subject.
//!
//! Every test runs beside all others, against real servers, the real Python client and real
//! repositories: it has a Redis database, a PostgreSQL database, a queue and a temporary
//! directory of its own. What it needs comes from [`support`]; a missing server fails the
//! test with the remedy.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a test binary: failures are loud and nobody imports it"
)]
#![allow(
    dead_code,
    reason = "support offers more than the tests of one day use"
)]

/// Every kind of address that leads to a Redis.
mod addresses;
/// Everything that is particular to RabbitMQ.
mod amqp;
/// Analyses and tokens in PostgreSQL and SQLite.
mod analyses;
/// Authors whose names and addresses are attacks.
mod authors;
/// Blame of small scripted histories that break simple versions of the rules.
mod blame_fixtures;
/// Blame of random histories.
mod blame_histories;
/// What git itself says about a repository, beside what the blame engine says.
mod blame_oracle;
/// Small repositories that want to become large.
mod bombs;
/// Calls and what the settings make of them.
mod calling;
/// Canvases, beside a Python worker and through the death of a worker.
mod canvas;
/// Workers, brokers and networks that die, with nothing lost and nothing done twice.
mod chaos;
/// Our inspect, control, call and the others beside the celery command.
mod commands;
/// Remote control and events, as the Python client sees them.
mod control;
/// Rubbish on its channel.
mod control_fuzz;
/// The words of its answers.
mod control_words;
/// Limits and turns of users.
mod fairness;
/// Real clones over HTTP.
mod fetch_clone;
/// Servers that lie.
mod fetch_lies;
/// Whom a fetch believes.
mod fetch_tls;
/// Repositories that hide tricks.
mod fetch_tricks;
/// The URLs strangers send.
mod fetch_urls;
/// Work that is done once.
mod flights;
/// The import table, the doors and the module docs of the source tree.
mod floors;
/// The generator of random histories.
mod histories;
/// What a dead worker or a full disk leaves behind.
mod janitor;
/// How a worker starts, stops and refuses to start.
mod lifecycle;
/// Tokens that are seen nowhere.
mod markers;
/// Malformed messages and random bytes.
mod messages;
/// Permits where a database counts them.
mod permits;
/// Result backends, read back by the Python client.
mod results;
/// Tasks that are tried again, beside a Python worker's.
mod retries;
/// The fences around a child of the product.
mod sandbox;
/// Tokens: given, encrypted, stored, used.
mod secrets;
/// What single settings of Celery change.
mod settings;
/// What those about the broker and its queues change.
mod settings_broker;
/// What those about results change.
mod settings_results;
/// What those about the worker itself change.
mod settings_worker;
/// That the test support itself does what the other tests rely on.
mod support_works;
/// Chords that a task watches, where the backend cannot count their parts.
mod unlocks;
/// Analyses from the client's call to the rows, and the limits of a task.
mod worker;

/// Servers, workers, the Python client, repositories and waiting.
mod support;
