//! Leads a pair of texts through the stages, with memory that is kept between calls.
//!
//! The stages meet in two arrays of flags, one byte per line and a zero before and after: line `n` of a text is
//! changed when flag `n + 1` is set. All flags are zero between calls; only those of the hunks found are cleared,
//! so a small change in a large text costs nothing per line.

use super::discard::Discard;
use super::myers::Myers;
use super::slide::{Side, slide};
use super::trim::{common_head, common_tail, lines_before_tail};
use super::{Hunk, Text};
use crate::git::{Error, Interrupt};

/// Finds the hunks between two texts; keeps its scratch memory between calls.
#[derive(Debug, Default)]
pub struct Differ {
    changed_a: Vec<u8>,
    changed_b: Vec<u8>,
    discard: Discard,
    myers: Myers,
}

impl Differ {
    /// A differ that has no memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the contents of `hunks` by what changed from `a` (the parent) to `b` (the child), in order.
    pub fn diff(&mut self, a: Text<'_>, b: Text<'_>, hunks: &mut Vec<Hunk>) {
        self.diff_until(a, b, hunks, &Interrupt::never())
            .expect("because nobody interrupts what never ends early");
    }

    /// The same, but ends soon with [`Error::Interrupted`] and no hunks when that is wished: two texts of a
    /// million lines that are all different in order take many seconds.
    pub fn diff_until(
        &mut self,
        a: Text<'_>,
        b: Text<'_>,
        hunks: &mut Vec<Hunk>,
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        hunks.clear();
        let (a_count, b_count) = lines_before_tail(a, b, interrupt)?;
        let (a_hashes, b_hashes) = (&a.lines.hashes()[..a_count], &b.lines.hashes()[..b_count]);
        let head = common_head(a_hashes, b_hashes, interrupt)?;
        let tail = common_tail(&a_hashes[head..], &b_hashes[head..], interrupt)?;
        if head + tail == a_count && head + tail == b_count {
            return Ok(());
        }

        reserve(&mut self.changed_a, a_count);
        reserve(&mut self.changed_b, b_count);
        let found = self.flag([a, b], [a_hashes, b_hashes], head, tail, interrupt);
        if found.is_err() {
            // Nothing is to be undone but the flags.
            self.changed_a.fill(0);
            self.changed_b.fill(0);
            return found;
        }

        self.collect(a_count, b_count, hunks);
        for hunk in hunks.iter() {
            let (start, length) = (hunk.a as usize + 1, hunk.a_len as usize);
            self.changed_a[start..start + length].fill(0);
            let (start, length) = (hunk.b as usize + 1, hunk.b_len as usize);
            self.changed_b[start..start + length].fill(0);
        }
        Ok(())
    }

    /// Sets the flags of the lines that changed; `head` and `tail` lines of the hashes are equal.
    fn flag(
        &mut self,
        [a, b]: [Text<'_>; 2],
        [a_hashes, b_hashes]: [&[u64]; 2],
        head: usize,
        tail: usize,
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        let (a_count, b_count) = (a_hashes.len(), b_hashes.len());
        let (a_middle, b_middle) = (head..a_count - tail, head..b_count - tail);
        if a_middle.is_empty()
            || b_middle.is_empty()
            || (a_middle.len() == 1 && b_middle.len() == 1)
        {
            self.changed_a[a_middle.start + 1..=a_middle.end].fill(1);
            self.changed_b[b_middle.start + 1..=b_middle.end].fill(1);
        } else {
            self.discard.run(
                a_hashes,
                b_hashes,
                (head, tail),
                &mut self.changed_a[1..],
                &mut self.changed_b[1..],
                interrupt,
            )?;
            self.myers.run(
                self.discard.kept(),
                &mut self.changed_a[1..],
                &mut self.changed_b[1..],
                interrupt,
            )?;
        }

        let mut a_side = Side {
            text: a,
            count: a_count,
            flags: &mut self.changed_a,
            interrupt,
        };
        let mut b_side = Side {
            text: b,
            count: b_count,
            flags: &mut self.changed_b,
            interrupt,
        };
        slide(&mut a_side, &b_side, head)?;
        slide(&mut b_side, &a_side, head)
    }

    /// Reads the hunks off the flags: unchanged lines of both sides pair up in order.
    fn collect(&self, a_count: usize, b_count: usize, hunks: &mut Vec<Hunk>) {
        let (a_flags, b_flags) = (&self.changed_a[1..=a_count], &self.changed_b[1..=b_count]);
        let next = |flags: &[u8], from: usize| {
            memchr::memchr(1, &flags[from..]).map_or(flags.len(), |distance| from + distance)
        };
        let run = |flags: &[u8]| flags.iter().take_while(|&&flag| flag != 0).count();

        let (mut a, mut b) = (0, 0);
        let (mut a_next, mut b_next) = (next(a_flags, 0), next(b_flags, 0));
        while a_next < a_count || b_next < b_count {
            let unchanged = match (a_next < a_count, b_next < b_count) {
                (true, true) => (a_next - a).min(b_next - b),
                (true, false) => a_next - a,
                _ => b_next - b,
            };
            (a, b) = (a + unchanged, b + unchanged);
            let (a_len, b_len) = (run(&a_flags[a..]), run(&b_flags[b..]));
            hunks.push(Hunk {
                a: a as u32,
                a_len: a_len as u32,
                b: b as u32,
                b_len: b_len as u32,
            });
            (a, b) = (a + a_len, b + b_len);
            if a_len > 0 {
                a_next = next(a_flags, a);
            }
            if b_len > 0 {
                b_next = next(b_flags, b);
            }
        }
    }
}

/// Makes room for the flags of `count` lines and the zeros around them.
fn reserve(flags: &mut Vec<u8>, count: usize) {
    if flags.len() < count + 2 {
        flags.resize(count + 2, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Lines, Whitespace};
    use super::*;
    use std::hash::{BuildHasher, RandomState};

    /// Numbers from a seed: small, and the same everywhere.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) as usize) % limit.max(1)
        }

        /// So many lines of the first `kinds` kinds.
        fn lines(&mut self, count: usize, kinds: usize) -> Vec<usize> {
            (0..count).map(|_| self.below(kinds)).collect()
        }

        /// Inserts, deletes, moves, repeats or replaces blocks.
        fn edit(&mut self, text: &[usize], kinds: usize, edits: usize) -> Vec<usize> {
            let mut text = text.to_vec();
            let block = 1 + self.below(12);
            for _ in 0..edits {
                let at = self.below(text.len() + 1);
                let length = self.below(block + 1).min(text.len() - at);
                let to = self.below(text.len() - length + 1);
                match self.below(5) {
                    0 => {
                        let count = self.below(block + 1);
                        let inserted = self.lines(count, kinds);
                        text.splice(at..at, inserted);
                    }
                    1 => {
                        text.drain(at..at + length);
                    }
                    2 => {
                        let moved: Vec<_> = text.drain(at..at + length).collect();
                        text.splice(to..to, moved);
                    }
                    3 => {
                        let repeated = text[at..at + length].to_vec();
                        text.splice(to..to, repeated);
                    }
                    _ => {
                        let replaced = self.lines(length, kinds);
                        text.splice(at..at + length, replaced);
                    }
                }
            }
            text
        }

        /// The bytes of a text; its last line may lack the line feed.
        fn bytes(&mut self, lines: &[usize]) -> Vec<u8> {
            let mut bytes = Vec::new();
            for &line in lines {
                match KINDS.get(line) {
                    Some(kind) => bytes.extend_from_slice(kind.as_bytes()),
                    None => bytes
                        .extend_from_slice(format!("{:1$}line {line}\n", "", line % 9).as_bytes()),
                }
            }
            if self.below(4) == 0 && bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            bytes
        }
    }

    /// What libgit2 finds, given the texts as git would hand them to the line diff.
    fn by_libgit2(a: &[u8], b: &[u8], whitespace: Whitespace) -> Vec<Hunk> {
        let mut tail = 0;
        let shorter = a.len().min(b.len());
        while tail + 1024 <= shorter
            && a[a.len() - tail - 1024..a.len() - tail] == b[b.len() - tail - 1024..b.len() - tail]
        {
            tail += 1024;
        }
        while tail > 0 {
            tail -= 1;
            if a[a.len() - tail - 1] == b'\n' {
                break;
            }
        }
        let mut options = git2::DiffOptions::new();
        options
            .context_lines(0)
            .interhunk_lines(0)
            .indent_heuristic(true)
            .force_text(true)
            .ignore_whitespace(whitespace == Whitespace::IgnoreAll);
        let patch = git2::Patch::from_buffers(
            &a[..a.len() - tail],
            None,
            &b[..b.len() - tail],
            None,
            Some(&mut options),
        )
        .unwrap();
        (0..patch.num_hunks())
            .map(|index| {
                let hunk = patch.hunk(index).unwrap().0;
                let from_zero = |start: u32, lines: u32| if lines == 0 { start } else { start - 1 };
                Hunk {
                    a: from_zero(hunk.old_start(), hunk.old_lines()),
                    a_len: hunk.old_lines(),
                    b: from_zero(hunk.new_start(), hunk.new_lines()),
                    b_len: hunk.new_lines(),
                }
            })
            .collect()
    }

    fn hunks(differ: &mut Differ, a: &[u8], b: &[u8], whitespace: Whitespace) -> Vec<Hunk> {
        let (a_lines, b_lines) = (Lines::of(a, whitespace), Lines::of(b, whitespace));
        let mut hunks = Vec::new();
        differ.diff(
            Text {
                bytes: a,
                lines: &a_lines,
            },
            Text {
                bytes: b,
                lines: &b_lines,
            },
            &mut hunks,
        );
        hunks
    }

    /// The first kinds of lines; there are as many further ones as a text asks for.
    const KINDS: [&str; 12] = [
        "\n",
        "}\n",
        "a\n",
        "  b\n",
        "    return\n",
        "\tc\n",
        "  \n",
        "b\n",
        "    }\n",
        "d\r\n",
        "        a line that is so long that a kilobyte is reached with only a few like it, and then another\n",
        "e  e\n",
    ];

    /// Compares with libgit2 on two texts; `name` tells how to make them again.
    fn compare(differ: &mut Differ, a: &[u8], b: &[u8], name: &str) {
        for whitespace in [Whitespace::Exact, Whitespace::IgnoreAll] {
            let found = hunks(differ, a, b, whitespace);
            let expected = by_libgit2(a, b, whitespace);
            if found != expected {
                let first = found
                    .iter()
                    .zip(&expected)
                    .take_while(|(found, expected)| found == expected)
                    .count();
                panic!(
                    "{name} {whitespace:?}: hunk {first} is {:?}, expected {:?}\n{:?}\n{:?}",
                    found.get(first),
                    expected.get(first),
                    String::from_utf8_lossy(&a[..a.len().min(5000)]),
                    String::from_utf8_lossy(&b[..b.len().min(5000)]),
                );
            }
        }
    }

    /// Compares a text of up to `length` lines of up to `kinds` kinds with its edited version, or with another one.
    fn compare_edited(differ: &mut Differ, seed: u64, length: usize, kinds: usize, edits: usize) {
        let name = format!("compare_edited(differ, {seed}, {length}, {kinds}, {edits})");
        let mut numbers = Numbers(seed);
        let kinds = 2 + numbers.below(kinds - 1);
        let count = numbers.below(length);
        let a = numbers.lines(count, kinds);
        let b = if numbers.below(4) == 0 {
            let count = numbers.below(length);
            numbers.lines(count, kinds)
        } else {
            let edits = 1 + numbers.below(edits);
            numbers.edit(&a, kinds, edits)
        };
        let (a, b) = (numbers.bytes(&a), numbers.bytes(&b));
        compare(differ, &a, &b, &name);
    }

    fn fresh_seed(round: u64) -> u64 {
        RandomState::new().hash_one(round)
    }

    #[test]
    fn hunks_are_those_of_libgit2_for_small_random_texts() {
        let mut differ = Differ::new();
        for round in 0..4_000 {
            compare_edited(&mut differ, fresh_seed(round), 16, KINDS.len(), 5);
        }
        for round in 0..1_000 {
            compare_edited(&mut differ, fresh_seed(round), 60, KINDS.len(), 5);
            compare_edited(&mut differ, fresh_seed(round), 300, 40, 20);
        }
    }

    /// Here the limits of the search and of discarding are reached.
    #[test]
    fn hunks_are_those_of_libgit2_for_large_random_texts() {
        let mut differ = Differ::new();
        for round in 0..12 {
            compare_edited(&mut differ, fresh_seed(round), 4_000, KINDS.len(), 20);
            compare_edited(&mut differ, fresh_seed(round), 4_000, 300, 200);
            compare_edited(&mut differ, fresh_seed(round), 8_000, 6_000, 600);
        }
    }

    /// A search gives up optimality for a good path only in texts of more than 32,768 lines.
    #[test]
    fn hunks_are_those_of_libgit2_where_a_good_path_is_taken() {
        let mut differ = Differ::new();
        for round in 0..6 {
            let seed = fresh_seed(round);
            let mut numbers = Numbers(seed);
            let a = numbers.lines(36_000, 400);
            // Much is changed in few places and little between them, so that runs are long and edits many.
            let mut b = Vec::new();
            for stretch in a.chunks(400) {
                let edits = [1, 3, 40][numbers.below(3)];
                b.extend(numbers.edit(stretch, 400, edits));
            }
            let (a, b) = (numbers.bytes(&a), numbers.bytes(&b));
            compare(&mut differ, &a, &b, &format!("good path, seed {seed}"));
        }
    }

    /// Some lines are in both texts often, the others in one of them once.
    #[test]
    fn hunks_are_those_of_libgit2_where_frequent_lines_are_discarded() {
        let mut differ = Differ::new();
        for round in 0..600 {
            let seed = fresh_seed(round);
            let mut numbers = Numbers(seed);
            let rare = 60 + numbers.below(30);
            let mut text = |first: usize| {
                let count = 200 + numbers.below(400);
                let lines: Vec<usize> = (0..count)
                    .map(|line| {
                        if numbers.below(100) < rare {
                            first + line
                        } else {
                            numbers.below(2)
                        }
                    })
                    .collect();
                numbers.bytes(&lines)
            };
            let (a, b) = (text(1_000), text(10_000));
            compare(&mut differ, &a, &b, &format!("frequent lines, seed {seed}"));
        }
    }

    /// A block of more than a hundred lines is repeated once more, or blank lines are added to many.
    #[test]
    fn hunks_are_those_of_libgit2_where_groups_have_many_places() {
        let mut differ = Differ::new();
        for round in 0..600 {
            let seed = fresh_seed(round);
            let mut numbers = Numbers(seed);
            let length = 90 + numbers.below(60);
            let block = numbers.lines(length, KINDS.len() + 20);
            let ends = numbers.lines(40, 100);
            let times = 1 + numbers.below(3);
            let (start, end) = ends.split_at(numbers.below(ends.len()));
            let text = |times: usize| [start, &block.repeat(times), end].concat();
            let (a, b) = (numbers.bytes(&text(times)), numbers.bytes(&text(times + 1)));
            compare(&mut differ, &a, &b, &format!("repeated block, seed {seed}"));

            let mut a = Vec::new();
            for _ in 0..6 {
                a.push(1 + numbers.below(8));
                let blank_lines = [0, 1, 17 + numbers.below(7)][numbers.below(3)];
                a.extend(std::iter::repeat_n(0, blank_lines));
            }
            let edits = 1 + numbers.below(4);
            let b = numbers.edit(&a, 9, edits);
            let (a, b) = (numbers.bytes(&a), numbers.bytes(&b));
            compare(&mut differ, &a, &b, &format!("blank lines, seed {seed}"));
        }
    }

    #[test]
    fn block_repeated_near_the_end_is_seen_as_git_sees_it() {
        // The common tail is set aside before groups slide, so the second copy counts as the new one or not.
        let tail = "b\nc\n".repeat(600);
        let (a, b) = (format!("a\n{tail}"), format!("a\nb\nc\n{tail}"));
        let found = hunks(
            &mut Differ::new(),
            a.as_bytes(),
            b.as_bytes(),
            Whitespace::Exact,
        );
        assert_eq!(
            found,
            by_libgit2(a.as_bytes(), b.as_bytes(), Whitespace::Exact)
        );
        // Without that it would be the last two of the 1203 lines.
        assert!(found.len() == 1 && found[0].b < 1201, "{found:?}");
    }

    #[test]
    fn interrupted_search_leaves_nothing_behind() {
        let mut differ = Differ::new();
        let mut numbers = Numbers(1);
        let (a, b) = (numbers.lines(3_000, 12), numbers.lines(3_000, 12));
        let (a, b) = (numbers.bytes(&a), numbers.bytes(&b));
        let lines = [&a, &b].map(|text| Lines::of(text, Whitespace::Exact));
        let texts = [
            Text {
                bytes: &a,
                lines: &lines[0],
            },
            Text {
                bytes: &b,
                lines: &lines[1],
            },
        ];
        let mut found = Vec::new();
        Interrupt::check(1 << 17, |interrupt| {
            let answer = differ.diff_until(texts[0], texts[1], &mut found, interrupt);
            assert!(answer.is_ok() || found.is_empty());
            answer
        });
        compare(&mut differ, &a, &b, "after an interrupt");
    }

    #[test]
    fn equal_and_empty_texts_have_the_hunks_they_must_have() {
        let mut differ = Differ::new();
        assert_eq!(hunks(&mut differ, b"a\nb", b"a\nb", Whitespace::Exact), []);
        assert_eq!(hunks(&mut differ, b"", b"", Whitespace::Exact), []);
        let all = Hunk {
            a: 0,
            a_len: 0,
            b: 0,
            b_len: 2,
        };
        assert_eq!(hunks(&mut differ, b"", b"a\nb", Whitespace::Exact), [all]);
        let last = Hunk {
            a: 1,
            a_len: 1,
            b: 1,
            b_len: 1,
        };
        assert_eq!(
            hunks(&mut differ, b"a\nb", b"a\nb\n", Whitespace::Exact),
            [last]
        );
        assert_eq!(
            hunks(&mut differ, b"a\nb", b"a \n\tb\n", Whitespace::IgnoreAll),
            []
        );
    }
}
