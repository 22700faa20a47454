//! Moves groups of changed lines to where git shows them.
//!
//! A group of added (or removed) lines can often stand in several places: when the line before it equals its last
//! line it may move up by one, when the line after it equals its first line it may move down. On its way it may
//! meet another group and join it. Where it comes to rest decides who is blamed for the lines at both its ends:
//!
//! 1. a group that can stand beside a change in the other text does so, as far down as possible;
//! 2. otherwise the place is chosen by how the lines around both its ends are indented and where blank lines are;
//! 3. without a choice, or with equal scores, it stands as far down as possible.
//!
//! The other text is followed with a cursor: between the same two unchanged lines there is one group on each
//! side, either of which may be empty.

use std::cmp::Ordering;

use super::Text;
use super::lines::is_blank;
use crate::git::{Error, Interrupt};

/// How many places a group may be tried at by indentation, counted from the lowest.
const MOST_PLACES: usize = 100;
/// Indentation beyond this is taken for this.
const DEEPEST: i32 = 200;
/// Blanks at the start of a line that are reported as work at once.
const LONG_INDENT: usize = 1 << 16;
/// What it costs to move a group by a line, or to look at a line around it.
const STEP: usize = 8;
/// This many blank lines in a row are as good as the border of a block.
const MOST_BLANKS: i32 = 20;

/// One text with its flags: line `n` is changed when flag `n + 1` is set, the flags around are zero.
pub(super) struct Side<'a> {
    pub(super) text: Text<'a>,
    /// Lines that take part, the common tail left out.
    pub(super) count: usize,
    pub(super) flags: &'a mut [u8],
    /// When that is wished, the groups are left wherever they are.
    pub(super) interrupt: &'a Interrupt<'a>,
}

/// Changed lines `start..end` between two unchanged lines; often empty.
#[derive(Debug, Clone, Copy)]
struct Group {
    start: usize,
    end: usize,
}

/// Moves all groups of `own` to their places; the first `head` lines of `own` are unchanged.
pub(super) fn slide(own: &mut Side<'_>, other: &Side<'_>, head: usize) -> Result<(), Error> {
    // Groups of the other text may have moved up into the equal lines at the head; before them both texts are in
    // step.
    let head = memchr::memchr(1, &other.flags[1..=head]).unwrap_or(head);
    let mut group = own.group_from(head);
    let mut partner = other.group_from(head);
    loop {
        own.interrupt.work(STEP)?;
        if group.is_empty() {
            let Some(distance) = memchr::memchr(1, &own.flags[group.end + 1..=own.count]) else {
                return Ok(());
            };
            let start = group.end + distance;
            group = own.group_from(start);
            partner = other.skip_unchanged(partner, distance);
        }
        place(own, other, &mut group, &mut partner)?;
        match (own.next(group), other.next(partner)) {
            (Some(group_after), Some(partner_after)) => {
                (group, partner) = (group_after, partner_after)
            }
            _ => return Ok(()),
        }
    }
}

/// Moves one group, and what it joins, to its place.
fn place(
    own: &mut Side<'_>,
    other: &Side<'_>,
    group: &mut Group,
    partner: &mut Group,
) -> Result<(), Error> {
    let mut highest_end;
    let mut beside_change;
    // A group that has joined another one may reach further, so both ends are looked for again.
    loop {
        let length = group.len();
        while own.move_up(group)? {
            *partner = other.previous(*partner);
        }
        highest_end = group.end;
        beside_change = !partner.is_empty();
        while own.move_down(group)? {
            let Some(after) = other.next(*partner) else {
                break;
            };
            *partner = after;
            beside_change |= !partner.is_empty();
        }
        if group.len() == length {
            break;
        }
    }

    if group.end == highest_end {
        return Ok(());
    }
    if beside_change {
        while partner.is_empty() && own.move_up(group)? {
            *partner = other.previous(*partner);
        }
    } else {
        let end = best_end(own, *group, highest_end)?;
        while group.end > end && own.move_up(group)? {
            *partner = other.previous(*partner);
        }
    }
    Ok(())
}

impl Group {
    fn is_empty(self) -> bool {
        self.start == self.end
    }

    fn len(self) -> usize {
        self.end - self.start
    }
}

impl Side<'_> {
    fn changed(&self, line: usize) -> bool {
        self.flags[line + 1] != 0
    }

    /// The group that starts at a line after an unchanged one.
    fn group_from(&self, start: usize) -> Group {
        let mut end = start;
        while end < self.count && self.changed(end) {
            end += 1;
        }
        Group { start, end }
    }

    /// The group after the next unchanged line.
    fn next(&self, group: Group) -> Option<Group> {
        (group.end < self.count).then(|| self.group_from(group.end + 1))
    }

    /// The group before the unchanged line that stands before this one.
    fn previous(&self, group: Group) -> Group {
        // A group of the other text moved up by an unchanged line, so there is one here too.
        let end = group.start.saturating_sub(1);
        let mut start = end;
        while start > 0 && self.changed(start - 1) {
            start -= 1;
        }
        Group { start, end }
    }

    /// The group after a number of further unchanged lines.
    fn skip_unchanged(&self, group: Group, mut unchanged: usize) -> Group {
        let mut group = group;
        while unchanged > 0 {
            let stretch = &self.flags[group.end + 1..=self.count];
            let run =
                memchr::memchr(1, &stretch[..unchanged.min(stretch.len())]).unwrap_or(unchanged);
            // The groups between them are empty, as long as no flag is set.
            group = self.group_from((group.end + run).min(self.count));
            unchanged -= run;
        }
        group
    }

    fn equal(&self, first: usize, second: usize) -> bool {
        self.text.lines.hashes()[first] == self.text.lines.hashes()[second]
    }

    /// Moves a group up by one line, joining the group it meets.
    fn move_up(&mut self, group: &mut Group) -> Result<bool, Error> {
        self.interrupt.work(STEP)?;
        if group.start == 0 || !self.equal(group.start - 1, group.end - 1) {
            return Ok(false);
        }
        group.start -= 1;
        group.end -= 1;
        self.flags[group.start + 1] = 1;
        self.flags[group.end + 1] = 0;
        while group.start > 0 && self.changed(group.start - 1) {
            group.start -= 1;
        }
        Ok(true)
    }

    /// Moves a group down by one line, joining the group it meets.
    fn move_down(&mut self, group: &mut Group) -> Result<bool, Error> {
        self.interrupt.work(STEP)?;
        if group.end >= self.count || !self.equal(group.start, group.end) {
            return Ok(false);
        }
        self.flags[group.start + 1] = 0;
        self.flags[group.end + 1] = 1;
        group.start += 1;
        group.end += 1;
        while group.end < self.count && self.changed(group.end) {
            group.end += 1;
        }
        Ok(true)
    }

    /// How deep a line is indented, TAB going to multiples of 8; nothing for a blank line.
    fn indent(&self, line: usize) -> Result<Option<i32>, Error> {
        self.interrupt.work(STEP)?;
        let mut indent = 0;
        for (place, &byte) in (0..).zip(&self.text.bytes[self.text.lines.range(line as u32)]) {
            // A line may be nothing but carriage returns.
            if place % LONG_INDENT == LONG_INDENT - 1 {
                self.interrupt.work(LONG_INDENT)?;
            }
            match byte {
                b' ' => indent += 1,
                b'\t' => indent += 8 - indent % 8,
                other if !is_blank(other) => return Ok(Some(indent)),
                _ => {}
            }
            if indent >= DEEPEST {
                return Ok(Some(DEEPEST));
            }
        }
        Ok(None)
    }
}

/// The end a group of at least two places has where the lines around it are indented best.
fn best_end(own: &Side<'_>, group: Group, highest_end: usize) -> Result<usize, Error> {
    let length = group.len();
    // Moving up by more than the group is long only repeats what was seen.
    let first = highest_end
        .max(group.end.saturating_sub(length + 1))
        .max(group.end.saturating_sub(MOST_PLACES));
    let mut best: Option<(usize, Score)> = None;
    for end in first..=group.end {
        let mut score = Score::default();
        score.add_cut(own, end)?;
        score.add_cut(own, end - length)?;
        if best
            .as_ref()
            .is_none_or(|(_, least)| score.compare(least) != Ordering::Greater)
        {
            best = Some((end, score));
        }
    }
    Ok(best.map_or(group.end, |(end, _)| end))
}

/// How bad it is to cut a text before two lines; less is better.
#[derive(Debug, Default)]
struct Score {
    /// Indentation of the lines after both cuts: cuts before shallow lines are better.
    indent: i32,
    penalty: i32,
}

impl Score {
    /// Adds the cut before `line`, which may be the end of the text.
    fn add_cut(&mut self, own: &Side<'_>, line: usize) -> Result<(), Error> {
        let at_end = line >= own.count;
        let here = if at_end { None } else { own.indent(line)? };
        let (blanks_before, before) = look(own, &mut (0..line).rev())?;
        let (blanks_after, after) = look(own, &mut (line + 1..own.count))?;

        // The first line of the text and its end are poor places.
        if before.is_none() && blanks_before == 0 {
            self.penalty += 1;
        }
        if at_end {
            self.penalty += 21;
        }
        // Blank lines at a cut are good; those after it a little less.
        let blanks_after = if here.is_none() { 1 + blanks_after } else { 0 };
        let blanks = blanks_before + blanks_after;
        self.penalty += 6 * blanks_after - 30 * blanks;

        let indent = here.or(after);
        self.indent += indent.unwrap_or(-1);
        let (Some(indent), Some(before)) = (indent, before) else {
            return Ok(());
        };
        let beside_blank = blanks != 0;
        self.penalty += match indent.cmp(&before) {
            Ordering::Equal => 0,
            Ordering::Greater if beside_blank => 10,
            Ordering::Greater => -4,
            Ordering::Less if beside_blank => 17,
            // A line less indented than its neighbours on both sides, as `else` is, belongs to what follows.
            Ordering::Less if after.is_some_and(|after| after > indent) => 24,
            Ordering::Less => 23,
        };
        Ok(())
    }

    /// Indentation weighs more than all the rest together usually does.
    fn compare(&self, other: &Score) -> Ordering {
        let difference =
            60 * (self.indent - other.indent).signum() + (self.penalty - other.penalty);
        difference.cmp(&0)
    }
}

/// Blank lines in a direction, and the indentation of the first line that is not; too many count as the margin.
fn look(
    own: &Side<'_>,
    lines: &mut dyn Iterator<Item = usize>,
) -> Result<(i32, Option<i32>), Error> {
    let mut blanks = 0;
    for line in lines {
        if let Some(indent) = own.indent(line)? {
            return Ok((blanks, Some(indent)));
        }
        blanks += 1;
        if blanks == MOST_BLANKS {
            return Ok((blanks, Some(0)));
        }
    }
    Ok((blanks, None))
}
