//! Authors whose names and addresses are attacks on whoever stores or shows them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::repository::command;
use crate::support::{Raw, Repository, Worker, services};

/// Name and address, as they stand in a commit. The names are shown nowhere.
const AUTHORS: [(&[u8], &[u8]); 16] = [
    (b"Ada", b"'); DROP TABLE analyses; --"),
    (b"Ada", b"x' OR '1'='1"),
    (b"\x1b]0;title\x07", b"\x1b[2J\x1b[31mred@example.com"),
    (b"=1+1", b"=cmd|' /C calc'!A0"),
    (b"+1", b"+HYPERLINK(1)@example.com"),
    (b"@SUM", b"@SUM(1)"),
    (b"&lt;", b"\"onload=alert(1) x=\"@example.com"),
    (b"{{7*7}}", b"${jndi:ldap://127.0.0.1/a}@example.com"),
    (b"%s%n", b"%s%s%n%x@example.com"),
    (b"\xff\xfe", b"\xff\xfe\x80@example.com"),
    (b"cut", b"\xe2\x82@example.com"),
    (b"turned", "\u{202e}moc.elpmaxe@ada".as_bytes()),
    (b"back", b"a\rb\x08\x08c@example.com"),
    (b"null", b"null"),
    (b"proto", b"__proto__"),
    (b"../..", b"../../etc/passwd"),
];

/// Appends a commit of one line whose author is written as given.
fn commit(repository: &Repository, number: usize, (name, address): (&[u8], &[u8])) {
    repository.write(&format!("f{number}.txt"), b"a line\n");
    repository.git(&["add", "--all"]);
    let tree = repository.git(&["write-tree"]);
    let head = repository.head();
    let content = [
        b"tree ".as_slice(),
        &tree,
        format!("parent {head}\nauthor ").as_bytes(),
        name,
        b" <",
        address,
        b"> 1700000000 +0000\ncommitter C <c@example.com> 1700000000 +0000\n\nm\n",
    ]
    .concat();
    let mut hash = command(repository.path())
        .args([
            "hash-object",
            "-t",
            "commit",
            "-w",
            "--literally",
            "--stdin",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("git runs");
    let mut input = hash.stdin.take().expect("it is piped");
    input.write_all(&content).expect("git reads");
    drop(input);
    let told = hash.wait_with_output().expect("git ends");
    assert!(told.status.success());
    let oid = String::from_utf8(told.stdout).expect("digits");
    repository.git(&["update-ref", "HEAD", oid.trim()]);
}

fn no_controls(place: &str, text: &[u8]) {
    let control = |byte: &&u8| byte.is_ascii_control() && **byte != b'\n';
    let found = text.iter().find(control);
    assert_eq!(found, None, "{place}: {}", String::from_utf8_lossy(text));
}

#[test]
fn hostile_authors_are_data_in_results_rows_logs_and_on_the_terminal() {
    let (redis, postgres) = (services::redis(), services::postgres());
    let mut repository = Repository::new();
    repository.commit("Eve <eve@example.com>", &[("first.txt", "one\n")]);
    for (number, author) in AUTHORS.into_iter().enumerate() {
        commit(&repository, number, author);
    }
    let worker = Worker::on(&redis.url)
        .database(&postgres)
        .loglevel("debug")
        .option("-E")
        .env("CELERY_RESULT_EXTENDED", "1")
        .start();
    let mut raw = Raw::new(worker.broker(), &worker.queue);
    let id = raw.send("analyze_repo_task", json!([1, repository.url()]));
    let expected: BTreeMap<String, u64> = AUTHORS
        .iter()
        .map(|(_, address)| (String::from_utf8_lossy(address).into_owned(), 1))
        .chain([("eve@example.com".to_owned(), 1)])
        .collect();
    let value = raw.value(&id);
    assert_eq!(value["result"], json!(expected), "{value:#}");
    // Python reads the same.
    let read = worker.ask(
        "answer(AsyncResult(sys.argv[1], app=app).get(timeout=20))",
        &[&id],
    );
    assert_eq!(read["result"], value["result"]);
    // A row for each, and the tables are there.
    let rows = postgres.rows("SELECT email, lines FROM contributors");
    let stored: BTreeMap<String, u64> = rows
        .into_iter()
        .map(|row| {
            let [email, lines] = <[_; 2]>::try_from(row).expect("two columns");
            (email.unwrap(), lines.unwrap().parse().unwrap())
        })
        .collect();
    assert_eq!(stored, expected);
    // The log has a line for each record, and nothing that moves a cursor.
    let log = worker.log();
    assert!(log.contains(&id), "{log}");
    no_controls("log", log.as_bytes());
    for line in log.lines().filter(|line| line.contains("succeeded in")) {
        assert!(line.starts_with('['), "{line}");
    }
    for words in [
        vec!["analyze", &repository.url()],
        vec!["analyze", "--csv", &repository.url()],
        vec!["analyze", "--json", &repository.url()],
        vec!["result", &id],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_celeriac"))
            .args(&words)
            .env("QUEUE_BROKER_URL", worker.broker())
            .env("CELERY_RESULT_BACKEND", worker.broker())
            .env("ALLOW_LOCAL_REPOS", "1")
            .current_dir(worker.clones())
            .output()
            .expect("the binary runs");
        assert!(output.status.success(), "{words:?}: {output:?}");
        assert!(!output.stdout.is_empty(), "{words:?}");
        no_controls(&words.join(" "), &output.stdout);
        if words.contains(&"--csv") {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let formula = |line: &&str| line.trim_start_matches('"').starts_with(['=', '+', '@']);
            assert_eq!(text.lines().find(formula), None, "{text}");
        }
    }
}
