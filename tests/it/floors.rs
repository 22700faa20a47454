//! The house rules that a machine can check: who may import whom, which library is spoken to
//! through which door, and that every file says what it is.
//!
//! The tables are the rules; when one has to change, it is changed here, in the same commit
//! as the code that needs it, with the reason in the commit's body.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::support::project;

/// Imports only go down: a directory imports from its own floor or below, never from above.
const FLOORS: &[&[&str]] = &[
    &["config", "protocol", "logging"],
    &["transport", "database", "git"],
    &["backend", "pidbox", "events", "blame"],
    &["analysis", "pool"],
    &["tasks"],
    &["worker"],
    &["cli"],
    &["main"],
];

/// Everything a directory (or a file beside lib.rs) may import from this crate.
const IMPORTS: &[(&str, &[&str])] = &[
    ("main", &["pool", "analysis", "cli"]),
    ("logging", &["config"]),
    ("config", &[]),
    ("protocol", &[]),
    ("transport", &["config", "protocol"]),
    // Permits are counted by either in the same words.
    ("database", &["config", "protocol"]),
    ("git", &[]),
    ("backend", &["config", "protocol", "transport", "database"]),
    ("pidbox", &["protocol", "transport"]),
    ("events", &["protocol", "transport"]),
    ("blame", &["git"]),
    // The handler of a child is given the pool's vocabulary.
    ("analysis", &["git", "blame", "pool", "protocol"]),
    ("pool", &["protocol"]),
    (
        "tasks",
        &["config", "protocol", "analysis", "pool", "database"],
    ),
    (
        "worker",
        &[
            "config",
            "protocol",
            "transport",
            "backend",
            "pidbox",
            "events",
            "pool",
            "tasks",
            // The worker carries jobs and reports between child and database.
            "analysis",
            "database",
            "logging",
        ],
    ),
    (
        "cli",
        &[
            "logging",
            "config",
            "protocol",
            "transport",
            "database",
            "git",
            "backend",
            "pidbox",
            "events",
            "blame",
            "analysis",
            "pool",
            "tasks",
            "worker",
        ],
    ),
];

/// One door per library: the files and directories (below src/) that may name it.
const DOORS: &[(&str, &[&str])] = &[
    ("lapin", &["transport/amqp"]),
    ("redis", &["transport/redis", "backend/redis"]),
    ("diesel", &["database", "backend/database"]),
    ("diesel_async", &["database", "backend/database"]),
    ("diesel_migrations", &["database"]),
    ("tokio_postgres", &["database"]),
    ("git2", &["git"]),
    ("gix", &["git"]),
    ("celery", &["worker/app"]),
    ("clap", &["cli"]),
    ("libc", &["pool/process", "pool/sandbox", "worker/shutdown"]),
    // Its types (signals, process ids, descriptors) are the pool's vocabulary.
    // Remote control tells of the process (rusage) and takes names of signals.
    (
        "nix",
        &[
            "pool",
            "worker/shutdown",
            "worker/control",
            "cli",
            "git/fetch/space",
        ],
    ),
    ("console", &["cli"]),
];

#[test]
fn imports_only_go_where_the_table_allows() {
    let mut broken = Vec::new();
    for file in source_files() {
        let from = file.top();
        if from == "lib" {
            continue;
        }
        let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == from) else {
            broken.push(format!("{}: {from} stands in no floor", file.shown()));
            continue;
        };
        for (line, top) in scan(&file.text, &file.module()).imports {
            // Items at the root itself (a macro, a re-export) belong to no floor.
            let known = IMPORTS.iter().any(|(name, _)| *name == top);
            if known && top != from && !allowed.contains(&top.as_str()) {
                broken.push(format!(
                    "{}:{line}: {from} may not import {top} (allowed: {})",
                    file.shown(),
                    if allowed.is_empty() {
                        "nothing".into()
                    } else {
                        allowed.join(" ")
                    }
                ));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn every_library_is_spoken_to_through_its_door() {
    let mut broken = Vec::new();
    for file in source_files() {
        for (line, library) in scan(&file.text, &file.module()).libraries {
            let (_, doors) = DOORS
                .iter()
                .find(|(name, _)| *name == library)
                .expect("scan reports what DOORS names");
            if !doors.iter().any(|door| file.is_behind(door)) {
                broken.push(format!(
                    "{}:{line}: {library} is spoken to in {} only",
                    file.shown(),
                    doors.join(", ")
                ));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn every_file_starts_with_its_module_doc() {
    let silent: Vec<String> = source_files()
        .iter()
        .filter(|file| !file.text.starts_with("//!") && !file.text.starts_with("// @generated"))
        .map(SourceFile::shown)
        .collect();
    assert!(
        silent.is_empty(),
        "these files do not say what they are (//! on the first line):\n{}\n",
        silent.join("\n")
    );
}

#[test]
fn the_table_itself_only_goes_down() {
    let floor = |name: &str| {
        FLOORS
            .iter()
            .position(|floor| floor.contains(&name))
            .unwrap_or_else(|| panic!("{name} stands on no floor"))
    };
    for (from, allowed) in IMPORTS {
        for to in *allowed {
            assert!(
                floor(to) <= floor(from),
                "{from} may not import {to}, which is above it"
            );
        }
    }
}

struct SourceFile {
    /// Below src/, with slashes: `transport/redis/keys.rs`.
    path: String,
    text: String,
}

impl SourceFile {
    fn shown(&self) -> String {
        format!("src/{}", self.path)
    }

    /// `transport`, or `logging` for logging.rs.
    fn top(&self) -> String {
        let first = self.path.split('/').next().unwrap_or_default();
        first.trim_end_matches(".rs").to_owned()
    }

    /// The module path of the file: `[transport, redis, keys]`; empty for the crate's root.
    fn module(&self) -> Vec<String> {
        let mut parts: Vec<String> = self
            .path
            .trim_end_matches(".rs")
            .split('/')
            .map(str::to_owned)
            .collect();
        if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] || parts == ["main"] {
            parts.pop();
        }
        parts
    }

    fn is_behind(&self, door: &str) -> bool {
        let rest = self.path.strip_prefix(door);
        rest.is_some_and(|rest| rest.starts_with(['/', '.', '_']))
    }
}

/// All of src/, sorted. Files named `tests.rs` may look behind every curtain, as modules
/// under `#[cfg(test)]` may.
fn source_files() -> Vec<SourceFile> {
    let root = project().join("src");
    let mut waiting = vec![root.clone()];
    let mut paths = BTreeSet::new();
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).expect("src is readable") {
            let path = entry.expect("src is readable").path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                paths.insert(path);
            }
        }
    }
    assert!(
        paths.contains(&root.join("lib.rs")),
        "no lib.rs in {}",
        root.display()
    );
    let below = |path: &PathBuf| path.strip_prefix(&root).expect("below src").to_owned();
    paths
        .iter()
        .filter(|path| {
            !below(path)
                .iter()
                .any(|part| part == "tests.rs" || part == "tests")
        })
        .map(|path| SourceFile {
            path: below(path).to_string_lossy().into_owned(),
            text: std::fs::read_to_string(path).expect("source is UTF-8"),
        })
        .collect()
}

/// What one file names, outside its tests.
#[derive(Debug, Default, PartialEq)]
struct Names {
    /// Line and the first name after the crate's root.
    imports: Vec<(usize, String)>,
    /// Line and a library of [`DOORS`].
    libraries: Vec<(usize, String)>,
}

/// Finds `crate::x`, `celeriac::x`, `super::…` that reaches the root, each also as a group
/// in braces, and paths that begin with a library's name.
fn scan(text: &str, file: &[String]) -> Names {
    let tokens = tokens(text);
    let word = |index: usize| tokens.get(index).map_or("", |token| token.1);
    let mut names = Names::default();
    let mut modules: Vec<(String, bool)> = Vec::new();
    // Which opening braces belong to an inline module, and since when the file is in tests.
    let mut braces: Vec<bool> = Vec::new();
    let mut test_attribute = false;

    for (index, &(line, token)) in tokens.iter().enumerate() {
        let before = if index == 0 { "" } else { word(index - 1) };
        match token {
            "{" => {
                let is_module = index >= 2 && word(index - 2) == "mod";
                if is_module {
                    modules.push((before.to_owned(), test_attribute));
                }
                braces.push(is_module);
                test_attribute = false;
            }
            "}" => {
                if braces.pop() == Some(true) {
                    modules.pop();
                }
                test_attribute = false;
            }
            ";" => test_attribute = false,
            "cfg" if word(index + 1) == "(" && word(index + 2) == "test" => test_attribute = true,
            _ => {}
        }
        if modules.iter().any(|(_, is_test)| *is_test) {
            continue;
        }
        if (token == "crate" || token == "celeriac") && before != "::" && word(index + 1) == "::" {
            first_names(&tokens, index + 2, &mut names.imports);
        }
        if token == "super" && before != "::" {
            let mut next = index;
            let mut climbed = 0;
            while word(next) == "super" && word(next + 1) == "::" {
                climbed += 1;
                next += 2;
            }
            if climbed > 0 && climbed == file.len() + modules.len() {
                first_names(&tokens, next, &mut names.imports);
            }
        }
        let absolute = before == "::" && (index < 2 || !is_name(word(index - 2)));
        if (before != "::" || absolute)
            && (word(index + 1) == "::" || (before == "use" && word(index + 1) == ";"))
            && DOORS.iter().any(|(library, _)| *library == token)
            && (absolute || !is_own_module(&tokens, token))
        {
            names.libraries.push((line, token.to_owned()));
        }
    }
    names
}

/// The name at `index`, or every name that begins an entry of the group there.
fn first_names(tokens: &[(usize, &str)], index: usize, found: &mut Vec<(usize, String)>) {
    let Some(&(line, token)) = tokens.get(index) else {
        return;
    };
    if token != "{" {
        found.push((line, token.to_owned()));
        return;
    }
    let mut depth = 0;
    let mut begins = false;
    for &(line, token) in &tokens[index..] {
        match token {
            "{" => {
                depth += 1;
                begins = depth == 1;
            }
            "}" => depth -= 1,
            "," => begins = depth == 1,
            _ if begins => {
                found.push((line, token.to_owned()));
                begins = false;
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

/// Whether the file declares or imports a module of ours that has the library's name, such as
/// `transport::redis`.
fn is_own_module(tokens: &[(usize, &str)], name: &str) -> bool {
    tokens.windows(3).any(|window| {
        let [(_, before), (_, token), (_, after)] = window else {
            return false;
        };
        *token == name
            && (*before == "mod"
                || (["::", "{", ","].contains(before) && [";", ",", "}"].contains(after)))
    })
}

fn is_name(token: &str) -> bool {
    token == ">"
        || token != "use" && token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Names, `::` and single signs with their lines; comments and literals are left out.
fn tokens(text: &str) -> Vec<(usize, &str)> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    let mut line = 1;
    while at < bytes.len() {
        let rest = &text[at..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest) {
            length
        } else if rest.starts_with('"') || rest.starts_with("b\"") || rest.starts_with("c\"") {
            quoted(rest, rest.find('"').unwrap_or(0))
        } else if rest.starts_with('\'') {
            character_or_lifetime(rest)
        } else if rest.starts_with("::") {
            found.push((line, "::"));
            2
        } else {
            let first = rest.chars().next().expect("not at the end");
            if first.is_alphanumeric() || first == '_' {
                let end = rest
                    .find(|other: char| !(other.is_alphanumeric() || other == '_'))
                    .unwrap_or(rest.len());
                found.push((line, &rest[..end]));
                end
            } else {
                if !first.is_whitespace() {
                    found.push((line, &rest[..first.len_utf8()]));
                }
                first.len_utf8()
            }
        };
        line += rest[..length].matches('\n').count();
        at += length;
    }
    found
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn raw_string(rest: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"].into_iter().find(|prefix| {
        rest.strip_prefix(prefix)
            .is_some_and(|rest| rest.trim_start_matches('#').starts_with('"'))
    })?;
    let hashes = rest[prefix.len()..].find('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let body = prefix.len() + hashes + 1;
    Some(
        rest[body..]
            .find(&end)
            .map_or(rest.len(), |at| body + at + end.len()),
    )
}

fn quoted(rest: &str, open: usize) -> usize {
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(open + 1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `'a'` and `'\''` are characters, `'a` is a lifetime.
fn character_or_lifetime(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => {
            characters.next();
            rest[3..].find('\'').map_or(rest.len(), |at| 3 + at + 1)
        }
        Some((_, _)) => match characters.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

fn path(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn the_scanner_finds_every_form_of_an_import() {
    let source = r##"//! doc
use crate::{git::{self, url}, blame::Outcome, pool};
fn run(x: &'static str) { let c = '{'; crate::worker::go("crate::cli", r#"crate::events"#); }
// crate::tasks
/* crate::tasks /* nested */ crate::tasks */
use super::super::config;
mod inner { use super::super::super::logging; use super::super::sibling; }
use super::near;
"##;
    let tops: Vec<String> = scan(source, &path(&["a", "b"]))
        .imports
        .into_iter()
        .map(|(_, top)| top)
        .collect();
    assert_eq!(
        tops,
        ["git", "blame", "pool", "worker", "config", "logging"]
    );
}

#[test]
fn the_scanner_leaves_tests_alone() {
    let source =
        "//! doc\n#[cfg(test)]\nmod tests { use crate::cli; use redis::Client; }\nuse crate::git;";
    let names = scan(source, &path(&["a"]));
    assert_eq!(names.imports, [(4, "git".to_owned())]);
    assert!(names.libraries.is_empty());
}

#[test]
fn the_scanner_tells_a_library_from_a_module_of_the_same_name() {
    let library = scan(
        "use redis::Client;\nfn f() { lapin::go(); ::nix::x(); a::git2::y() }",
        &[],
    );
    let found: Vec<&str> = library
        .libraries
        .iter()
        .map(|(_, name)| name.as_str())
        .collect();
    assert_eq!(found, ["redis", "lapin", "nix"]);
    assert!(
        scan("pub mod redis;\nfn f() { redis::connect() }", &[])
            .libraries
            .is_empty()
    );
    assert!(
        scan(
            "use super::{amqp, redis};\nfn f() { redis::connect() }",
            &[]
        )
        .libraries
        .is_empty()
    );
    assert_eq!(
        scan("mod redis;\nuse ::redis::Client;", &[])
            .libraries
            .len(),
        1
    );
}
