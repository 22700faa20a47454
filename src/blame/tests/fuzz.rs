//! Repositories whose objects were changed under their names: what inflates well may still hold anything.
//!
//! Damaged packs mostly fail at their checksums of deflated bytes and get no further. Here the contents of commits,
//! trees, blobs and deltas are mutated first and then packed soundly, under the names they had. The seed of a failure
//! is printed; `CELERIAC_FUZZ_SEED` runs it again, `CELERIAC_FUZZ_ROUNDS` asks for more than a few.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::fixture::Fixture;
use super::random::{self, Random};
use crate::blame::{Limits, Options, Whitespace, blame};
use crate::git::{Oid, Repository, objects};

/// Name, number of the type in a pack, contents.
type Objects = Vec<(Oid, u8, Vec<u8>)>;

fn objects_of(fixture: &Fixture) -> Objects {
    let listed = fixture.git(&[
        "cat-file",
        "--batch-all-objects",
        "--batch-check=%(objectname) %(objecttype)",
    ]);
    String::from_utf8(listed)
        .unwrap()
        .lines()
        .map(|line| {
            let (name, kind) = line.split_once(' ').unwrap();
            let number = match kind {
                "commit" => 1,
                "tree" => 2,
                "blob" => 3,
                _ => 4,
            };
            let oid = Oid::from_hex(name.as_bytes()).unwrap();
            (oid, number, fixture.git(&["cat-file", kind, name]))
        })
        .collect()
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>, names: &[Oid]) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() + 1);
        let to = at + random.below(bytes.len() - at + 1).min(40);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => {
                bytes.drain(at..to);
            }
            2 => {
                let piece = bytes[at..to].to_vec();
                bytes.splice(at..at, piece);
            }
            3 => {
                let name = names[random.below(names.len())];
                // Where a name stood, in bytes or in digits, another one may now stand.
                let digits = name.to_string().into_bytes();
                let text = if random.below(2) == 0 {
                    digits
                } else {
                    name.as_bytes().to_vec()
                };
                let end = (at + text.len()).min(bytes.len());
                bytes.splice(at..end, text);
            }
            4 => bytes.insert(at, [0, b' ', b'\n', b'/', 0xff][random.below(5)]),
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
}

/// A delta of a base, mostly sound before it is mutated.
fn delta(random: &mut Random, base: &[u8], result: &[u8], names: &[Oid]) -> Vec<u8> {
    let mut delta = Vec::new();
    for mut size in [base.len(), result.len()] {
        while size > 0x7f {
            delta.push(size as u8 | 0x80);
            size >>= 7;
        }
        delta.push(size as u8);
    }
    let same = base.iter().zip(result).take_while(|(a, b)| a == b).count();
    let same = same.min(0xff_ffff);
    if same > 0 {
        delta.push(0x80 | 0x70);
        delta.extend_from_slice(&(same as u32).to_le_bytes()[..3]);
    }
    for literal in result[same..].chunks(127) {
        delta.push(literal.len() as u8);
        delta.extend_from_slice(literal);
    }
    if random.below(3) == 0 {
        mutate(random, &mut delta, names);
    }
    delta
}

fn entry(pack: &mut Vec<u8>, number: u8, size: usize, base: Option<Oid>, bytes: &[u8]) {
    let mut rest = size >> 4;
    let more = |rest: usize| if rest > 0 { 0x80 } else { 0 };
    pack.push(number << 4 | (size & 0x0f) as u8 | more(rest));
    while rest > 0 {
        pack.push((rest & 0x7f) as u8 | more(rest >> 7));
        rest >>= 7;
    }
    pack.extend(base.iter().flat_map(|base| *base.as_bytes()));
    let mut encoder = flate2::write::ZlibEncoder::new(pack, flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap();
}

/// Writes the objects as a pack with its index; a third of them as deltas of any other one.
fn write(random: &mut Random, folder: &Path, objects: &Objects) {
    let names: Vec<Oid> = objects.iter().map(|(oid, ..)| *oid).collect();
    let mut pack = b"PACK\0\0\0\x02".to_vec();
    pack.extend((objects.len() as u32).to_be_bytes());
    let mut places = BTreeMap::new();
    for (oid, number, bytes) in objects {
        places.insert(*oid, pack.len() as u32);
        if random.below(3) > 0 {
            // Now and then its size or its type is a lie.
            let lie = random.below(200);
            let size = if lie == 0 {
                bytes.len() + 1
            } else {
                bytes.len()
            };
            let number = if lie == 1 {
                1 + random.below(7) as u8
            } else {
                *number
            };
            entry(&mut pack, number, size, None, bytes);
        } else {
            // Chains, circles and bases of another type all happen.
            let (base, _, base_bytes) = &objects[random.below(objects.len())];
            let delta = delta(random, base_bytes, bytes, &names);
            entry(&mut pack, 7, delta.len(), Some(*base), &delta);
        }
    }
    pack.extend([0; 20]);

    let mut index = b"\xfftOc\0\0\0\x02".to_vec();
    for first in 0..=255 {
        let count = places
            .keys()
            .filter(|oid| oid.as_bytes()[0] <= first)
            .count();
        index.extend((count as u32).to_be_bytes());
    }
    index.extend(places.keys().flat_map(|oid| *oid.as_bytes()));
    index.extend(vec![0; places.len() * 4]);
    index.extend(places.values().flat_map(|offset| offset.to_be_bytes()));
    index.extend([0; 40]);
    std::fs::write(folder.join("pack-1.pack"), pack).unwrap();
    std::fs::write(folder.join("pack-1.idx"), index).unwrap();
}

/// Whether a mutated repository was explained; a panic or a hang fails the test.
fn round(seed: u64, objects: &Objects, head: Oid) -> bool {
    let mut random = Random::new(seed);
    let fixture = Fixture::new();
    let names: Vec<Oid> = objects.iter().map(|(oid, ..)| *oid).collect();
    let mut mutated = objects.clone();
    for _ in 0..random.below(6) {
        let place = random.below(mutated.len());
        mutate(&mut random, &mut mutated[place].2, &names);
    }
    write(&mut random, &fixture.path().join("objects/pack"), &mutated);

    let repository = Repository::open(fixture.path()).unwrap();
    let options = Options {
        threads: 1 + random.below(2),
        cache_bytes: [0, 1 << 20][random.below(2)],
        whitespace: [Whitespace::Exact, Whitespace::IgnoreAll][random.below(2)],
        first_parent: random.below(4) == 0,
        ignored: names.iter().copied().step_by(3).collect(),
        limits: Limits {
            max_files: 10_000,
            objects: objects::Limits {
                structure_bytes: 1 << 20,
                blob_bytes: 1 << 20,
            },
            ..Limits::default()
        },
        ..Options::default()
    };
    let begin = Instant::now();
    let answer = blame(
        &repository,
        head,
        &options,
        &|_| (),
        &AtomicBool::new(false),
    );
    assert!(begin.elapsed() < Duration::from_secs(60), "seed {seed}");
    if let Err(error) = &answer {
        // "Lost" would be a fault of the walk.
        let text = error.to_string();
        assert!(!text.contains("please report"), "seed {seed}: {text}");
    }
    answer.is_ok()
}

#[test]
fn mutated_objects_end_in_an_error_or_an_answer_but_never_in_a_panic() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = number("CELERIAC_FUZZ_SEED").unwrap_or(now.as_nanos() as u64);
    let rounds = number("CELERIAC_FUZZ_ROUNDS").unwrap_or(60);
    eprintln!("seeds from {first}");
    let (mut explained, mut tried) = (0, 0);
    let mut source: Option<(u64, Objects, Oid)> = None;
    for seed in first..first + rounds {
        // A history serves for many rounds: git takes longer to make one than we to explain it.
        if source.as_ref().is_none_or(|source| source.0 != seed / 60) {
            let fixture = random::history(seed / 60, 25, true);
            let head = Oid::from_hex(fixture.git(&["rev-parse", "main"]).trim_ascii()).unwrap();
            source = Some((seed / 60, objects_of(&fixture), head));
        }
        let (_, objects, head) = source.as_ref().unwrap();
        let result = std::panic::catch_unwind(|| round(seed, objects, *head));
        explained += u64::from(result.unwrap_or_else(|_| panic!("seed {seed}")));
        tried += 1;
    }
    eprintln!("{explained} of {tried} were explained");
    assert!(explained < tried, "nothing was broken");
}
