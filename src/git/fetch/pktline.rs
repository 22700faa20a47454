//! Packet lines: the frames of git's wire protocol.
//!
//! Four hexadecimal digits give the length of the frame, themselves included; 0000, 0001 and 0002 are
//! frames without content. Answers for gitprotocol-common.

use std::io::{self, Read};

/// One frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet<'a> {
    /// Content, at most 65516 bytes.
    Data(&'a [u8]),
    /// `0000`: the end of a message.
    Flush,
    /// `0001`: the end of a section.
    Delimiter,
    /// `0002`: the end of a response.
    ResponseEnd,
}

/// Why no frame could be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// The stream ended at the start of a frame.
    End,
    /// The stream failed or ended inside a frame.
    Io(io::Error),
    /// The four bytes are no length.
    Length,
}

/// Reads frames.
pub(super) struct Packets<R> {
    read: R,
    content: Vec<u8>,
}

impl<R: Read> Packets<R> {
    pub(super) fn new(read: R) -> Packets<R> {
        Packets {
            read,
            content: Vec::new(),
        }
    }

    /// The next frame.
    pub(super) fn next(&mut self) -> Result<Packet<'_>, Fault> {
        match self.length()? {
            Header::Content(length) => {
                self.content.resize(length, 0);
                self.read.read_exact(&mut self.content).map_err(Fault::Io)?;
                Ok(Packet::Data(&self.content))
            }
            Header::Special(packet) => Ok(packet),
        }
    }

    /// The next frame of a side band: its content is appended to `pack` when it is of band 1, without a
    /// copy in between. `None` says that just this happened.
    pub(super) fn next_into(&mut self, pack: &mut Vec<u8>) -> Result<Option<Packet<'_>>, Fault> {
        match self.length()? {
            Header::Content(0) => Ok(Some(Packet::Data(&[]))),
            Header::Content(length) => {
                let mut band = [0];
                self.read.read_exact(&mut band).map_err(Fault::Io)?;
                if band == [1] {
                    let start = pack.len();
                    pack.resize(start + length - 1, 0);
                    self.read
                        .read_exact(&mut pack[start..])
                        .map_err(Fault::Io)?;
                    return Ok(None);
                }
                self.content.resize(length, 0);
                self.content[0] = band[0];
                self.read
                    .read_exact(&mut self.content[1..])
                    .map_err(Fault::Io)?;
                Ok(Some(Packet::Data(&self.content)))
            }
            Header::Special(packet) => Ok(Some(packet)),
        }
    }

    /// The stream behind the frames.
    pub(super) fn into_inner(self) -> R {
        self.read
    }

    fn length(&mut self) -> Result<Header, Fault> {
        let mut digits = [0; 4];
        let mut filled = 0;
        while filled < digits.len() {
            match self.read.read(&mut digits[filled..]) {
                Ok(0) if filled == 0 => return Err(Fault::End),
                Ok(0) => return Err(Fault::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(amount) => filled += amount,
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Fault::Io(source)),
            }
        }
        let length = digits
            .iter()
            .try_fold(0_usize, |value, &digit| {
                Some(value * 16 + (digit as char).to_digit(16)? as usize)
            })
            .ok_or(Fault::Length)?;
        match length {
            0 => Ok(Header::Special(Packet::Flush)),
            1 => Ok(Header::Special(Packet::Delimiter)),
            2 => Ok(Header::Special(Packet::ResponseEnd)),
            4..=65520 => Ok(Header::Content(length - 4)),
            _ => Err(Fault::Length),
        }
    }
}

/// What the four digits announce.
enum Header {
    Content(usize),
    Special(Packet<'static>),
}

/// Appends a frame with this content.
pub(super) fn write(out: &mut Vec<u8>, content: &str) {
    out.extend_from_slice(format!("{:04x}", content.len() + 4).as_bytes());
    out.extend_from_slice(content.as_bytes());
}

/// Appends `0000`.
pub(super) fn write_flush(out: &mut Vec<u8>) {
    out.extend_from_slice(b"0000");
}

/// Appends `0001`.
pub(super) fn write_delimiter(out: &mut Vec<u8>) {
    out.extend_from_slice(b"0001");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_back_as_written() {
        let mut wire = Vec::new();
        write(&mut wire, "hello\n");
        write_delimiter(&mut wire);
        write(&mut wire, "");
        write_flush(&mut wire);
        let mut packets = Packets::new(wire.as_slice());
        assert_eq!(packets.next().unwrap(), Packet::Data(b"hello\n"));
        assert_eq!(packets.next().unwrap(), Packet::Delimiter);
        assert_eq!(packets.next().unwrap(), Packet::Data(b""));
        assert_eq!(packets.next().unwrap(), Packet::Flush);
        assert!(matches!(packets.next(), Err(Fault::End)));
    }

    #[test]
    fn lengths_that_are_none_are_faults() {
        for wire in ["0003", "fff1", "zzzz", "+123", "<htm", "-001"] {
            let mut packets = Packets::new(wire.as_bytes());
            assert!(matches!(packets.next(), Err(Fault::Length)), "{wire}");
        }
        for wire in ["0", "00", "0006a", "ffff"] {
            let mut packets = Packets::new(wire.as_bytes());
            assert!(
                matches!(packets.next(), Err(Fault::Io(_) | Fault::Length)),
                "{wire}"
            );
        }
    }

    #[test]
    fn any_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..5_000 {
            let wire: Vec<u8> = (0..round % 40)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    b"0123456789abcdef\x01\x02\xff\n"[(state % 20) as usize]
                })
                .collect();
            let mut packets = Packets::new(wire.as_slice());
            while packets.next().is_ok() {}
            let mut packets = Packets::new(wire.as_slice());
            let mut pack = Vec::new();
            while packets.next_into(&mut pack).is_ok() {}
            assert!(pack.len() <= wire.len() + 65_520);
        }
    }
}
