//! Every setting once: its name, type, default, meaning, and where its value came from.
//!
//! Celery's settings keep Celery's names and meaning; a few of them have the defaults of the
//! worker that celeriac replaces. Values come, later ones winning, from the defaults, the
//! `.env` file, the environment (`CELERY_<NAME IN CAPITALS>` and the short names that the old
//! worker knew) and the command line (`name=value`). Nothing outside this directory reads the
//! environment for a setting.

pub mod catalogue;
mod environment;
mod settings;
mod value;

pub use environment::{Loaded, load};
pub use settings::{SETTINGS, Setting, Settings};
pub use value::{Limit, Seconds, SettingValue};

/// Why the settings cannot be used. The text names the variable, shows the value unless it may
/// hold a secret, and gives a correct example.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that cannot be understood.
    #[error("{origin}: {reason}; example: {origin}={example}")]
    Invalid {
        /// The variable or option the value came from.
        origin: String,
        /// What is wrong with it.
        reason: String,
        /// A value that would do.
        example: &'static str,
    },
    /// A `name=value` on the command line whose name is no setting.
    #[error("unknown setting '{0}'; settings are named as in Celery, such as task_time_limit=600")]
    Unknown(String),
    /// The `.env` file cannot be read.
    #[error("cannot read .env: {0}")]
    DotEnv(String),
}
