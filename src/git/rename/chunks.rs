//! The chunks by which two blobs are compared, and a cache of them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

use crate::git::interrupt::STRIDE;
use crate::git::{Error, Interrupt, Oid};

/// Chunk numbers are below this.
pub(super) const CHUNK_NUMBERS: usize = 107_927;
/// A chunk without line feed ends after so many bytes.
const LONGEST_CHUNK: u32 = 64;
/// Bytes reported as work at once.
const PORTION: usize = STRIDE / 16;
/// A NUL among so many first bytes makes a blob binary.
const BINARY_PROBE: usize = 8000;

/// The chunks of a blob: chunk number and bytes in chunks of this number, each number once.
pub(super) type Chunks = [(u32, u32)];

/// Cuts blobs into chunks.
#[derive(Debug, Default)]
pub(super) struct Counter {
    /// Bytes by chunk number; all zero between calls.
    bytes: Vec<u32>,
    /// The numbers whose bytes are not zero.
    numbers: Vec<u32>,
}

impl Counter {
    /// The chunks of a blob, in no order.
    pub(super) fn count(
        &mut self,
        blob: &[u8],
        interrupt: &Interrupt<'_>,
    ) -> Result<Vec<(u32, u32)>, Error> {
        self.bytes.resize(CHUNK_NUMBERS, 0);
        self.numbers.clear();
        let text = memchr::memchr(0, &blob[..blob.len().min(BINARY_PROBE)]).is_none();

        // Two registers of 32 bits that are rolled through each other by seven bits for every byte.
        let (mut upper, mut lower, mut length) = (0_u32, 0_u32, 0);
        for (index, &byte) in blob.iter().enumerate() {
            if index % PORTION == 0
                && let Err(stop) = interrupt.work(PORTION.min(blob.len() - index))
            {
                self.take();
                return Err(stop);
            }
            if text && byte == b'\r' && blob.get(index + 1) == Some(&b'\n') {
                continue;
            }
            (upper, lower) = (
                (upper << 7 ^ lower >> 25).wrapping_add(u32::from(byte)),
                lower << 7 ^ upper >> 25,
            );
            length += 1;
            if length == LONGEST_CHUNK || byte == b'\n' {
                self.add(upper, lower, length);
                (upper, lower, length) = (0, 0, 0);
            }
        }
        if length > 0 {
            self.add(upper, lower, length);
        }

        Ok(self.take())
    }

    /// What was counted; nothing remains.
    fn take(&mut self) -> Vec<(u32, u32)> {
        let bytes = &mut self.bytes;
        self.numbers
            .iter()
            .map(|&number| (number, std::mem::take(&mut bytes[number as usize])))
            .collect()
    }

    fn add(&mut self, upper: u32, lower: u32, length: u32) {
        let number = upper.wrapping_add(lower.wrapping_mul(0x61)) % CHUNK_NUMBERS as u32;
        let bytes = &mut self.bytes[number as usize];
        if *bytes == 0 {
            self.numbers.push(number);
        }
        *bytes = bytes.saturating_add(length);
    }
}

/// Chunks by blob, in two generations: when the young one is full it becomes the old one, and the old one goes.
#[derive(Debug)]
pub(super) struct ChunkCache {
    pub(super) young: OidMap<Rc<Chunks>>,
    pub(super) old: OidMap<Rc<Chunks>>,
    used: usize,
    limit: usize,
}

impl ChunkCache {
    pub(super) fn new(bytes: usize) -> Self {
        ChunkCache {
            young: OidMap::default(),
            old: OidMap::default(),
            used: 0,
            limit: bytes / 2,
        }
    }

    pub(super) fn get(&mut self, oid: Oid) -> Option<Rc<Chunks>> {
        if let Some(chunks) = self.young.get(&oid) {
            return Some(Rc::clone(chunks));
        }
        let chunks = self.old.remove(&oid)?;
        self.insert(oid, Rc::clone(&chunks));
        Some(chunks)
    }

    pub(super) fn insert(&mut self, oid: Oid, chunks: Rc<Chunks>) {
        // A rough price of an entry beside its chunks.
        const ENTRY: usize = 96;
        let cost = size_of_val::<Chunks>(&chunks) + ENTRY;
        if self.used + cost > self.limit && !self.young.is_empty() {
            self.old = std::mem::take(&mut self.young);
            self.used = 0;
        }
        self.used += cost;
        self.young.insert(oid, chunks);
    }
}

/// A map by object.
pub(super) type OidMap<T> = HashMap<Oid, T, BuildHasherDefault<OidHasher>>;

/// Takes some bytes of the name of an object for its hash: they are as good as random.
#[derive(Debug, Default)]
pub(super) struct OidHasher(u64);

impl Hasher for OidHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_the_chunks_of_a_large_blob_can_be_interrupted_and_leaves_nothing_behind() {
        let blob = b"some line or other\n".repeat(1 << 18);
        let mut counter = Counter::default();
        Interrupt::check(blob.len(), |interrupt| {
            let counted = counter.count(&blob, interrupt);
            assert!(counter.bytes.iter().all(|&bytes| bytes == 0));
            counted.map(|_| ())
        });
    }
}
