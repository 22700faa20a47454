//! What can go wrong with a result backend.

use crate::database;
use crate::transport;

/// Why a result could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// URL or option cannot be understood; the text names it and shows a correct one.
    #[error("{0}")]
    Url(String),
    /// The backend cannot be reached, and all tries are used up.
    #[error("{operation}: the result backend is not available: {reason}")]
    Unavailable {
        /// What was being done.
        operation: &'static str,
        /// What the server, the library or the system said; without secrets.
        reason: String,
    },
    /// The backend refused; trying again will not help.
    #[error("{operation}: the result backend refused: {reason}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// What the server said; without secrets.
        reason: String,
    },
    /// The value cannot be serialized or compressed as the settings say.
    #[error("encode the result: {0}")]
    Encode(String),
    /// What is stored cannot be read.
    #[error("decode the result of {what}: {reason}")]
    Decode {
        /// Whose record.
        what: String,
        /// Why not.
        reason: String,
    },
    /// More than Redis takes as one value.
    #[error(
        "store the result: it has {size} bytes, and the backend takes at most {limit}; return \
         less, or a reference to it"
    )]
    TooLarge {
        /// Bytes after serialization and compression.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// This backend cannot do it, and which can.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(crate) fn from_database(operation: &'static str, error: &database::Error) -> Self {
        let reason = error.to_string();
        match error.is_transient() {
            true => Self::Unavailable { operation, reason },
            false => Self::Refused { operation, reason },
        }
    }

    pub(crate) fn from_transport(operation: &'static str, error: &transport::Error) -> Self {
        let reason = error.to_string();
        match error.is_connection() {
            true => Self::Unavailable { operation, reason },
            false => Self::Refused { operation, reason },
        }
    }
}
