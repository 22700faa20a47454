//! Sets lines aside that need no search: those the other text does not have at all, and, among many of these,
//! lines the other text has so often that a match would mean nothing.
//!
//! Occurrences are counted in the whole other text (without the tail set aside before), not only in its middle.
//! Since the equal lines at head and tail are in both texts, one table of the lines of both middles is enough,
//! and the equal lines are looked up once for both sides; a filter of 4096 bits answers most of these look-ups.

use std::ops::Range;

use crate::git::{Error, Interrupt};

/// A line met in the other text this often counts as met too often, whatever the length of the texts.
const MOST_MATCHES: u32 = 1024;
/// How far around a line with too many matches its neighbours are looked at.
const WINDOW: usize = 100;
/// What the look-up of a line costs, which is often a step into memory that is far away.
const LOOK_UP: usize = 32;
/// The weight of lines with too many matches against lines without a match.
const WEIGHT: usize = 4;

/// Scratch memory and result of the stage.
#[derive(Debug, Default)]
pub(super) struct Discard {
    table: Table,
    a: Middle,
    b: Middle,
}

/// What the search has to look at: for both sides the classes of the kept lines and their line numbers.
#[derive(Clone, Copy)]
pub(super) struct Kept<'a> {
    /// Equal lines have the same class.
    pub(super) a: &'a [u32],
    pub(super) b: &'a [u32],
    /// Line number of each kept line, ascending.
    pub(super) a_lines: &'a [u32],
    pub(super) b_lines: &'a [u32],
}

/// The lines of one side between the equal ones at head and tail.
#[derive(Debug, Default)]
struct Middle {
    classes: Vec<u32>,
    matches: Vec<Matches>,
    kept: Vec<u32>,
    kept_lines: Vec<u32>,
}

/// How often the other text has a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Matches {
    None,
    Some,
    Many,
}

impl Discard {
    /// Flags what is set aside as changed and remembers what is kept.
    ///
    /// `a` and `b` are whole texts; so many lines at their head and tail are equal. Flag `n` belongs to line `n`.
    pub(super) fn run(
        &mut self,
        a: &[u64],
        b: &[u64],
        (head, tail): (usize, usize),
        changed_a: &mut [u8],
        changed_b: &mut [u8],
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        let (a_middle, b_middle) = (head..a.len() - tail, head..b.len() - tail);
        self.table
            .reset(a_middle.len() + b_middle.len(), interrupt)?;
        self.a.clear();
        self.b.clear();
        for &hash in &a[a_middle.clone()] {
            interrupt.work(LOOK_UP)?;
            let class = self.table.enter(hash);
            self.table.classes[class as usize].in_a += 1;
            self.a.classes.push(class);
        }
        for &hash in &b[b_middle.clone()] {
            interrupt.work(LOOK_UP)?;
            let class = self.table.enter(hash);
            self.table.classes[class as usize].in_b += 1;
            self.b.classes.push(class);
        }

        let shared = self
            .table
            .classes
            .iter()
            .filter(|class| class.in_a > 0 && class.in_b > 0)
            .count();
        if shared == 0 {
            // Nothing to pair between the middles: kept or not, every line ends up changed.
            changed_a[a_middle].fill(1);
            changed_b[b_middle].fill(1);
            return Ok(());
        }
        if shared == self.table.classes.len() {
            // No line is without a match, so no line with many has a reason to be dropped.
            self.a.keep_all(a_middle.start);
            self.b.keep_all(b_middle.start);
            return Ok(());
        }
        self.table.count_equal(&a[..head], interrupt)?;
        self.table.count_equal(&a[a.len() - tail..], interrupt)?;

        let many = |count: usize| doubling_root(count).min(MOST_MATCHES);
        let classes = &self.table.classes;
        self.a.sort_out(
            a_middle,
            many(a.len()),
            |class| classes[class as usize].in_b,
            changed_a,
            interrupt,
        )?;
        self.b.sort_out(
            b_middle,
            many(b.len()),
            |class| classes[class as usize].in_a,
            changed_b,
            interrupt,
        )
    }

    /// What the last run kept.
    pub(super) fn kept(&self) -> Kept<'_> {
        Kept {
            a: &self.a.kept,
            b: &self.b.kept,
            a_lines: &self.a.kept_lines,
            b_lines: &self.b.kept_lines,
        }
    }
}

impl Middle {
    fn clear(&mut self) {
        self.classes.clear();
        self.matches.clear();
        self.kept.clear();
        self.kept_lines.clear();
    }

    fn keep_all(&mut self, start: usize) {
        self.kept.extend_from_slice(&self.classes);
        self.kept_lines
            .extend((start..start + self.classes.len()).map(|line| line as u32));
    }

    /// Keeps or flags each line, given how often the other text has its class.
    fn sort_out(
        &mut self,
        lines: Range<usize>,
        many: u32,
        in_other: impl Fn(u32) -> u32,
        changed: &mut [u8],
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        self.matches
            .extend(self.classes.iter().map(|&class| match in_other(class) {
                0 => Matches::None,
                count if count >= many => Matches::Many,
                _ => Matches::Some,
            }));
        for (index, line) in lines.enumerate() {
            let keep = match self.matches[index] {
                Matches::None => false,
                Matches::Some => true,
                Matches::Many => {
                    interrupt.work(2 * WINDOW)?;
                    !stands_among_unmatched(&self.matches, index)
                }
            };
            interrupt.work(1)?;
            if keep {
                self.kept.push(self.classes[index]);
                self.kept_lines.push(line as u32);
            } else {
                changed[line] = 1;
            }
        }
        Ok(())
    }
}

/// Is a line with many matches surrounded by lines without any, so that a match there would be chance?
fn stands_among_unmatched(matches: &[Matches], index: usize) -> bool {
    // Counts (many, none) in one direction until the first line with an ordinary number of matches.
    let look = |neighbours: &mut dyn Iterator<Item = &Matches>| {
        let (mut many, mut none) = (0, 0);
        for neighbour in neighbours.take(WINDOW) {
            match neighbour {
                Matches::None => none += 1,
                Matches::Many => many += 1,
                Matches::Some => break,
            }
        }
        (many, none)
    };
    let (many_before, none_before) = look(&mut matches[..index].iter().rev());
    if none_before == 0 {
        return false;
    }
    let (many_after, none_after) = look(&mut matches[index + 1..].iter());
    if none_after == 0 {
        return false;
    }
    // The line itself counts once for each direction.
    let many = 2 + many_before + many_after;
    many * WEIGHT < many + none_before + none_after
}

/// A rough square root: starts at 1 and doubles for every two bits of the number.
pub(super) fn doubling_root(number: usize) -> u32 {
    let bits = usize::BITS - number.leading_zeros();
    1 << bits.div_ceil(2)
}

/// The different lines of both middles, found by hash with open addressing.
#[derive(Debug, Default)]
struct Table {
    /// 0 is a free place, otherwise the index of a class plus 1; the length is a power of two.
    places: Vec<u32>,
    mask: usize,
    classes: Vec<Class>,
    /// One bit per value of the upper 12 bits of the hashes entered.
    filter: Box<Filter>,
}

#[derive(Debug)]
struct Filter([u64; 64]);

impl Default for Filter {
    fn default() -> Self {
        Filter([0; 64])
    }
}

#[derive(Debug)]
struct Class {
    hash: u64,
    /// Occurrences in each text.
    in_a: u32,
    in_b: u32,
}

impl Table {
    fn reset(&mut self, lines: usize, interrupt: &Interrupt<'_>) -> Result<(), Error> {
        let length = (lines * 2).next_power_of_two().max(16);
        if self.places.len() < length {
            self.places = vec![0; length];
        } else {
            for piece in self.places[..length].chunks_mut(1 << 16) {
                interrupt.work(size_of_val(piece))?;
                piece.fill(0);
            }
        }
        self.mask = length - 1;
        self.classes.clear();
        self.filter.0.fill(0);
        Ok(())
    }

    /// The class of a line, made if it is new.
    fn enter(&mut self, hash: u64) -> u32 {
        let mut place = hash as usize & self.mask;
        loop {
            match self.places[place] {
                0 => break,
                taken if self.classes[taken as usize - 1].hash == hash => return taken - 1,
                _ => place = (place + 1) & self.mask,
            }
        }
        self.filter.0[(hash >> 58) as usize] |= 1 << (hash >> 52 & 63);
        self.classes.push(Class {
            hash,
            in_a: 0,
            in_b: 0,
        });
        self.places[place] = self.classes.len() as u32;
        self.classes.len() as u32 - 1
    }

    /// Counts lines that stand in both texts.
    fn count_equal(&mut self, hashes: &[u64], interrupt: &Interrupt<'_>) -> Result<(), Error> {
        for &hash in hashes {
            interrupt.work(2)?;
            if self.filter.0[(hash >> 58) as usize] >> (hash >> 52 & 63) & 1 == 0 {
                continue;
            }
            let mut place = hash as usize & self.mask;
            while let Some(index) = self.places[place].checked_sub(1) {
                let class = &mut self.classes[index as usize];
                if class.hash == hash {
                    class.in_a += 1;
                    class.in_b += 1;
                    break;
                }
                place = (place + 1) & self.mask;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rough_root_doubles_for_every_two_bits() {
        let roots: Vec<u32> = [0, 1, 3, 4, 15, 16, 1023, 1024, 1 << 20]
            .map(doubling_root)
            .into();
        assert_eq!(roots, [1, 2, 2, 4, 4, 8, 32, 64, 2048]);
    }

    #[test]
    fn line_without_a_match_is_changed_and_the_rest_is_kept() {
        let mut discard = Discard::default();
        let (mut changed_a, mut changed_b) = ([0; 4], [0; 5]);
        let run = discard.run(
            &[1, 2, 3, 9],
            &[1, 3, 7, 2, 9],
            (1, 1),
            &mut changed_a,
            &mut changed_b,
            &Interrupt::never(),
        );
        assert!(run.is_ok());
        assert_eq!((changed_a, changed_b), ([0, 0, 0, 0], [0, 0, 1, 0, 0]));
        let kept = discard.kept();
        assert_eq!((kept.a_lines, kept.b_lines), (&[1, 2][..], &[1, 3][..]));
        assert_eq!((kept.a[0], kept.a[1]), (kept.b[1], kept.b[0]));
    }

    #[test]
    fn sorting_out_many_lines_can_be_interrupted() {
        // Every line has a match but the odd ones of `a`; some are there very often.
        let a: Vec<u64> = (0..300_000)
            .map(|n| if n % 3 == 0 { 5 } else { n })
            .collect();
        let b: Vec<u64> = (0..300_000)
            .map(|n| if n % 2 == 0 { 5 } else { n })
            .collect();
        let mut discard = Discard::default();
        let mut flags = [vec![0; a.len()], vec![0; b.len()]];
        Interrupt::check(a.len() * LOOK_UP * 2, |interrupt| {
            let [changed_a, changed_b] = &mut flags;
            discard.run(&a, &b, (0, 0), changed_a, changed_b, interrupt)
        });
        // The lines before and after the middles.
        Interrupt::check(600_000, |interrupt| {
            let [changed_a, changed_b] = &mut flags;
            let (mut a, mut b) = (a.clone(), a.clone());
            (a[150_000], b[150_000]) = (1 << 40, 1 << 41);
            (a[150_001], b[150_002]) = (1 << 42, 1 << 42);
            discard.run(&a, &b, (150_000, 149_900), changed_a, changed_b, interrupt)
        });
    }

    #[test]
    fn line_is_dropped_only_among_lines_without_a_match() {
        use Matches::{Many, None, Some};
        assert!(stands_among_unmatched(
            &[None, None, None, None, Many, None, None, None],
            4
        ));
        assert!(!stands_among_unmatched(
            &[None, None, None, Many, None, None, None],
            3
        ));
        assert!(!stands_among_unmatched(
            &[None, None, None, None, None, None, None, Many],
            7
        ));
        assert!(!stands_among_unmatched(
            &[None, None, None, Some, Many, None, None, None, None],
            4
        ));
    }
}
