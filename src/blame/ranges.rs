//! Stretches of lines that look for their origin.
//!
//! A [`Range`] counts lines as they stand in one version of one file; which, its place in the
//! [`Trie`](super::pending::Trie) of a commit says. It remembers the file at HEAD whose lines
//! they are, because two files of today may meet in one file of the past. Lists of ranges are
//! sorted by start; they may overlap, because two lines of today may have one origin.

use crate::git::line_diff::Hunk;

/// Some lines in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// The first line, counted from 0.
    pub(super) start: u32,
    /// How many, never 0.
    pub(super) len: u32,
    /// The number of the file at HEAD.
    pub(super) file: u32,
}

impl Range {
    fn end(&self) -> u32 {
        self.start.saturating_add(self.len)
    }
}

/// Appends a range, joining it with the last one if it goes on there.
fn push(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.file == range.file && last.end() == range.start => {
            last.len += range.len;
        }
        _ => ranges.push(range),
    }
}

/// Divides the lines of a child: those in hunks it `kept`, all others `passed` to the parent,
/// where they are counted as the parent does.
pub(super) fn split(
    ranges: &[Range],
    hunks: &[Hunk],
    kept: &mut Vec<Range>,
    passed: &mut Vec<Range>,
) {
    kept.clear();
    passed.clear();
    // The first hunk that can matter to this range and all later ones.
    let mut first = 0;
    for range in ranges {
        while hunks
            .get(first)
            .is_some_and(|hunk| hunk.b + hunk.b_len <= range.start)
        {
            first += 1;
        }
        let mut next = first;
        let mut start = range.start;
        while start < range.end() {
            let hunk = hunks.get(next);
            let (end, is_kept) = match hunk {
                None => (range.end(), false),
                Some(hunk) if start < hunk.b => (range.end().min(hunk.b), false),
                Some(hunk) => (range.end().min(hunk.b + hunk.b_len), true),
            };
            let piece = Range {
                start,
                len: end - start,
                file: range.file,
            };
            if is_kept {
                if piece.len > 0 {
                    push(kept, piece);
                }
                next += 1;
            } else {
                let before = next.checked_sub(1).map(|last| &hunks[last]);
                let start = match before {
                    None => start,
                    Some(hunk) => start - (hunk.b + hunk.b_len) + (hunk.a + hunk.a_len),
                };
                push(passed, Range { start, ..piece });
            }
            start = end;
        }
    }
    // Ranges that overlap may have been cut into pieces that are out of order.
    sort(kept);
    sort(passed);
}

/// Moves lines that are in hunks to those of the parent they are `guesses` of; what has none stays.
///
/// `guesses` are for the lines of all hunks, in order.
pub(super) fn move_guessed(
    ranges: &[Range],
    hunks: &[Hunk],
    guesses: &[Option<u32>],
    kept: &mut Vec<Range>,
    passed: &mut Vec<Range>,
) {
    kept.clear();
    passed.clear();
    // Where the guesses of each hunk begin.
    let mut firsts = Vec::with_capacity(hunks.len());
    let mut first = 0;
    for hunk in hunks {
        firsts.push(first);
        first += hunk.b_len as usize;
    }
    for range in ranges {
        for start in range.start..range.end() {
            let line = Range {
                start,
                len: 1,
                file: range.file,
            };
            let place = hunks.partition_point(|hunk| hunk.b + hunk.b_len <= start);
            let guess = hunks
                .get(place)
                .filter(|hunk| hunk.b <= start)
                .and_then(|hunk| *guesses.get(firsts[place] + (start - hunk.b) as usize)?);
            match guess {
                Some(start) => push(passed, Range { start, ..line }),
                None => push(kept, line),
            }
        }
    }
    sort(kept);
    sort(passed);
}

fn sort(ranges: &mut [Range]) {
    if !ranges.is_sorted_by_key(|range| range.start) {
        ranges.sort_by_key(|range| (range.start, range.file));
    }
}

/// Unites two lists.
pub(super) fn union(ours: &mut Vec<Range>, theirs: Vec<Range>) {
    let mut united = Vec::with_capacity(ours.len() + theirs.len());
    let mut left = ours.iter().copied().peekable();
    let mut right = theirs.into_iter().peekable();
    loop {
        let take_left = match (left.peek(), right.peek()) {
            (Some(one), Some(other)) => (one.start, one.file) <= (other.start, other.file),
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => break,
        };
        let range = if take_left { left.next() } else { right.next() };
        if let Some(range) = range {
            push(&mut united, range);
        }
    }
    *ours = united;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u32, len: u32, file: u32) -> Range {
        Range { start, len, file }
    }

    fn hunk(a: u32, a_len: u32, b: u32, b_len: u32) -> Hunk {
        Hunk { a, a_len, b, b_len }
    }

    /// Line and file, one by one.
    type Singles = Vec<(u32, u32)>;

    /// The rule, line by line.
    fn slowly(ranges: &[Range], hunks: &[Hunk]) -> (Singles, Singles) {
        let (mut kept, mut passed) = (Vec::new(), Vec::new());
        for range in ranges {
            for line in range.start..range.start + range.len {
                let mut shift = 0_i64;
                let mut inside = false;
                for hunk in hunks {
                    inside |= (hunk.b..hunk.b + hunk.b_len).contains(&line);
                    if line >= hunk.b + hunk.b_len {
                        let end = i64::from(hunk.a + hunk.a_len);
                        shift = end - i64::from(hunk.b + hunk.b_len);
                    }
                }
                match inside {
                    true => kept.push((line, range.file)),
                    false => passed.push(((i64::from(line) + shift) as u32, range.file)),
                }
            }
        }
        kept.sort();
        passed.sort();
        (kept, passed)
    }

    fn lines(ranges: &[Range]) -> Singles {
        let mut lines: Vec<_> = ranges
            .iter()
            .flat_map(|range| (range.start..range.start + range.len).map(|line| (line, range.file)))
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn each_line_goes_where_the_rule_says_even_when_ranges_overlap() {
        let hunks = [
            hunk(0, 2, 0, 1),
            hunk(5, 3, 4, 0),
            hunk(10, 0, 6, 4),
            hunk(20, 1, 20, 2),
        ];
        for ranges in [
            vec![range(0, 30, 0)],
            vec![range(0, 3, 0), range(4, 1, 0), range(9, 13, 0)],
            vec![
                range(0, 30, 0),
                range(1, 5, 1),
                range(5, 2, 2),
                range(21, 1, 1),
            ],
            vec![range(4, 20, 3), range(4, 2, 4)],
            vec![range(22, 5, 0)],
        ] {
            let (mut kept, mut passed) = (Vec::new(), Vec::new());
            split(&ranges, &hunks, &mut kept, &mut passed);
            let expected = slowly(&ranges, &hunks);
            assert_eq!((lines(&kept), lines(&passed)), expected, "{ranges:?}");
            assert!(passed.is_sorted_by_key(|range| range.start));
            assert!(kept.is_sorted_by_key(|range| range.start));
        }
    }

    #[test]
    fn neighbours_of_one_file_are_joined() {
        let mut ours = vec![range(0, 2, 0), range(9, 1, 0)];
        union(&mut ours, vec![range(2, 3, 0), range(5, 4, 1)]);
        assert_eq!(ours, [range(0, 5, 0), range(5, 4, 1), range(9, 1, 0)]);
    }
}
