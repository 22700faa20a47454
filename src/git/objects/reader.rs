//! One thread's view of the objects: packs, caches and scratch memory.

use std::cell::OnceCell;
use std::io::Read as _;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use libdeflater::Decompressor;

use super::cache::Cache;
use super::delta;
use super::pack::{Entry, Place, Storage};
use super::{Kind, Packs};
use crate::git::interrupt::STRIDE;
use crate::git::line_diff::Lines;
use crate::git::tree::Starts;
use crate::git::{Error, Interrupt, Oid, Repository};

/// git writes chains of at most 4,095 deltas.
const LONGEST_CHAIN: usize = 4_096;

/// Deltas up to this size are inflated whole to learn the size of their result.
const SMALL_DELTA: u64 = 64 * 1024;

/// Places remembered by a reader.
const PLACES: usize = 1 << 12;

/// Larger objects are inflated in steps.
const LARGE: usize = 8 << 20;

/// Loose objects from this size on are read in steps.
const LARGE_LOOSE: u64 = 1 << 20;

/// Bytes inflated at once then.
const STEP: usize = STRIDE / 2;

/// What an object may weigh.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest commit or tree.
    pub structure_bytes: u64,
    /// The largest blob, intermediate results of deltas included.
    pub blob_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            structure_bytes: 128 << 20,
            blob_bytes: 512 << 20,
        }
    }
}

/// An object's bytes, and its lines once somebody has asked for them.
#[derive(Debug)]
pub struct Object {
    /// What the object holds, without git's header.
    pub bytes: Vec<u8>,
    /// The tokens of the bytes; kept here so that they live as long as the cached object.
    pub lines: OnceCell<Lines>,
    /// The same for trees.
    pub starts: OnceCell<Starts>,
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Object {
    fn new(bytes: Vec<u8>) -> Rc<Object> {
        Rc::new(Object {
            bytes,
            lines: OnceCell::new(),
            starts: OnceCell::new(),
        })
    }
}

/// What a reader has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Objects asked for.
    pub asked: u64,
    /// Objects made, those on the way to others included.
    pub made: u64,
    /// Bytes that came out of deflated streams.
    pub inflated_bytes: u64,
    /// Bytes of the objects made.
    pub made_bytes: u64,
}

/// Reads objects for one thread.
pub struct Reader<'a> {
    repository: &'a Repository,
    packs: &'a Packs,
    loose: Option<git2::Odb<'static>>,
    last_pack: u32,
    /// Where objects lie that were looked up lately, by some bits of their names.
    places: Vec<(Oid, Option<Place>)>,
    blobs: Cache<u64, Rc<Object>>,
    trees: Cache<u64, Rc<Object>>,
    /// What libgit2 had to read.
    others: Cache<Oid, Rc<Object>>,
    inflater: Decompressor,
    scratch: Vec<u8>,
    chain: Vec<Place>,
    limits: Limits,
    interrupt: Interrupt<'a>,
    counters: Counters,
}

/// Where to continue after one step along a chain of deltas.
enum Found {
    Object(Rc<Object>),
    Place(Place),
}

impl<'a> Reader<'a> {
    /// A reader whose caches hold about `cache_bytes`; it stops when `interrupt` is set.
    pub fn new(
        repository: &'a Repository,
        cache_bytes: usize,
        limits: Limits,
        interrupt: &'a AtomicBool,
    ) -> Reader<'a> {
        Reader {
            repository,
            packs: repository.packs(),
            loose: None,
            last_pack: 0,
            places: vec![(Oid::new([0; 20]), None); PLACES],
            blobs: Cache::new(cache_bytes / 8 * 5),
            trees: Cache::new(cache_bytes / 4),
            others: Cache::new(cache_bytes / 8),
            inflater: Decompressor::new(),
            scratch: Vec::new(),
            chain: Vec::new(),
            limits,
            interrupt: Interrupt::new(interrupt),
            counters: Counters::default(),
        }
    }

    /// The bytes of a commit.
    pub fn commit(&mut self, oid: Oid) -> Result<Rc<Object>, Error> {
        self.object(oid, Kind::Commit)
    }

    /// The bytes of a tree.
    pub fn tree(&mut self, oid: Oid) -> Result<Rc<Object>, Error> {
        self.object(oid, Kind::Tree)
    }

    /// The bytes of a blob.
    pub fn blob(&mut self, oid: Oid) -> Result<Rc<Object>, Error> {
        self.object(oid, Kind::Blob)
    }

    /// The size of a blob, without making it if that can be avoided.
    pub fn blob_size(&mut self, oid: Oid) -> Result<u64, Error> {
        self.check_interrupt()?;
        let Some(place) = self.place(oid) else {
            if let Some(object) = self.others.get(oid, weight) {
                return Ok(object.bytes.len() as u64);
            }
            return self.ask_libgit2(oid, Kind::Blob, |odb, name| {
                odb.read_header(name)
                    .map(|(size, kind)| (kind, size as u64))
            });
        };
        if let Some(object) = self.blobs.get(place.key(), weight) {
            return Ok(object.bytes.len() as u64);
        }
        let corrupt = |reason: &str| Error::Corrupt {
            oid,
            reason: reason.to_owned(),
        };
        let entry = self.packs.entry(place).map_err(corrupt)?;
        match entry.storage {
            Storage::Whole(Kind::Blob) => Ok(entry.size),
            Storage::Whole(kind) => Err(corrupt(&wrong_kind(kind, Kind::Blob))),
            _ if entry.size <= SMALL_DELTA => {
                let delta = self.inflate_delta(oid, &entry)?;
                delta::sizes(delta)
                    .map(|(_, size, _)| size)
                    .ok_or_else(|| corrupt("its delta has no sizes"))
            }
            _ => Ok(self.blob(oid)?.bytes.len() as u64),
        }
    }

    /// Tells the cache that blobs it holds have become heavier, by their tokens.
    pub fn grown(&mut self, bytes: usize) {
        self.blobs.grow(bytes);
    }

    /// The same for trees.
    pub fn tree_grown(&mut self, bytes: usize) {
        self.trees.grow(bytes);
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The flag that says so, for long work on what was read.
    pub fn interrupt(&self) -> &Interrupt<'a> {
        &self.interrupt
    }

    /// An error if the caller wants everything to stop.
    pub fn check_interrupt(&self) -> Result<(), Error> {
        self.interrupt.look()
    }

    /// Work that was ended by the flag looks like an error.
    fn unless_interrupted(&self, error: Error) -> Error {
        match self.check_interrupt() {
            Err(interrupted) => interrupted,
            Ok(()) => error,
        }
    }

    fn object(&mut self, oid: Oid, kind: Kind) -> Result<Rc<Object>, Error> {
        self.counters.asked += 1;
        match self.place(oid) {
            Some(place) => self.packed(oid, place, kind),
            None => self.unpacked(oid, kind),
        }
    }

    /// Looks an object up in the packs; the trees of neighbouring commits are asked for again and again.
    fn place(&mut self, oid: Oid) -> Option<Place> {
        let [.., high, low] = *oid.as_bytes();
        let slot = usize::from(u16::from_be_bytes([high, low])) % PLACES;
        if let (known, Some(place)) = self.places[slot]
            && known == oid
        {
            return Some(place);
        }
        let place = self.packs.find(&oid, &mut self.last_pack)?;
        self.places[slot] = (oid, Some(place));
        Some(place)
    }

    /// Follows the chain of deltas down to something known, then applies them upwards.
    fn packed(&mut self, oid: Oid, place: Place, kind: Kind) -> Result<Rc<Object>, Error> {
        let mut chain = std::mem::take(&mut self.chain);
        chain.clear();
        let made = self.follow(oid, place, kind, &mut chain);
        self.chain = chain;
        made
    }

    fn follow(
        &mut self,
        oid: Oid,
        mut place: Place,
        kind: Kind,
        chain: &mut Vec<Place>,
    ) -> Result<Rc<Object>, Error> {
        let mut object = loop {
            match self.step(oid, place, kind, !chain.is_empty())? {
                Found::Object(object) => break object,
                Found::Place(base) => {
                    chain.push(place);
                    place = base;
                }
            }
            if chain.len() > LONGEST_CHAIN {
                return Err(Error::Corrupt {
                    oid,
                    reason: format!("its chain of deltas is longer than {LONGEST_CHAIN}"),
                });
            }
        };
        while let Some(place) = chain.pop() {
            self.check_interrupt()?;
            object = self.apply(oid, place, kind, &object)?;
        }
        Ok(object)
    }

    fn step(&mut self, oid: Oid, place: Place, kind: Kind, is_base: bool) -> Result<Found, Error> {
        if let Some(object) = self.cache(kind).get(place.key(), weight) {
            return Ok(Found::Object(object));
        }
        let corrupt = |reason: &str| Error::Corrupt {
            oid,
            reason: reason.to_owned(),
        };
        let entry = self.packs.entry(place).map_err(corrupt)?;
        match entry.storage {
            Storage::Whole(stored) if stored == kind => {
                self.check_size(oid, kind, entry.size)?;
                let mut bytes = vec![0; entry.size as usize];
                self.inflate(oid, &entry, &mut bytes)?;
                if kind == Kind::Commit && !is_base {
                    // Nobody asks for a commit twice.
                    self.counters.made += 1;
                    self.counters.made_bytes += entry.size;
                    return Ok(Found::Object(Object::new(bytes)));
                }
                Ok(Found::Object(self.keep(place, kind, bytes)))
            }
            Storage::Whole(stored) => Err(corrupt(&wrong_kind(stored, kind))),
            Storage::OffsetDelta(base) => Ok(Found::Place(base)),
            Storage::NameDelta(base) => match self.place(base) {
                Some(place) => Ok(Found::Place(place)),
                None => self.unpacked(base, kind).map(Found::Object),
            },
        }
    }

    fn apply(
        &mut self,
        oid: Oid,
        place: Place,
        kind: Kind,
        base: &Object,
    ) -> Result<Rc<Object>, Error> {
        let corrupt = |reason: &str| Error::Corrupt {
            oid,
            reason: reason.to_owned(),
        };
        let entry = self.packs.entry(place).map_err(corrupt)?;
        self.check_size(oid, kind, entry.size)?;
        let delta = self.inflate_delta(oid, &entry)?;
        let (_, size, _) = delta::sizes(delta).ok_or_else(|| corrupt("its delta has no sizes"))?;
        self.check_size(oid, kind, size)?;
        let delta = &self.scratch[..entry.size as usize];
        let bytes = delta::apply(&base.bytes, delta, &self.interrupt)
            .map_err(|reason| self.unless_interrupted(corrupt(reason)))?;
        Ok(self.keep(place, kind, bytes))
    }

    /// Inflates an entry of as many bytes as `to` has.
    fn inflate(&mut self, oid: Oid, entry: &Entry<'_>, to: &mut [u8]) -> Result<(), Error> {
        inflate(&mut self.inflater, entry.deflated, to, &self.interrupt).map_err(|reason| {
            self.unless_interrupted(Error::Corrupt {
                oid,
                reason: reason.to_owned(),
            })
        })?;
        self.counters.inflated_bytes += entry.size;
        Ok(())
    }

    /// The same into the start of the scratch memory, whose size the caller has checked.
    fn inflate_delta(&mut self, oid: Oid, entry: &Entry<'_>) -> Result<&[u8], Error> {
        let size = entry.size as usize;
        let mut scratch = std::mem::take(&mut self.scratch);
        if scratch.len() < size {
            scratch = vec![0; size];
        }
        let inflated = self.inflate(oid, entry, &mut scratch[..size]);
        self.scratch = scratch;
        inflated?;
        Ok(&self.scratch[..size])
    }

    fn keep(&mut self, place: Place, kind: Kind, bytes: Vec<u8>) -> Rc<Object> {
        self.counters.made += 1;
        self.counters.made_bytes += bytes.len() as u64;
        let object = Object::new(bytes);
        self.cache(kind)
            .insert(place.key(), Rc::clone(&object), weight(&object));
        object
    }

    fn cache(&mut self, kind: Kind) -> &mut Cache<u64, Rc<Object>> {
        match kind {
            Kind::Blob => &mut self.blobs,
            _ => &mut self.trees,
        }
    }

    fn check_size(&self, oid: Oid, kind: Kind, size: u64) -> Result<(), Error> {
        let limit = match kind {
            Kind::Blob => self.limits.blob_bytes,
            _ => self.limits.structure_bytes,
        };
        if size > limit {
            return Err(Error::TooLarge { oid, size, limit });
        }
        Ok(())
    }

    /// Loose objects, alternates and packs of other forms.
    fn unpacked(&mut self, oid: Oid, kind: Kind) -> Result<Rc<Object>, Error> {
        if let Some(object) = self.others.get(oid, weight) {
            return Ok(object);
        }
        let size = self.ask_libgit2(oid, kind, |odb, name| {
            odb.read_header(name)
                .map(|(size, kind)| (kind, size as u64))
        })?;
        self.check_size(oid, kind, size)?;
        let streamed = match size {
            0..LARGE_LOOSE => None,
            _ => self.stream(oid, kind, size as usize)?,
        };
        let bytes = match streamed {
            Some(bytes) => bytes,
            None => self.ask_libgit2(oid, kind, |odb, name| {
                odb.read(name)
                    .map(|object| (object.kind(), object.data().to_vec()))
            })?,
        };
        self.counters.made += 1;
        self.counters.made_bytes += size;
        let object = Object::new(bytes);
        self.others.insert(oid, Rc::clone(&object), weight(&object));
        Ok(object)
    }

    /// Reads a large loose object piece by piece; `None` when it lies elsewhere, where libgit2 can only read it
    /// as a whole.
    fn stream(&mut self, oid: Oid, kind: Kind, size: usize) -> Result<Option<Vec<u8>>, Error> {
        let corrupt = |reason: String| Error::Corrupt { oid, reason };
        let name = oid.to_string();
        let path = self.repository.objects().join(&name[..2]).join(&name[2..]);
        let Ok(file) = std::fs::File::open(path) else {
            return Ok(None);
        };
        let mut stream = flate2::read::ZlibDecoder::new(file);
        let mut header = vec![0; format!("{} {size}\0", kind.word()).len()];
        let mut bytes = vec![0; size];
        let unreadable = |error: std::io::Error| corrupt(format!("its file: {error}"));
        stream.read_exact(&mut header).map_err(unreadable)?;
        for piece in bytes.chunks_mut(STEP) {
            self.interrupt.work(piece.len())?;
            stream.read_exact(piece).map_err(unreadable)?;
        }
        Ok(Some(bytes))
    }

    fn ask_libgit2<T>(
        &mut self,
        oid: Oid,
        kind: Kind,
        question: impl Fn(&git2::Odb<'static>, git2::Oid) -> Result<(git2::ObjectType, T), git2::Error>,
    ) -> Result<T, Error> {
        let refused = |error: git2::Error| match error.code() {
            git2::ErrorCode::NotFound => Error::Missing { oid },
            _ => Error::Corrupt {
                oid,
                reason: error.message().to_owned(),
            },
        };
        let odb = match self.loose.take() {
            Some(odb) => odb,
            None => self.repository.odb().map_err(refused)?,
        };
        let odb = self.loose.insert(odb);
        let name = git2::Oid::from_bytes(oid.as_bytes()).map_err(refused)?;
        let (stored, answer) = question(odb, name).map_err(refused)?;
        if stored.str() != kind.word() {
            return Err(Error::Corrupt {
                oid,
                reason: format!("it is a {}, not a {}", stored.str(), kind.word()),
            });
        }
        Ok(answer)
    }
}

/// About what the allocator and the cache need for an object.
const MANAGEMENT: usize = 192;

/// What an object weighs in the cache.
fn weight(object: &Rc<Object>) -> usize {
    let lines = object.lines.get().map_or(0, Lines::memory);
    let starts = object.starts.get().map_or(0, Starts::memory);
    object.bytes.len() + lines + starts + MANAGEMENT
}

fn wrong_kind(stored: Kind, wanted: Kind) -> String {
    format!("it is a {}, not a {}", stored.word(), wanted.word())
}

/// Fills `to`; large objects are inflated in steps, with a look at the flag between them.
fn inflate(
    inflater: &mut Decompressor,
    from: &[u8],
    to: &mut [u8],
    interrupt: &Interrupt<'_>,
) -> Result<(), &'static str> {
    const LESS: &str = "its deflated bytes hold less than its pack says";
    const MORE: &str = "its deflated bytes hold more than its pack says";
    const DAMAGED: &str = "its deflated bytes are damaged";
    // Whoever reads on looks at the flag before anything else.
    const STOPPED: &str = "it was not read to its end";
    if to.len() <= LARGE {
        if interrupt.work(to.len().min(STEP)).is_err() {
            return Err(STOPPED);
        }
        return match inflater.zlib_decompress(from, to) {
            Ok(size) if size == to.len() => Ok(()),
            Ok(_) => Err(LESS),
            Err(libdeflater::DecompressionError::BadData) => Err(DAMAGED),
            Err(libdeflater::DecompressionError::InsufficientSpace) => Err(MORE),
        };
    }
    let mut stream = flate2::Decompress::new(true);
    loop {
        if interrupt.work(STEP).is_err() {
            return Err(STOPPED);
        }
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        let input = from.get(read..).unwrap_or_default();
        let room = &mut to[written..];
        let step = room.len().min(STEP);
        let mut end = [0];
        let (output, is_end) = match step {
            0 => (&mut end[..], true),
            _ => (&mut room[..step], false),
        };
        let status = stream.decompress(input, output, flate2::FlushDecompress::None);
        let grown = stream.total_out() as usize - written;
        match status {
            Ok(_) if is_end && grown > 0 => return Err(MORE),
            Ok(flate2::Status::StreamEnd) if written + grown == to.len() => return Ok(()),
            Ok(flate2::Status::StreamEnd) => return Err(LESS),
            Ok(_) if grown == 0 && stream.total_in() as usize == read => return Err(DAMAGED),
            Ok(_) => {}
            Err(_) => return Err(DAMAGED),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn large_and_small_objects_inflate_to_exactly_what_was_deflated() {
        let go = Interrupt::never();
        for size in [0, 1, LARGE, LARGE + 1, LARGE + STEP, LARGE * 2 + 7] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            let mut stream = deflated(&bytes);
            let inflate = |stream: &[u8], size: usize| {
                let mut out = vec![0; size];
                inflate(&mut Decompressor::new(), stream, &mut out, &go).map(|()| out)
            };
            assert!(inflate(&stream, size).unwrap() == bytes, "{size}");
            assert!(inflate(&stream, size + 1).is_err(), "{size}");
            if size > 0 {
                assert!(inflate(&stream, size - 1).is_err(), "{size}");
            }
            let half = &stream[..stream.len() / 2];
            assert!(inflate(half, size).is_err(), "{size}");
            // What follows in the pack is not looked at.
            stream.extend([7; 100]);
            assert!(inflate(&stream, size).unwrap() == bytes, "{size}");
        }
    }

    #[test]
    fn the_flag_ends_the_inflation_of_a_large_object() {
        let stream = deflated(&vec![7; LARGE * 2]);
        let mut out = vec![0; LARGE * 2];
        Interrupt::check(LARGE * 2, |interrupt| {
            let answer = inflate(&mut Decompressor::new(), &stream, &mut out, interrupt);
            answer.map_err(|_| Error::Interrupted)
        });
    }
}
