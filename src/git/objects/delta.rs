//! Deltas: an object told as copies from its base and bytes of its own.
//!
//! A delta begins with the sizes of base and result as little-endian base-128 numbers. An
//! opcode with the high bit set copies: its low seven bits say which bytes of offset (four)
//! and length (three) follow, absent ones are zero, length zero means 65,536. Any other
//! opcode but zero is a number of literal bytes that follow.

use crate::git::Interrupt;
use crate::git::interrupt::STRIDE;

/// What an opcode costs beside its bytes.
const OPCODE: usize = 8;

/// The sizes of base and result, and how many bytes of the delta they take.
pub(super) fn sizes(delta: &[u8]) -> Option<(u64, u64, usize)> {
    let (base, first) = size(delta)?;
    let (result, second) = size(&delta[first..])?;
    Some((base, result, first + second))
}

fn size(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut size = 0_u64;
    for (index, &byte) in bytes.iter().take(9).enumerate() {
        size |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((size, index + 1));
        }
    }
    None
}

/// Applies `delta` to `base`; `Err` says what is wrong with it.
///
/// The caller has checked that the result's size is bearable.
pub(super) fn apply(
    base: &[u8],
    delta: &[u8],
    interrupt: &Interrupt<'_>,
) -> Result<Vec<u8>, &'static str> {
    let (base_size, result_size, header) = sizes(delta).ok_or("its delta has no sizes")?;
    if base_size != base.len() as u64 {
        return Err("its delta was made for a base of another size");
    }
    let result_size = result_size as usize;
    let mut result = Vec::with_capacity(result_size);
    let mut rest = &delta[header..];
    while let Some((&opcode, after)) = rest.split_first() {
        rest = after;
        let piece = if opcode & 0x80 != 0 {
            let mut operand = [0_u8; 7];
            for (bit, byte) in operand.iter_mut().enumerate() {
                if opcode >> bit & 1 != 0 {
                    let (&value, after) = rest.split_first().ok_or("its delta is cut short")?;
                    *byte = value;
                    rest = after;
                }
            }
            let [a, b, c, d, x, y, z] = operand;
            let from = u32::from_le_bytes([a, b, c, d]) as usize;
            let length = match u32::from_le_bytes([x, y, z, 0]) {
                0 => 0x1_0000,
                length => length as usize,
            };
            from.checked_add(length)
                .and_then(|to| base.get(from..to))
                .ok_or("its delta copies from outside its base")?
        } else if opcode != 0 {
            let (literal, after) = rest
                .split_at_checked(opcode as usize)
                .ok_or("its delta is cut short")?;
            rest = after;
            literal
        } else {
            return Err("its delta has an unknown opcode");
        };
        if piece.len() > result_size - result.len() {
            return Err("its delta makes more bytes than it says");
        }
        for part in piece.chunks(STRIDE / 2) {
            if interrupt.work(part.len() + OPCODE).is_err() {
                // Whoever reads on looks at the flag before anything else.
                return Err("it was not read to its end");
            }
            result.extend_from_slice(part);
        }
    }
    if result.len() != result_size {
        return Err("its delta makes fewer bytes than it says");
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::Error;

    fn apply(base: &[u8], delta: &[u8]) -> Result<Vec<u8>, &'static str> {
        super::apply(base, delta, &Interrupt::never())
    }

    #[test]
    fn copies_and_literals_make_the_result() {
        let base = b"hello world";
        // Sizes 11 and 10; copy 5 from 6; literal " you"; copy 1 from 4.
        let delta = [11, 10, 0x91, 6, 5, 4, b' ', b'y', b'o', b'u', 0x91, 4, 1];
        assert_eq!(apply(base, &delta).unwrap(), b"world youo");
    }

    #[test]
    fn applying_a_large_delta_can_be_interrupted() {
        // 4 MiB: a copy of 65,536 bytes 64 times.
        let base = vec![7; 65_536];
        let mut delta = vec![0x80, 0x80, 4, 0x80, 0x80, 0x80, 2];
        delta.extend([0x80; 64]);
        assert_eq!(apply(&base, &delta).unwrap(), vec![7; 4 << 20]);
        Interrupt::check(4 << 20, |interrupt| {
            let made = super::apply(&base, &delta, interrupt);
            made.map(|_| ()).map_err(|_| Error::Interrupted)
        });
    }

    #[test]
    fn broken_deltas_are_refused() {
        let base = b"hello world";
        for delta in [
            &[][..],
            &[0x80],
            &[11],
            &[10, 5, 0x91, 0, 5],
            &[11, 5, 0x91, 7, 5],
            &[11, 5, 0],
            &[11, 5, 4, b'a'],
            &[11, 5, 0x91, 0],
            &[11, 5, 0x91, 0, 6],
            &[11, 5, 0x91, 0, 4],
            &[11, 5, 0xff, 255, 255, 255, 255, 255, 255, 255],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert!(apply(base, delta).is_err(), "{delta:?}");
        }
    }

    #[test]
    fn any_bytes_never_panic() {
        let mut state = 1_u64;
        for length in 0..2000_usize {
            let mut delta: Vec<u8> = (0..length % 40)
                .map(|_| {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    (state >> 33) as u8
                })
                .collect();
            if delta.len() > 2 {
                delta[0] = 11;
                delta[1] &= 0x3f;
            }
            let _ = apply(b"hello world", &delta);
        }
    }
}
