//! Blame of small scripted histories, each made for one rule that simple versions get wrong.
//!
//! The scripts in `tests/fixtures` make repositories with git, and git says what is right; no expected value is
//! written down.

use celeriac::blame::{Options, Whitespace};

use celeriac::git::{Oid, Repository, ignored};

use crate::blame_oracle::{by_engine, by_git, count, differences, git, neutral};
use crate::support::project;

/// Makes the repository of a script and compares, by file and commit, with several options.
fn check(script: &str) {
    let directory = tempfile::tempdir().unwrap();
    let scripts = project().join("tests/fixtures");
    let done = neutral("sh")
        .arg(scripts.join(script))
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );

    let plain = Options {
        threads: 1,
        ..Options::default()
    };
    // A history that does not separate its commits cannot tell a right engine from a wrong one.
    let lines = by_git(directory.path(), &plain);
    let commits: std::collections::BTreeSet<&String> =
        lines.values().flat_map(|lines| lines.keys()).collect();
    assert!(commits.len() > 1, "{script}: {lines:?}");
    for options in [
        plain.clone(),
        Options {
            threads: 2,
            ..plain.clone()
        },
        Options {
            whitespace: Whitespace::IgnoreAll,
            ..plain.clone()
        },
        Options {
            first_parent: true,
            ..plain.clone()
        },
    ] {
        let text = differences(directory.path(), &options);
        assert!(text.is_empty(), "{script}, {options:?}\n{text}");
    }
}

/// What `celeriac analyze` counts by commit, and git with the same list.
#[test]
fn list_of_ignored_commits_is_read_as_git_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let run = |arguments: &[&str]| git(path, arguments, b"");
    run(&["init", "-q", "-b", "main", "."]);
    let commit = |text: &str, list: &str| {
        std::fs::write(path.join("file"), text).unwrap();
        std::fs::write(path.join(".git-blame-ignore-revs"), list).unwrap();
        run(&["add", "."]);
        let author = ["-c", "user.name=A", "-c", "user.email=a@example.com"];
        run(&[&author[..], &["commit", "-q", "-m", "m"]].concat());
        String::from_utf8(run(&["rev-parse", "HEAD"]))
            .unwrap()
            .trim()
            .to_owned()
    };
    commit("int one(int a) { return a; }\nint two;\n", "");
    let reformatted = commit(
        "int one(int a)\n{\n    return a;\n}\nint  two;\n",
        "# nothing yet\n",
    );
    let author = ["-c", "user.name=A", "-c", "user.email=a@example.com"];
    run(&[&author[..], &["tag", "-a", "-m", "t", "style"]].concat());
    let tag = String::from_utf8(run(&["rev-parse", "style"])).unwrap();
    let blob = String::from_utf8(run(&["rev-parse", "HEAD:file"])).unwrap();
    let missing = "1".repeat(40);
    let last = "int one(int a)\n{\n    return a;\n}\nint  two;\nint three;\n";
    for list in [
        format!("# style\n\n  {reformatted}  # only blanks\r\n"),
        format!("{missing}\n{}\n{}", tag.trim(), blob.trim()),
    ] {
        commit(last, &list);
        let head = Oid::from_hex(run(&["rev-parse", "HEAD"]).trim_ascii()).unwrap();
        let repository = Repository::open(path).unwrap();
        let text = repository
            .file(head, ".git-blame-ignore-revs")
            .unwrap()
            .unwrap();
        let names = ignored::parse(&text, "list").unwrap();
        let options = Options {
            ignored: repository.commits_of(&names).unwrap(),
            ..Options::default()
        };
        let expected = count(&run(&[
            "blame",
            "--porcelain",
            "--ignore-revs-file",
            ".git-blame-ignore-revs",
            "main",
            "--",
            "file",
        ]));
        assert_eq!(by_engine(path, &options)["file"], expected, "{list}");
        // Its five lines are not its own any more.
        assert!(!expected.contains_key(&reformatted), "{expected:?}");
    }
}

macro_rules! fixtures {
    ($($name:ident: $script:literal,)*) => {
        $(
            #[test]
            fn $name() {
                check($script);
            }
        )*

        #[test]
        fn every_script_has_its_test() {
            let scripts = project().join("tests/fixtures");
            for entry in std::fs::read_dir(scripts).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if !name.ends_with(".sh") {
                    continue;
                }
                assert!([$($script,)* "history.sh"].contains(&name.as_str()), "{name} is used by no test");
            }
        }
    };
}

fixtures! {
    common_tail_is_set_aside_before_blocks_slide: "tail_trim.sh",
    both_copies_follow_the_one_source: "two_copies.sh",
    file_renamed_away_unchanged_in_the_second_parent_is_passed_there: "merge_renamed_away.sh",
    identical_file_in_a_later_parent_wins_over_similar_one_in_the_first: "merge_identical_later.sh",
    parents_with_the_same_file_are_asked_once: "merge_same_blob.sh",
    parents_of_an_octopus_are_asked_in_their_order: "octopus.sh",
    type_change_settles_lines_and_mode_change_does_not: "type_change.sh",
    file_becomes_directory_and_back: "file_and_directory.sh",
    namesake_goes_before_the_more_similar: "namesakes.sh",
    equal_sources_are_chosen_by_place: "equal_sources.sh",
    last_newline_and_line_endings_count: "line_endings.sh",
    commits_older_than_their_parents_are_walked_in_order: "crossing_dates.sh",
    links_and_submodules_are_no_sources: "links_and_submodules.sh",
    similarity_counts_chunks: "similarity.sh",
}
