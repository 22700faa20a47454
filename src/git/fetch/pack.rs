//! The objects of a pack, judged while they arrive, and the index over them.
//!
//! The first pass walks the entries in the order of the stream: header, inflated size, checksum of the
//! compressed bytes. Every limit is applied here, before a byte is kept: declared sizes are compared with
//! the limit before inflating, inflating stops at the declared size, the result size of a delta is read
//! from its first bytes, and the depth of its chain from that of its base. The second pass resolves the
//! deltas and names the objects; gix-pack does it on all threads, with the same cap on allocations.
//! Answers for gitformat-pack.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;

use gix::ObjectId;
use gix::error::ErrorExt as _;
use gix::odb::pack::data;
use gix::odb::pack::data::entry::Header;
use gix::odb::pack::data::input::Entry;
use gix::zlib::{Decompress, FlushDecompress, Status};

use super::error::{Doing, Limit};
use super::progress::{Resolving, Steps};
use super::receive::TRAILER;
use super::space::{Lack, Space};

/// Base-by-name deltas are not asked for; a few are survived, a chain that overflows a counter is not.
const MAX_REF_DELTAS: u32 = 50_000;

pub(super) const PARSING: Doing = "reading its objects";
pub(super) const RESOLVING: Doing = "resolving its deltas";

/// What is accepted of a pack.
#[derive(Clone, Debug)]
pub(super) struct PackLimits {
    pub(super) objects: u64,
    pub(super) object_size: u64,
    pub(super) inflated: u64,
    pub(super) delta_depth: u16,
}

/// Why a pack is not accepted.
#[derive(Debug)]
pub(super) enum Fault {
    /// The stream ended; the receiver knows why.
    Ended,
    /// A limit.
    TooLarge(Limit, u64),
    /// No room on the disk.
    Space(Lack),
    /// The bytes make no pack.
    Damaged(Doing, String),
    /// The disk.
    Disk(Doing, PathBuf, std::io::Error),
}

/// A finished index.
#[derive(Debug)]
pub(super) struct Indexed {
    /// The checksum of the pack, which names the files.
    pub(super) checksum: ObjectId,
    /// Objects in it.
    pub(super) objects: u64,
}

/// Reads the pack from `chunks`, which somebody else also writes to `pack_path`, and writes its index.
pub(super) fn index(
    chunks: Receiver<Vec<u8>>,
    limits: &PackLimits,
    space: &Space,
    (pack_path, index_path): (&Path, &Path),
    threads: Option<usize>,
    steps: &Steps,
    stopped: &AtomicBool,
) -> Result<Indexed, Fault> {
    let fault = Rc::new(RefCell::new(None));
    let mut entries = Entries::new(chunks, limits.clone(), steps, Rc::clone(&fault))?;
    space
        .plan_index(u64::from(entries.left))
        .map_err(Fault::Space)?;
    let disk = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| Fault::Disk(doing, path, source)
    };
    let index_file =
        File::create_new(index_path).map_err(disk("creating the index", index_path))?;
    let mut out = BufWriter::with_capacity(128 * 1024, index_file);
    let make_resolver = || {
        let file = File::open(pack_path)?;
        // SAFETY: the file lies in a directory made for this fetch alone; its writer has finished, for
        // the entries ended, and nobody truncates it while the map lives.
        #[allow(unsafe_code, reason = "a pack is read by many threads at random")]
        let map = unsafe { memmap2::Mmap::map(&file)? };
        steps.resolving_begins();
        Ok((slice_of as SliceOf, map))
    };
    let result = gix::odb::pack::index::write_data_iter_to_stream(
        gix::odb::pack::index::Version::V2,
        make_resolver,
        &mut entries,
        threads,
        &mut Resolving::new(steps),
        &mut out,
        stopped,
        gix::hash::Kind::Sha1,
        usize::try_from(limits.object_size).ok(),
        data::Version::V2,
    );
    if let Some(fault) = fault.borrow_mut().take() {
        return Err(fault);
    }
    let outcome = result.map_err(|error| Fault::Damaged(RESOLVING, one_line(&error)))?;
    out.flush().map_err(disk("writing the index", index_path))?;
    Ok(Indexed {
        checksum: outcome.data_hash,
        objects: u64::from(outcome.num_objects),
    })
}

/// The shape in which gix-pack asks for [`slice_of`].
type SliceOf = for<'map> fn(data::EntryRange, &'map memmap2::Mmap) -> Option<&'map [u8]>;

/// The bytes of an entry.
fn slice_of(range: data::EntryRange, map: &memmap2::Mmap) -> Option<&[u8]> {
    map.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

/// An error of gix and its causes in a line.
fn one_line(error: &gix::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text.chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .take(300)
        .collect()
}

/// The first pass, in the shape gix-pack asks for.
struct Entries<'a> {
    input: Input,
    limits: PackLimits,
    steps: &'a Steps,
    left: u32,
    /// Bytes of all objects so far, deltas counted by what they make.
    inflated: u64,
    ref_deltas: u32,
    /// Offset and depth of every delta so far, in one number, ascending.
    depths: Vec<u64>,
    inflate: Decompress,
    scratch: Box<[u8]>,
    fault: Rc<RefCell<Option<Fault>>>,
    failed: bool,
}

/// Bits of a number of `depths` that hold the depth.
const DEPTH_BITS: u32 = 16;

impl<'a> Entries<'a> {
    fn new(
        chunks: Receiver<Vec<u8>>,
        limits: PackLimits,
        steps: &'a Steps,
        fault: Rc<RefCell<Option<Fault>>>,
    ) -> Result<Entries<'a>, Fault> {
        let mut input = Input::new(chunks);
        let mut header = [0; 12];
        for byte in &mut header {
            *byte = input.byte()?;
        }
        let number = |at: usize| {
            u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if &header[..4] != b"PACK" || !matches!(number(4), 2 | 3) {
            return Err(Fault::Damaged(
                PARSING,
                "it does not begin as a pack".into(),
            ));
        }
        let left = number(8);
        if u64::from(left) > limits.objects {
            return Err(Fault::TooLarge(Limit::Objects, limits.objects));
        }
        steps.receiving_begins(u64::from(left));
        Ok(Entries {
            input,
            limits,
            steps,
            left,
            inflated: 0,
            ref_deltas: 0,
            depths: Vec::new(),
            inflate: Decompress::new(),
            scratch: vec![0; 64 * 1024].into_boxed_slice(),
            fault,
            failed: false,
        })
    }

    fn entry(&mut self) -> Result<Entry, Fault> {
        let offset = self.input.offset;
        self.input.checksum.reset();
        let (kind, size) = self.type_and_size()?;
        if size > self.limits.object_size {
            return Err(Fault::TooLarge(Limit::ObjectSize, self.limits.object_size));
        }
        let header = match kind {
            1 => Header::Commit,
            2 => Header::Tree,
            3 => Header::Blob,
            4 => Header::Tag,
            6 => Header::OfsDelta {
                base_distance: self.base_distance(offset)?,
            },
            7 => Header::RefDelta {
                base_id: self.base_id()?,
            },
            _ => {
                let text = format!("object at {offset} is of the unknown type {kind}");
                return Err(Fault::Damaged(PARSING, text));
            }
        };
        let header_size = self.input.offset - offset;
        let start = self.input.offset;
        let first = self.inflate(offset, size)?;
        let result_size = match header {
            Header::OfsDelta { .. } | Header::RefDelta { .. } => delta_result_size(&first)
                .ok_or_else(|| {
                    Fault::Damaged(PARSING, format!("the delta at {offset} has no sizes"))
                })?,
            _ => size,
        };
        if result_size > self.limits.object_size {
            return Err(Fault::TooLarge(Limit::ObjectSize, self.limits.object_size));
        }
        self.inflated = self.inflated.saturating_add(result_size);
        if self.inflated > self.limits.inflated {
            return Err(Fault::TooLarge(Limit::Inflated, self.limits.inflated));
        }
        Ok(Entry {
            header,
            header_size: u16::try_from(header_size).unwrap_or(u16::MAX),
            pack_offset: offset,
            compressed: None,
            compressed_size: self.input.offset - start,
            crc32: Some(self.input.checksum.sum()),
            decompressed_size: size,
            trailer: None,
        })
    }

    fn type_and_size(&mut self) -> Result<(u8, u64), Fault> {
        let first = self.input.byte()?;
        let mut size = u64::from(first & 0x0f);
        let mut shift = 4;
        let mut byte = first;
        while byte & 0x80 != 0 {
            byte = self.input.byte()?;
            if shift > 56 {
                return Err(Fault::Damaged(
                    PARSING,
                    "the size of an object has no end".into(),
                ));
            }
            size |= u64::from(byte & 0x7f) << shift;
            shift += 7;
        }
        Ok(((first >> 4) & 7, size))
    }

    /// How far back the base is; notes the depth of the chain.
    fn base_distance(&mut self, offset: u64) -> Result<u64, Fault> {
        let damaged = || {
            let text = format!("the base of the delta at {offset} lies outside of the pack");
            Fault::Damaged(PARSING, text)
        };
        let mut byte = self.input.byte()?;
        let mut distance = u64::from(byte & 0x7f);
        while byte & 0x80 != 0 {
            byte = self.input.byte()?;
            distance =
                (distance + 1).checked_mul(128).ok_or_else(damaged)? | u64::from(byte & 0x7f);
            if distance > offset {
                return Err(damaged());
            }
        }
        let base = offset
            .checked_sub(distance)
            .filter(|base| *base >= 12 && distance > 0);
        let base = base.ok_or_else(damaged)?;
        let known = self
            .depths
            .binary_search_by_key(&base, |entry| entry >> DEPTH_BITS)
            .map_or(0, |at| self.depths[at] & ((1 << DEPTH_BITS) - 1));
        let depth = known + 1;
        if depth > u64::from(self.limits.delta_depth) {
            let allowed = u64::from(self.limits.delta_depth);
            return Err(Fault::TooLarge(Limit::DeltaDepth, allowed));
        }
        self.depths.push(offset << DEPTH_BITS | depth);
        Ok(distance)
    }

    fn base_id(&mut self) -> Result<ObjectId, Fault> {
        self.ref_deltas += 1;
        if self.ref_deltas > MAX_REF_DELTAS {
            let text = "it names the bases of its deltas though it was asked for offsets";
            return Err(Fault::Damaged(PARSING, text.to_owned()));
        }
        let mut id = ObjectId::null(gix::hash::Kind::Sha1);
        for byte in id.as_mut_slice() {
            *byte = self.input.byte()?;
        }
        Ok(id)
    }

    /// Inflates one stream that must make exactly `size` bytes; returns the first of them.
    fn inflate(&mut self, offset: u64, size: u64) -> Result<Vec<u8>, Fault> {
        const KEPT: usize = 20;
        let mut first = Vec::with_capacity(KEPT);
        let damaged = |detail: &str| {
            let text = format!("the object at {offset} {detail}");
            Fault::Damaged(PARSING, text)
        };
        self.inflate.reset();
        loop {
            let input = self.input.available()?;
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            let status = self
                .inflate
                .decompress(input, &mut self.scratch, FlushDecompress::None)
                .map_err(|_| damaged("cannot be inflated"))?;
            let consumed = self.inflate.total_in() - before_in;
            let made = usize::try_from(self.inflate.total_out() - before_out).unwrap_or(0);
            self.input.consume(usize::try_from(consumed).unwrap_or(0));
            let wanted = (KEPT - first.len()).min(made);
            first.extend_from_slice(&self.scratch[..wanted]);
            if self.inflate.total_out() > size {
                return Err(damaged("is larger than it says"));
            }
            match status {
                Status::StreamEnd => break,
                Status::Ok | Status::BufError if consumed == 0 && made == 0 => {
                    return Err(damaged("cannot be inflated"));
                }
                Status::Ok | Status::BufError => {}
            }
        }
        match self.inflate.total_out() == size {
            true => Ok(first),
            false => Err(damaged("is smaller than it says")),
        }
    }

    /// The checksum at the end, after which nothing may follow.
    fn trailer(&mut self) -> Result<ObjectId, Fault> {
        let mut bytes = [0; TRAILER];
        for byte in &mut bytes {
            *byte = self.input.byte()?;
        }
        match self.input.at_end() {
            true => Ok(ObjectId::from(bytes)),
            false => Err(Fault::Damaged(PARSING, "bytes follow its end".to_owned())),
        }
    }

    fn failure(&mut self, fault: Fault) -> gix::Error {
        *self.fault.borrow_mut() = Some(fault);
        self.failed = true;
        gix::error::message("the pack was not accepted").raise()
    }
}

impl Iterator for Entries<'_> {
    type Item = gix::Result<Entry>;

    fn next(&mut self) -> Option<gix::Result<Entry>> {
        if self.failed || self.left == 0 {
            return None;
        }
        self.left -= 1;
        let mut result = self.entry();
        if self.left == 0 {
            result = result.and_then(|entry| {
                let trailer = Some(self.trailer()?);
                Ok(Entry { trailer, ..entry })
            });
        }
        self.steps.object_received();
        Some(result.map_err(|fault| self.failure(fault)))
    }
}

/// Both sizes stand at the start of a delta; the second is that of the object it makes.
fn delta_result_size(delta: &[u8]) -> Option<u64> {
    let mut bytes = delta.iter();
    let mut size = || {
        let mut value = 0_u64;
        let mut shift = 0;
        loop {
            let byte = *bytes.next()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    };
    size()?;
    size()
}

/// The stream of the pack, chunk by chunk.
struct Input {
    chunks: Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    offset: u64,
    /// Over what was consumed since it was reset.
    checksum: flate2::Crc,
}

impl Input {
    fn new(chunks: Receiver<Vec<u8>>) -> Input {
        Input {
            chunks,
            chunk: Vec::new(),
            at: 0,
            offset: 0,
            checksum: flate2::Crc::new(),
        }
    }

    /// What can be read without waiting, or what comes next.
    fn available(&mut self) -> Result<&[u8], Fault> {
        if self.at == self.chunk.len() {
            self.chunk = self.chunks.recv().map_err(|_| Fault::Ended)?;
            self.at = 0;
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.checksum.update(&self.chunk[self.at..self.at + amount]);
        self.at += amount;
        self.offset += amount as u64;
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        let byte = *self.available()?.first().ok_or(Fault::Ended)?;
        self.consume(1);
        Ok(byte)
    }

    fn at_end(&mut self) -> bool {
        self.at == self.chunk.len() && self.chunks.recv().is_err()
    }
}
