//! Everything that can keep a repository from being fetched, each told apart from the others.
//!
//! The texts go to the user who sent the URL: what happened, to which repository, what to do. Text a
//! server chose appears only in [`Error::Remote`], cleaned and with the token blotted out.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::space::Lack;
use crate::git::http;
use crate::git::http::watch::Cause;
use crate::git::url;

/// A limit of [`super::Limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `max_bytes`
    Bytes,
    /// `max_objects`
    Objects,
    /// `max_object_size`
    ObjectSize,
    /// `max_inflated`
    Inflated,
    /// `max_delta_depth`
    DeltaDepth,
    /// `max_disk`
    Disk,
}

impl Limit {
    /// What a user can do about it: the setting that raises it, if there is one.
    fn advice(self) -> &'static str {
        match self {
            Limit::Bytes => "raise CLONE_MAX_BYTES to analyse it",
            Limit::Objects => "raise CLONE_MAX_OBJECTS to analyse it",
            Limit::ObjectSize => "raise CLONE_MAX_OBJECT_SIZE to analyse it",
            Limit::Inflated => "raise CLONE_MAX_INFLATED to analyse it",
            Limit::DeltaDepth => "git itself never makes as many",
            Limit::Disk => "raise CLONE_DISK_QUOTA to analyse it",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Limit::Bytes => "bytes received",
            Limit::Objects => "objects",
            Limit::ObjectSize => "bytes in one object",
            Limit::Inflated => "bytes in all objects together",
            Limit::DeltaDepth => "steps in a delta chain",
            Limit::Disk => "bytes of disk for one clone",
        })
    }
}

/// Why a repository was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL or an address behind it is not one to fetch from.
    #[error("{url} is not fetched: {reason}")]
    Refused {
        /// The repository.
        url: String,
        /// The rule.
        reason: String,
    },
    /// The branch asked for is no name of a branch.
    #[error("'{0}' is not a valid branch name")]
    BranchName(String),
    /// No such host.
    #[error("{url}: {detail}")]
    HostNotFound {
        /// The repository.
        url: String,
        /// Which host, and what to do.
        detail: String,
    },
    /// No connection.
    #[error("{url}: {detail}")]
    Connect {
        /// The repository.
        url: String,
        /// Which host, and what to do.
        detail: String,
    },
    /// TLS failed.
    #[error("{url}: {detail}")]
    Tls {
        /// The repository.
        url: String,
        /// What failed, and what to do.
        detail: String,
    },
    /// Time ran out.
    #[error(
        "{url}: no answer within {seconds} s while {doing}; the server or the network is overloaded, try again later"
    )]
    Timeout {
        /// The repository.
        url: String,
        /// The step.
        doing: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The whole fetch took too long.
    #[error(
        "{url}: not fetched within {seconds} s; raise the time limit, or ask for a shallow clone"
    )]
    TotalTime {
        /// The repository.
        url: String,
        /// The limit.
        seconds: u64,
    },
    /// The server trickles.
    #[error(
        "{url}: only {bytes_per_second} bytes/s over {seconds} s while {doing} (at least {minimum} are demanded); try again later"
    )]
    TooSlow {
        /// The repository.
        url: String,
        /// The step.
        doing: &'static str,
        /// What arrived.
        bytes_per_second: u64,
        /// What is demanded.
        minimum: u64,
        /// The window.
        seconds: u64,
    },
    /// 404, or 401 without a token, where servers hide private repositories.
    #[error(
        "repository not found or private: {url} (HTTP {status}); check the URL, or pass a token that may read it"
    )]
    NotFound {
        /// The repository.
        url: String,
        /// The status.
        status: u16,
    },
    /// 401 with a token.
    #[error(
        "the token was refused for {url} (HTTP 401); check that it is valid, not expired and may read this repository"
    )]
    TokenRefused {
        /// The repository.
        url: String,
    },
    /// 403.
    #[error(
        "access to {url} is forbidden (HTTP 403); the token or its owner may not read this repository, or the server blocks us"
    )]
    Forbidden {
        /// The repository.
        url: String,
    },
    /// 429.
    #[error("{url}: the server asks to come back later (HTTP 429); too many requests were made")]
    RateLimited {
        /// The repository.
        url: String,
        /// In how many seconds, where the server says so.
        retry_after: Option<u64>,
    },
    /// 5xx.
    #[error("{url}: the server has a fault (HTTP {status}); try again later")]
    Server {
        /// The repository.
        url: String,
        /// The status.
        status: u16,
        /// In how many seconds, where the server says so.
        retry_after: Option<u64>,
    },
    /// Any other status.
    #[error("{url}: unexpected answer (HTTP {status}); check the URL")]
    Status {
        /// The repository.
        url: String,
        /// The status.
        status: u16,
    },
    /// A redirect that is not followed.
    #[error("{url}: {detail}; use the address the repository has now")]
    Redirect {
        /// The repository.
        url: String,
        /// Which rule it broke.
        detail: String,
    },
    /// An answer that is no git server's.
    #[error("{url} is not a git repository: {detail}; check the URL")]
    NotGit {
        /// The repository.
        url: String,
        /// What came instead.
        detail: String,
    },
    /// The connection ended in the middle.
    #[error("{url}: the connection was cut while {doing} ({detail}); try again")]
    CutOff {
        /// The repository.
        url: String,
        /// The step.
        doing: &'static str,
        /// How it ended.
        detail: String,
    },
    /// A git server that does not keep to the protocol.
    #[error("{url}: the server broke the protocol while {doing}: {detail}")]
    Protocol {
        /// The repository.
        url: String,
        /// The step.
        doing: &'static str,
        /// Which rule.
        detail: String,
    },
    /// The server's own error message.
    #[error("{url}: the server says: {message}")]
    Remote {
        /// The repository.
        url: String,
        /// Its words, cleaned.
        message: String,
    },
    /// The branch asked for does not exist.
    #[error("{url} has no branch or tag '{branch}'; check the branch setting")]
    NoBranch {
        /// The repository.
        url: String,
        /// The branch.
        branch: String,
    },
    /// A SHA-256 repository.
    #[error("{url} is a repository of object format {format}; only sha1 is supported")]
    ObjectFormat {
        /// The repository.
        url: String,
        /// The format.
        format: String,
    },
    /// Larger than allowed.
    #[error("{url} is too large: more than {allowed} {limit}; {}", limit.advice())]
    TooLarge {
        /// The repository.
        url: String,
        /// Which limit.
        limit: Limit,
        /// Its value.
        allowed: u64,
    },
    /// A pack that cannot be read.
    #[error("{url}: the pack sent by the server is damaged or hostile ({doing}: {detail})")]
    Pack {
        /// The repository.
        url: String,
        /// The step.
        doing: &'static str,
        /// The fault.
        detail: String,
    },
    /// Our own disk.
    #[error("{doing} {}: {source}; check free space and permissions", path.display())]
    Disk {
        /// The step.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The disk is too full.
    #[error(
        "{url} is not fetched: {free} bytes are free on the disk of {} and {reserve} are to stay free \
         (CLONE_DISK_RESERVE); {}",
        path.display(),
        if *others { "other jobs may give room back, else make some" } else { "make room, or lower that setting" }
    )]
    DiskLow {
        /// The repository.
        url: String,
        /// What lies on that disk.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are to stay free.
        reserve: u64,
        /// Whether others took the room, so that waiting may help.
        others: bool,
    },
    /// A directory of this machine that is no repository.
    #[error("{} is not a git repository ({detail}); check the path", path.display())]
    Local {
        /// The directory.
        path: PathBuf,
        /// Why not.
        detail: String,
    },
    /// The system refused a thread.
    #[error(
        "no thread could be started: {0}; the machine has too little memory or too many processes"
    )]
    Thread(String),
    /// The caller's flag was set.
    #[error("the fetch was interrupted")]
    Interrupted,
}

impl Error {
    /// Whether the same fetch may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::HostNotFound { .. }
            | Error::Connect { .. }
            | Error::Timeout { .. }
            | Error::TooSlow { .. }
            | Error::RateLimited { .. }
            | Error::CutOff { .. }
            | Error::Thread(_) => true,
            Error::DiskLow { others, .. } => *others,
            Error::Server { status, .. } => *status != 501 && *status != 505,
            _ => false,
        }
    }

    /// How many seconds the server asks to wait.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Error::RateLimited { retry_after, .. } | Error::Server { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    /// The limit that was exceeded.
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Error::TooLarge { limit, .. } => Some(*limit),
            _ => None,
        }
    }
}

/// The step a fetch is at; errors name it.
pub(super) type Doing = &'static str;

/// Turns what the client says into what the user reads.
pub(super) fn from_http(url: &str, doing: Doing, error: http::Error) -> Error {
    let url = url.to_owned();
    match error {
        http::Error::Stopped(cause) => from_cause(&url, doing, &cause),
        http::Error::NotPublic { .. }
        | http::Error::PlainHttp(_)
        | http::Error::RedirectRefused(_) => Error::Refused {
            url,
            reason: error.to_string(),
        },
        http::Error::HostNotFound { .. } => Error::HostNotFound {
            url,
            detail: error.to_string(),
        },
        http::Error::Connect { .. } => Error::Connect {
            url,
            detail: error.to_string(),
        },
        http::Error::Timeout(doing, time) => Error::Timeout {
            url,
            doing,
            seconds: seconds(time),
        },
        http::Error::Tls(_) => Error::Tls {
            url,
            detail: error.to_string(),
        },
        http::Error::CutOff(detail) => Error::CutOff { url, doing, detail },
        http::Error::Protocol(_) => Error::NotGit {
            url,
            detail: error.to_string(),
        },
        http::Error::Redirect(_) => Error::Redirect {
            url,
            detail: error.to_string(),
        },
        http::Error::Thread(detail) => Error::Thread(detail),
    }
}

/// Turns a lack of room into what the user reads.
pub(super) fn from_lack(url: &str, path: &Path, lack: Lack) -> Error {
    let url = url.to_owned();
    match lack {
        Lack::Quota(allowed) => Error::TooLarge {
            url,
            limit: Limit::Disk,
            allowed,
        },
        Lack::Reserve {
            free,
            reserve,
            others,
        } => Error::DiskLow {
            url,
            path: path.to_owned(),
            free,
            reserve,
            others,
        },
    }
}

/// Turns the reason why we stopped into what the user reads.
pub(super) fn from_cause(url: &str, doing: Doing, cause: &Cause) -> Error {
    let url = url.to_owned();
    match cause {
        Cause::Interrupted => Error::Interrupted,
        Cause::TotalTime(limit) => Error::TotalTime {
            url,
            seconds: seconds(*limit),
        },
        Cause::Silent(time) => Error::Timeout {
            url,
            doing,
            seconds: seconds(*time),
        },
        Cause::Slow {
            bytes_per_second,
            minimum,
            window,
        } => Error::TooSlow {
            url,
            doing,
            bytes_per_second: *bytes_per_second,
            minimum: *minimum,
            seconds: seconds(*window),
        },
        Cause::Bytes(allowed) => Error::TooLarge {
            url,
            limit: Limit::Bytes,
            allowed: *allowed,
        },
    }
}

/// What a status other than success means.
pub(super) fn from_status(
    url: &str,
    status: u16,
    retry_after: Option<u64>,
    with_token: bool,
) -> Error {
    let url = url.to_owned();
    match status {
        401 if with_token => Error::TokenRefused { url },
        401 | 404 | 410 => Error::NotFound { url, status },
        // GitHub limits rates with 403 too, and then says when to come back.
        403 if retry_after.is_some() => Error::RateLimited { url, retry_after },
        403 => Error::Forbidden { url },
        429 => Error::RateLimited { url, retry_after },
        500..=599 => Error::Server {
            url,
            status,
            retry_after,
        },
        _ => Error::Status { url, status },
    }
}

/// Whole seconds, rounded up.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

impl From<url::Error> for Error {
    fn from(error: url::Error) -> Error {
        Error::Refused {
            url: "the repository URL".to_owned(),
            reason: error.to_string(),
        }
    }
}
