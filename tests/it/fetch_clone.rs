//! Real clones from `git http-backend`: what comes, with which token, and what of the token stays.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use celeriac::git::fetch::{self, Error, Fetched, Limits, Progress, Request};
use celeriac::git::url::{Policy, RepoUrl};
use secrecy::SecretString;

use crate::support::{GitServer, Repository};

/// Loopback is allowed, as in development.
pub fn local_policy() -> Policy {
    Policy {
        allow_local: true,
        ..Policy::default()
    }
}

/// Fetches into a new directory, which is kept as long as the result.
pub fn fetch_with(
    url: &str,
    token: Option<&str>,
    change: impl FnOnce(&mut Request<'_>),
) -> Result<(Fetched, tempfile::TempDir), Error> {
    let directory = tempfile::tempdir().unwrap();
    let policy = local_policy();
    let url = RepoUrl::parse(url, &policy)?;
    let token = token.map(SecretString::from);
    let mut request = Request {
        url: &url,
        token: token.as_ref(),
        branch: None,
        depth: None,
        directory: directory.path(),
        limits: Limits::default(),
        policy: &policy,
    };
    change(&mut request);
    let fetched = fetch::fetch(&request, &|_| {}, &AtomicBool::new(false))?;
    Ok((fetched, directory))
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = crate::support::repository::command(directory)
        .args(arguments)
        .output()
        .expect("git is a test dependency; install it");
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A history with branches, a merge, a tag and enough versions of one file to make deltas.
fn repository() -> Repository {
    let mut repository = Repository::new();
    let mut text: String = (0..400).map(|line| format!("line {line}\n")).collect();
    for round in 0..30 {
        text = text.replace(
            &format!("line {}\n", round * 7),
            &format!("changed {round}\n"),
        );
        repository.commit("Ann <ann@example.com>", &[("a/b/file.txt", &text)]);
    }
    repository.git(&["tag", "-a", "-m", "x", "v1", "HEAD~3"]);
    repository.git(&["branch", "side", "HEAD~5"]);
    repository.commit("Bob <bob@example.com>", &[("other", "x\n")]);
    repository
}

#[test]
fn clone_holds_heads_history_and_passes_gits_own_check() {
    let repository = repository();
    let server = GitServer::start();
    let reports = Mutex::new(Vec::new());
    let directory = tempfile::tempdir().unwrap();
    let policy = local_policy();
    let url = RepoUrl::parse(&server.open(&repository), &policy).unwrap();
    let request = Request {
        url: &url,
        token: None,
        branch: None,
        depth: None,
        directory: directory.path(),
        limits: Limits::default(),
        policy: &policy,
    };
    let report = |progress: Progress| reports.lock().unwrap().push(progress.fraction());
    let fetched = fetch::fetch(&request, &report, &AtomicBool::new(false)).unwrap();

    assert_eq!(fetched.head.unwrap().to_string(), repository.head());
    assert!(!fetched.shallow);
    assert_eq!(fetched.repository, directory.path());
    git(directory.path(), &["fsck", "--strict", "--no-dangling"]);
    assert_eq!(
        git(directory.path(), &["rev-parse", "HEAD"]),
        repository.head()
    );
    assert_eq!(
        git(directory.path(), &["for-each-ref", "--format=%(refname)"]),
        "refs/heads/main"
    );
    assert_eq!(
        git(directory.path(), &["rev-list", "--count", "HEAD"]),
        "31"
    );
    let objects = git(directory.path(), &["count-objects", "-v"]);
    assert!(
        objects.contains(&format!("in-pack: {}", fetched.objects)),
        "{objects}"
    );
    let reports = reports.into_inner().unwrap();
    assert!(reports.is_sorted(), "{reports:?}");
    assert_eq!(reports.last(), Some(&1.0));
    assert!(
        server
            .requests()
            .iter()
            .all(|request| !request.headers.contains_key("authorization")),
        "no token, no header"
    );
}

#[test]
fn token_opens_a_private_repository_and_stays_secret() {
    const TOKEN: &str = "ghp_marker0123456789";
    let repository = repository();
    let server = GitServer::start();
    let url = server.with_token(&repository, TOKEN);
    let (fetched, directory) = fetch_with(&url, Some(TOKEN), |_| {}).unwrap();
    assert_eq!(fetched.head.unwrap().to_string(), repository.head());
    for entry in ["HEAD", "config", "packed-refs"] {
        let content = std::fs::read_to_string(directory.path().join(entry)).unwrap();
        assert!(!content.contains(TOKEN), "{entry}");
    }

    let error = fetch_with(&url, Some("ghp_wrong_marker"), |_| {}).unwrap_err();
    assert!(matches!(error, Error::TokenRefused { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("ghp_wrong"));
    let error = fetch_with(&url, None, |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::NotFound { status: 401, .. }),
        "{error}"
    );
    let error = fetch_with(&url, Some(""), |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::NotFound { status: 401, .. }),
        "{error}"
    );
    assert!(!error.is_transient());
}

#[test]
fn statuses_are_told_apart() {
    let repository = repository();
    let server = GitServer::start();
    let error_of = |status| {
        fetch_with(
            &server.refusing(&repository, status),
            Some("ghp_marker"),
            |_| {},
        )
        .unwrap_err()
    };
    assert!(matches!(error_of(401), Error::TokenRefused { .. }));
    assert!(matches!(error_of(403), Error::Forbidden { .. }));
    assert!(matches!(error_of(404), Error::NotFound { status: 404, .. }));
    assert!(matches!(error_of(410), Error::NotFound { status: 410, .. }));
    assert!(matches!(error_of(418), Error::Status { status: 418, .. }));
    for status in [500, 502, 503, 504] {
        let error = error_of(status);
        assert!(
            matches!(error, Error::Server { .. }) && error.is_transient(),
            "{error}"
        );
    }
    let error = error_of(429);
    assert!(matches!(error, Error::RateLimited { .. }) && error.is_transient());
    assert!(!format!("{error} {error:?}").contains("ghp_marker"));
}

#[test]
fn branch_tag_and_depth_are_obeyed() {
    let repository = repository();
    let server = GitServer::start();
    let url = server.open(&repository);
    let rev = |name: &str| {
        String::from_utf8(repository.git(&["rev-parse", name]))
            .unwrap()
            .trim()
            .to_owned()
    };

    let (fetched, directory) =
        fetch_with(&url, None, |request| request.branch = Some("side")).unwrap();
    assert_eq!(fetched.head.unwrap().to_string(), rev("side"));
    assert_eq!(
        git(directory.path(), &["symbolic-ref", "HEAD"]),
        "refs/heads/side"
    );

    let (fetched, directory) =
        fetch_with(&url, None, |request| request.branch = Some("v1")).unwrap();
    assert_eq!(fetched.head.unwrap().to_string(), rev("v1^{commit}"));
    assert_eq!(
        git(directory.path(), &["rev-parse", "HEAD"]),
        rev("v1^{commit}")
    );

    let (fetched, directory) = fetch_with(&url, None, |request| request.depth = Some(3)).unwrap();
    assert!(fetched.shallow);
    assert_eq!(git(directory.path(), &["rev-list", "--count", "HEAD"]), "3");

    let error = fetch_with(&url, None, |request| request.branch = Some("none")).unwrap_err();
    assert!(matches!(error, Error::NoBranch { .. }), "{error}");
    for name in [
        "-x",
        "a..b",
        "a b",
        "a\nb",
        "",
        "refs/../x",
        "a~1",
        "x.lock",
        "@{0}",
    ] {
        let error = fetch_with(&url, None, |request| request.branch = Some(name)).unwrap_err();
        assert!(matches!(error, Error::BranchName(_)), "{name}: {error}");
    }
}

#[test]
fn empty_repository_has_no_head_and_detached_head_is_followed() {
    let server = GitServer::start();
    let empty = Repository::new();
    let (fetched, directory) = fetch_with(&server.open(&empty), None, |_| {}).unwrap();
    assert_eq!((fetched.head, fetched.objects), (None, 0));
    assert_eq!(
        git(directory.path(), &["symbolic-ref", "HEAD"]),
        "refs/heads/main"
    );

    let detached = repository();
    detached.git(&["checkout", "-q", "--detach", "HEAD~2"]);
    let (fetched, directory) = fetch_with(&server.open(&detached), None, |_| {}).unwrap();
    assert_eq!(fetched.head.unwrap().to_string(), detached.head());
    assert_eq!(
        git(directory.path(), &["rev-parse", "HEAD"]),
        detached.head()
    );
}

#[test]
fn other_object_formats_are_refused_by_name() {
    let repository = Repository::new();
    std::fs::remove_dir_all(repository.path().join(".git")).unwrap();
    repository.git(&["init", "-q", "-b", "main", "--object-format=sha256"]);
    repository.write("a", b"1\n");
    repository.git(&["add", "-A"]);
    repository.git(&[
        "-c",
        "user.name=A",
        "-c",
        "user.email=a@example.com",
        "commit",
        "-qm",
        "x",
    ]);
    let error = fetch_with(&GitServer::start().open(&repository), None, |_| {}).unwrap_err();
    assert!(
        matches!(&error, Error::ObjectFormat { format, .. } if format == "sha256"),
        "{error}"
    );
}

#[test]
fn local_repositories_are_read_in_place() {
    let repository = repository();
    for url in [repository.url(), repository.path().display().to_string()] {
        let (fetched, directory) = fetch_with(&url, None, |_| {}).unwrap();
        assert_eq!(fetched.repository, repository.path());
        assert_eq!(fetched.head.unwrap().to_string(), repository.head());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
    let error = fetch_with("file:///nowhere/none.git", None, |_| {}).unwrap_err();
    assert!(matches!(error, Error::Local { .. }), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = fetch_with(empty.path().to_str().unwrap(), None, |_| {}).unwrap_err();
    assert!(matches!(error, Error::Local { .. }), "{error}");
}

#[test]
fn connection_cut_in_the_pack_is_transient() {
    let repository = repository();
    let server = GitServer::start();
    for bytes in [0, 1, 30, 100, 600, 2000] {
        let error = fetch_with(&server.cutting(&repository, bytes), None, |_| {}).unwrap_err();
        assert!(
            matches!(error, Error::CutOff { .. }) && error.is_transient(),
            "{bytes}: {error:?}"
        );
    }
}

#[test]
fn each_limit_is_named_when_it_is_exceeded() {
    let repository = repository();
    let server = GitServer::start();
    let url = server.open(&repository);
    let limit_of = |setting: &str, change: fn(&mut Limits)| {
        let error = fetch_with(&url, None, |request| change(&mut request.limits)).unwrap_err();
        assert!(!error.is_transient());
        let told = error.to_string();
        assert!(told.contains(setting), "{told}");
        error.limit().unwrap_or_else(|| panic!("{error:?}"))
    };
    assert_eq!(
        limit_of("1000 bytes received; raise CLONE_MAX_BYTES", |limits| {
            limits.max_bytes = 1000
        }),
        fetch::Limit::Bytes
    );
    assert_eq!(
        limit_of("10 objects; raise CLONE_MAX_OBJECTS", |limits| limits
            .max_objects =
            10),
        fetch::Limit::Objects
    );
    assert_eq!(
        limit_of("raise CLONE_MAX_OBJECT_SIZE", |limits| limits
            .max_object_size =
            1000),
        fetch::Limit::ObjectSize
    );
    assert_eq!(
        limit_of("raise CLONE_MAX_INFLATED", |limits| limits.max_inflated =
            20_000),
        fetch::Limit::Inflated
    );
    assert_eq!(
        limit_of("1 steps in a delta chain", |limits| limits
            .max_delta_depth =
            1),
        fetch::Limit::DeltaDepth
    );
    assert_eq!(
        limit_of(
            "1500 bytes of disk for one clone; raise CLONE_DISK_QUOTA",
            |limits| {
                limits.max_disk = 1500;
            }
        ),
        fetch::Limit::Disk
    );
    let begun = server.requests().len();
    let full = fetch_with(&url, None, |request| {
        request.limits.keep_free = Some(u64::MAX);
    });
    let full = full.unwrap_err();
    let told = full.to_string();
    assert!(
        told.contains("CLONE_DISK_RESERVE") && full.is_transient(),
        "{told}"
    );
    let asked = &server.requests()[begun..];
    assert!(
        asked
            .iter()
            .all(|request| !request.body_has("command=fetch")),
        "a disk that is full is noticed before the pack is asked for"
    );
}

/// Sets the flag while the answer is held; how long the fetch took to end after that.
fn time_to_interrupt(server: &GitServer, repository: &Repository) -> Duration {
    let (url, gate) = server.gated(repository);
    let interrupt = AtomicBool::new(false);
    let policy = local_policy();
    let url = RepoUrl::parse(&url, &policy).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let request = Request {
        url: &url,
        token: None,
        branch: None,
        depth: None,
        directory: directory.path(),
        limits: Limits::default(),
        policy: &policy,
    };
    let taken = std::thread::scope(|scope| {
        let fetching = scope.spawn(|| fetch::fetch(&request, &|_| {}, &interrupt));
        gate.wait_arrivals(1);
        let start = Instant::now();
        interrupt.store(true, Ordering::SeqCst);
        let error = fetching.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
        start.elapsed()
    });
    gate.open();
    taken
}

#[test]
fn interrupt_ends_a_held_answer_at_once() {
    let repository = repository();
    let server = GitServer::start();
    // The best of a few: a busy machine may keep any single one waiting for the processor.
    let best = (0..5)
        .map(|_| time_to_interrupt(&server, &repository))
        .min();
    assert!(best < Some(Duration::from_secs(1)), "{best:?}");
}

#[test]
fn closed_port_and_unknown_host_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = fetch_with(&format!("http://{address}/r.git"), None, |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Connect { .. }) && error.is_transient(),
        "{error:?}"
    );
}
