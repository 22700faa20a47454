//! The shared vocabulary of Celery's wire: no input or output, no clock, no broker.
//!
//! The way of a task message through this directory: an [`envelope::Envelope`] from a
//! transport is decoded by [`message`] with the help of [`compression`] and [`serialization`]
//! (whose JSON reader is [`json`]) into a [`message::Message`] with its [`signature`]s;
//! [`arguments`] binds its arguments as Python would; [`exception`], [`state`] and [`saferepr`]
//! say how it ended; [`publish`] builds what is sent next;
//! [`permit`] is how workers count what runs. [`mask`] keeps secrets out of all
//! texts on the way.
//!
//! Answers for: `celery.app.amqp`, `celery.worker.strategy`, `celery.worker.request` (decoding
//! only), `celery.utils.saferepr`, `kombu.serialization`, `kombu.compression`, `kombu.clocks`.

pub mod arguments;
pub mod clock;
pub mod compression;
pub mod envelope;
pub mod exception;
pub mod json;
pub mod mask;
pub mod message;
mod msgpack;
pub mod nodename;
pub mod permit;
pub mod publish;
pub mod saferepr;
pub mod serialization;
pub mod signature;
pub mod state;
pub mod time;
mod yaml;
pub mod zone;

/// Bounds on what a message may make this process allocate, whoever sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a body, after decompression. YAML, which is slow to read, may have a twentieth.
    pub body: usize,
    /// Levels of arrays and objects in one another. Values are walked by recursion: this many
    /// fit into half of the stack tokio gives a thread, even without optimisation.
    pub depth: usize,
    /// Values of any kind in one body: a list of empty lists takes 36 times the memory of
    /// its text.
    pub values: usize,
}

impl Default for Limits {
    /// Room for arguments of 50 MB, which JSON's escapes make three times as long where they are
    /// not English, and for canvases nested a hundred deep.
    fn default() -> Self {
        Self {
            body: 160 << 20,
            depth: 256,
            values: 2_000_000,
        }
    }
}

/// Why bytes could not become values, or values bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The content type is not in the accept list.
    #[error(
        "Refusing to deserialize untrusted content of type {}",
        serialization::parenthesize(.0)
    )]
    Refused(String),
    /// The bytes are not what their content type says, or exceed a limit.
    #[error("{0}")]
    Decode(String),
    /// The value has no form in the serializer.
    #[error("{0}")]
    Encode(String),
    /// A compressed body that cannot be inflated.
    #[error("{method}: {reason}")]
    Decompress {
        /// The canonical name of the method.
        method: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A compression method nobody knows, or one this side cannot write.
    #[error("compression {name:?} is not supported for {purpose}; use one of {choices}")]
    Compression {
        /// The name as given.
        name: String,
        /// `reading` or `writing`.
        purpose: &'static str,
        /// What can be used instead.
        choices: &'static str,
    },
    /// A serializer nobody knows, or one that is refused on purpose.
    #[error("serializer {name:?} {reason}; use json, msgpack or yaml")]
    Serializer {
        /// The name as given.
        name: String,
        /// Why it cannot be used.
        reason: &'static str,
    },
    /// A node name or template with an unknown `%` key.
    #[error("unknown format %{key} in {template:?}; use %h %n %d %i %I %p or %%")]
    Format {
        /// The character after `%`.
        key: String,
        /// The whole text.
        template: String,
    },
}
