//! A marker in every token, sent along every path that succeeds or fails; then everything that
//! anybody can see is searched for it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::secrets::{KEY, OTHER_KEY, encrypt, repository, text};
use crate::support::{GitServer, Raw, RedisServer, Worker, fixed_port, services, wait_for};

const TASK: &str = "analyze_repo_task";

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

pub(crate) fn files_below(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
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

/// Flower beside a worker, and what it shows to whoever asks.
struct Flower {
    port: u16,
    _process: crate::support::python::Background,
}

/// Every page and API answer of Flower that tells of tasks or workers, in one text.
const FLOWER: &str = "
import urllib.request
base, *ids = sys.argv[1:]
seen = []
def get(path):
    try:
        with urllib.request.urlopen(base + path, timeout=20) as reply:
            seen.append(path + ' ' + reply.read().decode('utf-8', 'replace'))
    except urllib.error.HTTPError as error:
        seen.append(path + ' ' + error.read().decode('utf-8', 'replace'))
get('/api/workers?refresh=1')
get('/api/tasks?limit=10000')
get('/tasks/datatable?draw=1&start=0&length=1000&search[value]=&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name')
for path in ('/workers', '/tasks', '/broker', '/metrics', '/api/task/types', '/api/queues/length'):
    get(path)
for worker in json.loads(seen[0].split(' ', 1)[1]):
    get('/worker/' + worker)
for id in ids:
    for path in ('/api/task/info/', '/api/task/result/', '/task/'):
        get(path + id)
answer(seen)
";

impl Flower {
    fn start(worker: &Worker) -> Flower {
        // Flower cannot choose a port itself.
        let port = fixed_port();
        let python = worker.python().env("FLOWER_UNAUTHENTICATED_API", "true");
        let process = python.spawn(&[
            "-m",
            "celery",
            "-A",
            "celery_app",
            "flower",
            "--address=127.0.0.1",
            &format!("--port={port}"),
        ]);
        wait_for("Flower", Duration::from_secs(40), || {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
            // It knows the worker when it has heard one of its events.
            let request = "GET /workers?json=1 HTTP/1.0\r\n\r\n";
            std::io::Write::write_all(&mut stream, request.as_bytes()).ok()?;
            let mut reply = String::new();
            std::io::Read::read_to_string(&mut stream, &mut reply).ok()?;
            let knows = reply.contains("200 OK") && reply.contains(&worker.node);
            knows.then_some(())
        });
        Flower {
            port,
            _process: process,
        }
    }

    fn shows(&self, worker: &Worker, ids: &[&str]) -> Vec<String> {
        let base = format!("http://127.0.0.1:{}", self.port);
        let arguments = [&[base.as_str()], ids].concat();
        let seen = worker.ask(FLOWER, &arguments);
        let texts = seen.as_array().unwrap().iter();
        texts
            .map(|text| text.as_str().unwrap().to_owned())
            .collect()
    }
}

/// What a command of ours prints.
fn printed(worker: &Worker, words: &[&str]) -> Vec<u8> {
    let output = Command::new("timeout")
        .args(["20", env!("CARGO_BIN_EXE_celeriac")])
        .args(words)
        .env("QUEUE_BROKER_URL", worker.broker())
        .env("CELERY_RESULT_BACKEND", worker.broker())
        .current_dir(worker.clones())
        .output()
        .expect("the binary runs");
    [output.stdout, output.stderr].concat()
}

/// The child of the one task that runs.
fn busy_child(worker: &Worker) -> i32 {
    let started = worker.ask(
        "answer([t['worker_pid'] for n in inspect.active().values() for t in n])",
        &[],
    );
    i32::try_from(started[0].as_i64().expect("its child")).unwrap()
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
    // As text, and as libraries write bytes down.
    let bytes: Vec<String> = secret.bytes().map(|byte| byte.to_string()).collect();
    let markers = vec![secret.clone(), bytes.join(", ")];
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
    let flower = Flower::start(&worker);
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
        ("soft", json!({"timelimit": [null, 20]})),
        ("hard", json!({"timelimit": [20, null]})),
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
        "ids = sys.argv[1:]\n\
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
    for command in [
        "active",
        "reserved",
        "scheduled",
        "revoked",
        "conf",
        "stats",
        "report",
    ] {
        let told = printed(&worker, &["inspect", command]);
        assert!(!told.is_empty(), "{command}");
        found.extend(hits(command, &told, &markers));
    }
    worker.signal(nix::sys::signal::Signal::SIGUSR1);

    for (name, id, _) in &held[..2] {
        let meta = raw.wait(id);
        assert_eq!(meta["status"], "FAILURE", "{name}: {meta}");
    }
    held[2].2.wait_arrivals(1);
    let pid = busy_child(&worker);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGABRT,
    )
    .unwrap();
    let meta = raw.wait(&held[2].1);
    assert_eq!(meta["result"]["exc_type"], "WorkerLostError", "{meta}");
    // One that gets no memory any more amid its work panics or aborts in its own words.
    let (url, gate) = git.gated(&repository);
    let starved = raw.send(TASK, json!([31, url, token("memory")]));
    gate.wait_arrivals(1);
    let limited = Command::new("prlimit")
        .args(["--as=4096", "--pid", &busy_child(&worker).to_string()])
        .status()
        .expect("prlimit is there");
    assert!(limited.success());
    gate.open();
    let meta = raw.wait(&starved);
    assert_eq!(meta["status"], "FAILURE", "{meta}");
    println!("without memory: {}", meta["result"]);
    worker.ask("app.control.revoke(sys.argv[1])\nanswer(0)", &[&later]);
    let (url, gate) = git.gated(&repository);
    let ended = raw.send(TASK, json!([32, url, token("term")]));
    gate.wait_arrivals(1);
    worker.ask("app.control.terminate(sys.argv[1])\nanswer(0)", &[&ended]);
    assert_eq!(raw.wait(&ended)["status"], "REVOKED");

    // Our own commands: what is called, and what is told of the result.
    let arguments = json!([33, open, token("call")]).to_string();
    let called = printed(
        &worker,
        &["call", TASK, "--args", &arguments, "--queue", &worker.queue],
    );
    found.extend(hits("call", &called, &markers));
    let called = text(&called).split_whitespace().last().unwrap().to_owned();
    assert_eq!(raw.wait(&called)["status"], "SUCCESS");
    sent.push(("called".to_owned(), called));
    for (name, id) in &sent {
        let told = printed(&worker, &["result", id, "--traceback"]);
        assert!(!told.is_empty(), "{name}");
        found.extend(hits(&format!("result of {name}"), &told, &markers));
    }

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

    let ids: Vec<&str> = sent.iter().map(|(_, id)| id.as_str()).collect();
    let pages = flower.shows(&worker, &ids);
    let all = pages.concat();
    assert!(
        ids[1..].iter().all(|id| all.contains(id)),
        "Flower knows the tasks"
    );
    assert!(
        all.contains("user_github_token") || all.contains("'***'"),
        "and their arguments"
    );
    for page in pages {
        found.extend(hits("Flower", page.as_bytes(), &markers));
    }

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

/// The same over RabbitMQ, where results travel as messages.
#[test]
fn a_token_is_seen_nowhere_over_rabbitmq_either() {
    let broker = services::rabbitmq();
    let (repository, git) = (repository(), GitServer::start());
    let secret = uuid::Uuid::new_v4().simple().to_string();
    let markers = vec![secret.clone()];
    let worker = Worker::on(&broker)
        .loglevel("debug")
        .option("-E")
        .env("CELERY_RESULT_EXTENDED", "1")
        .env("CELERY_TASK_TRACK_STARTED", "1")
        .env("ANALYSIS_MAX_RETRIES", "1")
        .start();
    let right = format!("zq{secret}right");
    let (held, gate) = git.gated(&repository);
    let urls = [
        git.with_token(&repository, &right),
        git.with_token(&repository, "another"),
        git.refusing(&repository, 404),
        git.refusing(&repository, 500),
        git.open(&repository),
        "ext::sh -c id".to_owned(),
        held,
    ];
    let script = "
import threading, time
token, *urls = sys.argv[1:]
events = []
def listen():
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={'*': lambda event: events.append(repr(event))})
        ready.set()
        receiver.capture(limit=None, timeout=60, wakeup=False)
ready = threading.Event()
threading.Thread(target=listen, daemon=True).start()
ready.wait(20)
# It listens once it has heard a heartbeat.
while not events: time.sleep(0.05)
sent = [app.send_task('analyze_repo_task', args=[n, url, token], queue=QUEUE) for n, url in enumerate(urls)]
sent.append(app.send_task('analyze_repo_task', kwargs={'user_id': 9, 'repo_url': urls[4], 'user_github_token': token}, queue=QUEUE))
sent.append(app.send_task('analyze_repo_task', args=[9, urls[4], token, 'more'], queue=QUEUE))
sent.append(app.send_task('no_such_task', args=[token], queue=QUEUE))
active = None
while not any((active or {}).values()):
    active = inspect.active()
shown = [repr(getattr(inspect, name)()) for name in ('active', 'reserved', 'scheduled', 'stats', 'conf', 'report')]
app.control.terminate(sent[6].id)
for one in sent:
    one.get(timeout=60, propagate=False)
shown += [repr((one.state, one.result, one.traceback)) for one in sent]
answer([shown, [one.state for one in sent], events])
";
    let arguments: Vec<&str> = std::iter::once(right.as_str())
        .chain(urls.iter().map(String::as_str))
        .collect();
    let seen = worker.ask(script, &arguments);
    let states: Vec<&str> = seen[1]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(
        states,
        [
            "SUCCESS", "FAILURE", "FAILURE", "FAILURE", "SUCCESS", "FAILURE", "REVOKED", "SUCCESS",
            "FAILURE", "FAILURE",
        ]
    );
    gate.open();
    let mut worker = worker;
    assert!(worker.stop().success());
    assert!(seen[2].to_string().contains("task-failed"), "{seen}");
    let mut found = hits("what Python sees", seen.to_string().as_bytes(), &markers);
    found.extend(hits("log", worker.log().as_bytes(), &markers));
    let mut files = Vec::new();
    files_below(worker.clones().parent().unwrap(), &mut files);
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_default();
        found.extend(hits(&file.display().to_string(), &bytes, &markers));
    }
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}
