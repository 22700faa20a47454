//! The fences around a child of the product: what a repository that takes it over could do.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Broker, GitServer, Raw, Repository, TlsFront, Worker, on_brokers, project, python, services,
    unique, wait_for,
};

/// Lets an idle child of the worker try everything; see the script.
fn canary(worker: &Worker) -> Value {
    let port = url::Url::parse(worker.broker()).unwrap().port().unwrap();
    let root = wait_for(
        "the children's directories",
        Duration::from_secs(10),
        || {
            let below = std::fs::read_dir(worker.clones()).ok()?.flatten();
            let mut workers = below.filter(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().starts_with("celeriac-worker-")
            });
            let clones = workers.next()?.path().join("clones");
            Some(std::fs::read_dir(clones).ok()?.flatten().next()?.path())
        },
    );
    // Its second thread is started after the sandbox is closed, and then the first waits for work.
    let waits = |pid: &u32| {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        threads > 1 && stat.contains(") S ")
    };
    let pid = wait_for("an idle child", Duration::from_secs(10), || {
        worker.descendants().into_iter().find(waits)
    });
    let output = Command::new(python::interpreter())
        .arg(project().join("tests/it/scripts/canary.py"))
        .args([pid.to_string(), worker.pid().to_string(), port.to_string()])
        .arg(root)
        .output()
        .expect("python runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().find_map(|line| line.strip_prefix("answer: "));
    let answer = answer.unwrap_or_else(|| {
        panic!(
            "the canary did not sing: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    serde_json::from_str(answer).unwrap()
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_child_that_is_taken_over_reaches_nothing_and_without_the_sandbox_it_would() {
    let redis = services::redis();
    let fenced = Worker::on(&redis.url)
        .concurrency(1)
        .env("ALLOW_LOCAL_REPOS", "0")
        .start();
    let seen = canary(&fenced);
    println!("{seen:#}");
    for (what, answer) in seen.as_object().unwrap() {
        match what.as_str() {
            // A descriptor: this much it needs for its work. Its own directory is another's
            // where the spare child was asked.
            "open a TCP socket" => assert!(answer.is_u64(), "{what}: {answer}"),
            "write to its own directory" => {}
            _ => assert!(
                ["EACCES", "EPERM", "ENOSYS", "EAFNOSUPPORT"]
                    .contains(&answer.as_str().unwrap_or("done")),
                "{what}: {answer}"
            ),
        }
    }
    let open = Worker::on(&redis.url)
        .concurrency(1)
        .env("SANDBOX", "0")
        .start();
    let seen = canary(&open);
    for what in ["read /etc/shadow", "connect to Redis", "open a unix socket"] {
        assert!(
            seen[what].is_u64(),
            "{what} without a sandbox: {}",
            seen[what]
        );
    }
}

#[test]
fn real_clones_and_local_repositories_are_analysed_inside_the_sandbox() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let worker = Worker::on(&redis.url).start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    for url in [server.open(&repository), repository.url()] {
        let id = raw.send("analyze_repo_task", json!([1, url]));
        assert_eq!(raw.value(&id)["total_contributors"], 1, "{url}");
    }
    for pid in worker.descendants() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    let told = worker.log().matches("the sandbox is incomplete").count();
    assert!(told <= 1, "said once, not for every child");
}

#[test]
fn a_clone_over_https_works_inside_the_sandbox_and_only_a_trusted_server_hears_the_token() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let token = unique("secret");
    let plain = server.with_token(&repository, &token);
    let front = TlsFront::before(&plain);
    let url = front.url(&plain);
    let stranger = Worker::on(&redis.url).env("REPO_CA_FILE", "").start();
    let mut raw = Raw::new(&redis.url, &stranger.queue);
    let id = raw.send("analyze_repo_task", json!([1, url, token]));
    let meta = raw.wait(&id);
    let told = meta["result"]["exc_message"][0].as_str().unwrap();
    assert!(
        told.contains("UnknownIssuer") && told.contains("REPO_CA_FILE"),
        "{told}"
    );
    assert_eq!((front.requests(), server.requests().len()), (0, 0));
    drop(stranger);
    // Outside of every directory that children may read anyway.
    let elsewhere = tempfile::tempdir().unwrap();
    let authority = elsewhere.path().join("ca.pem");
    std::fs::copy(TlsFront::authority(), &authority).unwrap();
    for variable in ["REPO_CA_FILE", "SSL_CERT_FILE"] {
        let worker = Worker::on(&redis.url)
            .env(variable, authority.to_str().unwrap())
            .start();
        let mut raw = Raw::new(&redis.url, &worker.queue);
        let id = raw.send("analyze_repo_task", json!([1, url, token]));
        assert_eq!(raw.value(&id)["total_contributors"], 1, "{variable}");
        for pid in worker.descendants() {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(status.contains("Seccomp:\t2"), "{status}");
        }
    }
    let broken = elsewhere.path().join("broken.pem");
    std::fs::write(&broken, "-----BEGIN NOTHING-----\n").unwrap();
    let mut refused = Worker::on(&redis.url)
        .env("REPO_CA_FILE", broken.to_str().unwrap())
        .start_without_waiting();
    assert!(!refused.wait().success());
    assert!(
        refused.log().contains("no certificates in PEM form"),
        "{}",
        refused.log()
    );
}

/// Starts a worker whose kernel answers one system call with an error.
fn on_a_kernel_without(redis: &str, call: i64, error: i32) -> Worker {
    let rules = std::collections::BTreeMap::from([(call, Vec::new())]);
    let filter = seccompiler::SeccompFilter::new(
        rules,
        seccompiler::SeccompAction::Allow,
        seccompiler::SeccompAction::Errno(error.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    let redis = redis.to_owned();
    // A filter holds for its thread and whatever that thread starts.
    let start = move || {
        seccompiler::apply_filter(&program).unwrap();
        Worker::on(&redis)
            .concurrency(2)
            .env("CELERY_WORKER_MAX_TASKS_PER_CHILD", "1")
            .start()
    };
    std::thread::spawn(start).join().unwrap()
}

#[test]
fn what_the_kernel_lacks_is_said_once_and_the_other_fences_stand() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    for (call, error, told, status) in [
        (
            libc::SYS_landlock_create_ruleset,
            libc::ENOSYS,
            "Landlock is not in force (kernel older than 5.13, or switched off)",
            "Seccomp:\t2",
        ),
        (
            libc::SYS_landlock_create_ruleset,
            libc::EOPNOTSUPP,
            "Landlock is not in force (kernel older than 5.13, or switched off)",
            "NoNewPrivs:\t1",
        ),
        (
            libc::SYS_seccomp,
            libc::ENOSYS,
            "the seccomp filter is not in force",
            "NoNewPrivs:\t1",
        ),
    ] {
        let worker = on_a_kernel_without(&redis.url, call, error);
        let mut raw = Raw::new(&redis.url, &worker.queue);
        let url = server.open(&repository);
        for user in 0..3 {
            let id = raw.send("analyze_repo_task", json!([user, url]));
            assert_eq!(raw.value(&id)["total_contributors"], 1);
        }
        assert_eq!(worker.log().matches(told).count(), 1, "{}", worker.log());
        for pid in worker.descendants() {
            // A child may be replaced this moment.
            let found = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            assert!(found.is_empty() || found.contains(status), "{found}");
        }
    }
}

/// How many of its mappings hold the text. Only root may look.
fn holds(pid: u32, text: &str) -> usize {
    use std::os::unix::fs::FileExt;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).expect("root may look");
    let found = |line: &&str| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let number = |digits| u64::from_str_radix(digits, 16).unwrap();
        let mut bytes = vec![0; usize::try_from(number(end) - number(start)).unwrap()];
        rest.starts_with("rw")
            && memory.read_exact_at(&mut bytes, number(start)).is_ok()
            && memchr::memmem::find(&bytes, text.as_bytes()).is_some()
    };
    maps.lines().filter(found).count()
}

#[test]
fn a_token_is_gone_from_the_childs_memory_when_its_task_has_ended() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let (mark, server) = (unique("secret"), GitServer::start());
    let (url, gate) = server.gated(&repository);
    let worker = Worker::on(&redis.url).concurrency(1).start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    // Many times, for the first bytes of what is let go are used again at once.
    let id = raw.send("analyze_repo_task", json!([1, url, mark.repeat(20)]));
    gate.wait_arrivals(1);
    let children = worker.descendants();
    let held = || children.iter().map(|pid| holds(*pid, &mark)).sum::<usize>();
    assert!(held() > 0);
    gate.open();
    assert_eq!(raw.value(&id)["total_contributors"], 1);
    assert_eq!(worker.descendants(), children);
    assert_eq!(held(), 0);
}

#[test]
fn a_worker_without_capabilities_on_a_read_only_root_analyses_in_its_sandbox() {
    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    // What docker-compose.yml demands of a container, made by hand.
    let contained = "set -e\nmount --make-rprivate /\nmount --bind \"$HOME\" \"$HOME\"\n\
        mkdir \"$HOME/bin\"\ncp \"$1\" \"$HOME/bin/celeriac\"\nchown -R 65534:65534 \"$HOME\"\nshift\n\
        mount -o remount,ro,bind /\n! touch /tmp/x 2>/dev/null\ncd \"$HOME\"\n\
        exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all \
        --inh-caps=-all --no-new-privs bin/celeriac \"$@\"";
    let worker = Worker::on(&redis.url)
        .under(&["unshare", "--mount", "bash", "-c", contained, "bash"])
        .start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    assert!(status.contains("CapBnd:\t0000000000000000"), "{status}");
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let id = raw.send("analyze_repo_task", json!([1, server.open(&repository)]));
    assert_eq!(raw.value(&id)["total_contributors"], 1);
    for pid in worker.descendants() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    assert!(
        !worker.log().contains("sandbox is incomplete"),
        "{}",
        worker.log()
    );
}

#[test]
fn a_worker_and_a_child_that_are_aborted_amid_a_clone_leave_no_core_dump() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
    use nix::sys::signal::{Signal, kill};
    use std::os::unix::process::ExitStatusExt;

    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
    // Only root may have more than it was given.
    if setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY).is_err() {
        setrlimit(Resource::RLIMIT_CORE, hard, hard).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let mut other = Command::new("sleep")
        .arg("600")
        .current_dir(directory.path())
        .spawn()
        .unwrap();
    let process = |pid: u32| nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    kill(process(other.id()), Signal::SIGABRT).unwrap();
    let would = other.wait().unwrap();
    println!("another program leaves one: {}", would.core_dumped());

    let redis = services::redis();
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let (token, server) = (unique("secret"), GitServer::start());
    let (url, gate) = server.gated(&repository);
    let mut worker = Worker::on(&redis.url).concurrency(1).start();
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let lost = raw.send("analyze_repo_task", json!([1, url, token]));
    gate.wait_arrivals(1);
    let children = worker.descendants();
    let busy = children.iter().find(|pid| holds(**pid, &token) > 0);
    let busy = *busy.expect("the child that works with the token has it");
    kill(process(busy), Signal::SIGILL).unwrap();
    let meta = raw.wait(&lost);
    assert!(meta.to_string().contains("SIGILL"), "{meta}");

    raw.send("analyze_repo_task", json!([1, url, token]));
    gate.wait_arrivals(2);
    let pid = worker.pid();
    assert!(holds(pid, &token) > 0, "the worker has it, too");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    println!(
        "{}",
        limits.lines().find(|line| line.contains("core")).unwrap()
    );
    worker.signal(Signal::SIGABRT);
    let ended = worker.wait();
    assert_eq!(ended.signal(), Some(Signal::SIGABRT as i32), "{ended}");
    assert!(!ended.core_dumped(), "{ended}");
    let mut files = Vec::new();
    crate::markers::files_below(worker.clones().parent().unwrap(), &mut files);
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_default();
        let hit = memchr::memmem::find(&bytes, token.as_bytes());
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        assert!(hit.is_none() && !name.starts_with("core"), "{name}");
    }
}

on_brokers!(a_child_holds_no_connection_setting_or_secret_of_its_parent);
fn a_child_holds_no_connection_setting_or_secret_of_its_parent(broker: &Broker) {
    let secret = unique("secret");
    let worker = broker
        .worker()
        .env(
            "TOKEN_ENCRYPTION_KEYS",
            "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=",
        )
        .env("SENTRY_DSN", "")
        .env("AWS_SECRET_ACCESS_KEY", &secret)
        .env("HTTPS_PROXY", &format!("http://u:{secret}@127.0.0.1:9"))
        .start();
    let known = [
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "RUST_BACKTRACE",
        "HOME",
    ];
    let children = worker.descendants();
    assert!(children.len() >= 2, "{children:?}");
    for pid in children {
        let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap();
        for variable in read("environ")
            .split(|byte| *byte == 0)
            .filter(|text| !text.is_empty())
        {
            let text = String::from_utf8_lossy(variable);
            let (name, _) = text.split_once('=').unwrap();
            assert!(known.contains(&name), "{text}");
        }
        let arguments = String::from_utf8_lossy(&read("cmdline")).into_owned();
        assert!(!arguments.contains("://"), "{arguments}");
        // Its two sockets to the parent, what it needs of threads and timers, and no TCP socket.
        let tcp = [read("net/tcp"), read("net/tcp6")].concat();
        let tcp = String::from_utf8_lossy(&tcp).into_owned();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten()
        {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            let inode = target
                .strip_prefix("socket:[")
                .and_then(|rest| rest.strip_suffix(']'));
            let is_tcp = inode.is_some_and(|inode| tcp.contains(&format!(" {inode} ")));
            let is_known = ["socket:[", "/dev/null", "anon_inode:", "pipe:["]
                .iter()
                .any(|start| target.starts_with(start))
                || target.ends_with("/log");
            assert!(is_known && !is_tcp, "{pid} holds {target}");
        }
        let maps = String::from_utf8_lossy(&read("maps")).into_owned();
        let foreign = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5));
        for file in foreign.filter(|file| file.starts_with('/')) {
            let is_code = file.contains("/lib") || file.ends_with("/celeriac");
            assert!(is_code, "{pid} has mapped {file}");
        }
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        let limits = String::from_utf8_lossy(&read("limits")).into_owned();
        let limit = |name: &str| {
            let line = limits
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap()
                .to_owned();
            line[name.len()..]
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned()
        };
        assert_eq!(limit("Max core file size"), "0");
        assert_eq!(limit("Max file size"), (10_u64 << 30).to_string());
    }
}
