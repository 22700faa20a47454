//! What crosses the sockets between parent and child: a length (u32, big endian) and JSON.
//!
//! Jobs may hold a token, so every buffer that held an order is wiped: the writer's before it
//! grows or goes, the reader's as soon as the frame is parsed. Reports hold nothing secret and may
//! be large; their buffers are not. The reader trusts no length: it refuses what is over its limit
//! and grows only as bytes arrive.

use std::io::{self, Read, Write};

use secrecy::zeroize::Zeroize;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;
use super::job::{Failure, Job};
use super::sandbox::Sandbox;

/// The longest frame, in bytes: a result with some hundred thousand contributors.
pub(super) const LIMIT: usize = 64 << 20;

/// The length in front of every frame.
const HEADER: usize = 4;

/// A buffer that is kept for the next frame; a larger one is given back.
const KEEP: usize = 64 << 10;

/// From the parent on the jobs socket.
#[derive(Serialize, Deserialize)]
pub(super) enum Order {
    /// First frame: who the child is and how it locks itself in.
    Setup {
        name: String,
        sandbox: Sandbox,
        /// As [`log::LevelFilter`] counts, 0 = off.
        log_level: u8,
    },
    /// Work. The sequence number starts at 1 for each child.
    Job { sequence: u64, job: Job },
}

/// From the parent on the control socket, which is read while a job runs.
#[derive(Serialize, Deserialize)]
pub(super) enum Control {
    /// The soft limit of this job is over. A job that has ended meanwhile is not meant.
    SoftLimit { sequence: u64 },
}

/// From the child on the jobs socket.
#[derive(Serialize, Deserialize)]
pub(super) enum Report {
    /// Setup is done; what the sandbox could not do is told once.
    Ready { warnings: Vec<String> },
    /// Whatever the handler reports.
    Progress(Value),
    /// A line for the log; the level as [`log::Level`] counts, 1 = error.
    Log { level: u8, text: String },
    /// The job is done.
    Success(Value),
    /// The job failed; `last` says that the child is leaving (it panicked).
    Failure { failure: Failure, last: bool },
}

/// One frame with its header.
pub(super) struct Encoded(Buffer);

impl Encoded {
    /// Encodes a message of at most `limit` bytes.
    pub(super) fn new(
        message: &impl Serialize,
        limit: usize,
        secrecy: Secrecy,
    ) -> Result<Encoded, Error> {
        let mut buffer = Buffer::new(secrecy);
        buffer.bytes.reserve(1024);
        buffer.bytes.extend_from_slice(&[0; HEADER]);
        serde_json::to_writer(&mut buffer, message).map_err(Error::Malformed)?;
        let length = buffer.bytes.len() - HEADER;
        match u32::try_from(length) {
            Ok(announced) if length <= limit => {
                buffer.bytes[..HEADER].copy_from_slice(&announced.to_be_bytes());
                Ok(Encoded(buffer))
            }
            _ => Err(Error::FrameTooLong { length, limit }),
        }
    }

    /// Header and body.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }
}

/// What becomes of a buffer's bytes when it is done with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrecy {
    /// They are overwritten: orders hold tokens.
    Wipe,
    /// Nothing: reports hold no secrets.
    Plain,
}

/// A vector that leaves, if asked to, no copy of its bytes behind when it grows or is dropped.
struct Buffer {
    bytes: Vec<u8>,
    secrecy: Secrecy,
}

impl Buffer {
    fn new(secrecy: Secrecy) -> Buffer {
        let bytes = Vec::new();
        Buffer { bytes, secrecy }
    }

    fn reserve(&mut self, more: usize) {
        let wanted = self.bytes.len() + more;
        if wanted > self.bytes.capacity() {
            let mut larger = Vec::with_capacity(wanted.next_power_of_two());
            larger.extend_from_slice(&self.bytes);
            let mut old = std::mem::replace(&mut self.bytes, larger);
            self.wipe(&mut old);
        }
    }

    fn wipe(&self, bytes: &mut [u8]) {
        if self.secrecy == Secrecy::Wipe {
            bytes.zeroize();
        }
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reserve(bytes.len());
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.wipe(&mut bytes);
    }
}

/// Collects bytes and hands out the messages in them.
pub(super) struct Decoder {
    buffer: Buffer,
    /// Bytes of `buffer` that are filled.
    filled: usize,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses frames of more than `limit` bytes.
    pub(super) fn new(limit: usize, secrecy: Secrecy) -> Decoder {
        Decoder {
            buffer: Buffer::new(secrecy),
            filled: 0,
            limit,
        }
    }

    /// Room for more bytes; say with [`Decoder::filled`] how many arrived.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let length = self.buffer.bytes.len();
        if length - self.filled < 2048 {
            // Doubling what has arrived, not what was announced: a lying header costs nothing.
            let more = length.max(4096);
            self.buffer.reserve(more);
            self.buffer.bytes.resize(length + more, 0);
        }
        &mut self.buffer.bytes[self.filled..]
    }

    /// Takes note of bytes that were put into [`Decoder::space`].
    pub(super) fn filled(&mut self, count: usize) {
        self.filled = (self.filled + count).min(self.buffer.bytes.len());
    }

    /// The next complete message, if there is one.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let Some(header) = self.buffer.bytes[..self.filled].first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header) as usize;
        if length > self.limit {
            return Err(Error::FrameTooLong {
                length,
                limit: self.limit,
            });
        }
        let end = HEADER + length;
        if self.filled < end {
            return Ok(None);
        }
        let message =
            serde_json::from_slice(&self.buffer.bytes[HEADER..end]).map_err(Error::Malformed);
        self.forget(end);
        message.map(Some)
    }

    /// Wipes the first `end` bytes and moves what follows to the front.
    fn forget(&mut self, end: usize) {
        self.buffer.bytes.copy_within(end..self.filled, 0);
        let rest = self.filled - end;
        if self.buffer.secrecy == Secrecy::Wipe {
            self.buffer.bytes[rest..self.filled].zeroize();
        }
        self.filled = rest;
        if rest == 0 && self.buffer.bytes.len() > KEEP {
            self.buffer = Buffer::new(self.buffer.secrecy);
        }
    }

    /// Reads from a blocking socket until a message is complete; `None` at its end.
    pub(super) fn read<T: DeserializeOwned>(
        &mut self,
        mut socket: impl Read,
    ) -> Result<Option<T>, Error> {
        loop {
            if let Some(message) = self.next()? {
                return Ok(Some(message));
            }
            match socket.read(self.space()) {
                Ok(0) => return Ok(None),
                Ok(count) => self.filled(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(source) => {
                    return Err(Error::Socket {
                        operation: "read",
                        source,
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn decode(bytes: &[u8], step: usize) -> Result<Vec<Value>, Error> {
        let mut decoder = Decoder::new(1 << 20, Secrecy::Wipe);
        let mut messages = Vec::new();
        for chunk in bytes.chunks(step) {
            decoder.space()[..chunk.len()].copy_from_slice(chunk);
            decoder.filled(chunk.len());
            while let Some(message) = decoder.next()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    #[test]
    fn messages_survive_any_cutting_of_the_stream() {
        let messages = [
            json!({"a": 1}),
            json!("x".repeat(9000)),
            json!(null),
            json!([1.5]),
        ];
        let mut bytes = Vec::new();
        for message in &messages {
            let frame = Encoded::new(message, LIMIT, Secrecy::Wipe).expect("because it is short");
            bytes.extend_from_slice(frame.bytes());
        }
        for step in [1, 2, 3, 7, 1000] {
            assert_eq!(
                decode(&bytes, step).expect("because they are valid"),
                messages
            );
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_on_both_sides() {
        assert!(matches!(
            Encoded::new(&json!("four bytes and more"), 4, Secrecy::Wipe),
            Err(Error::FrameTooLong {
                length: 21,
                limit: 4
            })
        ));
        assert!(matches!(
            decode(&[0xff; 8], 8),
            Err(Error::FrameTooLong { .. })
        ));
    }

    #[test]
    fn any_bytes_never_panic() {
        let mut state = 1_u64;
        for _ in 0..2000 {
            let mut bytes = Vec::new();
            for _ in 0..(state % 40) {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                bytes.push(if bytes.len() < 3 {
                    0
                } else {
                    (state >> 33) as u8
                });
            }
            state = state.wrapping_add(1);
            let _ = decode(&bytes, 5);
        }
    }

    #[test]
    fn a_frame_is_wiped_from_the_readers_buffer_once_it_is_parsed() {
        let frame = Encoded::new(&json!("s3cr3t-token"), LIMIT, Secrecy::Wipe)
            .expect("because it is short");
        let mut decoder = Decoder::new(LIMIT, Secrecy::Wipe);
        decoder.space()[..frame.bytes().len()].copy_from_slice(frame.bytes());
        decoder.filled(frame.bytes().len());
        let value: Option<Value> = decoder.next().expect("because it is valid");
        assert_eq!(value, Some(json!("s3cr3t-token")));
        assert!(decoder.buffer.bytes.iter().all(|byte| *byte == 0));
    }
}
