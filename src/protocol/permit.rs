//! Counting what runs for each user and at each repository, over all workers: by the broker
//! where it can count (Redis with scripts), else by the database.
//!
//! A permit is a lease: whoever holds one says so every [`RENEWAL`], and one that nobody speaks for
//! ends after [`LEASE`]. A worker that dies thus gives back what it held without anybody's help.
//! Knows nothing of tasks; who may run what is the worker's affair.

use std::time::Duration;

/// How long a permit lives that is not renewed.
pub const LEASE: Duration = Duration::from_secs(4);
/// How often it is renewed.
pub const RENEWAL: Duration = Duration::from_secs(1);

/// What permits are counted for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Scope {
    /// A user's tasks.
    User(String),
    /// The analyses of one repository, named by a digest.
    Repository(String),
}

/// What may be done within a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowance {
    /// Tasks that run at once; 0 is without limit.
    pub running: u64,
    /// Tasks that start within [`Allowance::window`]; 0 is without limit.
    pub starts: u64,
    /// See [`Allowance::starts`].
    pub window: Duration,
}

/// Asks for a permit.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// What it is counted for.
    pub scope: &'a Scope,
    /// Names the permit; asking twice for the same one is granted twice.
    pub holder: &'a str,
    /// The task's id: a task that starts again has used its start already.
    pub task: &'a str,
    /// How many there may be.
    pub allowance: Allowance,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It may run.
    Granted,
    /// So many run already.
    TooMany(u64),
    /// So many were started already; the next may start after this time.
    TooSoon(Duration),
    /// Whoever was asked cannot count.
    Unable,
}
