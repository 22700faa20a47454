//! Histories made with `git fast-import` and explained by us and by the real git, which is the
//! only source of expected values. Git runs without any configuration but the repository's.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::*;

mod fixture;
mod fuzz;
mod hostile;
mod random;

use fixture::{FILE, Fixture, LINK, Tree, text};

fn tree(files: &[(&str, &str)]) -> Tree {
    let entry =
        |&(path, contents): &(&str, &str)| (path.to_owned(), (FILE, contents.as_bytes().to_vec()));
    files.iter().map(entry).collect()
}

/// Lines that occur nowhere else.
fn lines(word: &str, count: usize) -> String {
    (0..count).map(|line| format!("{word} {line}\n")).collect()
}

#[test]
fn a_block_inserted_before_its_like_slides_as_in_git() {
    let block = "{\n\tone\n\n}\n".repeat(3);
    let body = block.repeat(40);
    let mut fixture = Fixture::new();
    let one = fixture.commit(&[], 0, &tree(&[("a", &body)]));
    let longer = format!(
        "{}{block}\n{}",
        &body[..body.len() - 60],
        &body[body.len() - 60..]
    );
    let two = fixture.commit(&[one], 10, &tree(&[("a", &longer)]));
    fixture.import(two, false);
    fixture.check();
}

#[test]
fn two_new_files_may_both_come_from_one_source() {
    let mut fixture = Fixture::new();
    let text = lines("word", 30);
    let one = fixture.commit(&[], 0, &tree(&[("a", &text)]));
    let (b, c) = (format!("{text}more\n"), format!("less\n{text}"));
    let two = fixture.commit(&[one], 10, &tree(&[("b", &b), ("c", &c)]));
    fixture.import(two, true);
    fixture.check();
}

#[test]
fn at_a_merge_the_identical_file_wins_over_the_first_parent() {
    let mut fixture = Fixture::new();
    let text = lines("word", 30);
    let edited = text.replace("word 7\n", "edited\n");
    let base = fixture.commit(&[], 0, &tree(&[("a", &text)]));
    let one = fixture.commit(&[base], 10, &tree(&[("a", &edited)]));
    let two = fixture.commit(&[base], 20, &tree(&[("b", &text)]));
    let three = fixture.commit(&[base], 30, &tree(&[("a", &text), ("c", "c\n")]));
    let merge = fixture.commit(&[one, two], 40, &tree(&[("a", &text)]));
    let merge = fixture.commit(&[merge, three], 50, &tree(&[("a", &text), ("c", "c\n")]));
    fixture.import(merge, true);
    fixture.check();
}

#[test]
fn an_octopus_shares_lines_out_in_the_order_of_its_parents() {
    let mut fixture = Fixture::new();
    let part = |word: &str| lines(word, 10);
    let base = fixture.commit(&[], 0, &tree(&[("a", &part("base"))]));
    let mut parents = Vec::new();
    for words in [["x", "y"], ["y", "z"], ["z", "x"], ["z", "x"]] {
        let text = format!("{}{}{}", part(words[0]), part("base"), part(words[1]));
        let place = parents.len() as i64;
        parents.push(fixture.commit(&[base], 10 + place, &tree(&[("a", &text)])));
    }
    let all = ["x", "new", "y", "base", "z"].map(part).concat();
    let merge = fixture.commit(&parents, 40, &tree(&[("a", &all)]));
    fixture.import(merge, true);
    fixture.check();
}

#[test]
fn a_change_of_type_ends_the_search_and_a_change_of_mode_does_not() {
    let mut fixture = Fixture::new();
    let with = |mode, path: &str, bytes: &str| {
        Tree::from([(path.to_owned(), (mode, bytes.as_bytes().to_vec()))])
    };
    let one = fixture.commit(&[], 0, &with(FILE, "a", "target"));
    let two = fixture.commit(&[one], 10, &with(LINK, "a", "target"));
    let three = fixture.commit(&[two], 20, &with(FILE, "a", "target"));
    let four = fixture.commit(&[three], 30, &with("100755", "a", "target"));
    let five = fixture.commit(&[four], 40, &with(LINK, "b", "target"));
    let six = fixture.commit(&[five], 50, &with(LINK, "c", "target"));
    fixture.import(six, false);
    fixture.check();
}

#[test]
fn a_file_becomes_a_directory_and_back() {
    let mut fixture = Fixture::new();
    let text = lines("word", 20);
    let more = format!("{text}more\n");
    let one = fixture.commit(&[], 0, &tree(&[("a", &text), ("a.b", "b\n")]));
    let two = fixture.commit(&[one], 10, &tree(&[("a/a", &more), ("a.b", "b\n")]));
    let three = fixture.commit(&[two], 20, &tree(&[("a", &more), ("a.b/c", "b\n")]));
    fixture.import(three, false);
    fixture.check();
}

#[test]
fn a_last_line_without_end_is_another_line_than_with_one() {
    let mut fixture = Fixture::new();
    let one = fixture.commit(
        &[],
        0,
        &tree(&[("a", "1\n2\n3"), ("b", "1\r\n2\r\n"), ("e", "")]),
    );
    let two = fixture.commit(
        &[one],
        10,
        &tree(&[("a", "1\n2\n3\n"), ("b", "1\n2\r\n"), ("e", "")]),
    );
    let three = fixture.commit(
        &[two],
        -500,
        &tree(&[("a", "1\n2\n3\n4"), ("b", "1\n2\n"), ("e", "")]),
    );
    fixture.import(three, false);
    fixture.check();
}

#[test]
fn the_mailmap_of_head_gives_authors_their_addresses() {
    let mut fixture = Fixture::new();
    let map = "Proper <proper@x> <OLD@x>\nTwo <two@x> Second Name <shared@x>\n<e@x> <>\n";
    let mut files = Vec::new();
    let mut grown = String::new();
    let mut last = Vec::new();
    let authors = [
        "Anybody <old@x>",
        "second name <Shared@x>",
        "Third Name <shared@x>",
        "Nobody <>",
        "Odd <  odd@x >",
        "Ünknown <\u{fc}@x>",
    ];
    for (number, author) in authors.iter().enumerate() {
        grown.push_str(&format!("line {number}\n").repeat(number + 1));
        files.push((".mailmap", map));
        let tree = tree(&[(".mailmap", map), ("a", &grown)]);
        last = vec![fixture.commit_by(author, &last, number as i64, &tree)];
    }
    fixture.import(last[0], true);
    let mut expected = BTreeMap::<String, u64>::new();
    for path in [".mailmap", "a"] {
        let porcelain = fixture.git(&["blame", "--line-porcelain", "main", "--", path]);
        for line in text_lines(&porcelain) {
            if let Some(email) = line.strip_prefix("author-mail <") {
                *expected
                    .entry(email[..email.len() - 1].to_owned())
                    .or_default() += 1;
            }
        }
    }
    let outcome = fixture.ours(&Options::default());
    let totals: BTreeMap<String, u64> = (outcome.totals.iter())
        .map(|(email, lines)| (text(email), *lines))
        .collect();
    assert_eq!(totals, expected);
    assert!(outcome.totals.is_sorted_by(|one, other| one.1 >= other.1));
}

fn text_lines(bytes: &[u8]) -> Vec<String> {
    text(bytes).lines().map(str::to_owned).collect()
}

#[test]
fn options_choose_what_gits_own_options_choose() {
    for seed in 1000..1004 {
        let fixture = random::history(seed, 40, true);
        let ignore = Options {
            whitespace: Whitespace::IgnoreAll,
            ..Options::default()
        };
        assert_eq!(
            fixture.our_lines(&ignore),
            fixture.git_lines(&["-w"]),
            "{seed}"
        );
        let first = Options {
            first_parent: true,
            ..Options::default()
        };
        let expected = fixture.git_lines(&["--first-parent"]);
        assert_eq!(fixture.our_lines(&first), expected, "{seed}");
        let both = Options {
            whitespace: Whitespace::IgnoreAll,
            ..first
        };
        let expected = fixture.git_lines(&["-w", "--first-parent"]);
        assert_eq!(fixture.our_lines(&both), expected, "{seed}");
    }
}

#[test]
fn patterns_choose_files_and_change_nothing_else() {
    let fixture = random::history(2000, 30, true);
    let options = Options {
        include: vec!["d*".to_owned()],
        exclude: vec!["*1".to_owned()],
        ..Options::default()
    };
    let mut expected = fixture.git_lines(&[]);
    expected.retain(|path, _| {
        let names = || path.split('/');
        names().any(|name| name.starts_with('d')) && !names().any(|name| name.ends_with('1'))
    });
    assert_eq!(fixture.our_lines(&options), expected);
}

/// Fresh histories each time; the seed of a failure is printed with the smallest number of
/// commits that shows it, to be added to the fixed ones below.
#[test]
fn random_histories_are_explained_as_by_git() {
    let count = match std::env::var("CELERIAC_BLAME_SEEDS") {
        Ok(count) => count.parse().unwrap(),
        Err(_) => 12,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    // CELERIAC_BLAME_SEED shows a printed one again.
    let first = match std::env::var("CELERIAC_BLAME_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => now.as_nanos() as u64,
    };
    for seed in first..first + count {
        random::check(seed);
    }
}

#[test]
fn fixed_random_histories_are_explained_as_by_git() {
    for seed in 1..8 {
        random::check(seed);
    }
}

#[test]
fn progress_rises_to_the_end_and_the_flag_interrupts() {
    let fixture = random::history(3000, 40, true);
    let repository = Repository::open(fixture.path()).unwrap();
    let head = repository.head().unwrap().unwrap();
    let flag = AtomicBool::new(false);
    let seen = Mutex::new(Vec::new());
    let record = |progress: Progress| seen.lock().unwrap().push(progress.fraction());
    blame(&repository, head, &Options::default(), &record, &flag).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&1.0));

    let interrupt = |_: Progress| flag.store(true, Ordering::Relaxed);
    let error = blame(&repository, head, &Options::default(), &interrupt, &flag).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
}

#[test]
fn a_repository_without_commits_has_no_head() {
    let fixture = Fixture::new();
    let repository = Repository::open(fixture.path()).unwrap();
    assert_eq!(repository.head().unwrap(), None);
}

#[test]
fn head_may_be_detached_and_revisions_be_tags() {
    let fixture = random::history(4000, 5, false);
    let commit = text(&fixture.git(&["rev-parse", "main"])).trim().to_owned();
    fixture.git(&[
        "-c",
        "user.name=T",
        "-c",
        "user.email=t@x",
        "tag",
        "-a",
        "-m",
        "t",
        "v1",
        "main",
    ]);
    fixture.git(&["update-ref", "--no-deref", "HEAD", &commit]);
    let repository = Repository::open(fixture.path()).unwrap();
    assert_eq!(repository.head().unwrap().unwrap().to_string(), commit);
    assert_eq!(repository.resolve("v1").unwrap().to_string(), commit);
    let error = repository.resolve("nothing").unwrap_err();
    assert!(error.to_string().contains("nothing"), "{error}");
    let error = repository.resolve("main^{tree}").unwrap_err();
    assert!(error.to_string().contains("not a commit"), "{error}");

    fixture.git(&["symbolic-ref", "HEAD", "refs/tags/v1"]);
    let repository = Repository::open(fixture.path()).unwrap();
    assert_eq!(repository.head().unwrap().unwrap().to_string(), commit);
    let nobody = "1234567890123456789012345678901234567890";
    std::fs::write(fixture.path().join("HEAD"), nobody).unwrap();
    let repository = Repository::open(fixture.path()).unwrap();
    let error = repository.head().unwrap_err();
    assert!(error.to_string().contains(nobody), "{error}");
}

#[test]
fn a_shallow_clone_ends_where_git_ends_it() {
    let origin = random::history(5000, 30, true);
    let clone = Fixture::new();
    let url = format!("file://{}", origin.path().display());
    clone.git(&["fetch", "-q", "--depth=4", &url, "main:main"]);
    clone.check();
}
