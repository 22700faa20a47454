//! From the server's side band to the disk: one thread that reads, hashes, writes, and hands on.
//!
//! It runs beside the thread that parses the objects ([`super::pack`]), so that waiting for the network,
//! the checksum and the disk cost the parser nothing. A bounded channel between them holds the reader
//! back when parsing is slower than the network.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use std::sync::mpsc::SyncSender;

use super::conversation::Conversation;
use super::error::{Doing, Error, from_lack};
use super::pktline::{Packet, Packets};
use super::space::Space;
use crate::git::http::Response;
use crate::git::http::watch::Watch;

/// Bytes handed on at a time.
const CHUNK: usize = 256 * 1024;
/// Chunks waiting for the parser.
pub(super) const CHUNKS: usize = 16;
/// The checksum at the end of a pack.
pub(super) const TRAILER: usize = 20;

const RECEIVING: Doing = "receiving the pack";

/// Reads the pack from `packets` until the server's end mark, into `file` and `chunks`. Stops without
/// an error when nobody takes the chunks any more: then the parser has an error of its own.
pub(super) fn receive(
    conversation: &Conversation<'_>,
    mut packets: Packets<BufReader<Response>>,
    watch: &Watch,
    (mut file, path, space): (&File, &Path, &Space),
    chunks: &SyncSender<Vec<u8>>,
) -> Result<(), Error> {
    let mut checksum = Checksum::new();
    let mut at_end = false;
    let mut begun = false;
    while !at_end {
        let mut chunk = Vec::with_capacity(CHUNK + 64 * 1024);
        while chunk.len() < CHUNK {
            match packets.next_into(&mut chunk) {
                Ok(None) => {
                    if !begun {
                        watch.pack_begins();
                        begun = true;
                    }
                }
                Ok(Some(Packet::Data([2, ..] | []))) => {}
                Ok(Some(Packet::Data([3, message @ ..]))) => {
                    return Err(conversation.remote(&String::from_utf8_lossy(message)));
                }
                Ok(Some(Packet::Flush)) => {
                    at_end = true;
                    break;
                }
                Ok(Some(Packet::Data(_) | Packet::Delimiter | Packet::ResponseEnd)) => {
                    return Err(conversation.broken(RECEIVING, "it uses an unknown side band"));
                }
                Err(fault) => return Err(conversation.fault(fault, RECEIVING)),
            }
        }
        if chunk.is_empty() {
            break;
        }
        checksum.update(&chunk);
        space
            .admit(chunk.len() as u64)
            .map_err(|lack| from_lack(conversation.url(), path, lack))?;
        file.write_all(&chunk).map_err(|source| Error::Disk {
            doing: "writing the pack to",
            path: path.to_owned(),
            source,
        })?;
        if chunks.send(chunk).is_err() {
            return Ok(());
        }
    }
    match checksum.matches() {
        true => Ok(()),
        false => Err(Error::Pack {
            url: conversation.url().to_owned(),
            doing: RECEIVING,
            detail: "its checksum does not match its content".to_owned(),
        }),
    }
}

/// SHA-1 of everything but the last 20 bytes, which must be just that.
struct Checksum {
    hasher: gix::hash::Hasher,
    held: Vec<u8>,
}

impl Checksum {
    fn new() -> Checksum {
        Checksum {
            hasher: gix::hash::hasher(gix::hash::Kind::Sha1),
            held: Vec::with_capacity(2 * TRAILER),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match bytes.len().checked_sub(TRAILER) {
            Some(split) => {
                self.hasher.update(&self.held);
                self.hasher.update(&bytes[..split]);
                self.held.clear();
                self.held.extend_from_slice(&bytes[split..]);
            }
            None => {
                self.held.extend_from_slice(bytes);
                let surplus = self.held.len().saturating_sub(TRAILER);
                self.hasher.update(&self.held[..surplus]);
                self.held.drain(..surplus);
            }
        }
    }

    fn matches(self) -> bool {
        self.hasher
            .try_finalize()
            .is_ok_and(|id| id.as_slice() == self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_found_however_the_bytes_are_cut() {
        let content: Vec<u8> = (0..1000_u32).map(|value| (value % 251) as u8).collect();
        let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
        hasher.update(&content);
        let mut pack = content;
        pack.extend_from_slice(hasher.try_finalize().unwrap().as_slice());
        for size in [1, 3, 19, 20, 21, 40, 500, 1020] {
            let mut checksum = Checksum::new();
            pack.chunks(size).for_each(|piece| checksum.update(piece));
            assert!(checksum.matches(), "pieces of {size}");
        }
        pack[7] ^= 1;
        let mut checksum = Checksum::new();
        checksum.update(&pack);
        assert!(!checksum.matches());
        assert!(!Checksum::new().matches());
    }
}
