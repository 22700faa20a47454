//! PostgreSQL, or the embedded SQLite: what became of every analysis, users' tokens, and what runs
//! now where no broker counts it.
//!
//! One analysis is one row in `analyses`, found by its task's id, and one row for each
//! contributor. What a task does to them is idempotent, because a message may be delivered
//! twice: a second success replaces the first, and nothing replaces a success but a success.
//! The token store keeps what users entrusted to the backend, encrypted by a key that is not
//! in the database.
//!
//! Floors: this directory knows neither Celery nor git. diesel, tokio-postgres and
//! libsqlite3 are used here and in `backend/database.rs` only. Every error says whether trying
//! again can help ([`Error::is_transient`]); the caller decides how often.
//!
//! Files in the order to open them: `url`, `connection`, `migrate`, `schema`, `models`,
//! `analyses`, `cipher`, `tokens`, `permits`.

pub mod analyses;
pub mod cipher;
pub(crate) mod connection;
mod error;
mod migrate;
pub mod models;
mod permits;
#[rustfmt::skip]
pub(crate) mod schema;
pub mod sql_types;
mod tls;
pub mod tokens;
mod url;

pub use self::analyses::Begun;
pub use self::cipher::Keys;
pub use self::connection::Database;
pub use self::error::Error;
pub use self::models::{Analysis, Completed, Contributor, Ended, Run, State};
pub use self::url::DatabaseUrl;
pub(crate) use self::url::masked;
