//! Which line of the parent a changed line was, when the change itself shall not count.
//!
//! A diff says only that some lines became some others. To look through a commit (a reformatting, say) each changed
//! line needs one line of the parent, or none. Answers for `git blame --ignore-rev`, whose rule is:
//!
//! * What a line is like is its **print**: how often each pair of neighbouring bytes is in it, letters without case
//!   and blanks all alike. The likeness of two lines is the number of pairs they have in common.
//! * Inside a hunk a line is compared with the lines of the parent near the place that is in proportion its own. The
//!   line that is most certain of its match goes first; what it has in common is taken from the parent's line, so
//!   that no other line matches the same pairs; then the lines before it look for their match before that one, those
//!   after it after that one.
//! * A line that finds nothing in its hunk takes the most alike line of the whole parent, the nearest of equals.
//!
//! Hunks are asked in order, because what was taken from a line of the parent stays taken.

use super::lines::is_blank;
use super::{Hunk, Text};
use crate::git::{Error, Interrupt};

/// Lines of the parent are compared up to so far from the proportional place.
const REACH: usize = 10;
/// Likeness that a match outside the hunk needs.
const ENOUGH: u32 = 10;
/// A match loses a thousandth of its likeness for each line between it and the proportional place.
const NEARNESS: i64 = 1_000;
/// What it costs to compare two lines.
const COMPARISON: usize = 256;
/// What it costs to find the print of a line, for each byte: its pairs are sorted.
const PRINT: usize = 16;

/// Finds for each changed line of `b` (the child) the line of `a` (the parent) it was.
///
/// The answers are those for the lines of all hunks, in order; `hunks` are all that `a` and `b` have.
pub fn guess(
    a: Text<'_>,
    b: Text<'_>,
    hunks: &[Hunk],
    interrupt: &Interrupt<'_>,
) -> Result<Vec<Option<u32>>, Error> {
    let mut guesser = Guesser {
        old: a,
        new: b,
        prints: vec![None; a.lines.ends().len()],
        interrupt,
    };
    let mut answers = Vec::new();
    for hunk in hunks {
        let in_hunk = guesser.in_hunk(hunk)?;
        for (place, found) in (0..hunk.b_len).zip(in_hunk) {
            let line = (hunk.b + place) as usize;
            answers.push(match found {
                Some(found) => Some(found as u32),
                None => guesser.anywhere(line)?,
            });
        }
    }
    Ok(answers)
}

/// Pairs of bytes and how often they are there, sorted.
#[derive(Debug, Clone, Default)]
struct Print {
    pairs: Vec<(u32, u32)>,
    /// The sum of the counts.
    all: u32,
}

impl Print {
    fn of(line: &[u8]) -> Print {
        let mut pairs: Vec<u32> = Vec::with_capacity(line.len() + 1);
        let mut before = 0_u32;
        // The line ends in a blank, whether or not it has an LF.
        for &byte in line.iter().chain(b"\n") {
            let here = match byte {
                blank if is_blank(blank) => 0,
                // Bytes are signed to git: one beyond ASCII sets all higher bits, and its pair is its alone.
                byte => byte.to_ascii_lowercase() as i8 as u32,
            };
            let pair = before | here << 8;
            if pair != 0 {
                pairs.push(pair);
            }
            before = here;
        }
        pairs.sort_unstable();
        let counts = pairs.chunk_by(|one, other| one == other);
        Print {
            all: pairs.len() as u32,
            pairs: counts.map(|same| (same[0], same.len() as u32)).collect(),
        }
    }

    fn likeness(&self, other: &Print) -> u32 {
        let (mut ours, mut theirs) = (&self.pairs[..], &other.pairs[..]);
        let mut common = 0;
        while let ([one, rest @ ..], [two, others @ ..]) = (ours, theirs) {
            match one.0.cmp(&two.0) {
                std::cmp::Ordering::Less => ours = rest,
                std::cmp::Ordering::Greater => theirs = others,
                std::cmp::Ordering::Equal => {
                    common += one.1.min(two.1);
                    (ours, theirs) = (rest, others);
                }
            }
        }
        common
    }

    /// Takes away what the other has.
    fn take(&mut self, other: &Print) {
        let mut theirs = &other.pairs[..];
        self.pairs.retain_mut(|(pair, count)| {
            let passed = theirs.partition_point(|(other, _)| other < pair);
            theirs = &theirs[passed..];
            if let Some(&(other, less)) = theirs.first()
                && other == *pair
            {
                *count = count.saturating_sub(less);
            }
            *count > 0
        });
        self.all = self.pairs.iter().map(|(_, count)| count).sum();
    }
}

struct Guesser<'a> {
    old: Text<'a>,
    new: Text<'a>,
    /// What is left of the lines of `old`; made when first needed.
    prints: Vec<Option<Print>>,
    interrupt: &'a Interrupt<'a>,
}

/// How sure a line of a hunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match {
    Unknown,
    /// There is nothing like it within reach.
    Nothing,
    Best {
        certainty: i64,
        best: usize,
        second: usize,
    },
}

/// A part of a hunk: some of its lines, and where they may have come from.
struct Stretch {
    old: std::ops::Range<usize>,
    new: std::ops::Range<usize>,
}

/// A hunk while its lines are matched. Lines of the child are counted from its start, lines of the parent are not.
struct Matching {
    hunk: Hunk,
    /// How far from the proportional place lines are compared.
    reach: usize,
    new: Vec<Print>,
    matches: Vec<Match>,
    /// Likeness by line of the child and distance; negative: unknown.
    known: Vec<i64>,
}

impl Matching {
    /// The line of the parent at the proportional place.
    fn nearest(&self, line: usize) -> usize {
        let (old, new) = (self.hunk.a_len as usize, self.hunk.b_len as usize);
        (line * 2 + 1) * old / (new * 2) + self.hunk.a as usize
    }

    fn known(&mut self, old: usize, line: usize) -> &mut i64 {
        let distance = old + self.reach - self.nearest(line);
        &mut self.known[line * (self.reach * 2 + 1) + distance]
    }
}

impl Guesser<'_> {
    fn in_hunk(&mut self, hunk: &Hunk) -> Result<Vec<Option<usize>>, Error> {
        let (old, new) = (hunk.a_len as usize, hunk.b_len as usize);
        if old == 0 || new == 0 {
            return Ok(vec![None; new]);
        }
        let reach = REACH.min(old - 1);
        let mut matching = Matching {
            hunk: *hunk,
            reach,
            new: Vec::with_capacity(new),
            matches: vec![Match::Unknown; new],
            known: vec![-1; new * (reach * 2 + 1)],
        };
        for line in hunk.b..hunk.b + hunk.b_len {
            let line = line_of(self.new, line);
            self.interrupt.work(PRINT * line.len())?;
            matching.new.push(Print::of(line));
        }
        // No two lines further apart than this are compared with one line of the parent.
        let apart = ((2 * reach + 1) * new - 1) / old;
        let whole = Stretch {
            old: hunk.a as usize..(hunk.a + hunk.a_len) as usize,
            new: 0..new,
        };
        let mut open = vec![whole];
        while let Some(stretch) = open.pop() {
            let Some(chosen) = self.most_certain(&mut matching, &stretch)? else {
                continue;
            };
            let Match::Best { best, .. } = matching.matches[chosen] else {
                continue;
            };
            self.print(best).take(&matching.new[chosen]);

            let from = stretch.new.start.max(chosen.saturating_sub(apart));
            let to = stretch.new.end.min(chosen + apart + 1);
            for line in from..to {
                if matching.nearest(line).abs_diff(best) <= reach {
                    *matching.known(best, line) = -1;
                }
                // Who wanted to cross over the match, or to share it, has to look again.
                if let Match::Best {
                    best: one,
                    second: two,
                    ..
                } = matching.matches[line]
                    && ((line < chosen && one.max(two) >= best)
                        || (line > chosen && one.min(two) <= best))
                {
                    matching.matches[line] = Match::Unknown;
                }
            }
            // The lines before it go first: both sides may still match the line that was chosen.
            if chosen + 1 < stretch.new.end {
                open.push(Stretch {
                    old: best..stretch.old.end,
                    new: chosen + 1..stretch.new.end,
                });
            }
            if chosen > stretch.new.start {
                open.push(Stretch {
                    old: stretch.old.start..best + 1,
                    new: stretch.new.start..chosen,
                });
            }
        }
        let found = matching.matches.iter().map(|found| match found {
            Match::Best { best, .. } => Some(*best),
            _ => None,
        });
        Ok(found.collect())
    }

    /// Matches the lines of a stretch that have to be; gives back the first of the most certain ones.
    fn most_certain(
        &mut self,
        matching: &mut Matching,
        stretch: &Stretch,
    ) -> Result<Option<usize>, Error> {
        let mut most = None;
        for line in stretch.new.clone() {
            if matching.matches[line] == Match::Unknown {
                matching.matches[line] = self.best(matching, stretch, line)?;
            }
            if let Match::Best { certainty, .. } = matching.matches[line]
                && most.is_none_or(|(_, before)| certainty > before)
            {
                most = Some((line, certainty));
            }
        }
        self.interrupt.work(stretch.new.len())?;
        Ok(most.map(|(line, _)| line))
    }

    fn best(
        &mut self,
        matching: &mut Matching,
        stretch: &Stretch,
        line: usize,
    ) -> Result<Match, Error> {
        let nearest = matching.nearest(line);
        let from = stretch
            .old
            .start
            .max(nearest.saturating_sub(matching.reach));
        let to = stretch.old.end.min(nearest + matching.reach + 1);
        // Without a second one the first of the stretch counts as that.
        let (mut best, mut second) = ((0, stretch.old.start), (0, stretch.old.start));
        for old in from..to {
            if *matching.known(old, line) < 0 {
                let likeness = self.print(old).likeness(&matching.new[line]);
                *matching.known(old, line) =
                    i64::from(likeness) * (NEARNESS - old.abs_diff(nearest) as i64);
            }
            let likeness = *matching.known(old, line);
            if likeness > best.0 {
                second = best;
                best = (likeness, old);
            } else if likeness > second.0 {
                second = (likeness, old);
            }
        }
        self.interrupt.work(COMPARISON * to.saturating_sub(from))?;
        if best.0 == 0 {
            return Ok(Match::Nothing);
        }
        Ok(Match::Best {
            certainty: 2 * best.0 - second.0,
            best: best.1,
            second: second.1,
        })
    }

    /// The most alike line of the whole parent.
    fn anywhere(&mut self, line: usize) -> Result<Option<u32>, Error> {
        let print = Print::of(line_of(self.new, line as u32));
        let mut best: Option<(u32, usize)> = None;
        if print.all < ENOUGH {
            return Ok(None);
        }
        for old in 0..self.prints.len() {
            let least = best.map_or(ENOUGH, |(likeness, _)| likeness);
            let other = self.print(old);
            // No more pairs can be in common than one of them has.
            if other.all < least {
                continue;
            }
            let likeness = other.likeness(&print);
            self.interrupt.work(COMPARISON)?;
            let is_better = likeness > least
                || likeness == least
                    && best.is_none_or(|(_, found)| old.abs_diff(line) <= found.abs_diff(line));
            if is_better {
                best = Some((likeness, old));
            }
        }
        Ok(best.map(|(_, old)| old as u32))
    }

    fn print(&mut self, line: usize) -> &mut Print {
        let text = self.old;
        self.prints[line].get_or_insert_with(|| Print::of(line_of(text, line as u32)))
    }
}

fn line_of(text: Text<'_>, line: u32) -> &[u8] {
    &text.bytes[text.lines.range(line)]
}

#[cfg(test)]
mod tests {
    use super::super::{Differ, Lines, Whitespace};
    use super::*;

    fn guesses(old: &str, new: &str) -> Vec<Option<u32>> {
        let lines = [old, new].map(|text| Lines::of(text.as_bytes(), Whitespace::Exact));
        let (a, b) = (
            Text {
                bytes: old.as_bytes(),
                lines: &lines[0],
            },
            Text {
                bytes: new.as_bytes(),
                lines: &lines[1],
            },
        );
        let mut hunks = Vec::new();
        Differ::new().diff(a, b, &mut hunks);
        guess(a, b, &hunks, &Interrupt::never()).unwrap()
    }

    #[test]
    fn reformatted_lines_find_what_they_were() {
        let old = "call(one, two, three);\nif (other) { call(four); }\n";
        let new = "call(\n  one,\n  two,\n  three\n);\nif (other) {\n  call(four);\n}\n";
        let found = guesses(old, new);
        assert_eq!(found[1..4], [Some(0); 3]);
        assert_eq!(found[5..7], [Some(1); 2]);
    }

    #[test]
    fn guessing_can_be_interrupted() {
        let text = |word: &str| -> String {
            (0..600)
                .map(|n| format!("{word} {} of {}\n", n * 7, n % 13))
                .collect()
        };
        let (old, new) = (text("the old line"), text("a New line"));
        let lines = [&old, &new].map(|text| Lines::of(text.as_bytes(), Whitespace::Exact));
        let texts = [(&old, &lines[0]), (&new, &lines[1])].map(|(text, lines)| Text {
            bytes: text.as_bytes(),
            lines,
        });
        let mut hunks = Vec::new();
        Differ::new().diff(texts[0], texts[1], &mut hunks);
        Interrupt::check(600 * COMPARISON, |interrupt| {
            guess(texts[0], texts[1], &hunks, interrupt).map(|_| ())
        });
    }

    #[test]
    fn a_line_moved_far_away_is_found_in_the_whole_file() {
        let middle: String = (0..40).map(|n| format!("{n}{n}{n}\n")).collect();
        let old = format!("the quick brown fox\n{middle}");
        let new = format!("{middle}the quick brown Fox\n");
        assert_eq!(guesses(&old, &new), [Some(0)]);
    }

    #[test]
    fn a_line_like_nothing_stays_without_a_match() {
        assert_eq!(guesses("aaaa\nbbbb\n", "aaaa\nzzzz\nbbbb\n"), [None]);
    }
}
