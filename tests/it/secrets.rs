//! Tokens: given, encrypted, stored, used for whom they belong to.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::support::{
    Broker, GitServer, RedisServer, Repository, Worker, on_brokers, project, services, unique,
};

const TASK: &str = "analyze_repo_task";
pub(crate) const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";
pub(crate) const OTHER_KEY: &str = "rA1pPq1p5xD4mXc0r2mO6n1j1l1V7o1d3kq0S5d8cHk=";

pub(crate) fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    repository
}

/// The Python snippet that the README gives to backends.
fn snippet() -> String {
    let text = std::fs::read_to_string(project().join("README.md")).expect("the README");
    let (_, rest) = text.split_once("```python\n").expect("a Python block");
    rest.split_once("```").expect("its end").0.to_owned()
}

/// Encrypts as the documentation says, with the real `cryptography`.
pub(crate) fn encrypt(worker: &Worker, key: &str, token: &str, age: u64) -> String {
    let script = format!(
        "import os, time\nos.environ['TOKEN_ENCRYPTION_KEY'] = sys.argv[1]\n{}\n\
         if sys.argv[3] == '0':\n    answer(encrypted(sys.argv[2]))\n\
         else:\n    answer(fernet.encrypt_at_time(sys.argv[2].encode(), int(time.time()) - int(sys.argv[3])).decode())",
        snippet()
    );
    let made = worker.ask(&script, &[key, token, &age.to_string()]);
    made.as_str().expect("a token").to_owned()
}

/// `celeriac token …` with the token on standard input.
fn token_command(
    directory: &Path,
    database: &str,
    keys: &str,
    words: &[&str],
    input: &str,
) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_celeriac"))
        .arg("token")
        .args(words)
        .env("DATABASE_URL", database)
        .env("TOKEN_ENCRYPTION_KEYS", keys)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // Commands that read nothing close it early.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("its output")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

on_brokers!(an_encrypted_token_of_python_is_opened_and_a_wrong_or_old_one_is_a_clear_failure);
fn an_encrypted_token_of_python_is_opened_and_a_wrong_or_old_one_is_a_clear_failure(
    broker: &Broker,
) {
    let (repository, server) = (repository(), GitServer::start());
    let token = unique("plain");
    let url = server.with_token(&repository, &token);
    let worker = broker
        .worker()
        .env("TOKEN_ENCRYPTION_KEYS", &format!("{OTHER_KEY},{KEY}"))
        .env("TOKEN_TTL", "600")
        .start();
    let mut raw = broker.raw(&worker.queue);
    let mut ask = |sealed: &str| {
        let id = raw.send(TASK, json!([7, url, sealed]));
        raw.wait(&id)
    };
    for key in [KEY, OTHER_KEY] {
        let meta = ask(&encrypt(&worker, key, &token, 0));
        assert_eq!(meta["status"], "SUCCESS", "{meta}");
    }
    let stranger = "3q2-7wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let failed = |meta: Value, words: &str| {
        assert_eq!(meta["status"], "FAILURE", "{meta}");
        assert_eq!(meta["result"]["exc_type"], "ValueError", "{meta}");
        let shown = meta.to_string();
        assert!(shown.contains(words), "{shown}");
        assert!(
            !shown.contains("gAAAA") && !shown.contains(&token),
            "{shown}"
        );
    };
    failed(
        ask(&encrypt(&worker, stranger, &token, 0)),
        "no key of TOKEN_ENCRYPTION_KEYS fits",
    );
    failed(
        ask(&encrypt(&worker, KEY, &token, 3600)),
        "older than the 600 s that TOKEN_TTL allows",
    );
    assert!(!worker.log().contains(&token));
}

on_brokers!(a_stored_token_is_used_for_its_user_and_host_only_and_survives_a_rotation);
fn a_stored_token_is_used_for_its_user_and_host_only_and_survives_a_rotation(broker: &Broker) {
    let postgres = services::postgres();
    let (repository, server) = (repository(), GitServer::start());
    let directory = tempfile::tempdir().unwrap();
    let token = unique("stored");
    let url = server.with_token(&repository, &token);
    let host = url::Url::parse(&url).unwrap();
    let host = format!("127.0.0.1:{}", host.port().unwrap());
    let run = |keys: &str, words: &[&str], input: &str| {
        token_command(directory.path(), &postgres.url, keys, words, input)
    };
    let set = run(KEY, &["set", "7", "--host", &host], &format!("{token}\n"));
    assert!(set.status.success(), "{}", text(&set.stderr));
    assert!(run(KEY, &["set", "7"], "ghp_another\n").status.success());
    let empty = run(KEY, &["set", "7"], "\n");
    assert!(!empty.status.success() && text(&empty.stderr).contains("standard input"));
    let keyless = run("", &["set", "7"], "x\n");
    assert!(text(&keyless.stderr).contains("TOKEN_ENCRYPTION_KEYS is not set"));
    for (words, told) in [
        (
            &["set", "7", "--host", "https://github.com/o"][..],
            "is no host",
        ),
        (&["rm", "7", "--host", "a b"], "is no host"),
        (&["set", "7", "--host", "example.com:99999"], "is no host"),
        (&["set", "7", "--host", "example.com:"], "is no host"),
        (&["set", "7", "--host", ":8443"], "is no host"),
        (&["set", "7", "--host", "example.com:22"], "is no host"),
        (&["set", " "], "the user is empty"),
    ] {
        let refused = run(KEY, words, "x\n");
        assert_eq!(refused.status.code(), Some(1), "{words:?}");
        assert!(
            text(&refused.stderr).contains(told),
            "{}",
            text(&refused.stderr)
        );
    }
    // Another spelling of the same host replaces what was there.
    let again = run(
        KEY,
        &["set", "7", "--host", "GitHub.com:443"],
        "ghp_another\n",
    );
    assert!(again.status.success());
    let locked = run(OTHER_KEY, &["rotate"], "");
    let told = text(&locked.stderr);
    assert!(
        !locked.status.success()
            && told.contains("the token of user 7 for ")
            && told.matches("no key of TOKEN_ENCRYPTION_KEYS fits").count() == 1,
        "{told}"
    );
    let list = text(&run(KEY, &["list"], "").stdout);
    assert_eq!(list.lines().count(), 2, "{list}");
    assert!(
        list.contains(&host) && list.contains("github.com"),
        "{list}"
    );
    assert!(!list.contains(&token) && !list.contains("ghp_"));
    assert_eq!(postgres.rows_with(&token), Vec::<String>::new());

    let worker = broker
        .worker()
        .database(&postgres)
        .env("TOKEN_ENCRYPTION_KEYS", &format!("{OTHER_KEY},{KEY}"))
        .start();
    let mut raw = broker.raw(&worker.queue);
    let mut ask = |user: Value, url: &str, token: Value| {
        let id = raw.send(TASK, json!([user, url, token]));
        raw.wait(&id)["status"].clone()
    };
    assert_eq!(ask(json!(7), &url, Value::Null), "SUCCESS");
    assert_eq!(ask(json!("7"), &url, json!("")), "SUCCESS");
    assert_eq!(ask(json!(8), &url, Value::Null), "FAILURE", "another user");
    assert_eq!(ask(Value::Null, &url, Value::Null), "FAILURE", "nobody");
    assert_eq!(
        ask(json!(7), &url, json!("wrong")),
        "FAILURE",
        "the task's own token goes first"
    );
    // Another host (the same machine, another port) never sees it.
    let stranger = GitServer::start();
    let elsewhere = stranger.open(&repository);
    assert_eq!(ask(json!(7), &elsewhere, Value::Null), "SUCCESS");
    let seen = stranger.requests();
    assert!(!seen.is_empty());
    assert!(
        seen.iter()
            .all(|request| !request.headers.contains_key("authorization"))
    );

    let rotated = run(&format!("{OTHER_KEY},{KEY}"), &["rotate"], "");
    assert!(text(&rotated.stdout).contains("2 encrypted anew"));
    let worker = broker
        .worker()
        .database(&postgres)
        .env("TOKEN_ENCRYPTION_KEYS", OTHER_KEY)
        .start();
    let mut raw = broker.raw(&worker.queue);
    let id = raw.send(TASK, json!([7, url]));
    assert_eq!(raw.wait(&id)["status"], "SUCCESS");
    let removed = run(OTHER_KEY, &["rm", "7", "--host", &host], "");
    assert!(removed.status.success());
    assert!(
        !run(OTHER_KEY, &["rm", "7", "--host", &host], "")
            .status
            .success()
    );
    let id = raw.send(TASK, json!([7, url]));
    assert_eq!(raw.wait(&id)["status"], "FAILURE");
}

#[test]
fn an_open_redis_is_pointed_out_once_and_a_guarded_one_is_not() {
    let address = services_address();
    let open = RedisServer::with(&["--save", "", "--protected-mode", "no", "--bind", "0.0.0.0"]);
    let reachable = open.url.replace("127.0.0.1", &address);
    let said = "takes commands without a password";
    let worker = Worker::on(&reachable).start();
    assert_eq!(worker.log().matches(said).count(), 1, "{}", worker.log());
    let local = Worker::on(&open.url).start();
    assert!(!local.log().contains(said));
}

/// An address of this machine that is not loopback.
fn services_address() -> String {
    // No packet is sent: connecting a datagram socket only chooses the way.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket
        .connect("192.0.2.1:9")
        .expect("this machine has a network");
    socket.local_addr().expect("its address").ip().to_string()
}
