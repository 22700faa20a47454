//! Random histories: many open heads, merges of many parents, and in each commit some of the
//! changes that are easy to get wrong.

use super::fixture::{FILE, Fixture, LINK, Tree};
use crate::blame::Options;

/// A small generator of numbers; the same seed gives the same numbers everywhere.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }
}

/// Compares one history; a failure is told with the fewest commits that show it.
pub(super) fn check(seed: u64) {
    let commits = 45;
    let agrees = |commits: usize| {
        let fixture = history(seed, commits, seed.is_multiple_of(2));
        fixture.our_lines(&Options::default()) == fixture.git_lines(&[])
    };
    if !agrees(commits) {
        let fewest = (1..commits)
            .find(|&fewer| !agrees(fewer))
            .unwrap_or(commits);
        let fixture = history(seed, fewest, seed.is_multiple_of(2));
        let (ours, gits) = (
            fixture.our_lines(&Options::default()),
            fixture.git_lines(&[]),
        );
        panic!("seed {seed}, {fewest} commits: ours {ours:#?}, git's {gits:#?}");
    }
}

/// Makes the history of a seed.
pub(super) fn history(seed: u64, commits: usize, packed: bool) -> Fixture {
    let mut random = Random::new(seed);
    let mut fixture = Fixture::new();
    let mut first = Tree::new();
    for number in 0..6 {
        let path = format!("d{}/f{number}", number % 3);
        first.insert(path, (FILE, contents(&mut random)));
    }
    let mark = fixture.commit(&[], 0, &first);
    let mut heads = vec![(mark, first)];
    for step in 1..commits {
        let time = step as i64 * 300 + random.below(10_000) as i64 - 5_000;
        let (parents, mut tree, replaced) = if heads.len() > 1 && random.chance(35) {
            merge(&mut random, &heads)
        } else {
            let place = random.below(heads.len());
            (vec![heads[place].0], heads[place].1.clone(), vec![place])
        };
        let changes = match parents.len() {
            1 => 1 + random.below(3),
            _ => random.below(2),
        };
        for _ in 0..changes {
            change(&mut random, &mut tree);
        }
        let mark = fixture.commit(&parents, time, &tree);
        let stays_open = parents.len() == 1 && heads.len() < 12 && random.chance(35);
        if !stays_open {
            let mut place = 0;
            heads.retain(|_| {
                place += 1;
                !replaced.contains(&(place - 1))
            });
        }
        heads.push((mark, tree));
    }
    let parents: Vec<usize> = heads.iter().map(|head| head.0).collect();
    let tree = mix(
        &mut random,
        &heads.iter().map(|head| &head.1).collect::<Vec<_>>(),
    );
    let last = match parents[..] {
        [only] => only,
        _ => fixture.commit(&parents, commits as i64 * 300, &tree),
    };
    fixture.import(last, packed);
    fixture
}

type Merge = (Vec<usize>, Tree, Vec<usize>);

fn merge(random: &mut Random, heads: &[(usize, Tree)]) -> Merge {
    let most = if random.chance(25) { 12 } else { 2 };
    let count = 2 + random.below(most - 1);
    let mut places: Vec<usize> = Vec::new();
    for _ in 0..count {
        let place = random.below(heads.len());
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let parents = places.iter().map(|&place| heads[place].0).collect();
    let trees: Vec<&Tree> = places.iter().map(|&place| &heads[place].1).collect();
    (parents, mix(random, &trees), places)
}

/// Each path as one of the parents has it, or not at all; sometimes their lines alternate.
fn mix(random: &mut Random, trees: &[&Tree]) -> Tree {
    let mut mixed = Tree::new();
    let paths: Vec<&String> = trees.iter().flat_map(|tree| tree.keys()).collect();
    for path in paths {
        let tree = random.pick(trees);
        let other = random.pick(trees);
        match (tree.get(path), other.get(path)) {
            (Some((FILE, one)), Some((FILE, two))) if random.chance(30) => {
                let mut lines = split(one);
                let others = split(two);
                let cut = random.below(lines.len() + 1);
                lines.truncate(cut);
                lines.extend(others.into_iter().skip(cut));
                put(&mut mixed, path, (FILE, lines.concat()));
            }
            (Some(file), _) => put(&mut mixed, path, file.clone()),
            (None, _) => {}
        }
    }
    mixed
}

/// Adds a file and removes what stands in its way.
fn put(tree: &mut Tree, path: &str, file: (&'static str, Vec<u8>)) {
    let below = format!("{path}/");
    tree.retain(|other, _| !other.starts_with(&below) && !path.starts_with(&format!("{other}/")));
    tree.insert(path.to_owned(), file);
}

fn change(random: &mut Random, tree: &mut Tree) {
    let paths: Vec<String> = tree.keys().cloned().collect();
    if paths.is_empty() || random.chance(6) {
        let path = path(random);
        let contents = contents(random);
        return put(tree, &path, (FILE, contents));
    }
    let chosen = random.pick(&paths).clone();
    let Some((mode, bytes)) = tree.get(&chosen).cloned() else {
        return;
    };
    match random.below(20) {
        0..9 => {
            let bytes = edit(random, &bytes);
            put(tree, &chosen, (mode, bytes));
        }
        9..12 => {
            tree.remove(&chosen);
            let target = path(random);
            let bytes = if random.chance(50) {
                edit(random, &bytes)
            } else {
                bytes
            };
            put(tree, &target, (mode, bytes));
        }
        12..14 => {
            tree.remove(&chosen);
            for _ in 0..2 {
                let target = path(random);
                let bytes = edit(random, &bytes);
                put(tree, &target, (mode, bytes));
            }
        }
        14 => {
            tree.remove(&chosen);
        }
        15 => {
            let mode = *random.pick(&[FILE, "100755", LINK]);
            put(tree, &chosen, (mode, bytes));
        }
        16 => {
            let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
            let text = if bytes.contains(&b'\r') {
                text
            } else {
                text.replace('\n', "\r\n")
            };
            put(tree, &chosen, (mode, text.into_bytes()));
        }
        17 => {
            let (old, new) = (
                format!("d{}/", random.below(3)),
                format!("d{}/e/", random.below(5)),
            );
            for path in paths.iter().filter(|path| path.starts_with(&old)) {
                if let Some(file) = tree.remove(path) {
                    put(tree, &format!("{new}{}", &path[old.len()..]), file);
                }
            }
        }
        _ => {
            tree.remove(&chosen);
            put(
                tree,
                &format!("{chosen}/f{}", random.below(9)),
                (mode, bytes),
            );
        }
    }
}

fn path(random: &mut Random) -> String {
    let name = format!("f{}", random.below(9));
    match random.below(4) {
        0 => name,
        1 => format!("d{}/e/{name}", random.below(3)),
        _ => format!("d{}/{name}", random.below(4)),
    }
}

/// Few different short lines, so that diffs have many equally good answers.
fn contents(random: &mut Random) -> Vec<u8> {
    let count = match random.below(10) {
        0 => 0,
        1..8 => 5 + random.below(40),
        _ => 200 + random.below(200),
    };
    (0..count).flat_map(|_| line(random)).collect()
}

fn line(random: &mut Random) -> Vec<u8> {
    const WORDS: [&str; 8] = [
        "",
        "{",
        "}",
        "\treturn;",
        "    end",
        "  a = b",
        "# c",
        "if (x) {",
    ];
    let word = *random.pick(&WORDS);
    match random.below(3) {
        0 => format!("{word} {}\n", random.below(60)).into_bytes(),
        _ => format!("{word}\n").into_bytes(),
    }
}

fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes
        .split_inclusive(|&byte| byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect()
}

fn edit(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let mut lines = split(bytes);
    for _ in 0..1 + random.below(4) {
        let from = random.below(lines.len() + 1);
        let to = (from + random.below(6)).min(lines.len());
        match random.below(5) {
            0 | 1 => {
                let new: Vec<_> = (0..random.below(6)).map(|_| line(random)).collect();
                lines.splice(from..from, new);
            }
            2 => {
                lines.drain(from..to);
            }
            3 => {
                let block: Vec<_> = lines.drain(from..to).collect();
                let target = random.below(lines.len() + 1);
                lines.splice(target..target, block);
            }
            _ => {
                let block = lines[from..to].to_vec();
                let target = random.below(lines.len() + 1);
                lines.splice(target..target, block);
            }
        }
    }
    lines.concat()
}
