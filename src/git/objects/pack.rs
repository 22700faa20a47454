//! Packs and their indexes, memory-mapped.
//!
//! Index, version 2: `\377tOc`, version, 256 cumulative counts by first byte, the sorted
//! names, one checksum each, one 31-bit offset each (or, with the high bit set, the number of
//! a 64-bit one), 64-bit offsets, two checksums. A pack begins with `PACK`, version and
//! count, and ends with a checksum. Anything else is left to libgit2.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Kind;
use crate::git::{Error, Oid};

const INDEX_MAGIC: &[u8; 8] = b"\xfftOc\0\0\0\x02";
const FANOUT: usize = 8;
const NAMES: usize = FANOUT + 256 * 4;
const TRAILER: usize = 2 * Oid::LEN;
const PACK_HEADER: usize = 12;

/// How far from the first guess a name is usually found.
const NEAR: usize = 24;

/// All packs of a repository that could be mapped.
#[derive(Default)]
pub struct Packs {
    packs: Vec<Pack>,
}

/// Where an object lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pack: u32,
    offset: u64,
}

impl Place {
    /// One number for it, to be used as a cache key.
    pub(super) fn key(self) -> u64 {
        u64::from(self.pack) << 40 | self.offset
    }
}

/// How an object is stored.
pub(super) enum Storage {
    Whole(Kind),
    /// A delta of the object at that place.
    OffsetDelta(Place),
    /// A delta of the object with that name.
    NameDelta(Oid),
}

/// The head of a pack entry.
pub(super) struct Entry<'a> {
    pub(super) storage: Storage,
    /// The size of what inflates: the object or the delta.
    pub(super) size: u64,
    /// The deflated bytes, and whatever follows them in the pack.
    pub(super) deflated: &'a [u8],
}

struct Pack {
    index: Mmap,
    pack: Mmap,
    offsets: usize,
    large_offsets: usize,
}

impl Packs {
    /// Maps every pack below the directory of objects, in the order of their names.
    pub(in crate::git) fn open(objects: &Path) -> Result<Packs, Error> {
        let folder = objects.join("pack");
        let mut names: Vec<PathBuf> = match std::fs::read_dir(&folder) {
            Ok(entries) => entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "idx"))
                .collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                return Err(Error::Read {
                    path: folder,
                    source,
                });
            }
        };
        names.sort();
        let mut packs = Vec::new();
        for name in names {
            packs.extend(Pack::open(&name)?);
        }
        Ok(Packs { packs })
    }

    /// Looks an object up, trying the pack with the number `last` first.
    pub(super) fn find(&self, oid: &Oid, last: &mut u32) -> Option<Place> {
        let count = self.packs.len();
        for step in 0..count {
            let number = (*last as usize + step) % count;
            if let Some(offset) = self.packs[number].find(oid) {
                *last = number as u32;
                return Some(Place {
                    pack: number as u32,
                    offset,
                });
            }
        }
        None
    }

    /// Reads the head of the entry there; `Err` says what is wrong.
    pub(super) fn entry(&self, place: Place) -> Result<Entry<'_>, &'static str> {
        let outside = "its place is outside its pack";
        let pack = &self.packs[place.pack as usize].pack;
        let end = pack.len() - Oid::LEN;
        let start = usize::try_from(place.offset).map_err(|_| outside)?;
        if start < PACK_HEADER || start >= end {
            return Err(outside);
        }
        let mut rest = pack[start..end].iter();
        let cut = "its pack is cut short";
        let mut byte = *rest.next().ok_or(cut)?;
        let number = byte >> 4 & 7;
        let mut size = u64::from(byte & 0x0f);
        let mut shift = 4;
        while byte & 0x80 != 0 {
            byte = *rest.next().ok_or(cut)?;
            if shift > 56 {
                return Err("its size is beyond all bounds");
            }
            size |= u64::from(byte & 0x7f) << shift;
            shift += 7;
        }
        let storage = match number {
            1 => Storage::Whole(Kind::Commit),
            2 => Storage::Whole(Kind::Tree),
            3 => Storage::Whole(Kind::Blob),
            4 => Storage::Whole(Kind::Tag),
            6 => {
                let mut byte = *rest.next().ok_or(cut)?;
                let mut back = u64::from(byte & 0x7f);
                while byte & 0x80 != 0 {
                    byte = *rest.next().ok_or(cut)?;
                    if back >> 48 != 0 {
                        return Err("its base is beyond all bounds");
                    }
                    back = (back + 1) << 7 | u64::from(byte & 0x7f);
                }
                if back == 0 || back > place.offset {
                    return Err("its base lies outside its pack");
                }
                Storage::OffsetDelta(Place {
                    pack: place.pack,
                    offset: place.offset - back,
                })
            }
            7 => {
                let (name, after) = rest.as_slice().split_at_checked(Oid::LEN).ok_or(cut)?;
                rest = after.iter();
                Storage::NameDelta(Oid::from_bytes(name).ok_or(cut)?)
            }
            _ => return Err("its pack entry is of no known type"),
        };
        Ok(Entry {
            storage,
            size,
            deflated: rest.as_slice(),
        })
    }
}

impl Pack {
    /// `None`: not of the kind this module reads.
    fn open(index_path: &Path) -> Result<Option<Pack>, Error> {
        let (Some(index), Some(pack)) =
            (map(index_path)?, map(&index_path.with_extension("pack"))?)
        else {
            return Ok(None);
        };
        let fitting = index.len() >= NAMES + TRAILER
            && index.starts_with(INDEX_MAGIC)
            && pack.len() >= PACK_HEADER + Oid::LEN
            // Cache keys hold 40 bits of offset.
            && pack.len() < 1 << 40
            && pack.starts_with(b"PACK\0\0\0")
            && matches!(pack[7], 2 | 3);
        if !fitting {
            return Ok(None);
        }
        let count = number(&index, FANOUT + 255 * 4) as usize;
        let offsets = NAMES + count * (Oid::LEN + 4);
        let large_offsets = offsets + count * 4;
        let rising = (1..256)
            .all(|byte| number(&index, FANOUT + byte * 4 - 4) <= number(&index, FANOUT + byte * 4));
        if !rising || large_offsets + TRAILER > index.len() {
            return Ok(None);
        }
        Ok(Some(Pack {
            index,
            pack,
            offsets,
            large_offsets,
        }))
    }

    fn find(&self, oid: &Oid) -> Option<u64> {
        let first = oid.as_bytes()[0] as usize;
        let mut low = match first {
            0 => 0,
            _ => number(&self.index, FANOUT + first * 4 - 4) as usize,
        };
        let mut high = number(&self.index, FANOUT + first * 4) as usize;
        // Names are spread evenly, so the place can be guessed; a few guesses are enough, and
        // halving goes on where somebody has chosen names that mislead.
        let wanted = u64::from(number(oid.as_bytes(), 1));
        for guess in 0.. {
            if low >= high {
                return None;
            }
            let span = (high - low) as u64;
            let middle = match guess {
                0 => low + ((wanted * span) >> 32) as usize,
                _ => low + (high - low) / 2,
            };
            // The first guess is off by the square root of the span or so: look close by.
            match self.compare(middle, oid) {
                std::cmp::Ordering::Less => {
                    low = middle + 1;
                    let close = low + NEAR;
                    if guess == 0 && close < high && self.compare(close, oid).is_gt() {
                        high = close;
                    }
                }
                std::cmp::Ordering::Greater => {
                    high = middle;
                    let close = high.saturating_sub(NEAR);
                    if guess == 0 && close > low && self.compare(close, oid).is_lt() {
                        low = close;
                    }
                }
                std::cmp::Ordering::Equal => return self.offset(middle),
            }
        }
        None
    }

    /// Compares the name there with another one.
    fn compare(&self, position: usize, oid: &Oid) -> std::cmp::Ordering {
        let at = NAMES + position * Oid::LEN;
        let name = &self.index[at..at + Oid::LEN];
        // Nearly always the first bytes decide, and a number is compared without a call.
        let (ours, theirs) = (first(name), first(oid.as_bytes()));
        ours.cmp(&theirs)
            .then_with(|| name.cmp(&oid.as_bytes()[..]))
    }

    fn offset(&self, position: usize) -> Option<u64> {
        let offset = number(&self.index, self.offsets + position * 4);
        if offset >> 31 == 0 {
            return Some(u64::from(offset));
        }
        let at = self.large_offsets + (offset & 0x7fff_ffff) as usize * 8;
        if at + 8 + TRAILER > self.index.len() {
            return None;
        }
        let offset =
            u64::from(number(&self.index, at)) << 32 | u64::from(number(&self.index, at + 4));
        (offset < 1 << 40).then_some(offset)
    }
}

fn first(name: &[u8]) -> Option<u64> {
    name.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// The big-endian number there; the caller knows that it is inside.
fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `None`: there is no such file, or it is empty.
fn map(path: &Path) -> Result<Option<Mmap>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if file.metadata().map_err(failed)?.len() == 0 {
        return Ok(None);
    }
    #[expect(unsafe_code, reason = "there is no safe way to map a file")]
    // SAFETY: packs and indexes are written once under their final name and never changed in
    // place, by git as by ourselves; a pack that is deleted stays mapped. Every access is
    // bounds-checked against the length mapped here.
    let map = unsafe { Mmap::map(&file) };
    map.map(Some).map_err(failed)
}
