//! celeriac: a Celery-compatible worker that tells who wrote a Git repository, line by line.
//!
//! # The journey
//!
//! ```text
//! parent: broker → transport delivery → protocol message → worker request → rusty-celery → tasks → pool slot …
//! child:  … analysis → git fetch → blame → report …
//! parent: … database → worker follow-ups → backend → ack → events
//! ```
//!
//! # Floors
//!
//! Imports only go down. What a directory may import is a table in `tests/it/floors.rs`.
//!
//! | floor | modules |
//! | --- | --- |
//! | 6 | [`cli`] |
//! | 5 | [`worker`] |
//! | 4 | [`tasks`] |
//! | 3 | [`analysis`] [`pool`] |
//! | 2 | [`backend`] [`pidbox`] [`events`] [`blame`] |
//! | 1 | [`transport`] [`database`] [`git`] |
//! | 0 | [`config`] [`protocol`] [`logging`] |
//!
//! # Invariants
//!
//! * The child computes, the parent speaks: only the parent talks to broker, result backend and
//!   database; a child knows its directory and the git server, nothing else.
//! * What follows from what is pure: `worker::effects` says it, `worker::execute` does it.
//! * One door per library: lapin is named in `transport/amqp` alone, redis in `transport/redis`
//!   and `backend/redis`, diesel in `database` and `backend/database.rs`, git2 and gix in `git`,
//!   the celery crate in `worker/app.rs`, clap in `cli`.
//! * Absent on purpose: a cache of anything a broker or database knows, a retry without a bound, a
//!   queue in memory without one, a thread in a child that outlives its job.

pub mod analysis;
pub mod backend;
pub mod blame;
pub mod cli;
pub mod config;
pub mod database;
pub mod events;
pub mod git;
pub mod logging;
pub mod pidbox;
pub mod pool;
pub mod protocol;
pub mod tasks;
pub mod transport;
pub mod worker;
