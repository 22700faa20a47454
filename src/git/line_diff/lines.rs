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
use crate::git::interrupt::STRIDE;
use crate::git::{Error, Interrupt};

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
        Lines::of_until(bytes, whitespace, &Interrupt::never())
            .expect("because nobody interrupts what never ends early")
    }

    /// The same, but ends soon with [`Error::Interrupted`] when that is wished.
    pub fn of_until(
        bytes: &[u8],
        whitespace: Whitespace,
        interrupt: &Interrupt<'_>,
    ) -> Result<Lines, Error> {
        let mut lines = Lines::with_room(count_lines(bytes, interrupt)?);
        lines.append(bytes, 0, bytes.len(), whitespace, interrupt)?;
        Ok(lines)
    }

    /// The same answer as [`Lines::of_until`], with the tokens of `near` taken over where the texts agree at head and tail.
    ///
    /// `near_lines` must have been made of `near` with the same `whitespace`.
    pub fn derive(
        bytes: &[u8],
        near: &[u8],
        near_lines: &Lines,
        whitespace: Whitespace,
        interrupt: &Interrupt<'_>,
    ) -> Result<Lines, Error> {
        let head = common_head(bytes, near, interrupt)?;
        let tail = common_tail(&bytes[head..], &near[head..], interrupt)?;

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
        let mut lines = Lines::with_room(others + count_lines(&bytes[from..to], interrupt)?);
        for piece in pieces(0..head_lines) {
            interrupt.work(piece.len() * LINE)?;
            lines
                .ends
                .extend_from_slice(&near_lines.ends[piece.clone()]);
            lines.hashes.extend_from_slice(&near_lines.hashes[piece]);
        }
        lines.append(bytes, from, to, whitespace, interrupt)?;
        let shift = (bytes.len() as u32).wrapping_sub(near.len() as u32);
        for piece in pieces(tail_line..near_lines.ends.len()) {
            interrupt.work(piece.len() * LINE)?;
            let ends = near_lines.ends[piece.clone()].iter();
            lines.ends.extend(ends.map(|end| end.wrapping_add(shift)));
            lines.hashes.extend_from_slice(&near_lines.hashes[piece]);
        }
        Ok(lines)
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
    fn append(
        &mut self,
        bytes: &[u8],
        from: usize,
        to: usize,
        whitespace: Whitespace,
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        let key = key();
        let mut significant = Vec::new();
        let mut add = |start: usize, end: usize| {
            let line = &bytes[start..end];
            self.ends.push(end as u32);
            self.hashes.push(match whitespace {
                Whitespace::Exact => hash(line, key, interrupt)?,
                Whitespace::IgnoreAll => {
                    significant.clear();
                    for piece in line.chunks(STRIDE) {
                        interrupt.work(piece.len())?;
                        let counting = piece.iter().copied().filter(|&byte| !is_blank(byte));
                        significant.extend(counting);
                    }
                    hash(&significant, key, interrupt)?
                }
            });
            Ok::<(), Error>(())
        };

        let mut start = from;
        for found in memchr::memchr_iter(b'\n', &bytes[from..to]) {
            let end = from + found + 1;
            add(start, end)?;
            start = end;
        }
        if start < to {
            add(start, to)?;
        }
        Ok(())
    }
}

/// What a line costs beside its bytes.
const LINE: usize = 8;

/// Cuts a range of lines into pieces that are work for less than a stride.
fn pieces(lines: std::ops::Range<usize>) -> impl Iterator<Item = std::ops::Range<usize>> {
    const PIECE: usize = STRIDE / LINE / 2;
    let end = lines.end;
    lines
        .step_by(PIECE)
        .map(move |start| start..end.min(start + PIECE))
}

/// How many lines a text has.
pub fn count_lines(bytes: &[u8], interrupt: &Interrupt<'_>) -> Result<usize, Error> {
    let unfinished = bytes.last().is_some_and(|&byte| byte != b'\n');
    let mut count = usize::from(unfinished);
    for piece in bytes.chunks(STRIDE) {
        interrupt.work(piece.len())?;
        count += memchr::memchr_iter(b'\n', piece).count();
    }
    Ok(count)
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

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
const OTHER: u64 = 0xd1b5_4a32_d192_ed03;

fn hash(line: &[u8], key: u64, interrupt: &Interrupt<'_>) -> Result<u64, Error> {
    let mut state = key ^ (line.len() as u64).wrapping_mul(ODD);
    let mut rest = line;
    while rest.len() > LONG_LINE {
        let (piece, after) = rest.split_at(LONG_LINE);
        interrupt.work(piece.len())?;
        state = mix(state, piece, key);
        rest = after;
    }
    interrupt.work(rest.len() + LINE)?;
    let (whole, last) = rest.split_at(rest.len().saturating_sub(1) / BLOCK * BLOCK);
    Ok(finish(mix(state, whole, key), last, key))
}

/// So many bytes are mixed into the state of a hash at once.
const BLOCK: usize = 16;
/// Lines are hashed in pieces of this many bytes, a multiple of blocks, so that the cuts do not show.
const LONG_LINE: usize = STRIDE / 2;

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("because eight bytes were cut"))
}

/// Mixes whole blocks into the state of a hash.
fn mix(mut state: u64, blocks: &[u8], key: u64) -> u64 {
    for block in blocks.chunks_exact(BLOCK) {
        state = fold(word(&block[..8]) ^ state, word(&block[8..]) ^ OTHER);
        state = state.wrapping_add(key).rotate_left(23);
    }
    state
}

fn finish(state: u64, rest: &[u8], key: u64) -> u64 {
    // The last 1 to 16 bytes, if the line has any; where they overlap the length in the first state tells the cases apart.
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
    fn cutting_a_large_text_into_lines_can_be_interrupted() {
        let many = b"line\n".repeat(1 << 20);
        let one = vec![b'x'; 5 << 20];
        for text in [&many, &one] {
            for whitespace in [Whitespace::Exact, Whitespace::IgnoreAll] {
                Interrupt::check(text.len(), |interrupt| {
                    Lines::of_until(text, whitespace, interrupt).map(|_| ())
                });
            }
            let near = [&b"first\n"[..], text, b"last\n"].concat();
            let near_lines = Lines::of(&near, Whitespace::Exact);
            let text = [&text[..], b"end\n"].concat();
            Interrupt::check(text.len(), |interrupt| {
                Lines::derive(&text, &near, &near_lines, Whitespace::Exact, interrupt).map(|_| ())
            });
        }
    }

    #[test]
    fn the_hash_of_a_long_line_does_not_show_where_it_was_cut() {
        let never = Interrupt::never();
        for length in [LONG_LINE - 1, LONG_LINE, LONG_LINE + 1, LONG_LINE * 2 + 33] {
            let line: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let (whole, last) = line.split_at((length - 1) / BLOCK * BLOCK);
            let start = 7 ^ (length as u64).wrapping_mul(ODD);
            let expected = finish(mix(start, whole, 7), last, 7);
            assert_eq!(hash(&line, 7, &never).unwrap(), expected, "{length}");
        }
    }

    #[test]
    fn derived_lines_equal_lines_cut_afresh() {
        let never = Interrupt::never();
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
                    Lines::derive(&bytes, &near, &near_lines, whitespace, &never).unwrap(),
                    Lines::of(&bytes, whitespace),
                    "{near:?} -> {bytes:?}",
                );
            }
        }
    }
}
