//! Where a file that is new in a commit came from, exactly as `git blame` finds it.
//!
//! Blame asks for one path at a time, so two new files may come from the same source; an assignment of all files
//! of a commit at once would be another rule. In this order:
//!
//! 1. a source with the same blob, best with the same file name;
//! 2. the only source of the same file name, if three quarters are the same;
//! 3. the most similar source, if half of it is the same.
//!
//! Similarity is counted in chunks: the bytes up to a line feed, at most 64 of them, are reduced to a number below
//! 107,927; the bytes of the chunks two blobs have in common are divided by the size of the larger one. All
//! numbers are integers as in git, where 60,000 stands for "the same".
//!
//! This module knows nothing of trees and commits; who calls it collects the sources, in the order of the tree.

mod chunks;

use std::rc::Rc;

use super::{Error, Interrupt, Oid};
use chunks::{CHUNK_NUMBERS, ChunkCache, Chunks, Counter, OidMap};

/// Similarity of equal contents.
const SAME: u64 = 60_000;
/// What the only source of the same name must reach.
const ENOUGH_FOR_NAMESAKE: u64 = 45_000;
/// What any source must reach.
const ENOUGH: u64 = 30_000;
/// Sources with the same blob that are looked at for one of the same name.
const MOST_IDENTICAL: usize = 100;
/// The best of so many sources are remembered; which of several equal ones wins depends on it.
const PLACES: usize = 4;
/// What it costs to look at a source whose size is known and does not fit.
const SOURCE: usize = 64;
/// Sizes remembered before all are forgotten.
const MOST_SIZES: usize = 1 << 17;

/// A file on either side of a possible rename.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Full path from the root.
    pub path: &'a [u8],
    /// Mode as in the tree entry.
    pub mode: u32,
    /// What the entry names.
    pub oid: Oid,
}

/// Where blobs are read from.
pub trait Blobs {
    /// The size of a blob, without reading it if that can be avoided.
    fn size(&mut self, oid: Oid) -> Result<u64, Error>;
    /// The contents of a blob.
    fn bytes(&mut self, oid: Oid) -> Result<Rc<dyn AsRef<[u8]>>, Error>;
    /// Who may end the search.
    fn interrupt(&self) -> &Interrupt<'_>;
}

/// Finds sources of renames; remembers the chunks of blobs it has seen, within bounds.
#[derive(Debug)]
pub struct RenameDetector {
    cache: ChunkCache,
    sizes: OidMap<u64>,
    counter: Counter,
    /// Bytes in each chunk number of the target; all zero between calls.
    target: Vec<u32>,
}

impl RenameDetector {
    /// A detector that keeps at most about `cache_bytes` of chunks.
    pub fn new(cache_bytes: usize) -> Self {
        RenameDetector {
            cache: ChunkCache::new(cache_bytes),
            sizes: OidMap::default(),
            counter: Counter::default(),
            target: Vec::new(),
        }
    }

    /// The index of the source that `target` is a rename of, if there is one.
    ///
    /// `sources` are all files the commit removed, in the order of the tree.
    pub fn find(
        &mut self,
        target: &Candidate<'_>,
        sources: &[Candidate<'_>],
        blobs: &mut dyn Blobs,
    ) -> Result<Option<usize>, Error> {
        if let Some(source) = find_identical(target, sources) {
            return Ok(Some(source));
        }
        if sources.is_empty() || !target.is_regular() {
            return Ok(None);
        }
        let mut search = Search {
            detector: self,
            target,
            target_chunks: None,
            blobs,
        };
        let found = search.most_similar(sources);
        if let Some(chunks) = search.target_chunks {
            for &(number, _) in chunks.iter() {
                self.target[number as usize] = 0;
            }
        }
        found
    }

    fn size(&mut self, oid: Oid, blobs: &mut dyn Blobs) -> Result<u64, Error> {
        if let Some(&size) = self.sizes.get(&oid) {
            return Ok(size);
        }
        let size = blobs.size(oid)?;
        if self.sizes.len() >= MOST_SIZES {
            self.sizes.clear();
        }
        self.sizes.insert(oid, size);
        Ok(size)
    }

    fn chunks(&mut self, oid: Oid, blobs: &mut dyn Blobs) -> Result<Rc<Chunks>, Error> {
        if let Some(chunks) = self.cache.get(oid) {
            return Ok(chunks);
        }
        let blob = blobs.bytes(oid)?;
        let chunks = self.counter.count((*blob).as_ref(), blobs.interrupt())?;
        let chunks: Rc<Chunks> = chunks.into();
        self.cache.insert(oid, Rc::clone(&chunks));
        Ok(chunks)
    }
}

impl Candidate<'_> {
    fn is_regular(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }

    fn name(&self) -> &[u8] {
        memchr::memrchr(b'/', self.path).map_or(self.path, |slash| &self.path[slash + 1..])
    }
}

/// The first source with the same blob and name, else the first with the same blob.
fn find_identical(target: &Candidate<'_>, sources: &[Candidate<'_>]) -> Option<usize> {
    let mut identical = sources
        .iter()
        .enumerate()
        .filter(|(_, source)| source.oid == target.oid)
        .filter(|(_, source)| {
            source.mode == target.mode || source.is_regular() && target.is_regular()
        })
        .take(MOST_IDENTICAL);
    let first = identical.next()?;
    if first.1.name() == target.name() {
        return Some(first.0);
    }
    let namesake = identical.find(|(_, source)| source.name() == target.name());
    Some(namesake.unwrap_or(first).0)
}

/// One search; the target is read only when a source is of a similar size.
struct Search<'a> {
    detector: &'a mut RenameDetector,
    target: &'a Candidate<'a>,
    /// Set when the target is spread out in `detector.target`.
    target_chunks: Option<Rc<Chunks>>,
    blobs: &'a mut dyn Blobs,
}

impl Search<'_> {
    fn most_similar(&mut self, sources: &[Candidate<'_>]) -> Result<Option<usize>, Error> {
        let name = self.target.name();
        let mut namesakes = (0..sources.len()).filter(|&index| sources[index].name() == name);
        if let (Some(only), None) = (namesakes.next(), namesakes.next())
            && self.similarity(&sources[only], ENOUGH_FOR_NAMESAKE)? >= ENOUGH_FOR_NAMESAKE
        {
            return Ok(Some(only));
        }

        let mut best = Best::default();
        for (index, source) in sources.iter().enumerate() {
            self.blobs.interrupt().work(SOURCE)?;
            let similarity = self.similarity(source, ENOUGH)?;
            best.offer(Place {
                similarity,
                namesake: source.name() == name,
                source: index,
            });
        }
        Ok(best
            .first()
            .filter(|place| place.similarity >= ENOUGH)
            .map(|place| place.source))
    }

    /// How similar a source is to the target; 0 when sizes alone say that it is below `enough`.
    fn similarity(&mut self, source: &Candidate<'_>, enough: u64) -> Result<u64, Error> {
        if !source.is_regular() {
            return Ok(0);
        }
        let source_size = self.detector.size(source.oid, self.blobs)?;
        let target_size = self.detector.size(self.target.oid, self.blobs)?;
        let larger = source_size.max(target_size);
        let difference = larger - source_size.min(target_size);
        if larger.saturating_mul(SAME - enough) < difference.saturating_mul(SAME)
            || target_size == 0
        {
            return Ok(0);
        }

        if self.target_chunks.is_none() {
            let chunks = self.detector.chunks(self.target.oid, self.blobs)?;
            self.detector.target.resize(CHUNK_NUMBERS, 0);
            for &(number, bytes) in chunks.iter() {
                self.detector.target[number as usize] = bytes;
            }
            self.target_chunks = Some(chunks);
        }
        let chunks = self.detector.chunks(source.oid, self.blobs)?;
        self.blobs.interrupt().work(chunks.len())?;
        let in_target = &self.detector.target;
        let common: u64 = chunks
            .iter()
            .map(|&(number, bytes)| u64::from(bytes.min(in_target[number as usize])))
            .sum();
        Ok(common.saturating_mul(SAME) / larger)
    }
}

/// A source as it was compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    similarity: u64,
    namesake: bool,
    source: usize,
}

impl Place {
    fn is_better_than(&self, other: &Place) -> bool {
        (self.similarity, self.namesake) > (other.similarity, other.namesake)
    }
}

/// The few best sources. A better one takes the place of the worst, so that of two equal sources the later one can
/// stand before the earlier; git takes the one that stands first.
#[derive(Debug, Default)]
struct Best {
    places: Vec<Place>,
}

impl Best {
    fn offer(&mut self, offered: Place) {
        if self.places.len() < PLACES {
            self.places.push(offered);
            return;
        }
        let mut worst = 0;
        for index in 1..PLACES {
            if self.places[worst].is_better_than(&self.places[index]) {
                worst = index;
            }
        }
        if offered.is_better_than(&self.places[worst]) {
            self.places[worst] = offered;
        }
    }

    fn first(&self) -> Option<Place> {
        let better = |best: Place, next: &Place| {
            if next.is_better_than(&best) {
                *next
            } else {
                best
            }
        };
        let (first, rest) = self.places.split_first()?;
        Some(rest.iter().fold(*first, better))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A real repository as the source of blobs, with the number of blobs read.
    struct Repository {
        inner: git2::Repository,
        read: usize,
        interrupt: Interrupt<'static>,
        _directory: tempfile::TempDir,
    }

    impl Repository {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let inner = git2::Repository::init_bare(directory.path()).unwrap();
            Repository {
                inner,
                read: 0,
                interrupt: Interrupt::never(),
                _directory: directory,
            }
        }

        fn blob(&self, content: &str) -> Oid {
            let oid = self.inner.blob(content.as_bytes()).unwrap();
            Oid::from_bytes(oid.as_bytes()).unwrap()
        }

        fn file<'a>(&self, path: &'a str, content: &str) -> Candidate<'a> {
            Candidate {
                path: path.as_bytes(),
                mode: 0o100_644,
                oid: self.blob(content),
            }
        }

        fn find(&mut self, target: &Candidate<'_>, sources: &[Candidate<'_>]) -> Option<usize> {
            RenameDetector::new(1 << 20)
                .find(target, sources, self)
                .unwrap()
        }
    }

    impl Blobs for Repository {
        fn size(&mut self, oid: Oid) -> Result<u64, Error> {
            let oid = git2::Oid::from_bytes(oid.as_bytes()).unwrap();
            Ok(self.inner.find_blob(oid).unwrap().size() as u64)
        }

        fn bytes(&mut self, oid: Oid) -> Result<Rc<dyn AsRef<[u8]>>, Error> {
            self.read += 1;
            let oid = git2::Oid::from_bytes(oid.as_bytes()).unwrap();
            Ok(Rc::new(
                self.inner.find_blob(oid).unwrap().content().to_vec(),
            ))
        }

        fn interrupt(&self) -> &Interrupt<'_> {
            &self.interrupt
        }
    }

    /// Lines `from..to`, all different.
    fn lines(from: usize, to: usize) -> String {
        (from..to)
            .map(|line| format!("this is line {line}\n"))
            .collect()
    }

    #[test]
    fn identical_source_of_the_same_name_is_preferred_without_reading_blobs() {
        let mut repository = Repository::new();
        let sources = [
            repository.file("a/other", &lines(0, 9)),
            repository.file("b/other", &lines(0, 9)),
            repository.file("c/name", &lines(0, 9)),
        ];
        let target = repository.file("d/name", &lines(0, 9));
        assert_eq!(repository.find(&target, &sources), Some(2));
        assert_eq!(repository.find(&target, &sources[..2]), Some(0));
        assert_eq!(repository.read, 0);
    }

    #[test]
    fn identical_source_beyond_the_hundredth_is_not_looked_at() {
        let mut repository = Repository::new();
        let mut sources = vec![repository.file("other", "same\n"); 100];
        sources.push(repository.file("name", "same\n"));
        let target = repository.file("d/name", "same\n");
        assert_eq!(repository.find(&target, &sources), Some(0));
        assert_eq!(repository.find(&target, &sources[1..]), Some(99));
    }

    #[test]
    fn symbolic_link_comes_only_from_a_symbolic_link_with_the_same_blob() {
        let mut repository = Repository::new();
        let file = repository.file("file", "target");
        let link = Candidate {
            path: b"link",
            mode: 0o120_000,
            ..file
        };
        let other = Candidate {
            path: b"other",
            oid: repository.blob("target2"),
            ..link
        };
        assert_eq!(repository.find(&link, &[file]), None);
        assert_eq!(repository.find(&link, &[other]), None);
        assert_eq!(repository.find(&link, &[other, link]), Some(1));
        let executable = Candidate {
            path: b"executable",
            mode: 0o100_755,
            ..file
        };
        assert_eq!(repository.find(&file, &[executable]), Some(0));
    }

    #[test]
    fn only_namesake_wins_over_a_more_similar_source() {
        let mut repository = Repository::new();
        let sources = [
            repository.file("a/other", &lines(0, 99)),
            repository.file("a/name", &lines(0, 80)),
            repository.file("b/name", &lines(0, 80)),
        ];
        let target = repository.file("c/name", &lines(0, 100));
        assert_eq!(repository.find(&target, &sources[..2]), Some(1));
        assert_eq!(repository.find(&target, &sources), Some(0));
    }

    #[test]
    fn half_of_the_larger_size_must_be_common() {
        let mut repository = Repository::new();
        let target = repository.file("new", &lines(100, 120));
        let half = repository.file("old", &lines(110, 130));
        let less = repository.file("old", &lines(111, 131));
        assert_eq!(repository.find(&target, &[half]), Some(0));
        assert_eq!(repository.find(&target, &[less]), None);
    }

    #[test]
    fn source_of_a_too_different_size_is_not_read() {
        let mut repository = Repository::new();
        let target = repository.file("new", &lines(100, 120));
        let source = repository.file("old", &lines(100, 200));
        assert_eq!(repository.find(&target, &[source]), None);
        assert_eq!(repository.read, 0);
    }

    #[test]
    fn line_endings_do_not_count_in_text() {
        let mut repository = Repository::new();
        let target = repository.file("new", &lines(0, 50).replace('\n', "\r\n"));
        let source = repository.file("old", &lines(0, 50));
        assert_eq!(repository.find(&target, &[source]), Some(0));
        let target = repository.file("new", &(lines(0, 50).replace('\n', "\r\n") + "\0"));
        assert_eq!(repository.find(&target, &[source]), None);
    }

    #[test]
    fn one_of_several_equal_sources_wins_by_its_place() {
        let mut repository = Repository::new();
        let good = repository.file("good", &lines(0, 90));
        let poor = repository.file("poor", &lines(0, 70));
        let target = repository.file("new", &lines(0, 100));
        assert_eq!(repository.find(&target, &[poor, good, good]), Some(1));
        // The fifth source takes the place of the first, and stands before the second.
        assert_eq!(
            repository.find(&target, &[poor, good, good, good, good]),
            Some(4)
        );
    }

    #[test]
    fn answers_do_not_depend_on_what_the_cache_holds() {
        let mut repository = Repository::new();
        let contents: Vec<String> = (0..20)
            .map(|shift| lines(shift * 5, shift * 5 + 40))
            .collect();
        let files: Vec<Candidate<'_>> = contents
            .iter()
            .map(|content| repository.file("file", content))
            .collect();
        let mut small = RenameDetector::new(0);
        let mut large = RenameDetector::new(1 << 20);
        for target in &files {
            let sources: Vec<Candidate<'_>> = files
                .iter()
                .filter(|source| source.oid != target.oid)
                .copied()
                .collect();
            let with_small = small.find(target, &sources, &mut repository).unwrap();
            assert_eq!(
                with_small,
                large.find(target, &sources, &mut repository).unwrap()
            );
            assert!(with_small.is_some());
        }
        assert!(small.cache.young.len() + small.cache.old.len() <= 2);
    }
}
