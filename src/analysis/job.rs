//! What the parent asks of a child, and what comes back: the payloads of the pool's frames.

use std::path::PathBuf;

use secrecy::zeroize::Zeroize;
use serde::{Deserialize, Serialize};

/// One repository to analyse. Travels to the child in a frame, never in argv or environment.
#[derive(Clone, Serialize, Deserialize)]
pub struct Job {
    /// The repository's URL as the client gave it.
    pub url: String,
    /// Token for that host. `Debug` does not exist for this type because of it.
    pub token: Option<String>,
    /// Branch instead of HEAD.
    pub branch: Option<String>,
    /// Commits of history; a shallow history falsifies blame and is marked as such.
    pub depth: Option<u32>,
    /// Empty directory for the clone; the parent removes it.
    pub directory: PathBuf,
    /// Threads of the blame.
    pub threads: usize,
    /// MiB of unpacked objects kept by the blame.
    pub cache: u64,
    /// What may be fetched.
    pub policy: Policy,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.token.zeroize();
    }
}

/// What the parent sends: a job, and what is known of its repository already.
#[derive(Serialize, Deserialize)]
pub struct Work {
    /// The repository to analyse.
    pub job: Job,
    /// The commit that an analysis is at hand for; see [`Answer::Unchanged`].
    pub known: Option<String>,
}

/// What a child sends back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// The repository was analysed.
    Found(Report),
    /// The server gives this token access and its HEAD is still the known commit: the analysis
    /// at hand stands.
    Unchanged,
}

/// What may be fetched, and how much of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Policy {
    /// Allows file:// and loopback addresses.
    pub allow_local: bool,
    /// Allows http://.
    pub allow_http: bool,
    /// Hosts; empty: any public one.
    pub hosts: Vec<String>,
    /// PEM file of the authorities to trust; absent: Mozilla's.
    pub authorities: Option<PathBuf>,
    /// Most bytes on the wire.
    pub max_bytes: u64,
    /// Most objects.
    pub max_objects: u64,
    /// Most bytes of one object.
    pub max_object_size: u64,
    /// Most bytes of all objects, inflated and with their deltas applied.
    pub max_inflated: u64,
    /// Most bytes of disk.
    pub disk_quota: u64,
    /// Bytes of disk that are to stay free; absent: what the fetch finds reasonable.
    pub disk_reserve: Option<u64>,
}

/// A stage of the work, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Talking to the server and receiving the history.
    Clone,
    /// Following lines through the history.
    Analyze,
}

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The stage.
    pub stage: Stage,
    /// Units done: objects or commits.
    pub current: u64,
    /// Units in all; 0 while unknown.
    pub total: u64,
    /// 0.0 to 1.0 within the stage.
    pub fraction: f64,
}

/// Who wrote the repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// HEAD, absent in an empty repository.
    pub head: Option<String>,
    /// E-mail and lines, most lines first; invalid UTF-8 replaced.
    pub contributors: Vec<(String, u64)>,
    /// Text files at HEAD.
    pub files: u64,
    /// Lines of them.
    pub lines: u64,
    /// Binary files at HEAD.
    pub binary_files: u64,
    /// Files that were left out, with the reason.
    pub skipped: Vec<(String, String)>,
    /// Whether the history was cut off, which makes the result approximate.
    pub shallow: bool,
    /// Commits looked at.
    pub commits: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Seconds of fetching and of blaming.
    pub seconds: (f64, f64),
}
