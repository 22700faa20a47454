//! What the ends of two texts have in common, in bytes and in lines.
//!
//! git sets the common tail aside before it looks at lines at all, in blocks of 1 KiB, and returns the part up
//! to the first LF. The lines set aside take part in nothing that follows: no group slides into them and they
//! are not counted, which changes where repeated blocks are seen as inserted.

use super::Text;
use crate::git::{Error, Interrupt};

/// The tail is compared and set aside in blocks of this many bytes.
const BLOCK: usize = 1024;

/// The line counts of both texts without the common tail that git sets aside.
pub(super) fn lines_before_tail(
    a: Text<'_>,
    b: Text<'_>,
    interrupt: &Interrupt<'_>,
) -> Result<(usize, usize), Error> {
    let shorter = a.bytes.len().min(b.bytes.len());
    let mut tail = 0;
    while tail + BLOCK <= shorter
        && a.bytes[a.bytes.len() - tail - BLOCK..a.bytes.len() - tail]
            == b.bytes[b.bytes.len() - tail - BLOCK..b.bytes.len() - tail]
    {
        tail += BLOCK;
        interrupt.work(BLOCK)?;
    }
    let set_aside = match memchr::memchr(b'\n', &a.bytes[a.bytes.len() - tail..]) {
        Some(line_feed) => tail - line_feed - 1,
        None => 0,
    };
    let count = |text: Text<'_>| {
        let end = text.bytes.len() - set_aside;
        // What is left ends with a line feed or is the whole text, so lines are not cut.
        text.lines
            .ends()
            .partition_point(|&line_end| line_end as usize <= end)
    };
    if set_aside == 0 {
        return Ok((a.lines.ends().len(), b.lines.ends().len()));
    }
    Ok((count(a), count(b)))
}

/// How many elements two slices have in common at the head.
pub(super) fn common_head<T: PartialEq>(
    a: &[T],
    b: &[T],
    interrupt: &Interrupt<'_>,
) -> Result<usize, Error> {
    let length = a.len().min(b.len());
    let (a, b) = (&a[..length], &b[..length]);
    let mut head = 0;
    // Whole blocks are compared as memory; the first unequal one is looked at closely.
    while head + BLOCK <= length && a[head..head + BLOCK] == b[head..head + BLOCK] {
        head += BLOCK;
        interrupt.work(BLOCK)?;
    }
    Ok(head
        + a[head..]
            .iter()
            .zip(&b[head..])
            .take_while(|(a, b)| a == b)
            .count())
}

/// How many elements two slices have in common at the tail.
pub(super) fn common_tail<T: PartialEq>(
    a: &[T],
    b: &[T],
    interrupt: &Interrupt<'_>,
) -> Result<usize, Error> {
    let length = a.len().min(b.len());
    let (a, b) = (&a[a.len() - length..], &b[b.len() - length..]);
    let mut left = length;
    while left >= BLOCK && a[left - BLOCK..left] == b[left - BLOCK..left] {
        left -= BLOCK;
        interrupt.work(BLOCK)?;
    }
    Ok(length - left
        + a[..left]
            .iter()
            .rev()
            .zip(b[..left].iter().rev())
            .take_while(|(a, b)| a == b)
            .count())
}

#[cfg(test)]
mod tests {
    use super::super::{Lines, Whitespace};
    use super::*;

    fn counts(a: &[u8], b: &[u8]) -> (usize, usize) {
        let (a_lines, b_lines) = (
            Lines::of(a, Whitespace::Exact),
            Lines::of(b, Whitespace::Exact),
        );
        lines_before_tail(
            Text {
                bytes: a,
                lines: &a_lines,
            },
            Text {
                bytes: b,
                lines: &b_lines,
            },
            &Interrupt::never(),
        )
        .unwrap()
    }

    #[test]
    fn tail_shorter_than_a_block_stays() {
        let tail = "x\n".repeat(500);
        assert_eq!(
            counts(
                format!("a\n{tail}").as_bytes(),
                format!("b\n{tail}").as_bytes()
            ),
            (501, 501)
        );
    }

    #[test]
    fn first_line_of_the_tail_stays() {
        let tail = "x\n".repeat(1024);
        let (a, b) = (format!("a\n{tail}"), format!("b\nc\n{tail}"));
        // Two blocks of 512 lines are common, and the first line of them is given back.
        assert_eq!(counts(a.as_bytes(), b.as_bytes()), (2, 3));
    }

    #[test]
    fn tail_without_line_feed_stays() {
        let tail = "x".repeat(5000);
        assert_eq!(
            counts(
                format!("a\n{tail}").as_bytes(),
                format!("b\nc\n{tail}").as_bytes()
            ),
            (2, 3)
        );
    }

    #[test]
    fn common_ends_are_counted_across_blocks() {
        for length in [0, 1, 1023, 1024, 1025, 3000] {
            let same = vec![7_u8; length];
            let (front, back) = ([&[1], &same[..]].concat(), [&[2, 3], &same[..]].concat());
            let never = Interrupt::never();
            assert_eq!(common_tail(&front, &back, &never).unwrap(), length);
            let (front, back) = ([&same[..], &[1]].concat(), [&same[..], &[2, 3]].concat());
            assert_eq!(common_head(&front, &back, &never).unwrap(), length);
            assert_eq!(common_head(&same, &same, &never).unwrap(), length);
        }
    }
}
