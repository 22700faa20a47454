//! Tokens: given, stored, used, and seen nowhere.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    GitServer, Raw, RedisServer, Repository, Worker, project, services, unique, wait_for,
};

const TASK: &str = "analyze_repo_task";
const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";
const OTHER_KEY: &str = "rA1pPq1p5xD4mXc0r2mO6n1j1l1V7o1d3kq0S5d8cHk=";

fn repository() -> Repository {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    repository
}

/// The Python snippet that the documentation gives to backends.
fn snippet() -> String {
    let text = std::fs::read_to_string(project().join("docs/security.md")).expect("the document");
    let (_, rest) = text.split_once("```python\n").expect("a Python block");
    rest.split_once("```").expect("its end").0.to_owned()
}

/// Encrypts as the documentation says, with the real `cryptography`.
fn encrypt(worker: &Worker, key: &str, token: &str, age: u64) -> String {
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn an_encrypted_token_of_python_is_opened_and_a_wrong_or_old_one_is_a_clear_failure() {
    let redis = services::redis();
    let (repository, server) = (repository(), GitServer::start());
    let token = unique("plain");
    let url = server.with_token(&repository, &token);
    let worker = Worker::on(&redis.url)
        .env("TOKEN_ENCRYPTION_KEYS", &format!("{OTHER_KEY},{KEY}"))
        .env("TOKEN_TTL", "600")
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
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

#[test]
fn a_stored_token_is_used_for_its_user_and_host_only_and_survives_a_rotation() {
    let (redis, postgres) = (services::redis(), services::postgres());
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
    let list = text(&run(KEY, &["list"], "").stdout);
    assert!(
        list.contains(&host) && list.contains("github.com"),
        "{list}"
    );
    assert!(!list.contains(&token) && !list.contains("ghp_"));
    assert_eq!(postgres.rows_with(&token), Vec::<String>::new());

    let worker = Worker::on(&redis.url)
        .database(&postgres)
        .env("TOKEN_ENCRYPTION_KEYS", &format!("{OTHER_KEY},{KEY}"))
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
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
    let worker = Worker::on(&redis.url)
        .database(&postgres)
        .env("TOKEN_ENCRYPTION_KEYS", OTHER_KEY)
        .start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
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

/// Where the marker was found.
fn hits(place: &str, bytes: &[u8], markers: &[String]) -> Vec<String> {
    let shown = |at: usize| {
        let from = at.saturating_sub(120);
        String::from_utf8_lossy(&bytes[from..(at + 60).min(bytes.len())]).into_owned()
    };
    markers
        .iter()
        .filter_map(|marker| {
            let at = bytes
                .windows(marker.len())
                .position(|window| window == marker.as_bytes())?;
            Some(format!("{place}: …{}…", shown(at)))
        })
        .collect()
}

fn files_below(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&path, found),
            Ok(kind) if kind.is_file() => found.push(path),
            _ => {}
        }
    }
}

/// Argument lists and environments of the worker and its children, while tokens are in use.
fn processes(worker: &Worker, markers: &[String]) -> Vec<String> {
    let mut pids = worker.descendants();
    pids.push(worker.pid());
    pids.iter()
        .flat_map(|pid| ["cmdline", "environ"].map(|file| format!("/proc/{pid}/{file}")))
        .flat_map(|path| hits(&path, &std::fs::read(&path).unwrap_or_default(), markers))
        .collect()
}

/// The value of every key, as bytes.
fn all_values(connection: &mut redis::Connection) -> Vec<(String, Vec<u8>)> {
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(connection).expect("KEYS");
    let mut all = Vec::new();
    for key in keys {
        let kind: String = redis::cmd("TYPE")
            .arg(&key)
            .query(connection)
            .expect("TYPE");
        let items: Vec<Vec<u8>> = match kind.as_str() {
            "string" => redis::cmd("MGET").arg(&key).query(connection),
            "list" => redis::cmd("LRANGE")
                .arg(&key)
                .arg(0)
                .arg(-1)
                .query(connection),
            "hash" => redis::cmd("HGETALL").arg(&key).query(connection),
            "set" => redis::cmd("SMEMBERS").arg(&key).query(connection),
            "zset" => redis::cmd("ZRANGE")
                .arg(&key)
                .arg(0)
                .arg(-1)
                .query(connection),
            _ => Ok(Vec::new()),
        }
        .unwrap_or_default();
        all.extend(items.into_iter().map(|item| (format!("key {key}"), item)));
    }
    all
}

/// What is not searched: the messages that clients sent, which are theirs and stay in Redis
/// until they are acknowledged; nothing of them may be left at the end.
#[test]
fn a_token_is_seen_nowhere_whatever_becomes_of_its_task() {
    let server = RedisServer::start();
    let postgres = services::postgres();
    let (repository, git) = (repository(), GitServer::start());
    let secret = uuid::Uuid::new_v4().simple().to_string();
    // No prefix that gives it away, and one token for each path.
    let token = |name: &str| format!("zq{secret}{name}");
    let markers = vec![secret.clone()];
    let worker = Worker::on(&server.url)
        .database(&postgres)
        .concurrency(3)
        .loglevel("debug")
        .option("-E")
        .env("CELERY_RESULT_EXTENDED", "1")
        .env("CELERY_TASK_TRACK_STARTED", "1")
        .env("TOKEN_ENCRYPTION_KEYS", KEY)
        .env("ANALYSIS_MAX_RETRIES", "1")
        .env("USER_MAX_RUNNING", "2")
        .env("RESULT_REUSE_TTL", "60")
        .env("RUST_BACKTRACE", "1")
        .start();
    let events = tempfile::NamedTempFile::new().unwrap();
    let capture = "import json, sys\nfrom celery_app import celery_app as app\n\
        out = open(sys.argv[1], 'a', buffering=1)\n\
        def note(event): out.write(json.dumps(event, default=repr) + '\\n')\n\
        with app.connection() as connection:\n\
        \x20   receiver = app.events.Receiver(connection, handlers={'*': note})\n\
        \x20   out.write('listening\\n')\n\
        \x20   receiver.capture(limit=None, timeout=None, wakeup=True)\n";
    let _listener = worker
        .python()
        .spawn(&["-c", capture, events.path().to_str().unwrap()]);
    let seen = || std::fs::read(events.path()).unwrap_or_default();
    wait_for("the event receiver", Duration::from_secs(20), || {
        text(&seen()).contains("listening").then_some(())
    });
    let open = git.open(&repository);
    let mut raw = Raw::new(&server.url, &worker.queue);
    let mut found = Vec::new();
    let mut sent: Vec<(String, String)> = Vec::new();
    macro_rules! path {
        ($name:literal, $arguments:expr) => {
            path!($name, $arguments, json!({}))
        };
        ($name:literal, $arguments:expr, $headers:expr) => {{
            let id = raw.send_with(TASK, $arguments, &$headers);
            sent.push(($name.to_owned(), id.clone()));
            id
        }};
    }
    // Settings of the server and of the message.
    let right = token("right");
    path!(
        "right token",
        json!([1, git.with_token(&repository, &right), right])
    );
    path!(
        "right again",
        json!([2, git.with_token(&repository, &right), right])
    );
    path!(
        "wrong token",
        json!([3, git.with_token(&repository, "x"), token("wrong")])
    );
    path!(
        "404",
        json!([4, git.refusing(&repository, 404), token("404")])
    );
    path!(
        "403",
        json!([5, git.refusing(&repository, 403), token("403")])
    );
    path!(
        "500 and a retry",
        json!([6, git.refusing(&repository, 500), token("500")])
    );
    path!(
        "cut off",
        json!([7, git.cutting(&repository, 20), token("cut")])
    );
    path!("public with token", json!([8, open, token("public")]));
    path!(
        "white space",
        json!([9, open, format!(" {} ", token("space"))])
    );
    path!(
        "strange letters",
        json!([10, open, format!("{}\\'\"é\n", token("letters"))])
    );
    path!(
        "password in URL",
        json!([11, format!("http://u:{}@127.0.0.1/x", token("p")), null])
    );
    path!(
        "user in URL",
        json!([11, format!("http://{}@127.0.0.1/x", token("u")), null])
    );
    path!(
        "query in URL",
        json!([12, format!("{open}?token={}", token("q")), token("q")])
    );
    path!("one too many", json!([13, open, token("many"), "x"]));
    path!(
        "URL is a dict",
        json!([14, {"token": token("d")}, token("d")])
    );
    path!("token is a dict", json!([15, open, {"token": token("td")}]));
    path!("token is a list", json!([15, open, [token("tl")]]));
    path!("bad scheme", json!([16, "ext::sh -c id", token("ext")]));
    path!(
        "nobody there",
        json!([17, "http://127.0.0.1:9/r", token("conn")])
    );
    let sealed = encrypt(&worker, KEY, &token("sealed"), 0);
    path!(
        "sealed",
        json!([18, git.with_token(&repository, &token("sealed")), sealed])
    );
    let strange = encrypt(&worker, OTHER_KEY, &token("strange"), 0);
    path!("sealed by another", json!([18, open, strange]));
    let soon = (chrono::Utc::now() + chrono::Duration::seconds(2)).to_rfc3339();
    path!("eta", json!([19, open, token("eta")]), json!({"eta": soon}));
    let past = (chrono::Utc::now() - chrono::Duration::seconds(60)).to_rfc3339();
    path!(
        "expired",
        json!([20, open, token("exp")]),
        json!({"expires": past})
    );
    let argsrepr = format!("(21, 'u', '{}')", token("repr"));
    path!(
        "in argsrepr",
        json!([21, open, token("repr")]),
        json!({"argsrepr": argsrepr})
    );
    for (name, id) in &sent {
        let meta = raw.wait(id);
        println!(
            "{name}: {} {}",
            meta["status"], meta["result"]["exc_message"]
        );
    }

    // Limits, revocation and death, with the tokens in use while everybody is asked.
    let mut held = Vec::new();
    for (name, headers) in [
        ("soft", json!({"timelimit": [null, 6]})),
        ("hard", json!({"timelimit": [6, null]})),
        ("crash", json!({})),
    ] {
        let (url, gate) = git.gated(&repository);
        let id = raw.send_with(TASK, json!([30, url, token(name)]), &headers);
        if name != "crash" {
            gate.wait_arrivals(1);
        }
        held.push((name, id, gate));
    }
    let far = (chrono::Utc::now() + chrono::Duration::seconds(600)).to_rfc3339();
    let later = raw.send_with(TASK, json!([31, open, token("far")]), &json!({"eta": far}));
    // The user is at the limit of two: the third waits.
    wait_for("the limit", Duration::from_secs(10), || {
        (raw.status(&held[2].1) == "RETRY").then_some(())
    });
    worker.wait_log(&later);
    found.extend(processes(&worker, &markers));
    let inspected = worker.ask(
        "inspect = app.control.inspect(timeout=3)\nids = sys.argv[1:]\n\
         asked = {name: getattr(inspect, name)() for name in ('active', 'reserved', 'scheduled', \
         'stats', 'registered', 'revoked', 'report', 'active_queues', 'conf', 'clock')}\n\
         asked['query_task'] = inspect.query_task(*ids)\n\
         asked['safe'] = inspect.active(safe=True)\n\
         answer(asked)",
        &[&held[0].1, &held[2].1, &later],
    );
    for name in ["active", "reserved", "scheduled", "query_task", "conf"] {
        assert_ne!(inspected[name], Value::Null, "{name}");
    }
    let shown = inspected.to_string();
    assert!(
        shown.contains(&held[0].1) && shown.contains(&later),
        "{shown}"
    );
    found.extend(hits("inspect", shown.as_bytes(), &markers));
    found.extend(hits("inspect, keys", shown.as_bytes(), &[KEY.to_owned()]));
    worker.signal(nix::sys::signal::Signal::SIGUSR1);

    for (name, id, _) in &held[..2] {
        let meta = raw.wait(id);
        assert_eq!(meta["status"], "FAILURE", "{name}: {meta}");
    }
    held[2].2.wait_arrivals(1);
    let started = worker.ask(
        "answer([t['worker_pid'] for n in app.control.inspect(timeout=3).active().values() for t in n])",
        &[],
    );
    let pid = i32::try_from(started[0].as_i64().expect("its child")).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGABRT,
    )
    .unwrap();
    let meta = raw.wait(&held[2].1);
    assert_eq!(meta["result"]["exc_type"], "WorkerLostError", "{meta}");
    worker.ask("app.control.revoke(sys.argv[1])\nanswer(0)", &[&later]);
    let (url, gate) = git.gated(&repository);
    let ended = raw.send(TASK, json!([32, url, token("term")]));
    gate.wait_arrivals(1);
    worker.ask("app.control.terminate(sys.argv[1])\nanswer(0)", &[&ended]);
    assert_eq!(raw.wait(&ended)["status"], "REVOKED");

    // What Python builds: keyword arguments, chains, links, chords, an unknown task.
    let canvas = worker.ask(
        "from celery import chain, chord, signature\n\
         def task(name, *args, **options): return signature(name, args=args, app=app, **options)\n\
         url, token = sys.argv[1:3]\nanalyze = lambda n: task('analyze_repo_task', 40, url, token + n, queue=QUEUE)\n\
         test = task('test_task', queue=QUEUE)\n\
         sent = [\n\
         \x20 app.send_task('analyze_repo_task', kwargs={'user_id': 41, 'repo_url': url, 'user_github_token': token + 'kw'}, queue=QUEUE),\n\
         \x20 chain(analyze('chain'), test).apply_async(),\n\
         \x20 chain(task('analyze_repo_task', 40, 'ftp://bad', token + 'bad', queue=QUEUE), test).apply_async(),\n\
         \x20 analyze('link').apply_async(link=test, link_error=test),\n\
         \x20 chord([analyze('one'), analyze('two')], test).apply_async(),\n\
         \x20 app.send_task('no_such_task', kwargs={'token': token + 'unknown'}, queue=QUEUE),\n\
         ]\n\
         for one in sent:\n\
         \x20 try: one.get(timeout=60, propagate=False)\n\
         \x20 except Exception as error: answer(repr(error)); raise\n\
         answer([[one.state, repr(one.result), one.traceback] for one in sent])",
        &[&open, &token("py")],
    );
    found.extend(hits(
        "results in Python",
        canvas.to_string().as_bytes(),
        &markers,
    ));
    let states: Vec<&str> = canvas
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|one| one[0].as_str())
        .collect();
    assert_eq!(states[0], "SUCCESS", "{canvas}");

    // An ETA far away is the client's message still; the worker hands it back at its end.
    let mut worker = worker;
    assert!(worker.stop().success());
    let _: () = redis::cmd("DEL")
        .arg(&worker.queue)
        .query(&mut server.connect())
        .unwrap();
    for (place, value) in all_values(&mut server.connect()) {
        found.extend(hits(&place, &value, &markers));
    }
    for row in postgres.rows_with(&secret) {
        found.push(format!("database: {row}"));
    }
    found.extend(hits("log", worker.log().as_bytes(), &markers));
    found.extend(hits(
        "log, keys",
        worker.log().as_bytes(),
        &[KEY.to_owned()],
    ));
    found.extend(hits("events", &seen(), &markers));
    assert!(text(&seen()).contains("task-failed") && text(&seen()).contains("task-retried"));
    let home = worker.clones().parent().unwrap().to_owned();
    let mut files = Vec::new();
    files_below(&home, &mut files);
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_default();
        found.extend(hits(&file.display().to_string(), &bytes, &markers));
    }
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}
