//! The shortest edit script by divide and conquer in linear space, with git's limits.
//!
//! An area is a stretch of both sides. From its start and from its end paths grow one edit at a time along the
//! diagonals (`d` = position in a − position in b); each diagonal remembers the furthest position in a. Where the
//! two fronts meet, the area is split. In a large change the search would cost too much, so it settles for a good
//! diagonal run after 256 edits, and for whatever got furthest when the cost limit is reached. The half of the
//! area a front has already crossed is then searched without these shortcuts ("minimal"), the other one with them.
//!
//! Which of several equally good points is taken decides whose line is whose, so the order of the sweeps and the
//! comparisons below are part of the result.

use super::discard::{Kept, doubling_root};
use super::trim::{common_head, common_tail};
use crate::git::{Error, Interrupt};

/// A diagonal run of more than this many equal lines is a sign of a good path.
const RUN: i32 = 20;
/// Edits before a good path is taken instead of the shortest one.
const PATIENCE: i32 = 256;
/// How much further than its edits a path must have come to be good.
const GAIN: i32 = 4;
/// The cost limit never falls below this.
const LEAST_COST_LIMIT: i32 = 256;

/// Scratch memory of the search.
#[derive(Debug, Default)]
pub(super) struct Myers {
    forward: Vec<i32>,
    backward: Vec<i32>,
    areas: Vec<Area>,
}

/// Lines `a_from..a_to` against `b_from..b_to`.
#[derive(Debug, Clone, Copy)]
struct Area {
    a_from: i32,
    a_to: i32,
    b_from: i32,
    b_to: i32,
    /// Search for the shortest script whatever it costs.
    minimal: bool,
}

/// Where an area is cut in two.
#[derive(Debug, Clone, Copy)]
struct Split {
    a: i32,
    b: i32,
    minimal_before: bool,
    minimal_after: bool,
}

/// The furthest positions in a by diagonal; diagonals may be negative.
struct Front<'a> {
    positions: &'a mut [i32],
    zero: i32,
}

impl Front<'_> {
    fn get(&self, diagonal: i32) -> i32 {
        self.positions[(diagonal + self.zero) as usize]
    }

    fn set(&mut self, diagonal: i32, position: i32) {
        self.positions[(diagonal + self.zero) as usize] = position;
    }
}

impl Myers {
    /// Flags the kept lines that are not part of the common ones; flag `n` belongs to line `n`.
    pub(super) fn run(
        &mut self,
        kept: Kept<'_>,
        changed_a: &mut [u8],
        changed_b: &mut [u8],
        interrupt: &Interrupt<'_>,
    ) -> Result<(), Error> {
        let (a_len, b_len) = (kept.a.len(), kept.b.len());
        let diagonals = a_len + b_len + 3;
        let cost_limit = (doubling_root(diagonals) as i32).max(LEAST_COST_LIMIT);
        for front in [&mut self.forward, &mut self.backward] {
            if front.len() < diagonals {
                front.resize(diagonals, 0);
            }
        }

        self.areas.clear();
        self.areas.push(Area {
            a_from: 0,
            a_to: a_len as i32,
            b_from: 0,
            b_to: b_len as i32,
            minimal: false,
        });
        while let Some(whole) = self.areas.pop() {
            let part = shrink(whole, kept, interrupt)?;
            let (a_range, b_range) = (
                part.a_from as usize..part.a_to as usize,
                part.b_from as usize..part.b_to as usize,
            );
            if a_range.is_empty() || b_range.is_empty() {
                for &line in &kept.a_lines[a_range] {
                    changed_a[line as usize] = 1;
                }
                for &line in &kept.b_lines[b_range] {
                    changed_b[line as usize] = 1;
                }
                continue;
            }
            let zero = b_len as i32 + 1;
            let mut forward = Front {
                positions: &mut self.forward,
                zero,
            };
            let mut backward = Front {
                positions: &mut self.backward,
                zero,
            };
            let split = split(
                part,
                kept,
                cost_limit,
                &mut forward,
                &mut backward,
                interrupt,
            )?;
            self.areas.push(Area {
                a_from: split.a,
                b_from: split.b,
                minimal: split.minimal_after,
                ..part
            });
            self.areas.push(Area {
                a_to: split.a,
                b_to: split.b,
                minimal: split.minimal_before,
                ..part
            });
        }
        Ok(())
    }
}

/// Leaves out equal lines at the head and then at the tail of an area.
fn shrink(part: Area, kept: Kept<'_>, interrupt: &Interrupt<'_>) -> Result<Area, Error> {
    let a = &kept.a[part.a_from as usize..part.a_to as usize];
    let b = &kept.b[part.b_from as usize..part.b_to as usize];
    let head = common_head(a, b, interrupt)?;
    let tail = common_tail(&a[head..], &b[head..], interrupt)? as i32;
    let head = head as i32;
    Ok(Area {
        a_from: part.a_from + head,
        a_to: part.a_to - tail,
        b_from: part.b_from + head,
        b_to: part.b_to - tail,
        minimal: part.minimal,
    })
}

/// Finds the point where an area without equal ends is cut.
fn split(
    part: Area,
    kept: Kept<'_>,
    cost_limit: i32,
    forward: &mut Front<'_>,
    backward: &mut Front<'_>,
    interrupt: &Interrupt<'_>,
) -> Result<Split, Error> {
    let Area {
        a_from,
        a_to,
        b_from,
        b_to,
        minimal,
    } = part;
    let (a, b) = (kept.a, kept.b);
    let (least, most) = (a_from - b_to, a_to - b_from);
    let (start, end) = (a_from - b_from, a_to - b_to);
    // The fronts can meet in a forward sweep only if start and end are an odd number of diagonals apart.
    let odd = (start - end) & 1 != 0;
    let (mut low, mut high) = (start, start);
    let (mut back_low, mut back_high) = (end, end);
    forward.set(start, a_from);
    backward.set(end, a_to);

    for cost in 1.. {
        // Each diagonal of both sweeps, which may be looked at twice more for a good point.
        interrupt.work(8 * cost as usize)?;
        let mut long_run = false;

        // One more edit from the start. Inside the area the sweep widens by a diagonal on each side, with a value
        // beyond it that never wins; at the border it narrows.
        if low > least {
            low -= 1;
            forward.set(low - 1, -1);
        } else {
            low += 1;
        }
        if high < most {
            high += 1;
            forward.set(high + 1, -1);
        } else {
            high -= 1;
        }
        let mut diagonal = high;
        while diagonal >= low {
            let (below, above) = (forward.get(diagonal - 1), forward.get(diagonal + 1));
            let from = if below >= above { below + 1 } else { above };
            let run = run_forward(a, b, from, from - diagonal, a_to, b_to);
            let reached = from + run;
            long_run |= run > RUN;
            if run > RUN {
                interrupt.work(run as usize)?;
            }
            forward.set(diagonal, reached);
            if odd
                && (back_low..=back_high).contains(&diagonal)
                && backward.get(diagonal) <= reached
            {
                return Ok(Split {
                    a: reached,
                    b: reached - diagonal,
                    minimal_before: true,
                    minimal_after: true,
                });
            }
            diagonal -= 2;
        }

        // One more edit from the end, mirrored.
        if back_low > least {
            back_low -= 1;
            backward.set(back_low - 1, i32::MAX);
        } else {
            back_low += 1;
        }
        if back_high < most {
            back_high += 1;
            backward.set(back_high + 1, i32::MAX);
        } else {
            back_high -= 1;
        }
        let mut diagonal = back_high;
        while diagonal >= back_low {
            let (below, above) = (backward.get(diagonal - 1), backward.get(diagonal + 1));
            let from = if below < above { below } else { above - 1 };
            let run = run_backward(a, b, from, from - diagonal, a_from, b_from);
            let reached = from - run;
            long_run |= run > RUN;
            if run > RUN {
                interrupt.work(run as usize)?;
            }
            backward.set(diagonal, reached);
            if !odd && (low..=high).contains(&diagonal) && reached <= forward.get(diagonal) {
                return Ok(Split {
                    a: reached,
                    b: reached - diagonal,
                    minimal_before: true,
                    minimal_after: true,
                });
            }
            diagonal -= 2;
        }

        if minimal {
            continue;
        }
        if long_run && cost > PATIENCE {
            if let Some((a, b)) = good_point_forward(part, kept, cost, forward, low, high) {
                return Ok(Split {
                    a,
                    b,
                    minimal_before: true,
                    minimal_after: false,
                });
            }
            if let Some((a, b)) =
                good_point_backward(part, kept, cost, backward, back_low, back_high)
            {
                return Ok(Split {
                    a,
                    b,
                    minimal_before: false,
                    minimal_after: true,
                });
            }
        }
        if cost >= cost_limit {
            return Ok(furthest_point(
                part,
                forward,
                (low, high),
                backward,
                (back_low, back_high),
            ));
        }
    }
    unreachable!("because the fronts meet after as many edits as the area has lines")
}

/// Equal lines from (a_at, b_at) on.
fn run_forward(a: &[u32], b: &[u32], a_at: i32, b_at: i32, a_to: i32, b_to: i32) -> i32 {
    if a_at >= a_to || b_at >= b_to {
        return 0;
    }
    let a = &a[a_at as usize..a_to as usize];
    let b = &b[b_at as usize..b_to as usize];
    a.iter().zip(b).take_while(|(a, b)| a == b).count() as i32
}

/// Equal lines just before (a_at, b_at).
fn run_backward(a: &[u32], b: &[u32], a_at: i32, b_at: i32, a_from: i32, b_from: i32) -> i32 {
    if a_at <= a_from || b_at <= b_from {
        return 0;
    }
    let a = &a[a_from as usize..a_at as usize];
    let b = &b[b_from as usize..b_at as usize];
    a.iter()
        .rev()
        .zip(b.iter().rev())
        .take_while(|(a, b)| a == b)
        .count() as i32
}

/// The point of the forward front that came furthest from the start, ends a run and lies well inside the area.
fn good_point_forward(
    part: Area,
    kept: Kept<'_>,
    cost: i32,
    front: &Front<'_>,
    low: i32,
    high: i32,
) -> Option<(i32, i32)> {
    let start = part.a_from - part.b_from;
    let (mut best, mut point) = (0, None);
    let mut diagonal = high;
    while diagonal >= low {
        let a = front.get(diagonal);
        let b = a - diagonal;
        let gain = (a - part.a_from) + (b - part.b_from) - (diagonal - start).abs();
        if gain > GAIN * cost
            && gain > best
            && (part.a_from + RUN..part.a_to).contains(&a)
            && (part.b_from + RUN..part.b_to).contains(&b)
            && kept.a[(a - RUN) as usize..a as usize] == kept.b[(b - RUN) as usize..b as usize]
        {
            best = gain;
            point = Some((a, b));
        }
        diagonal -= 2;
    }
    point
}

/// The same for the backward front, measured from the end.
fn good_point_backward(
    part: Area,
    kept: Kept<'_>,
    cost: i32,
    front: &Front<'_>,
    low: i32,
    high: i32,
) -> Option<(i32, i32)> {
    let end = part.a_to - part.b_to;
    let (mut best, mut point) = (0, None);
    let mut diagonal = high;
    while diagonal >= low {
        let a = front.get(diagonal);
        let b = a - diagonal;
        let gain = (part.a_to - a) + (part.b_to - b) - (diagonal - end).abs();
        if gain > GAIN * cost
            && gain > best
            && (part.a_from + 1..=part.a_to - RUN).contains(&a)
            && (part.b_from + 1..=part.b_to - RUN).contains(&b)
            && kept.a[a as usize..(a + RUN) as usize] == kept.b[b as usize..(b + RUN) as usize]
        {
            best = gain;
            point = Some((a, b));
        }
        diagonal -= 2;
    }
    point
}

/// The cost limit is reached: the point either front brought furthest, whichever came further.
fn furthest_point(
    part: Area,
    forward: &Front<'_>,
    (low, high): (i32, i32),
    backward: &Front<'_>,
    (back_low, back_high): (i32, i32),
) -> Split {
    let (mut ahead, mut ahead_a) = (-1, -1);
    let mut diagonal = high;
    while diagonal >= low {
        let mut a = forward.get(diagonal).min(part.a_to);
        let mut b = a - diagonal;
        if b > part.b_to {
            (a, b) = (part.b_to + diagonal, part.b_to);
        }
        if a + b > ahead {
            (ahead, ahead_a) = (a + b, a);
        }
        diagonal -= 2;
    }

    let (mut behind, mut behind_a) = (i32::MAX, i32::MAX);
    let mut diagonal = back_high;
    while diagonal >= back_low {
        let mut a = backward.get(diagonal).max(part.a_from);
        let mut b = a - diagonal;
        if b < part.b_from {
            (a, b) = (part.b_from + diagonal, part.b_from);
        }
        if a + b < behind {
            (behind, behind_a) = (a + b, a);
        }
        diagonal -= 2;
    }

    if (part.a_to + part.b_to) - behind < ahead - (part.a_from + part.b_from) {
        Split {
            a: ahead_a,
            b: ahead - ahead_a,
            minimal_before: true,
            minimal_after: false,
        }
    } else {
        Split {
            a: behind_a,
            b: behind - behind_a,
            minimal_before: false,
            minimal_after: true,
        }
    }
}
