//! Reading objects fast: memory-mapped packs, an own delta loop and caches by pack offset.
//!
//! Walking from new commits to old ones, the base of a delta is nearly always an object that
//! was just read, because packs store old versions as deltas of newer ones. So everything that
//! is made on the way, finished or intermediate, goes into a cache keyed by its place in the
//! pack, and most reads cost one small inflate and one application of a delta.
//!
//! [`Packs`] is shared by all threads, a [`Reader`] belongs to one. What is in no pack that
//! can be mapped (loose objects, alternates, old index formats) is asked of libgit2, slower
//! but complete. This module does not verify object names: whoever fetched the pack did.

mod cache;
mod delta;
mod pack;
mod reader;

pub(crate) use cache::Quick;
pub use pack::Packs;
pub use reader::{Counters, Limits, Object, Reader};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A point of history.
    Commit,
    /// A directory.
    Tree,
    /// The bytes of a file.
    Blob,
    /// A named, signed or annotated reference to another object.
    Tag,
}

impl Kind {
    /// git's word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Kind::Commit => "commit",
            Kind::Tree => "tree",
            Kind::Blob => "blob",
            Kind::Tag => "tag",
        }
    }
}
