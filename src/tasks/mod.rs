//! What this worker offers, and under which names.
//!
//! A task is a [`Definition`]: its name on the wire, its Python-like parameters and its
//! defaults. How its arguments become work is told in its own file. [`registry`] holds what
//! can change at run time (rate and time limits).

pub mod analyze_repo;
pub mod builtin;
pub mod registry;
pub mod test;

pub use analyze_repo::AnalyzeRepo;
pub use builtin::{Accumulate, BackendCleanup, ChordUnlock};
pub use registry::{Entry, Kind, Options, Registry};
pub use test::Test;

/// A task type, for the seam to register.
pub trait Definition: Send + Sync + 'static {
    /// The name clients call it by.
    const NAME: &'static str;
}
