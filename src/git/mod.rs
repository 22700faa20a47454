//! Reading and fetching git repositories.
//!
//! The words used here are git's own:
//!
//! * An **object** is named by its [`Oid`]; it is a commit, a tree, a blob or a tag.
//! * A **tree** is one directory: entries of mode, name and oid. A **blob** is one file's bytes.
//! * A **pack** holds many objects in one file, an **index** beside it says where each begins.
//! * A **delta** tells an object as copies from another one, its **base**.
//! * **Mailmap**: the file `.mailmap` at HEAD, which gives authors one address for several.
//!
//! What is read comes from strangers: no bytes of a repository may cause a panic, a hang or
//! unbounded memory, and errors name the object. A repository's own configuration is not
//! obeyed: no hooks, filters, text conversions, replaced objects or grafts.
//!
//! This directory knows no Celery, no SQL and nothing of who wrote what. It is the only door
//! to libgit2 and gitoxide.

use std::fmt;
use std::path::PathBuf;

pub mod fetch;
pub mod history;
pub mod http;
pub mod ignored;
pub mod interrupt;
pub mod line_diff;
pub mod mailmap;
pub mod objects;
pub mod policy;
pub mod rename;
mod repository;
pub mod tree;
pub mod tree_diff;
pub mod url;

pub use interrupt::Interrupt;
pub use repository::Repository;

/// The name of an object: its SHA-1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Oid([u8; 20]);

impl Oid {
    /// The number of bytes of a name.
    pub const LEN: usize = 20;

    /// The object with these bytes as its name.
    pub const fn new(bytes: [u8; 20]) -> Oid {
        Oid(bytes)
    }

    /// Reads 40 hexadecimal digits.
    pub fn from_hex(digits: &[u8]) -> Option<Oid> {
        let mut bytes = [0; 20];
        if digits.len() != 40 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = (pair[0] as char).to_digit(16)?;
            let low = (pair[1] as char).to_digit(16)?;
            *byte = (high << 4 | low) as u8;
        }
        Some(Oid(bytes))
    }

    /// Reads the 20 bytes of a name, as trees hold it.
    pub fn from_bytes(bytes: &[u8]) -> Option<Oid> {
        Some(Oid(bytes.try_into().ok()?))
    }

    /// The SHA-1 of plain bytes; `None` for bytes made to collide.
    pub fn digest(bytes: &[u8]) -> Option<Oid> {
        let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
        hasher.update(bytes);
        Oid::from_bytes(hasher.try_finalize().ok()?.as_slice())
    }

    /// The 20 bytes.
    pub const fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a repository could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked to stop.
    #[error("go on: interrupted")]
    Interrupted,
    /// There is no readable repository.
    #[error("open the repository {}: {reason}", .path.display())]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// What git says.
        reason: String,
    },
    /// The repository names its objects by something else than SHA-1.
    #[error(
        "open the repository {}: its object format is {format}, only sha1 is supported; \
         convert it or analyse a SHA-1 copy",
        .path.display()
    )]
    Format {
        /// The repository.
        path: PathBuf,
        /// The format it declares.
        format: String,
    },
    /// A file of the repository could not be read.
    #[error("read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No branch, tag or commit has this name.
    #[error("find the revision {revision:?}: {reason}")]
    Revision {
        /// What was asked for.
        revision: String,
        /// What git says.
        reason: String,
    },
    /// A list of commits has a line that is none.
    #[error(
        "read the list of commits {list}: line {number} is {line:?}, not the 40 hexadecimal \
         digits of a commit's name"
    )]
    List {
        /// The list.
        list: String,
        /// The line's number, from 1.
        number: usize,
        /// What it says.
        line: String,
    },
    /// An object that is referred to is not there.
    #[error("read object {oid}: it is missing from the repository; fetch it again in full")]
    Missing {
        /// The object.
        oid: Oid,
    },
    /// An object or its pack entry cannot be decoded.
    #[error("read object {oid}: {reason}")]
    Corrupt {
        /// The object.
        oid: Oid,
        /// What is wrong with it.
        reason: String,
    },
    /// An object is larger than the limit.
    #[error("read object {oid}: {size} bytes are more than the limit of {limit}")]
    TooLarge {
        /// The object.
        oid: Oid,
        /// Its size.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Directories are nested deeper than the limit.
    #[error("read tree {oid}: directories are nested deeper than {limit}")]
    TooDeep {
        /// The tree at which it was noticed.
        oid: Oid,
        /// What is allowed.
        limit: usize,
    },
    /// There is more of something than the limit.
    #[error("read tree {oid}: more than {limit} {what}")]
    TooMany {
        /// The tree at which it was noticed.
        oid: Oid,
        /// What there is too much of.
        what: &'static str,
        /// What is allowed.
        limit: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oid_is_read_from_40_digits_and_shown_as_them() {
        let text = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(Oid::from_hex(text.as_bytes()).unwrap().to_string(), text);
        assert_eq!(Oid::from_hex(&text.as_bytes()[1..]), None);
        assert_eq!(
            Oid::from_hex(b"g123456789abcdef0123456789abcdef01234567"),
            None
        );
    }
}
