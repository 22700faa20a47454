//! The client commands of our binary beside Celery's own, towards a celeriac worker and a
//! Python worker that share a broker: same words, same exit codes.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::python::{self, Background, Python};
use crate::support::{Broker, Worker, on_brokers, project, unique, wait_for};

/// A broker of its own (remote control reaches everybody), a worker of ours and a Python one.
struct World<'a> {
    broker: &'a Broker,
    worker: Worker,
    peer: String,
    queue: String,
    _python: Background,
}

fn world(broker: &Broker) -> World<'_> {
    let queue = unique("q");
    let worker = broker.worker().queue(&queue).option("-E").start();
    let name = unique("py");
    let path = project().join("examples/python-worker");
    let process = Python::new(&broker.url, &broker.results, &queue)
        .env("PYTHONPATH", &path.to_string_lossy())
        .spawn(&[
            "-m",
            "celery",
            "-A",
            "python_worker",
            "worker",
            "-c",
            "1",
            "-l",
            "info",
            "-E",
            "-n",
            &format!("{name}@%h"),
        ]);
    wait_for("the Python worker", Duration::from_secs(60), || {
        process.log().contains(" ready.").then_some(())
    });
    let host = worker.node.split_once('@').unwrap().1;
    let peer = format!("{name}@{host}");
    let world = World {
        broker,
        worker,
        peer,
        queue,
        _python: process,
    };
    // Python says ready before kombu subscribes: what is broadcast in between never reaches it.
    let ping = format!("inspect ping -t 1 -d {}", world.peer);
    wait_for("its first answer", Duration::from_secs(60), || {
        (world.ours(&ping).code == Some(0)).then_some(())
    });
    world
}

impl World<'_> {
    /// A command with the broker and the queue of this world.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("QUEUE_BROKER_URL", &self.broker.url)
            .env("CELERY_RESULT_BACKEND", &self.broker.results)
            .env("ANALYSIS_QUEUE", &self.queue)
            .env("CELERY_TASK_DEFAULT_QUEUE", &self.queue)
            .env("PYTHONPATH", project().join("examples/python-worker"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null());
        command
    }

    /// Our binary.
    #[track_caller]
    fn ours(&self, line: &str) -> Said {
        let words: Vec<&str> = line.split(' ').collect();
        Said::of(
            self.command(env!("CARGO_BIN_EXE_celeriac"), &words)
                .output()
                .unwrap(),
        )
    }

    /// The `celery` command.
    #[track_caller]
    fn theirs(&self, line: &str) -> Said {
        let words = ["-m", "celery", "-A", "python_worker"]
            .into_iter()
            .chain(line.split(' '));
        let interpreter = python::interpreter();
        let words: Vec<&str> = words.collect();
        Said::of(
            self.command(&interpreter.to_string_lossy(), &words)
                .output()
                .unwrap(),
        )
    }
}

/// What a command printed, and its exit code.
#[derive(Debug)]
struct Said {
    out: String,
    err: String,
    code: Option<i32>,
}

impl Said {
    fn of(output: Output) -> Self {
        Self {
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
            code: output.status.code(),
        }
    }

    /// The nodes answer in any order; each with the lines of its answer. pygments, where it is
    /// installed, ends coloured JSON with a line of spaces.
    fn answers(&self) -> BTreeSet<String> {
        let text = self.out.replace("\n    \n", "\n");
        // --quiet leaves the arrows out.
        let (text, mark) = match text.contains("->  ") {
            true => (text.replace("\n\n", "->  "), "->  "),
            false => (text, "\n"),
        };
        text.split(mark)
            .map(str::trim_end)
            .map(str::to_owned)
            .collect()
    }
}

/// The lines whose answers know something of the broker.
const ON_RABBITMQ: [&str; 5] = [
    "inspect ping",
    "inspect active_queues",
    "status",
    "control add_consumer another",
    "control cancel_consumer another",
];

on_brokers!(what_workers_answer_is_shown_as_celery_shows_it);
fn what_workers_answer_is_shown_as_celery_shows_it(broker: &Broker) {
    let world = world(broker);
    for line in [
        "inspect ping",
        "inspect active",
        "inspect reserved",
        "inspect scheduled",
        "inspect registered",
        "inspect active_queues",
        "inspect query_task nobody",
        "inspect objgraph",
        "status",
        "-q status",
        "-q inspect ping",
        "control rate_limit test_task 10/m",
        "control rate_limit nobody 10/m",
        "control rate_limit test_task",
        "control time_limit test_task 10 20",
        "control add_consumer another",
        "control cancel_consumer another",
        "control enable_events",
        "control heartbeat",
    ] {
        // The words are the same whatever carries them, and Celery's command is slow to start.
        if !broker.is_redis() && !ON_RABBITMQ.contains(&line) {
            continue;
        }
        // Who is named is waited for, not a second only: a busy machine may need longer.
        let line = &format!("{line} -t 30 -d {},{}", world.worker.node, world.peer);
        let (ours, theirs) = (world.ours(line), world.theirs(line));
        assert_eq!(ours.answers(), theirs.answers(), "celeriac {line}");
        assert_eq!(ours.code, theirs.code, "celeriac {line}");
        assert_eq!(
            ours.out.lines().count(),
            theirs.out.lines().count(),
            "celeriac {line}"
        );
    }
    for line in [
        "inspect --json ping",
        "inspect active_queues -j",
        "control -j enable_events",
    ] {
        let parse = |said: Said| -> Value { serde_json::from_str(&said.out).unwrap() };
        let sorted = |value: Value| match value {
            Value::Array(items) => items.iter().map(Value::to_string).collect::<BTreeSet<_>>(),
            Value::Object(map) => map.iter().map(|(k, v)| format!("{k} {v}")).collect(),
            other => panic!("{other}"),
        };
        let (ours, theirs) = (parse(world.ours(line)), parse(world.theirs(line)));
        assert_eq!(sorted(ours), sorted(theirs), "celeriac {line}");
    }
}

on_brokers!(nobody_who_answers_and_no_broker_have_celerys_exit_code);
fn nobody_who_answers_and_no_broker_have_celerys_exit_code(broker: &Broker) {
    let world = world(broker);
    let said = world.ours("inspect ping -d nobody@nowhere -t 0.2");
    assert_eq!(said.code, Some(69));
    assert_eq!(said.err, "Error: No nodes replied within time constraint\n");
    assert_eq!(world.ours("status -d nobody@nowhere -t 0.2").code, Some(69));
    let away = if broker.is_redis() {
        "redis://127.0.0.1:1/0"
    } else {
        "amqp://127.0.0.1:1//"
    };
    let away = world.ours(&format!("status -b {away}"));
    assert_eq!(away.code, Some(69));
    assert!(
        away.err
            .starts_with("Error: Could not connect to the message broker."),
        "{}",
        away.err
    );
}

#[test]
fn a_wrong_line_has_celerys_exit_code() {
    let broker = Broker::redis();
    let world = world(&broker);
    for line in [
        "inspect nonsense",
        "inspect",
        "control rate_limit a b c",
        "call",
        "call t --args {}",
        "call t --args [",
        "call t --kwargs []",
        "call t --eta soon",
        "call t --countdown soon",
        "call t --expires soon",
    ] {
        let (ours, theirs) = (world.ours(line), world.theirs(line));
        assert_eq!(
            (ours.code, theirs.code),
            (Some(2), Some(2)),
            "celeriac {line}"
        );
        if line.starts_with("inspect") || line.starts_with("control") {
            assert_eq!(
                ours.err,
                theirs.err.replace("python -m celery ", "celeriac "),
                "celeriac {line}"
            );
        }
    }
    for (option, wanted) in [
        (
            "--eta",
            "not a time in ISO 8601, such as 2027-01-31T12:00:00",
        ),
        ("--countdown", "not a number of seconds, such as 90 or 1.5"),
        (
            "--expires",
            "neither a time in ISO 8601, such as 2027-01-31T12:00:00",
        ),
        (
            "--wait --timeout",
            "not a number of seconds, such as 90 or 1.5",
        ),
    ] {
        for value in ["tomorrow", "NaN", "2026-02-30T25:00"] {
            let said = world.ours(&format!("call t {option} {value}"));
            assert_eq!(said.code, Some(2), "{option} {value}");
            let name = option.rsplit(' ').next().unwrap();
            for part in [name, &format!("'{value}'"), wanted] {
                assert!(said.err.contains(part), "{option} {value}: {}", said.err);
            }
            assert!(!said.err.contains("literal"), "{}", said.err);
        }
    }
    for line in ["inspect --list", "control --list"] {
        assert_eq!(
            world.ours(line).out,
            world.theirs(line).out,
            "celeriac {line}"
        );
    }
}

on_brokers!(a_ping_ends_with_the_last_answer_and_leaves_no_key);
fn a_ping_ends_with_the_last_answer_and_leaves_no_key(broker: &Broker) {
    let world = world(broker);
    for line in [
        "inspect ping -t 120",
        "inspect ping -t 120 -d WORKER,PEER",
        "status -t 120",
    ] {
        // RabbitMQ does not say how many listen: only those that were named are waited for alone.
        let line = match (broker.is_redis(), line.contains("-d")) {
            (false, false) => line.replace("120", "8"),
            _ => line.to_owned(),
        };
        let line = line
            .replace("WORKER", &world.worker.node)
            .replace("PEER", &world.peer);
        let start = Instant::now();
        let said = world.ours(&line);
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "celeriac {line} waited"
        );
        assert!(said.out.contains("2 nodes online."), "{}", said.out);
    }
    let left = broker.queues();
    assert!(
        !left.iter().any(|name| name.contains("reply.celery.pidbox")),
        "{left:?}"
    );
}

on_brokers!(tasks_are_called_and_their_results_printed);
fn tasks_are_called_and_their_results_printed(broker: &Broker) {
    let world = world(broker);
    for _ in 0..4 {
        let call = world.ours(r#"call test_task --args ["안녕"] --wait --timeout 60"#);
        // Which of the two workers takes it shows in the first word.
        assert!(call.out.ends_with(" received: 안녕\n"), "{call:?}");
        assert_eq!(call.code, Some(0));
    }
    let id = world
        .ours(r#"call test_task -a ["a"]"#)
        .out
        .trim()
        .to_owned();
    let (ours, theirs) = (
        world.ours(&format!("result {id}")),
        world.theirs(&format!("result {id}")),
    );
    assert_eq!((ours.out, ours.code), (theirs.out, theirs.code));
    // What Celery's command sent is there for ours, too.
    let id = world
        .theirs(r#"call test_task --kwargs {"nonsense":1}"#)
        .out
        .trim()
        .to_owned();
    let (ours, theirs) = (
        world.ours(&format!("result {id}")),
        world.theirs(&format!("result {id}")),
    );
    assert_eq!((ours.code, theirs.code), (Some(1), Some(1)));
    let last = |said: &Said| said.err.trim_end().lines().last().unwrap().to_owned();
    assert_eq!(last(&ours), last(&theirs));
    let line = format!("result --traceback {id}");
    assert_eq!(world.ours(&line).out, world.theirs(&line).out);
    let late = world.ours("result nobody --timeout 0.2");
    assert_eq!(late.code, Some(1));
    let later = Instant::now();
    let said = world.ours(r#"call test_task -a ["late"] --countdown 1.5 --wait --timeout 60"#);
    assert!(said.out.ends_with(" received: late\n"), "{said:?}");
    assert!(later.elapsed() >= Duration::from_millis(1500));
}

on_brokers!(queues_are_purged_and_bindings_listed_as_celery_does);
fn queues_are_purged_and_bindings_listed_as_celery_does(broker: &Broker) {
    let world = world(broker);
    let ours = world.ours("list bindings");
    if broker.is_redis() {
        let theirs = world.theirs("list bindings");
        assert_eq!((ours.out, ours.code), (theirs.out, theirs.code));
    } else {
        // Celery's command wants a library that nobody maintains.
        assert!(ours.out.contains(&world.queue), "{}", ours.out);
    }
    let idle = unique("idle");
    let fill = || {
        for _ in 0..3 {
            assert_eq!(
                world.ours(&format!("call nobody --queue {idle}")).code,
                Some(0)
            );
        }
    };
    for line in [
        "purge -f -Q IDLE",
        "purge -f -Q IDLE",
        "purge -f -Q IDLE,nothing",
        "purge -Q IDLE",
    ] {
        let line = line.replace("IDLE", &idle);
        fill();
        let ours = world.ours(&line);
        world.ours(&format!("purge -f -Q {idle}"));
        fill();
        let theirs = world.theirs(&line);
        world.ours(&format!("purge -f -Q {idle}"));
        assert_eq!(
            (ours.out, ours.code),
            (theirs.out, theirs.code),
            "celeriac {line}"
        );
    }
    fill();
    let mut process = world
        .command(env!("CARGO_BIN_EXE_celeriac"), &["purge", "-Q", &idle])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process
        .stdin
        .take()
        .unwrap()
        .write_all(b"what?\ny\n")
        .unwrap();
    let said = Said::of(process.wait_with_output().unwrap());
    assert!(
        said.out
            .ends_with("Purged 3 messages from 1 known task queue.\n"),
        "{}",
        said.out
    );
}

on_brokers!(events_are_dumped_as_celery_dumps_them);
fn events_are_dumped_as_celery_dumps_them(broker: &Broker) {
    let world = world(broker);
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut dump = world
        .command(env!("CARGO_BIN_EXE_celeriac"), &["events"])
        .stdout(file.reopen().unwrap())
        .spawn()
        .unwrap();
    let text = || std::fs::read_to_string(file.path()).unwrap();
    for node in [&world.worker.node, &world.peer] {
        // They are asked for a heartbeat, so that nobody has to wait for one.
        wait_for("a heartbeat", Duration::from_secs(20), || {
            text().contains(&format!("{node} [")).then_some(())
        });
    }
    let id = world
        .ours(r#"call test_task -a ["seen"]"#)
        .out
        .trim()
        .to_owned();
    let task = format!(": test_task({id}) args=('seen',) kwargs={{}} clock=");
    for kind in ["received", "started", "succeeded"] {
        wait_for(kind, Duration::from_secs(20), || {
            text()
                .contains(&format!("] task {kind}{task}"))
                .then_some(())
        });
    }
    assert!(text().starts_with("-> evdump: starting capture...\n"));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(dump.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(dump.wait().unwrap().code(), Some(0));
}
