//! Repositories that hide tricks: what runs where git checks them out, follows their links or
//! believes their configuration is data here. Each is fetched from a server and analysed; the
//! canary must not appear, the listener must hear nothing, and the clone holds what we wrote.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use celeriac::analysis::{self, Answer, Job, Policy};

use crate::support::{GitServer, Repository, repository};

/// A tree entry: mode, name, content.
type Entry = (&'static str, Vec<u8>, Content);

enum Content {
    Text(String),
    Directory(Vec<Entry>),
    /// A commit of another repository.
    Elsewhere,
}

/// Somebody who hears nothing, and a file that never appears.
struct Trap {
    address: String,
    heard: Arc<AtomicUsize>,
    canary: String,
}

fn text(content: impl Into<String>) -> Content {
    Content::Text(content.into())
}

fn file(name: &str, content: impl Into<String>) -> Entry {
    ("100644", name.as_bytes().to_vec(), text(content))
}

fn directory(name: &str, entries: Vec<Entry>) -> Entry {
    (
        "40000",
        name.as_bytes().to_vec(),
        Content::Directory(entries),
    )
}

fn object(repository: &Path, kind: &str, bytes: &[u8]) -> String {
    let mut child = repository::command(repository)
        .args(["hash-object", "-t", kind, "-w", "--stdin", "--literally"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn tree(repository: &Path, entries: &[Entry]) -> String {
    let mut bytes = Vec::new();
    for (mode, name, content) in entries {
        let id = match content {
            Content::Text(text) => object(repository, "blob", text.as_bytes()),
            Content::Directory(entries) => tree(repository, entries),
            Content::Elsewhere => "1".repeat(40),
        };
        bytes.extend(mode.as_bytes());
        bytes.push(b' ');
        bytes.extend(name);
        bytes.push(0);
        bytes.extend(
            (0..40)
                .step_by(2)
                .map(|at| u8::from_str_radix(&id[at..at + 2], 16).unwrap()),
        );
    }
    object(repository, "tree", &bytes)
}

/// What came of it: the lines that were counted, or the error.
fn analysed(url: &str) -> (String, Vec<String>) {
    let clone = tempfile::tempdir().unwrap();
    let job = Job {
        url: url.to_owned(),
        token: None,
        branch: None,
        depth: None,
        directory: clone.path().to_owned(),
        threads: 1,
        cache: 16,
        policy: Policy {
            allow_local: true,
            ..Policy::default()
        },
    };
    let answer = analysis::answer(&job, None, &|_| {}, &AtomicBool::new(false));
    let told = match answer {
        Ok(Answer::Found(report)) => {
            let people: Vec<_> = report.contributors.iter().map(|one| &one.0).collect();
            format!("{} lines by {people:?}", report.lines)
        }
        Ok(Answer::Unchanged) => "unchanged".to_owned(),
        Err((_, error)) => error.to_string(),
    };
    (told, files(clone.path(), clone.path()))
}

/// Files below a directory that a bare repository of ours has no reason to hold.
fn files(root: &Path, directory: &Path) -> Vec<String> {
    let mut strange = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let known = ["HEAD", "config", "packed-refs"].contains(&name.as_str())
            || name.starts_with("objects/pack/");
        if kind.is_dir() {
            strange.extend(files(root, &path));
        } else if !kind.is_file() || !known {
            strange.push(name);
        }
    }
    strange
}

#[test]
fn tricks_of_a_work_tree_are_data() {
    let ear = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = tempfile::tempdir().unwrap();
    let trap = Trap {
        address: ear.local_addr().unwrap().to_string(),
        heard: Arc::new(AtomicUsize::new(0)),
        canary: home.path().join("canary").display().to_string(),
    };
    let heard = Arc::clone(&trap.heard);
    std::thread::spawn(move || {
        for _ in ear.incoming() {
            heard.fetch_add(1, Ordering::SeqCst);
        }
    });
    let server = GitServer::start();
    let mut wrong = Vec::new();
    for (name, expected, entries) in cases(&trap) {
        let repository = Repository::new();
        let root = tree(repository.path(), &entries);
        let commit = format!(
            "tree {root}\nauthor Eve <eve@example.com> 1700000000 +0000\n\
             committer Eve <eve@example.com> 1700000000 +0000\n\none\n"
        );
        let commit = object(repository.path(), "commit", commit.as_bytes());
        repository.git(&["update-ref", "HEAD", &commit]);
        let (fetched, strange) = analysed(&server.open(&repository));
        let (in_place, _) = analysed(&repository.url());
        println!("{name}: {fetched} / {in_place}");
        // Some are too broken for git to pack; then only reading them in place tells.
        let packed = !fetched.contains("the server says: aborting");
        let told = if packed { fetched } else { in_place.clone() };
        let same = told.contains("lines") == in_place.contains("lines");
        if !told.contains(expected) || !strange.is_empty() || !same {
            wrong.push(format!(
                "{name}: expected {expected}, got {told}; {in_place}; {strange:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
    assert!(!Path::new(&trap.canary).exists(), "a trick was played");
    assert_eq!(
        trap.heard.load(Ordering::SeqCst),
        0,
        "the listener heard something"
    );
}

/// Name, what must come of it, the tree at HEAD.
fn cases(trap: &Trap) -> Vec<(&'static str, &'static str, Vec<Entry>)> {
    let Trap {
        address, canary, ..
    } = trap;
    let touch = format!("touch {canary}");
    let hook = || {
        (
            "100755",
            b"post-checkout".to_vec(),
            text(format!("#!/bin/sh\n{touch}\n")),
        )
    };
    let module = |path: &str, url: &str| {
        file(
            ".gitmodules",
            format!("[submodule \"m\"]\n\tpath = {path}\n\turl = {url}\n\tupdate = !{touch}\n"),
        )
    };
    let long = "n".repeat(3_000);
    vec![
        (
            "submodule that calls home",
            "4 lines by [\"eve@example.com\"]",
            vec![
                module("m", &format!("http://{address}/m.git")),
                ("160000", b"m".to_vec(), Content::Elsewhere),
            ],
        ),
        (
            "submodule outside of the work tree",
            "4 lines",
            vec![
                module("../../m", &format!("ext::sh -c '{touch}'")),
                ("160000", b"m".to_vec(), Content::Elsewhere),
            ],
        ),
        (
            "submodule that is an option",
            "4 lines",
            vec![module("-u", &format!("--upload-pack={touch}"))],
        ),
        (
            "filters of attributes",
            "6 lines",
            vec![
                file(
                    ".gitattributes",
                    "* filter=evil diff=evil merge=evil\n*.txt working-tree-encoding=UTF-16\n",
                ),
                file(
                    ".gitconfig",
                    format!("[filter \"evil\"]\n\tsmudge = {touch}\n\tclean = {touch}\n"),
                ),
                file("a.txt", "one\n"),
            ],
        ),
        (
            "large files elsewhere",
            "5 lines",
            vec![
                file(
                    ".gitattributes",
                    "*.bin filter=lfs diff=lfs merge=lfs -text\n",
                ),
                file(".lfsconfig", format!("[lfs] url = http://{address}/lfs\n")),
                file(
                    "a.bin",
                    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
                ),
            ],
        ),
        (
            "links out of the repository",
            "4 lines",
            vec![
                ("120000", b"a".to_vec(), text("/etc/passwd")),
                ("120000", b"b".to_vec(), text("../../../../../etc/shadow")),
                ("120000", b"c".to_vec(), text("/proc/self/environ")),
                ("120000", b"d".to_vec(), text(format!("http://{address}/"))),
            ],
        ),
        (
            "mailmap that is a link",
            "2 lines by [\"eve@example.com\"]",
            vec![
                ("120000", b".mailmap".to_vec(), text("/etc/passwd")),
                file("a", "one\n"),
            ],
        ),
        (
            "mailmap that goes in circles",
            "3 lines",
            vec![
                file(
                    ".mailmap",
                    "<a@example.com> <eve@example.com>\n<eve@example.com> <a@example.com>\n",
                ),
                file("a", "one\n"),
            ],
        ),
        (
            "link and directory of one name",
            "a file and a directory at once",
            vec![
                ("120000", b"d".to_vec(), text(".git/hooks")),
                directory("d", vec![file("post-checkout", "one\n")]),
            ],
        ),
        (
            "hooks in the tree",
            "2 lines",
            vec![directory(".git", vec![directory("hooks", vec![hook()])])],
        ),
        (
            "hooks under other spellings",
            "8 lines",
            vec![
                directory(".GIT", vec![directory("hooks", vec![hook()])]),
                directory(".g\u{200c}it", vec![directory("hooks", vec![hook()])]),
                directory("GIT~1", vec![directory("hooks", vec![hook()])]),
                directory(".git.", vec![directory("hooks", vec![hook()])]),
            ],
        ),
        (
            "a bare repository inside",
            "6 lines",
            vec![
                file("HEAD", "ref: refs/heads/main\n"),
                file(
                    "config",
                    format!("[core]\n\tfsmonitor = {touch}\n\tsshCommand = {touch}\n"),
                ),
                directory(
                    "objects",
                    vec![directory(
                        "info",
                        vec![
                            file("alternates", "/etc\n"),
                            file("http-alternates", format!("http://{address}/objects\n")),
                        ],
                    )],
                ),
                directory("refs", vec![]),
            ],
        ),
        (
            "names that climb",
            "1 lines",
            vec![directory(
                "..",
                vec![directory("..", vec![file("canary", "one\n")])],
            )],
        ),
        (
            "a name that is a path",
            "an entry of the tree is malformed",
            vec![file("../../canary", "one\n")],
        ),
        (
            "an absolute name",
            "an entry of the tree is malformed",
            vec![file("/tmp/canary", "one\n")],
        ),
        (
            "the same name twice",
            "2 lines",
            vec![file("a", "one\n"), file("a", "two\n")],
        ),
        (
            "names out of order",
            "2 lines",
            vec![file("z", "one\n"), file("a", "two\n")],
        ),
        (
            "a name without letters",
            "malformed",
            vec![("100644", Vec::new(), text("one\n"))],
        ),
        (
            "a mode that is no number",
            "malformed",
            vec![("banana", b"a".to_vec(), text("one\n"))],
        ),
        (
            "modes as they were written once",
            "2 lines",
            vec![
                ("0100644", b"a".to_vec(), text("one\n")),
                (
                    "040000",
                    b"d".to_vec(),
                    Content::Directory(vec![file("b", "one\n")]),
                ),
            ],
        ),
        (
            "a mode nobody has",
            "1 lines",
            vec![("100000", b"a".to_vec(), text("one\n"))],
        ),
        (
            "set-uid",
            "1 lines",
            vec![("104755", b"a".to_vec(), text("one\n"))],
        ),
        (
            "a device",
            "0 lines",
            vec![("20666", b"a".to_vec(), text("one\n"))],
        ),
        (
            "names for terminals",
            "4 lines",
            vec![
                file("\u{1b}]0;owned\u{7}", "one\n"),
                file("a\nb\r\tc", "one\n"),
                file("--upload-pack=touch", "one\n"),
                ("100644", vec![0xff, 0xfe, b'x'], text("one\n")),
            ],
        ),
        ("a very long name", "1 lines", vec![file(&long, "one\n")]),
        (
            "a path that is longer than any",
            "4096 bytes in the path",
            vec![directory(
                &long,
                vec![directory(&long, vec![file("a", "one\n")])],
            )],
        ),
        (
            "a file that calls itself a tree",
            "it is a blob, not a tree",
            vec![("40000", b"d".to_vec(), text("one\n"))],
        ),
        (
            "a tree that calls itself a file",
            "it is a tree, not a blob",
            vec![(
                "100644",
                b"f".to_vec(),
                Content::Directory(vec![file("a", "one\n")]),
            )],
        ),
        (
            "a commit that is not there, as a file",
            "0 lines",
            vec![("100644", b"f".to_vec(), Content::Elsewhere)],
        ),
    ]
}
