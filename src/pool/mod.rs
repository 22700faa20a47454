//! Child processes that compute; the parent speaks to the world.
//!
//! The pool is generic: a [`Job`] is an id, a name and a JSON payload, and what a child makes of
//! it is decided by the handler that `main` gives to [`child::serve`]. It knows nothing of git,
//! brokers or results. It answers for Celery's `concurrency/prefork.py` and billiard's pool.
//!
//! ```text
//!  parent (tokio)                                     child (one per place, plus a warm spare)
//!  Pool ── place 0 ── Slot ── jobs socket    ───────▶ stdin : a job in, progress and outcome out
//!                          └─ control socket ───────▶ stdout: "your soft limit is over"
//!  keeper thread: spawns, watches, kills groups, reaps
//! ```
//!
//! * A child is the same program started again through `/proc/self/exe` with
//!   [`CHILD_ARGUMENT`] first; nothing is ever forked without exec.
//! * Every child leads its own process group, dies with its parent, sees an allow-list of the
//!   environment, inherits its two sockets and standard error and nothing else, and sandboxes
//!   itself ([`sandbox`]) before it reads the first job.
//! * All children are spawned by one thread that lives as long as the pool, because the
//!   parent-death signal is tied to the spawning *thread*.
//! * A job that reached a child ends in exactly one [`Outcome`], however the child ended; a place
//!   whose child is gone gets the spare at once and a new spare is started.
//! * A child is silent about its own death: the socket's end and the exit status tell.
//!
//! Files: [`prefork`] (the pool's public face), `places` (places, children, spare), `slot` (one child's job as the parent sees
//! it), [`child`] (the child's loop), `process` (spawn, group, signals, reaping; the only unsafe
//! code), `frame` (what crosses the sockets), [`job`] (the vocabulary), [`limits`] (how many
//! processors, how much memory), [`sandbox`].

use std::path::PathBuf;

pub mod child;
mod frame;
pub mod job;
pub mod limits;
mod options;
mod places;
pub mod prefork;
mod process;
pub mod sandbox;
mod slot;

pub use job::{Event, Failure, Job, Outcome, Retry};
pub use options::Options;
pub use prefork::{Pool, Writes};
pub use process::release_start_up_text;
pub use sandbox::Sandbox;
pub use slot::Slot;

/// The first argument that turns the program into a pool child; `main` looks at it before
/// anything else. It is followed by the parent's process id.
pub const CHILD_ARGUMENT: &str = "__pool_child";

/// What can go wrong with the pool itself; a failing job is an [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to start a child.
    #[error("start a pool child from {program}: {source} (process or memory limit reached?)")]
    Spawn {
        /// The program that was to be started.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A child ended, or said nothing sensible, before it was ready.
    #[error("start pool child {name}: it ended before it was ready ({reason})")]
    Stillborn {
        /// The child's name.
        name: String,
        /// How it ended.
        reason: String,
    },
    /// The thread that spawns children could not be started, or has ended.
    #[error("start the pool: {0}")]
    Keeper(std::io::Error),
    /// The directory that a child is to work in cannot be made.
    #[error("make the pool child's directory {path}: {source} (does it exist, is it writable?)")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Fewer processes are idle than are to go.
    #[error("Can't shrink pool. All processes busy!")]
    Busy,
    /// The pool has been stopped.
    #[error("use the pool: it has been stopped")]
    Stopped,
    /// A frame is longer than allowed.
    #[error("send or read a pool frame: {length} bytes are more than the limit of {limit}")]
    FrameTooLong {
        /// The length that was announced.
        length: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// A frame holds something else than a message of ours.
    #[error("read a pool frame: {0}")]
    Malformed(serde_json::Error),
    /// The socket between parent and child failed.
    #[error("{operation} a pool frame: {source}")]
    Socket {
        /// `send` or `read`.
        operation: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}
