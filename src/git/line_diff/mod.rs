//! Which lines of a child text come unchanged from its parent, exactly as `git blame` sees it.
//!
//! A diff runs through stages, one file each, and every stage decides ties in a way that shows in the result:
//!
//! | stage | what it does | file |
//! |---|---|---|
//! | tokens | line ends and 64-bit hashes of a text, kept with it and derived from a similar text | `lines` |
//! | trim | bytes common to both ends of the texts are set aside in whole blocks, then equal lines at the head and tail | `trim` |
//! | discard | lines the other text does not have (or has too often, among such) are changed without asking further | `discard` |
//! | script | divide and conquer over what is kept, with limits that give up optimality in large changes | `myers` |
//! | slide | groups of changed lines that could stand elsewhere go where a reader expects them | `slide` |
//!
//! `guess` tells, for a commit that shall not count, which line of the parent each changed line was.
//!
//! `differ` leads a pair of texts through them with scratch memory that is allocated once.
//!
//! The rules are those of git's default diff (Myers, indent heuristic) with no context lines, as blame calls it;
//! the tests compare with libgit2's diff over the same trimmed texts and with git itself. This module knows
//! nothing of blobs, paths or commits.

mod differ;
mod discard;
mod guess;
mod lines;
mod myers;
mod slide;
mod trim;

pub use differ::Differ;
pub use guess::guess;
pub use lines::{Lines, Whitespace, count_lines};

/// A text with its tokens; `lines` must have been made of `bytes`.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// The raw bytes, never converted.
    pub bytes: &'a [u8],
    /// The tokens of these bytes.
    pub lines: &'a Lines,
}

/// A changed stretch: `a_len` lines of the parent from `a` became `b_len` lines of the child from `b`.
///
/// Lines count from 0. Between two hunks the lines of parent and child are the same, one for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hunk {
    /// First line in the parent; where lines would stand if there are none.
    pub a: u32,
    /// Lines in the parent.
    pub a_len: u32,
    /// First line in the child; where lines would stand if there are none.
    pub b: u32,
    /// Lines in the child.
    pub b_len: u32,
}
