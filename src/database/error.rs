//! What can go wrong with the database, and whether trying again can help.
//!
//! Texts name the operation and the database (its password masked) and never a value that was
//! being stored.

use diesel::result::{DatabaseErrorKind, Error as Diesel};

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL cannot be understood; the text names the variable, the part and an example.
    #[error("{0}")]
    Url(String),
    /// The database cannot be reached, the connection broke, or the server asked to try again.
    #[error("{operation}: the database {database} is not available: {reason}")]
    Unavailable {
        /// What was being done.
        operation: &'static str,
        /// The URL without its password.
        database: String,
        /// What the server, the library or the system said.
        reason: String,
    },
    /// The database refused: trying again will not help.
    #[error("{operation}: the database {database} refused: {reason}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// The URL without its password.
        database: String,
        /// What the server said.
        reason: String,
    },
    /// A key for tokens is not one.
    #[error(
        "TOKEN_ENCRYPTION_KEYS: key number {position} is not a Fernet key (32 bytes in URL-safe \
         base64); make one with: python -c \"from cryptography.fernet import Fernet; \
         print(Fernet.generate_key().decode())\""
    )]
    Key {
        /// Which key of the list, from 1.
        position: usize,
    },
    /// A token was to be encrypted or decrypted and there is no key.
    #[error("{operation}: TOKEN_ENCRYPTION_KEYS is not set, so encrypted tokens cannot be used")]
    NoKey {
        /// What was being done.
        operation: &'static str,
    },
    /// The token was encrypted too long ago.
    #[error(
        "{operation}: the encrypted token is older than the {seconds} s that TOKEN_TTL allows; \
         send the task with a freshly encrypted one"
    )]
    Expired {
        /// What was being done.
        operation: &'static str,
        /// The age that is allowed.
        seconds: u64,
    },
    /// A stored token cannot be used.
    #[error(
        "the token of user {user} for {host}: {source} (replace it with celeriac token set, or remove it with token rm)"
    )]
    Stored {
        /// Whose it is.
        user: String,
        /// What for.
        host: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// None of the keys opens the token.
    #[error(
        "{operation}: the encrypted token cannot be opened: no key of TOKEN_ENCRYPTION_KEYS fits, \
         or the token is damaged; give the worker the key that the token was encrypted with"
    )]
    Cipher {
        /// What was being done.
        operation: &'static str,
    },
}

/// What PostgreSQL and SQLite say when the same statement may succeed a little later. diesel
/// hands the text through but not the SQLSTATE.
const PASSING: &[&str] = &[
    "deadlock detected",
    "could not serialize access",
    "terminating connection",
    "the database system is",
    "connection closed",
    "too many clients already",
    "too many connections",
    "remaining connection slots",
    "canceling statement due to",
    "database is locked",
    "database table is locked",
    "no space left on device",
    "database or disk is full",
    "out of memory",
    "cannot execute",
];

impl Error {
    /// Whether the same call may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// Sorts an error of diesel into the two kinds.
    pub(crate) fn from_diesel(operation: &'static str, database: String, error: &Diesel) -> Self {
        let reason = describe(error);
        let lost = matches!(
            error,
            Diesel::BrokenTransactionManager
                | Diesel::DatabaseError(
                    DatabaseErrorKind::SerializationFailure
                        | DatabaseErrorKind::ClosedConnection
                        | DatabaseErrorKind::UnableToSendCommand
                        | DatabaseErrorKind::ReadOnlyTransaction,
                    _
                )
        );
        let lower = reason.to_lowercase();
        if lost || PASSING.iter().any(|text| lower.contains(text)) {
            Self::Unavailable {
                operation,
                database,
                reason,
            }
        } else {
            Self::Refused {
                operation,
                database,
                reason,
            }
        }
    }
}

/// Message and hint; the detail is left out because PostgreSQL repeats values in it.
fn describe(error: &Diesel) -> String {
    match error {
        Diesel::DatabaseError(_, information) => match information.hint() {
            Some(hint) => format!("{} ({hint})", information.message()),
            None => information.message().to_owned(),
        },
        other => other.to_string(),
    }
}
