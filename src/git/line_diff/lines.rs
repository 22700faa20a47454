//! The lines of a text as tokens: where each ends, and a 64-bit hash that stands for its content.
//!
//! A line is the bytes up to and including LF; a last line without LF is another line than the same one with it.
//! All later stages compare hashes only. The hash is keyed with a number drawn once per process, so nobody can
//! prepare two lines that are taken for the same one; that two lines of a history meet by chance has a
//! probability of about 10⁻⁸ for a million different lines.
//!
//! Hashing is most of the cost of a diff, and a parent differs from its child in few places: [`Lines::derive`]
//! takes over the tokens of a similar text wherever the bytes at the head and at the tail are the same.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use super::trim::{common_head, common_tail};

/// Which bytes count when lines are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Whitespace {
    /// All bytes count.
    #[default]
    Exact,
    /// Blanks (SP, TAB, CR, LF) do not count: `git blame -w`.
    IgnoreAll,
}

/// The tokens of one text, in two arrays of the same length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines {
    /// Offset just after each line, ascending; the last one is the length of the text.
    ends: Vec<u32>,
    /// What each line contains, as far as it counts.
    hashes: Vec<u64>,
}

impl Lines {
    /// The longest text that can be tokenised; the caller sets larger ones aside.
    pub const LONGEST: usize = u32::MAX as usize;

    /// Cuts a text of at most [`Lines::LONGEST`] bytes into lines.
    pub fn of(bytes: &[u8], whitespace: Whitespace) -> Lines {
        let mut lines = Lines::with_room(count_lines(bytes));
        lines.append(bytes, 0, bytes.len(), whitespace);
        lines
    }

    /// The same answer as [`Lines::of`], with the tokens of `near` taken over where the texts agree at head and tail.
    ///
    /// `near_lines` must have been made of `near` with the same `whitespace`.
    pub fn derive(bytes: &[u8], near: &[u8], near_lines: &Lines, whitespace: Whitespace) -> Lines {
        let head = common_head(bytes, near);
        let tail = common_tail(&bytes[head..], &near[head..]);

        let mut head_lines = near_lines.ends.partition_point(|&end| end as usize <= head);
        let unfinished = near.last().is_some_and(|&byte| byte != b'\n');
        if unfinished && head_lines == near_lines.ends.len() && bytes.len() > head {
            // The last line of `near` has no LF and goes on in `bytes`.
            head_lines -= 1;
        }

        // A line of the tail is the same line only if the byte before it, an LF, belongs to the tail too.
        let tail_start = near.len() - tail;
        let tail_line = (1 + near_lines
            .ends
            .partition_point(|&end| end as usize <= tail_start))
        .clamp(head_lines, near_lines.ends.len());

        let from = near_lines.start(head_lines);
        let to = bytes.len() - (near.len() - near_lines.start(tail_line));

        let others = head_lines + (near_lines.ends.len() - tail_line);
        let mut lines = Lines::with_room(others + count_lines(&bytes[from..to]));
        lines.ends.extend_from_slice(&near_lines.ends[..head_lines]);
        lines
            .hashes
            .extend_from_slice(&near_lines.hashes[..head_lines]);
        lines.append(bytes, from, to, whitespace);
        let shift = (bytes.len() as u32).wrapping_sub(near.len() as u32);
        lines.ends.extend(
            near_lines.ends[tail_line..]
                .iter()
                .map(|end| end.wrapping_add(shift)),
        );
        lines
            .hashes
            .extend_from_slice(&near_lines.hashes[tail_line..]);
        lines
    }

    /// How many lines the text has.
    pub fn count(&self) -> u32 {
        self.ends.len() as u32
    }

    /// The bytes of one line within the text.
    pub fn range(&self, line: u32) -> std::ops::Range<usize> {
        self.start(line as usize)..self.ends[line as usize] as usize
    }

    /// Offset just after each line, ascending.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// One hash per line; equal hashes are equal lines.
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// Memory held, for caches that are bounded in bytes.
    pub fn memory(&self) -> usize {
        self.ends.capacity() * size_of::<u32>() + self.hashes.capacity() * size_of::<u64>()
    }

    /// Counting first is cheaper than growing: most of these arrays live long, and many at once.
    fn with_room(lines: usize) -> Lines {
        Lines {
            ends: Vec::with_capacity(lines),
            hashes: Vec::with_capacity(lines),
        }
    }

    fn start(&self, line: usize) -> usize {
        if line == 0 {
            0
        } else {
            self.ends[line - 1] as usize
        }
    }

    /// Adds the lines of `bytes[from..to]`, where `from` is the start of a line.
    fn append(&mut self, bytes: &[u8], from: usize, to: usize, whitespace: Whitespace) {
        let key = key();
        let mut significant = Vec::new();
        let mut add = |start: usize, end: usize| {
            let line = &bytes[start..end];
            self.ends.push(end as u32);
            self.hashes.push(match whitespace {
                Whitespace::Exact => hash(line, key),
                Whitespace::IgnoreAll => {
                    significant.clear();
                    significant.extend(line.iter().copied().filter(|&byte| !is_blank(byte)));
                    hash(&significant, key)
                }
            });
        };

        let mut start = from;
        for found in memchr::memchr_iter(b'\n', &bytes[from..to]) {
            let end = from + found + 1;
            add(start, end);
            start = end;
        }
        if start < to {
            add(start, to);
        }
    }
}

fn count_lines(bytes: &[u8]) -> usize {
    let unfinished = bytes.last().is_some_and(|&byte| byte != b'\n');
    memchr::memchr_iter(b'\n', bytes).count() + usize::from(unfinished)
}

/// What git counts as white space, whatever the locale; vertical tab and form feed are no blanks.
pub(super) fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// The secret of this process.
fn key() -> u64 {
    static KEY: OnceLock<u64> = OnceLock::new();
    *KEY.get_or_init(|| RandomState::new().hash_one(0x6c69_6e65_u64))
}

/// Multiplies to 128 bits and folds the halves together, so that every bit of the input reaches every bit.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ (product >> 64) as u64
}

fn hash(line: &[u8], key: u64) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    const OTHER: u64 = 0xd1b5_4a32_d192_ed03;

    let word =
        |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("because eight bytes were cut"));
    let mut state = key ^ (line.len() as u64).wrapping_mul(ODD);
    let mut rest = line;
    while rest.len() > 16 {
        state = fold(word(&rest[..8]) ^ state, word(&rest[8..16]) ^ OTHER);
        state = state.wrapping_add(key).rotate_left(23);
        rest = &rest[16..];
    }
    // The last 1 to 16 bytes; where they overlap the length in the first state tells the cases apart.
    let (low, high) = match rest.len() {
        0 => (0, 0),
        1..=3 => (
            u64::from(rest[0])
                | u64::from(rest[rest.len() / 2]) << 8
                | u64::from(rest[rest.len() - 1]) << 16,
            0,
        ),
        4..=7 => {
            let half = |bytes: &[u8]| {
                u64::from(u32::from_le_bytes(
                    bytes.try_into().expect("because four bytes were cut"),
                ))
            };
            (half(&rest[..4]), half(&rest[rest.len() - 4..]))
        }
        length => (word(&rest[..8]), word(&rest[length - 8..])),
    };
    fold(
        fold(low ^ state, high ^ OTHER) ^ ODD,
        state ^ key.rotate_left(32) ^ OTHER,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator of numbers, enough for texts.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % limit
        }
    }

    #[test]
    fn line_includes_its_line_feed_and_the_last_one_may_lack_it() {
        let text = b"one\n\ntwo\nthree";
        let lines = Lines::of(text, Whitespace::Exact);
        let cut: Vec<&[u8]> = (0..lines.count())
            .map(|line| &text[lines.range(line)])
            .collect();
        assert_eq!(cut, [&b"one\n"[..], b"\n", b"two\n", b"three"]);
        assert_eq!(Lines::of(b"", Whitespace::Exact).count(), 0);
    }

    #[test]
    fn hashes_differ_exactly_where_lines_differ() {
        let mut text = Vec::new();
        for length in 0..40 {
            for fill in [b'x', b'y', 0] {
                text.extend(std::iter::repeat_n(fill, length));
                text.push(b'\n');
            }
        }
        text.extend(b"last\nlast");
        let lines = Lines::of(&text, Whitespace::Exact);
        for first in 0..lines.count() {
            for second in 0..lines.count() {
                assert_eq!(
                    text[lines.range(first)] == text[lines.range(second)],
                    lines.hashes[first as usize] == lines.hashes[second as usize],
                );
            }
        }
    }

    #[test]
    fn blanks_do_not_count_when_whitespace_is_ignored() {
        let lines = Lines::of(b"a b\n\tab \r\nab\na\x0bb\nab", Whitespace::IgnoreAll);
        assert_eq!(lines.hashes[0], lines.hashes[1]);
        assert_eq!(lines.hashes[0], lines.hashes[2]);
        assert_ne!(lines.hashes[0], lines.hashes[3]);
        assert_eq!(lines.hashes[0], lines.hashes[4]);
    }

    #[test]
    fn derived_lines_equal_lines_cut_afresh() {
        let mut numbers = Numbers(7);
        for _ in 0..20_000 {
            let mut text = |most: usize| -> Vec<u8> {
                (0..numbers.below(most))
                    .map(|_| b"ab\n\n "[numbers.below(5)])
                    .collect()
            };
            let (near, mut bytes) = (text(24), text(24));
            if numbers.below(2) == 0 {
                // An edit of `near` instead of another text.
                let at = numbers.below(near.len() + 1);
                let end = at + numbers.below(near.len() - at + 1);
                let inserted = bytes.split_off(bytes.len() / 2);
                bytes = [&near[..at], &inserted, &near[end..]].concat();
            }
            for whitespace in [Whitespace::Exact, Whitespace::IgnoreAll] {
                let near_lines = Lines::of(&near, whitespace);
                assert_eq!(
                    Lines::derive(&bytes, &near, &near_lines, whitespace),
                    Lines::of(&bytes, whitespace),
                    "{near:?} -> {bytes:?}",
                );
            }
        }
    }
}
