//! Result backends: where a client's `AsyncResult` looks.
//!
//! A [`Backend`] is chosen by its URL ([`connect`]): `redis`, `rediss`, `socket` and
//! `sentinel` by [`redis`], `rpc` by [`rpc`], `db+postgresql` and `db+sqlite` by [`database`],
//! `disabled` by [`disabled`]. All of them keep the rules Celery's backends keep:
//!
//! * a success is never replaced ([`Stored::AlreadySuccessful`]),
//! * a result is stored with retries, so that it outlives a restart of the backend; the worker
//!   acknowledges the message only afterwards,
//! * whoever waits is woken: on Redis by the publication that goes with every store.
//!
//! What a chord is made of is counted here ([`Backend::chord_part`]); what its completion
//! means — the body published, its failure spread — is the worker's.
//!
//! Answers for `celery/backends/`: `base`, `redis`, `rpc`, `database`. Knows no task and no
//! broker beyond [`Transport`](crate::transport::Transport).

use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;

mod codec;
mod connect;
pub mod database;
pub mod disabled;
mod error;
pub mod meta;
pub mod redis;
mod retry;
pub mod rpc;

pub use self::codec::Codec;
pub use self::connect::connect;
pub use self::error::Error;
pub use self::meta::{Extended, Meta};
pub use self::retry::RetryPolicy;

/// Where a result goes besides the store: `rpc://` answers by message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplyTo<'a> {
    /// Property `reply_to` of the task's message.
    pub reply_to: Option<&'a str>,
    /// Property `correlation_id` of the task's message; the task's id without it.
    pub correlation_id: Option<&'a str>,
}

/// What storing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The document is there, and who waits was told; also when an earlier try had stored it
    /// and only the answer was lost.
    Written,
    /// The task had succeeded before; nothing was changed.
    AlreadySuccessful,
}

/// A task of a chord's header that has returned.
#[derive(Debug, Clone, Copy)]
pub struct ChordPart<'a> {
    /// Header `group` of the part.
    pub group_id: &'a str,
    /// The part.
    pub task_id: &'a str,
    /// Header `group_index`; parts without one come last.
    pub group_index: Option<i64>,
    /// State it ended in.
    pub state: &'a str,
    /// Its return value or encoded exception.
    pub result: &'a Value,
}

/// A part as the backend kept it.
#[derive(Debug, Clone, PartialEq)]
pub struct PartResult {
    /// The part.
    pub task_id: String,
    /// `SUCCESS`, `FAILURE`, `REVOKED`.
    pub state: String,
    /// Return value or encoded exception.
    pub result: Value,
}

/// Says who may finish a chord; see [`Backend::chord_extend`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim(pub(crate) String);

/// What a part's return means for its chord.
#[derive(Debug, Clone, PartialEq)]
pub enum ChordStatus {
    /// Other parts are missing.
    Waiting,
    /// All parts are there, and another worker has claimed the completion. When it dies with
    /// the claim, that runs out, and the next return of a part may finish the chord.
    Claimed,
    /// All parts are there and this caller is the one to finish the chord.
    Ready {
        /// To be given to `chord_extend` and `chord_done`.
        claim: Claim,
        /// In the order of their index.
        parts: Vec<PartResult>,
    },
    /// All parts are there, and the header was saved as a group because it is nested: its
    /// result tuple says whose results make up the argument of the body.
    ReadyNested {
        /// To be given to `chord_extend` and `chord_done`.
        claim: Claim,
        /// The saved group: `[[group id, parent], [tuple, …]]`.
        group: Value,
        /// The parts counted, in the order of their index.
        parts: Vec<PartResult>,
    },
    /// The chord was finished before: a late duplicate.
    Done,
}

/// Whether this caller is the one to end a chord that nobody counts; see
/// [`Backend::chord_take`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It is, and nobody tried before.
    First(Claim),
    /// It is, for another has left its claim behind: what that one has done is not known.
    Left(Claim),
    /// Another is at it.
    Claimed,
    /// The chord has ended.
    Done,
}

/// What every backend needs to know; the settings' names are Celery's.
#[derive(Debug, Clone)]
pub struct Options {
    /// `result_expires`; zero keeps results for ever.
    pub expires: Duration,
    /// `result_failure_expires`: for failures instead.
    pub failure_expires: Option<Duration>,
    /// `result_serializer`: `json`, `msgpack` or `yaml`.
    pub serializer: String,
    /// `result_compression`: `gzip`, `bzip2`, `zstd` and so on.
    pub compression: Option<String>,
    /// `result_backend_transport_options`: `global_keyprefix`, `retry_policy`, `master_name`,
    /// `result_chord_ordered` and the like.
    pub transport_options: serde_json::Map<String, Value>,
    /// `result_persistent`: replies of `rpc://` survive a restart of the broker.
    pub persistent: bool,
    /// `result_chord_expires`, in whole seconds.
    pub chord_expires: Option<Duration>,
    /// `result_chord_join_timeout`.
    pub chord_join_timeout: Duration,
    /// `redis_socket_timeout`: how long a command may take before the connection is given up.
    pub socket_timeout: Duration,
    /// `redis_socket_connect_timeout`.
    pub connect_timeout: Duration,
    /// `result_backend_always_retry`: try for ever, unless `max_retries` says how often.
    pub always_retry: bool,
    /// `result_backend_max_retries`.
    pub max_retries: Option<u32>,
    /// `result_extended`: tables of the database backend get the columns for it.
    pub extended: bool,
    /// `database_create_tables_at_setup`.
    pub create_tables: bool,
    /// `database_table_names`.
    pub table_names: serde_json::Map<String, Value>,
    /// `database_table_schemas`.
    pub table_schemas: serde_json::Map<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            expires: Duration::from_secs(24 * 60 * 60),
            failure_expires: None,
            serializer: "json".to_owned(),
            compression: None,
            transport_options: serde_json::Map::new(),
            persistent: false,
            chord_expires: None,
            chord_join_timeout: Duration::from_secs(3),
            socket_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(5),
            always_retry: false,
            max_retries: None,
            extended: false,
            create_tables: true,
            table_names: serde_json::Map::new(),
            table_schemas: serde_json::Map::new(),
        }
    }
}

const NO_CHORDS: Error = Error::Unsupported(
    "this result backend does not count the parts of a chord; a redis:// one does",
);

/// A place for results. One whose [`Backend::supports_chords`] is false leaves out what counts
/// the parts of a chord.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Stores a state, retrying while the backend is away. Never replaces a success.
    async fn store(&self, meta: &Meta, to: &ReplyTo<'_>) -> Result<Stored, Error>;

    /// What is stored for a task.
    async fn get(&self, task_id: &str) -> Result<Option<Meta>, Error>;

    /// Removes what is stored for a task.
    async fn forget(&self, task_id: &str) -> Result<(), Error>;

    /// Says how many parts a chord has, before the last of them is published.
    async fn chord_start(&self, _group_id: &str, _size: u64) -> Result<(), Error> {
        Err(NO_CHORDS)
    }

    /// Counts a part that has returned; each part counts once, however often it returns.
    async fn chord_part(&self, _part: &ChordPart<'_>) -> Result<ChordStatus, Error> {
        Err(NO_CHORDS)
    }

    /// Renews a claim before the body is published. False when it was lost: somebody else
    /// finishes the chord.
    async fn chord_extend(&self, _group_id: &str, _claim: &Claim) -> Result<bool, Error> {
        Err(NO_CHORDS)
    }

    /// Claims the end of a chord whose parts are not counted, before its body is published.
    async fn chord_take(&self, _group_id: &str) -> Result<Taken, Error> {
        Ok(Taken::First(Claim(String::new())))
    }

    /// Renews a claim of [`Backend::chord_take`], before the body is published and while that
    /// takes its time. False when it was lost.
    async fn chord_keep(&self, _group_id: &str, _claim: &Claim) -> Result<bool, Error> {
        Ok(true)
    }

    /// Forgets a chord whose body is published.
    async fn chord_done(&self, _group_id: &str, _claim: &Claim) -> Result<(), Error> {
        Err(NO_CHORDS)
    }

    /// Gives a chord up whose body failed, so that no late part finishes it.
    async fn chord_fail(&self, _group_id: &str) -> Result<(), Error> {
        Err(NO_CHORDS)
    }

    /// Keeps a group's result tuple.
    async fn save_group(&self, group_id: &str, tuple: &Value) -> Result<(), Error>;

    /// A kept group's result tuple.
    async fn restore_group(&self, group_id: &str) -> Result<Option<Value>, Error>;

    /// Removes what has expired, where the backend does not do so by itself.
    async fn cleanup(&self) -> Result<u64, Error> {
        Ok(0)
    }

    /// Whether the parts of a chord are counted natively. Without it a chord is watched by the
    /// task `celery.chord_unlock`, or impossible ([`Backend::driver`] is `rpc`).
    fn supports_chords(&self) -> bool {
        false
    }

    /// The URL for logs and the banner, its password masked.
    fn display_url(&self) -> String;

    /// `redis`, `rpc`, `database` or `disabled`.
    fn driver(&self) -> &'static str;
}
