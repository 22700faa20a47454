//! What a child sees and reaches.

use super::*;

pub(super) async fn a_child_sees_only_the_listed_environment() {
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

pub(super) async fn a_child_has_only_its_own_descriptors() {
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

pub(super) async fn a_hijacked_child_reaches_nothing_that_is_not_its_own() {
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

pub(super) async fn the_sandbox_can_be_switched_off() {
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
