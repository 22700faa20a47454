//! The cases. Each starts a pool of its own and shows one promise of the pool's module docs.

use std::collections::HashSet;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use celeriac::pool::{Error, Event, Job, Options, Outcome, Pool, Sandbox};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Case;

/// The first argument of the process that is killed to see what becomes of its children.
pub(crate) const DOOMED_PARENT: &str = "__doomed_parent";

/// No case waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(20);

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// Every case by name.
        pub(crate) const ALL: &[Case] = &[$((stringify!($name), || block_on($name()))),*];
    };
}

cases![
    a_job_comes_back_as_it_was_sent,
    progress_arrives_in_order_and_before_the_outcome,
    a_failure_keeps_its_parts,
    the_soft_limit_interrupts_and_the_child_lives_on,
    the_hard_limit_kills_within_a_tenth_of_a_second,
    a_child_that_never_stops_talking_is_killed_at_its_limit_too,
    terminate_kills_the_running_job_and_frees_the_place,
    a_signal_that_is_survived_is_followed_by_one_that_is_not,
    a_terminate_that_comes_too_late_does_not_hit_the_next_job,
    a_killed_child_is_a_lost_job_at_once_and_others_go_on,
    a_crash_is_told_by_its_exit_code_or_signal,
    a_panic_is_a_failure_without_secrets_and_the_child_is_replaced,
    an_abandoned_job_does_not_spoil_its_place,
    an_idle_child_that_dies_is_replaced,
    children_are_replaced_after_n_jobs_and_no_job_is_lost,
    two_thousand_jobs_with_a_fresh_child_for_each,
    a_child_that_became_large_is_replaced,
    the_pool_grows_and_shrinks_but_not_below_its_busy_places,
    restart_replaces_every_child,
    acquire_waits_for_a_free_place,
    a_large_result_arrives_and_a_larger_one_is_a_failure,
    a_child_sees_only_the_listed_environment,
    a_child_has_only_its_own_descriptors,
    a_hijacked_child_reaches_nothing_that_is_not_its_own,
    the_sandbox_can_be_switched_off,
    stop_waits_for_running_jobs_and_leaves_nobody,
    kill_ends_running_jobs_and_leaves_nobody,
    dropping_the_pool_leaves_nobody,
    a_parent_that_is_killed_leaves_nobody,
    a_program_that_cannot_be_started_is_an_error_of_the_start,
    four_children_start_quickly,
];

fn block_on(case: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(4 * DEADLINE, case)
            .await
            .expect("the case takes too long");
    });
}

fn options(size: usize) -> Options {
    Options {
        size,
        ..Options::default()
    }
}

async fn pool(options: Options) -> Arc<Pool> {
    let pool = Pool::start(options).unwrap();
    in_time(pool.ready()).await;
    pool
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("nothing came in time")
}

fn job(name: &str, payload: Value) -> Job {
    Job {
        id: format!("id-of-{name}"),
        name: name.to_owned(),
        payload,
        soft_limit: None,
        hard_limit: None,
        directory: None,
    }
}

fn channel() -> (UnboundedSender<Event>, UnboundedReceiver<Event>) {
    unbounded_channel()
}

/// Runs one job in a place of its own and gives the outcome and what was heard.
async fn run(pool: &Pool, job: Job) -> (Outcome, Vec<Event>) {
    let (sender, mut receiver) = channel();
    let mut slot = in_time(pool.acquire()).await;
    let outcome = in_time(slot.run(job, sender)).await;
    drop(slot);
    let mut events = Vec::new();
    while let Some(event) = receiver.recv().await {
        events.push(event);
    }
    (outcome, events)
}

/// Starts a job in a task of its own; comes back when the handler says that it is waiting.
async fn start(pool: &Arc<Pool>, job: Job) -> (tokio::task::JoinHandle<Outcome>, u32) {
    let (sender, mut receiver) = channel();
    let mut slot = in_time(pool.acquire()).await;
    let pid = slot.pid();
    let task = tokio::spawn(async move { slot.run(job, sender).await });
    while let Some(event) = in_time(receiver.recv()).await {
        if event == Event::Progress(json!("waiting")) {
            return (task, pid);
        }
    }
    panic!("the job ended before it waited: {:?}", task.await);
}

fn exists(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Polls a condition that no signal tells of, with a deadline.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// All children of this process, ours and the zombies among them.
fn children_of(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        if after_name.split_ascii_whitespace().nth(1) == Some(&parent.to_string()) {
            found.push(pid);
        }
    }
    found
}

async fn a_job_comes_back_as_it_was_sent() {
    let pool = pool(options(1)).await;
    let payload =
        json!({"text": "분석 중", "number": 12345678901234567890_u64, "list": [null, 1.5]});
    let (outcome, events) = run(&pool, job("echo", payload.clone())).await;
    assert_eq!(outcome, Outcome::Success(payload));
    assert_eq!(
        events,
        [Event::Started {
            pid: pool.processes()[0]
        }]
    );
    assert_eq!(pool.writes().total, 1);
}

async fn progress_arrives_in_order_and_before_the_outcome() {
    let pool = pool(options(1)).await;
    let (outcome, events) = run(&pool, job("progress", json!(5000))).await;
    assert_eq!(outcome, Outcome::Success(json!("reported")));
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Progress(step) => step.as_u64(),
            _ => None,
        })
        .collect();
    assert_eq!(steps, (0..5000).collect::<Vec<_>>());
    let log = |level, text: &str| Event::Log {
        level,
        text: text.to_owned(),
    };
    let expected = [
        log(log::Level::Info, "half done"),
        log(log::Level::Warn, "done reporting"),
    ];
    assert_eq!(events[5001..], expected);
}

async fn a_failure_keeps_its_parts() {
    let pool = pool(options(1)).await;
    let (outcome, _) = run(&pool, job("fail", json!({"a": 1}))).await;
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(failure.exc_type, "ValueError");
    assert_eq!(failure.exc_message, [json!({"a": 1})]);
    assert_eq!(failure.traceback, "test\n");
}

async fn the_soft_limit_interrupts_and_the_child_lives_on() {
    let pool = pool(options(1)).await;
    let before = pool.processes();
    let mut limited = job("until_interrupt", json!(null));
    limited.soft_limit = Some(Duration::from_millis(50));
    let begun = Instant::now();
    let (outcome, events) = run(&pool, limited).await;
    assert!(begun.elapsed() >= Duration::from_millis(50));
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(failure.exc_type, "SoftTimeLimitExceeded");
    assert_eq!(failure.exc_message, [json!(true)]);
    assert_eq!(events.last(), Some(&Event::SoftLimit));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    assert_eq!(pool.processes(), before);
}

async fn the_hard_limit_kills_within_a_tenth_of_a_second() {
    let pool = pool(options(1)).await;
    let limit = Duration::from_millis(100);
    let mut limited = job("forever", json!(null));
    limited.hard_limit = Some(limit);
    let mut slot = pool.acquire().await;
    let pid = slot.pid();
    let begun = Instant::now();
    let outcome = slot.run(limited, channel().0).await;
    let took = begun.elapsed();
    assert_eq!(outcome, Outcome::HardTimeLimit(limit));
    assert!(
        took >= limit && took < limit + Duration::from_millis(100),
        "{took:?}"
    );
    assert!(!exists(pid), "the child is still there");
    drop(slot);
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

async fn a_child_that_never_stops_talking_is_killed_at_its_limit_too() {
    let pool = pool(options(1)).await;
    let limit = Duration::from_millis(50);
    let mut limited = job("chatter", json!(null));
    limited.hard_limit = Some(limit);
    let (outcome, _) = run(&pool, limited).await;
    assert_eq!(outcome, Outcome::HardTimeLimit(limit));
}

async fn terminate_kills_the_running_job_and_frees_the_place() {
    let pool = pool(options(1)).await;
    assert!(!pool.terminate("id-of-forever", 15), "nothing runs yet");
    let (task, pid) = start(&pool, job("forever", json!(null))).await;
    let begun = Instant::now();
    assert!(pool.terminate("id-of-forever", 15));
    let outcome = in_time(task).await.unwrap();
    assert_eq!(outcome, Outcome::Terminated { signal: 15 });
    assert!(
        begun.elapsed() < Duration::from_millis(100),
        "{:?}",
        begun.elapsed()
    );
    assert!(!exists(pid));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

async fn a_signal_that_is_survived_is_followed_by_one_that_is_not() {
    let pool = pool(options(1)).await;
    let (task, _) = start(&pool, job("forever", json!(null))).await;
    // Stopping is survived.
    assert!(pool.terminate("id-of-forever", 19));
    let outcome = in_time(task).await.unwrap();
    assert_eq!(outcome, Outcome::Terminated { signal: 19 });
}

async fn a_terminate_that_comes_too_late_does_not_hit_the_next_job() {
    let pool = pool(options(1)).await;
    let mut too_late = 0;
    for round in 0..300 {
        let mut target = job("echo", json!(1));
        target.id = String::from("target");
        let mut slot = in_time(pool.acquire()).await;
        let task = tokio::spawn(async move { slot.run(target, channel().0).await });
        for _ in 0..round % 40 {
            std::hint::spin_loop();
            tokio::task::yield_now().await;
        }
        pool.terminate("target", 15);
        match in_time(task).await.unwrap() {
            Outcome::Success(_) => too_late += 1,
            outcome => assert_eq!(outcome, Outcome::Terminated { signal: 15 }),
        }
        let (outcome, _) = run(&pool, job("echo", json!(round))).await;
        assert_eq!(
            outcome,
            Outcome::Success(json!(round)),
            "after {too_late} late ones"
        );
    }
}

async fn a_killed_child_is_a_lost_job_at_once_and_others_go_on() {
    let pool = pool(options(2)).await;
    let (lost, pid) = start(&pool, job("forever", json!(null))).await;
    let mut other = job("until_interrupt", json!(null));
    other.soft_limit = Some(Duration::from_millis(300));
    let (other, _) = start(&pool, other).await;
    let begun = Instant::now();
    send(pid, "KILL");
    let outcome = in_time(lost).await.unwrap();
    let reason = String::from("signal 9 (SIGKILL)");
    assert_eq!(outcome, Outcome::Lost { reason });
    assert!(
        begun.elapsed() < Duration::from_millis(200),
        "{:?}",
        begun.elapsed()
    );
    assert!(matches!(in_time(other).await.unwrap(), Outcome::Failure(_)));
}

fn send(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

async fn a_crash_is_told_by_its_exit_code_or_signal() {
    let pool = pool(options(1)).await;
    for (name, expected) in [("exit", "exitcode 3"), ("abort", "signal 6 (SIGABRT)")] {
        let (outcome, _) = run(&pool, job(name, json!(null))).await;
        let reason = String::from(expected);
        assert_eq!(outcome, Outcome::Lost { reason });
    }
}

async fn a_panic_is_a_failure_without_secrets_and_the_child_is_replaced() {
    let pool = pool(options(1)).await;
    let before = pool.processes();
    let (outcome, _) = run(&pool, job("panic", json!({"token": "ghp_marker"}))).await;
    let Outcome::Failure(failure) = outcome else {
        panic!("{outcome:?}")
    };
    let text = format!("{failure:?}");
    assert!(
        text.contains("panicked: could not use") && text.contains("handler.rs"),
        "{text}"
    );
    assert!(!text.contains("ghp_marker"), "{text}");
    let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)), "it is a fresh child");
    assert_ne!(pool.processes(), before);
}

async fn an_abandoned_job_does_not_spoil_its_place() {
    let pool = pool(options(1)).await;
    let (task, pid) = start(&pool, job("forever", json!(null))).await;
    task.abort();
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    eventually("the abandoned child is gone", || !exists(pid)).await;
}

async fn an_idle_child_that_dies_is_replaced() {
    let pool = pool(options(2)).await;
    let victim = pool.processes()[0];
    send(victim, "KILL");
    eventually("it has a successor", || {
        let now = pool.processes();
        !now.contains(&victim) && now.len() == 2
    })
    .await;
    for number in 0..4 {
        let (outcome, _) = run(&pool, job("echo", json!(number))).await;
        assert_eq!(outcome, Outcome::Success(json!(number)));
    }
}

async fn children_are_replaced_after_n_jobs_and_no_job_is_lost() {
    let pool = pool(Options {
        max_tasks_per_child: Some(3),
        ..options(1)
    })
    .await;
    let mut counts = Vec::new();
    for _ in 0..9 {
        let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
        let Outcome::Success(count) = outcome else {
            panic!("{outcome:?}")
        };
        counts.push(count.as_u64().unwrap());
    }
    assert_eq!(counts, [1, 2, 3, 1, 2, 3, 1, 2, 3]);
    pool.set_max_tasks_per_child(None);
    for expected in 1..8 {
        let (outcome, _) = run(&pool, job("jobs", json!(null))).await;
        assert_eq!(outcome, Outcome::Success(json!(expected)));
    }
}

async fn two_thousand_jobs_with_a_fresh_child_for_each() {
    let pool = pool(Options {
        max_tasks_per_child: Some(1),
        ..options(4)
    })
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..2000 {
        let pool = Arc::clone(&pool);
        tasks.spawn(async move {
            let mut slot = pool.acquire().await;
            let pid = slot.pid();
            (
                pid,
                number,
                slot.run(job("echo", json!(number)), channel().0).await,
            )
        });
    }
    let mut done = HashSet::new();
    while let Some(result) = in_time(tasks.join_next()).await {
        let (_, number, outcome) = result.unwrap();
        assert_eq!(outcome, Outcome::Success(json!(number)));
        done.insert(number);
    }
    assert_eq!(done.len(), 2000);
    in_time(pool.stop()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
}

async fn a_child_that_became_large_is_replaced() {
    let pool = pool(Options {
        max_memory_per_child: Some(100 << 10),
        ..options(1)
    })
    .await;
    let before = pool.processes();
    run(&pool, job("allocate", json!(1 << 20))).await;
    assert_eq!(pool.processes(), before, "it is still small");
    let (outcome, _) = run(&pool, job("allocate", json!(200 << 20))).await;
    assert_eq!(outcome, Outcome::Success(json!("allocated")));
    assert_ne!(pool.processes(), before);
}

async fn the_pool_grows_and_shrinks_but_not_below_its_busy_places() {
    let pool = pool(options(1)).await;
    pool.grow(2);
    in_time(pool.ready()).await;
    assert_eq!((pool.size(), pool.processes().len()), (3, 3));
    let held = [pool.acquire().await, pool.acquire().await];
    let error = pool.shrink(2).unwrap_err();
    assert!(matches!(error, Error::Busy));
    assert_eq!(error.to_string(), "Can't shrink pool. All processes busy!");
    pool.shrink(1).unwrap();
    assert_eq!((pool.size(), pool.busy()), (2, 2));
    assert!(
        pool.try_acquire().is_none(),
        "a place that went took its permit along"
    );
    drop(held);
    pool.shrink(5).unwrap();
    assert_eq!((pool.size(), pool.busy()), (1, 0), "the last place stays");
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
    eventually("one child and the spare are left", || {
        children_of(std::process::id()).len() == 2
    })
    .await;
}

async fn restart_replaces_every_child() {
    let pool = pool(options(2)).await;
    let before: HashSet<_> = pool.processes().into_iter().collect();
    let (busy, _) = start(&pool, {
        let mut job = job("until_interrupt", json!(null));
        job.soft_limit = Some(Duration::from_millis(50));
        job
    })
    .await;
    pool.restart();
    assert!(matches!(in_time(busy).await.unwrap(), Outcome::Failure(_)));
    in_time(pool.ready()).await;
    let after: HashSet<_> = pool.processes().into_iter().collect();
    assert_eq!(after.len(), 2);
    assert!(after.is_disjoint(&before), "{before:?} {after:?}");
}

async fn acquire_waits_for_a_free_place() {
    let pool = pool(options(1)).await;
    let held = pool.acquire().await;
    let waiting = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.acquire().await.pid() }
    });
    tokio::task::yield_now().await;
    assert!(pool.try_acquire().is_none() && !waiting.is_finished());
    let pid = held.pid();
    drop(held);
    assert_eq!(in_time(waiting).await.unwrap(), pid);
}

async fn a_large_result_arrives_and_a_larger_one_is_a_failure() {
    let pool = pool(options(1)).await;
    let (outcome, _) = run(&pool, job("large", json!(20 << 20))).await;
    assert!(matches!(outcome, Outcome::Success(Value::String(text)) if text.len() == 20 << 20));
    let (outcome, _) = run(&pool, job("large", json!(65 << 20))).await;
    assert!(matches!(&outcome, Outcome::Failure(failure) if failure.exc_type == "ValueError"));
    let (outcome, _) = run(&pool, job("echo", json!(1))).await;
    assert_eq!(outcome, Outcome::Success(json!(1)));
}

async fn a_child_sees_only_the_listed_environment() {
    let pool = pool(Options {
        environment: vec![(String::from("EXTRA"), String::from("yes"))],
        ..options(1)
    })
    .await;
    let (outcome, _) = run(&pool, job("environment", json!(null))).await;
    let Outcome::Success(Value::Array(variables)) = outcome else {
        panic!("{outcome:?}")
    };
    let names: Vec<_> = variables
        .iter()
        .map(|pair| pair[0].as_str().unwrap())
        .collect();
    let allowed = [
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HOME",
        "RUST_BACKTRACE",
        "EXTRA",
    ];
    assert!(names.iter().all(|name| allowed.contains(name)), "{names:?}");
    assert!(names.contains(&"EXTRA"));
    assert!(variables.contains(&json!(["HOME", "/nonexistent"])));
    // Cargo's variables stand for those that must not get through.
    assert!(std::env::vars().any(|(name, _)| !allowed.contains(&name.as_str())));
}

async fn a_child_has_only_its_own_descriptors() {
    // A descriptor that a careless library left inheritable.
    let stray = std::fs::File::open("/dev/zero").unwrap();
    nix::fcntl::fcntl(
        &stray,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let pool = pool(options(2)).await;
    let (outcome, _) = run(&pool, job("descriptors", json!(null))).await;
    let Outcome::Success(Value::Array(targets)) = outcome else {
        panic!("{outcome:?}")
    };
    let targets: Vec<_> = targets
        .iter()
        .map(|target| target.as_str().unwrap())
        .collect();
    let sockets = targets
        .iter()
        .filter(|target| target.starts_with("socket:"))
        .count();
    // Jobs for reading and for writing, control; standard error may be a socket as well.
    assert!((3..=5).contains(&sockets), "{targets:?}");
    assert!(!targets.contains(&"/dev/zero"), "{targets:?}");
    assert!(targets.contains(&"/dev/null"), "{targets:?}");
    drop(stray);
}

async fn a_hijacked_child_reaches_nothing_that_is_not_its_own() {
    let root = tempfile::tempdir().unwrap();
    let secrets = tempfile::tempdir().unwrap();
    let foreign = secrets.path().join("foreign");
    std::fs::write(&foreign, "another job's").unwrap();
    let allowed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let denied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = |listener: &std::net::TcpListener| listener.local_addr().unwrap().port();
    let pool = pool(Options {
        root: Some(root.path().join("jobs")),
        sandbox: Sandbox {
            connect_ports: vec![port(&allowed)],
            ..Sandbox::default()
        },
        ..options(2)
    })
    .await;
    let mut slot = pool.acquire().await;
    let own = slot.directory().unwrap().to_owned();
    assert!(own.is_dir());
    let payload = json!({
        "foreign": foreign,
        "parent": format!("/proc/{}/environ", std::process::id()),
        "allowed": port(&allowed),
        "denied": port(&denied),
    });
    let outcome = slot.run(job("canary", payload), channel().0).await;
    let Outcome::Success(found) = outcome else {
        panic!("{outcome:?}")
    };
    for (what, expected) in [
        ("write own", "done"),
        ("read own", "done"),
        ("read hosts", "done"),
        ("start a thread", "done"),
        ("resolve", "done"),
        ("connect allowed", "done"),
        ("write foreign", "permission denied"),
        ("read foreign", "permission denied"),
        ("read parent", "permission denied"),
        ("start a program", "permission denied"),
        ("open a unix socket", "permission denied"),
        ("listen", "permission denied"),
        ("connect denied", "permission denied"),
    ] {
        assert_eq!(found[what], json!(expected), "{what} in {found}");
    }
    let processors = celeriac::pool::limits::available_cpus();
    assert_eq!(found["processors"], json!(processors));
    drop(slot);
    assert!(own.join("file").exists());
    in_time(pool.stop()).await;
    assert!(!own.exists(), "the directory went with its child");
}

async fn the_sandbox_can_be_switched_off() {
    let pool = pool(Options {
        sandbox: Sandbox::off(),
        ..options(1)
    })
    .await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let payload = json!({"parent": "/etc/passwd", "denied": listener.local_addr().unwrap().port()});
    let (outcome, _) = run(&pool, job("canary", payload)).await;
    let Outcome::Success(found) = outcome else {
        panic!("{outcome:?}")
    };
    for what in ["read parent", "start a program", "connect denied", "listen"] {
        assert_eq!(found[what], json!("done"), "{what} in {found}");
    }
}

async fn stop_waits_for_running_jobs_and_leaves_nobody() {
    let pool = pool(options(2)).await;
    let mut limited = job("until_interrupt", json!(null));
    limited.soft_limit = Some(Duration::from_millis(100));
    let (task, _) = start(&pool, limited).await;
    in_time(pool.stop()).await;
    assert!(
        task.is_finished(),
        "the pool stopped before its job was done"
    );
    assert!(matches!(task.await.unwrap(), Outcome::Failure(_)));
    assert_eq!(children_of(std::process::id()), [0; 0]);
    in_time(pool.stop()).await;
}

async fn kill_ends_running_jobs_and_leaves_nobody() {
    let pool = pool(options(2)).await;
    let (task, _) = start(&pool, job("forever", json!(null))).await;
    in_time(pool.kill()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
    assert_eq!(
        in_time(task).await.unwrap(),
        Outcome::Terminated { signal: 9 }
    );
}

async fn dropping_the_pool_leaves_nobody() {
    let pool = pool(options(3)).await;
    drop(pool);
    eventually("all children are reaped", || {
        children_of(std::process::id()).is_empty()
    })
    .await;
}

async fn a_parent_that_is_killed_leaves_nobody() {
    let mut parent = Command::new("/proc/self/exe")
        .arg(DOOMED_PARENT)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let pids: Vec<u32> = line.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert!(
        pids.len() == 4 && pids.iter().all(|pid| exists(*pid)),
        "{line}"
    );
    parent.kill().unwrap();
    parent.wait().unwrap();
    let begun = Instant::now();
    // An orphan becomes a zombie of whoever adopts it, which is not ours to reap.
    let alive = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| !rest.starts_with(" Z"))
        })
    };
    eventually("all children are gone", || !pids.iter().any(alive)).await;
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

/// A parent with a busy place and idle ones that prints its children and waits to be killed.
pub(crate) fn be_a_doomed_parent() -> ExitCode {
    block_on(async {
        let pool = pool(options(3)).await;
        let (_task, _) = start(&pool, job("forever", json!(null))).await;
        eventually("the spare is there", || {
            children_of(std::process::id()).len() == 4
        })
        .await;
        let pids: Vec<_> = children_of(std::process::id())
            .iter()
            .map(ToString::to_string)
            .collect();
        println!("{}", pids.join(" "));
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}

async fn a_program_that_cannot_be_started_is_an_error_of_the_start() {
    let error = Pool::start(Options {
        program: "/nonexistent/celeriac".into(),
        ..options(2)
    });
    let text = error.err().unwrap().to_string();
    assert!(text.contains("/nonexistent/celeriac"), "{text}");
    // A program that is no child of ours ends without a word; the pool goes on trying.
    let pool = Pool::start(Options {
        program: "/bin/true".into(),
        ..options(1)
    })
    .unwrap();
    in_time(pool.stop()).await;
    assert_eq!(children_of(std::process::id()), [0; 0]);
}

async fn four_children_start_quickly() {
    let begun = Instant::now();
    let pool = Pool::start(options(4)).unwrap();
    let started = begun.elapsed();
    in_time(pool.ready()).await;
    let ready = begun.elapsed();
    println!("     4 children: spawned after {started:?}, ready after {ready:?}");
    // Far above what it takes on an idle machine, far below what a person would notice.
    assert!(ready < Duration::from_secs(1), "{ready:?}");
}
