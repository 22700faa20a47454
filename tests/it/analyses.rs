//! Analyses and tokens in a real PostgreSQL and in SQLite files.

use celeriac::database::analyses::Same;
use celeriac::database::{
    Begun, Completed, Contributor, Database, DatabaseUrl, Ended, Keys, Run, State,
};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

use crate::support::python::Python;
use crate::support::{services, unique};

fn open(url: &str) -> Database {
    Database::new(DatabaseUrl::parse(url).unwrap())
}

fn now() -> DateTime<Utc> {
    use chrono::SubsecRound;
    Utc::now().trunc_subsecs(6)
}

fn run(task_id: &str) -> Run {
    Run {
        task_id: task_id.to_owned(),
        user_id: Some("7".to_owned()),
        repo_url: "https://git.example/o'brien/\"r\"-한글;--.git".to_owned(),
        branch: None,
        shallow: false,
        worker: Some("w@h".to_owned()),
        started_at: now(),
    }
}

fn contributor(email: &str, lines: i64) -> Contributor {
    Contributor {
        email: email.to_owned(),
        lines,
    }
}

fn completed() -> Completed {
    Completed {
        head_commit: Some("a".repeat(40)),
        finished_at: now(),
        total_lines: 21,
        total_files: 3,
        skipped_files: 1,
        contributors: vec![
            contributor("zoë@example.com", 9),
            contributor("ann@example.com", 7),
            contributor(&"long".repeat(4000), 3),
            contributor("nul\0@example.com", 1),
            contributor("'); DROP TABLE analyses; --", 1),
        ],
        result: json!({
            "status": "success",
            "result": {"zoë@example.com": 9, "ann@example.com": 7, "nul\0@example.com": 1},
        }),
    }
}

/// A database of either kind, empty and migrated.
struct Place {
    database: Database,
    _postgres: Option<services::Postgres>,
    _directory: Option<tempfile::TempDir>,
}

async fn places() -> Vec<Place> {
    let postgres = tokio::task::spawn_blocking(services::postgres)
        .await
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = format!("sqlite:///{}/new/analyses.db", directory.path().display());
    let places = vec![
        Place {
            database: open(&postgres.url),
            _postgres: Some(postgres),
            _directory: None,
        },
        Place {
            database: open(&file),
            _postgres: None,
            _directory: Some(directory),
        },
    ];
    for place in &places {
        assert_eq!(place.database.migrate().await.unwrap().len(), 4);
        assert!(place.database.migrate().await.unwrap().is_empty());
        place.database.ping().await.unwrap();
    }
    places
}

/// PostgreSQL's clean-up blocks, so it must not happen on a thread of the runtime.
async fn leave(places: Vec<Place>) {
    tokio::task::spawn_blocking(move || drop(places))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_analysis_is_begun_retried_and_succeeds_once() {
    let places = places().await;
    for Place { database, .. } in &places {
        let run = run("t-1");
        assert_eq!(
            database.begin(&run).await.unwrap(),
            Begun::Running { attempt: 1 }
        );
        let ended = Ended {
            state: State::Retry,
            error: "no\0route".into(),
            finished_at: now(),
        };
        assert!(database.fail(&run, &ended).await.unwrap());
        let row = database.find("t-1").await.unwrap().unwrap();
        assert_eq!(
            (row.state.as_str(), row.error.as_deref()),
            ("RETRY", Some("no\u{FFFD}route"))
        );
        assert_eq!(
            database.begin(&run).await.unwrap(),
            Begun::Running { attempt: 2 }
        );
        let row = database.find("t-1").await.unwrap().unwrap();
        assert_eq!(
            (row.state.as_str(), row.error, row.finished_at),
            ("RUNNING", None, None)
        );

        let completed = completed();
        for _ in 0..2 {
            database.succeed(&run, &completed).await.unwrap();
        }
        let row = database.find("t-1").await.unwrap().unwrap();
        assert_eq!(row.state, "SUCCESS");
        assert_eq!(row.repo_url, run.repo_url);
        assert_eq!(row.started_at, run.started_at);
        assert_eq!(row.finished_at, Some(completed.finished_at));
        assert_eq!(
            (row.total_contributors, row.total_lines),
            (Some(5), Some(21))
        );
        assert_eq!(
            (row.total_files, row.skipped_files, row.attempts),
            (Some(3), Some(1), 2)
        );
        assert_eq!(
            row.result.as_ref().unwrap().to_string(),
            "{\"status\":\"success\",\"result\":{\"zoë@example.com\":9,\"ann@example.com\":7,\
             \"nul\u{FFFD}@example.com\":1}}"
        );
        let mut expected = completed.contributors.clone();
        expected[3].email = "nul\u{FFFD}@example.com".into();
        assert_eq!(database.contributors(row.id).await.unwrap(), expected);

        let ended = Ended {
            state: State::Failure,
            error: "late".into(),
            finished_at: now(),
        };
        assert!(!database.fail(&run, &ended).await.unwrap());
        let again = database.begin(&run).await.unwrap();
        assert_eq!(again, Begun::AlreadySucceeded(Box::new(row)));
    }
    leave(places).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_success_needs_no_beginning_and_is_final() {
    let places = places().await;
    for Place { database, .. } in &places {
        let mut run = run("t-2");
        run.repo_url = "https://x:geheim@git.example/o/r".into();
        let many = (0..12_345).map(|n| contributor(&format!("{n}@example.com"), 20_000 - n));
        let more = Completed {
            contributors: many.collect(),
            ..completed()
        };
        database.succeed(&run, &more).await.unwrap();
        let row = database.find("t-2").await.unwrap().unwrap();
        assert_eq!(row.repo_url, "https://git.example/o/r");
        let nobody = Completed {
            contributors: Vec::new(),
            head_commit: None,
            ..completed()
        };
        database.succeed(&run, &nobody).await.unwrap();
        assert_eq!(
            database.contributors(row.id).await.unwrap(),
            more.contributors
        );
        let after = database.find("t-2").await.unwrap().unwrap();
        assert_eq!(after.head_commit, row.head_commit);
        assert_eq!(database.recent(10).await.unwrap().len(), 1);
    }
    leave(places).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_is_given_to_another_request_begins_anew() {
    let places = places().await;
    for Place { database, .. } in &places {
        let first = run("t-9");
        database.succeed(&first, &completed()).await.unwrap();
        let of_user = |user: Option<&str>, url: &str| Run {
            user_id: user.map(str::to_owned),
            repo_url: url.to_owned(),
            ..run("t-9")
        };
        let same = of_user(Some("7"), &first.repo_url);
        let begun = database.begin(&same).await.unwrap();
        assert!(matches!(begun, Begun::AlreadySucceeded(_)), "{begun:?}");
        let others = [
            of_user(Some("7"), "https://git.example/o/other"),
            of_user(Some("8"), "https://git.example/o/other"),
            of_user(None, "https://git.example/o/other"),
            of_user(Some("7"), "https://git.example/o/other"),
        ];
        for other in &others {
            let begun = database.begin(other).await.unwrap();
            assert_eq!(begun, Begun::Running { attempt: 1 });
            let row = database.find("t-9").await.unwrap().unwrap();
            assert_eq!(
                (&row.repo_url, &row.user_id),
                (&other.repo_url, &other.user_id)
            );
            assert_eq!((row.result, row.head_commit), (None, None));
            assert!(database.contributors(row.id).await.unwrap().is_empty());
            database.succeed(other, &completed()).await.unwrap();
        }
        // Without a beginning, as after one that the database missed.
        let ended = Ended {
            state: State::Failure,
            error: "gone".to_owned(),
            finished_at: now(),
        };
        assert!(database.fail(&first, &ended).await.unwrap());
        let row = database.find("t-9").await.unwrap().unwrap();
        assert_eq!(
            (row.repo_url, row.state.as_str()),
            (first.repo_url, "FAILURE")
        );
    }
    leave(places).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_analysis_of_the_same_commit_and_options_is_found() {
    let places = places().await;
    for Place { database, .. } in &places {
        let (first, completed) = (run("t-3"), completed());
        database.succeed(&first, &completed).await.unwrap();
        let of_branch = Run {
            branch: Some("dev".into()),
            ..run("t-4")
        };
        database.succeed(&of_branch, &completed).await.unwrap();
        let commit = "a".repeat(40);
        let same = Same {
            repo_url: &first.repo_url,
            head_commit: &commit,
            branch: None,
            shallow: false,
            since: completed.finished_at,
        };
        let task = |row: Option<celeriac::database::Analysis>| row.map(|row| row.task_id);
        assert_eq!(
            task(database.latest_for(&same).await.unwrap()).as_deref(),
            Some("t-3")
        );
        let branch = Same {
            branch: Some("dev"),
            ..same.clone()
        };
        assert_eq!(
            task(database.latest_for(&branch).await.unwrap()).as_deref(),
            Some("t-4")
        );
        for other in [
            Same {
                branch: Some("main"),
                ..same.clone()
            },
            Same {
                shallow: true,
                ..same.clone()
            },
            Same {
                head_commit: "b",
                ..same.clone()
            },
            Same {
                repo_url: "https://git.example/other",
                ..same.clone()
            },
            Same {
                since: completed.finished_at + chrono::Duration::seconds(1),
                ..same.clone()
            },
        ] {
            assert_eq!(
                database.latest_for(&other).await.unwrap(),
                None,
                "{other:?}"
            );
        }
    }
    leave(places).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_start_together_migrate_once_and_count_one_task_once() {
    let postgres = tokio::task::spawn_blocking(services::postgres)
        .await
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = format!("sqlite:///{}/a.db", directory.path().display());
    for url in [&postgres.url, &file] {
        let workers: Vec<Database> = (0..6).map(|_| open(url)).collect();
        let migrations = workers.iter().map(|worker| worker.migrate());
        for outcome in futures::future::join_all(migrations).await {
            outcome.unwrap();
        }
        let (run, completed) = (run("t-5"), completed());
        let successes = workers
            .iter()
            .map(|worker| worker.succeed(&run, &completed));
        for outcome in futures::future::join_all(successes).await {
            outcome.unwrap();
        }
        let row = workers[0].find("t-5").await.unwrap().unwrap();
        assert_eq!(workers[1].contributors(row.id).await.unwrap().len(), 5);
    }
    tokio::task::spawn_blocking(move || drop(postgres))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_the_server_ended_is_replaced() {
    let postgres = tokio::task::spawn_blocking(services::postgres)
        .await
        .unwrap();
    let database = open(&postgres.url);
    database.migrate().await.unwrap();
    database.begin(&run("t-6")).await.unwrap();
    let postgres = tokio::task::spawn_blocking(move || {
        let ended = postgres.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity \
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
        );
        assert!(!ended.is_empty());
        postgres
    })
    .await
    .unwrap();
    // The notice may still be on its way; such an error says that trying again helps.
    if let Err(error) = database.succeed(&run("t-6"), &completed()).await {
        assert!(error.is_transient(), "{error}");
        database.succeed(&run("t-6"), &completed()).await.unwrap();
    }
    let postgres = tokio::task::spawn_blocking(move || {
        assert!(!postgres.rows_with("ann@example.com").is_empty());
        assert!(
            !postgres
                .rows_with("https://git.example/o'brien/")
                .is_empty()
        );
        postgres
    })
    .await
    .unwrap();
    tokio::task::spawn_blocking(move || drop(postgres))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_told_from_one_that_refuses() {
    let postgres = tokio::task::spawn_blocking(services::postgres)
        .await
        .unwrap();
    let unused = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let away = open(&format!("postgresql://u:geheim@{unused}/d"));
    let error = away.ping().await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(!error.to_string().contains("geheim"), "{error}");

    let mut url = url::Url::parse(&postgres.url).unwrap();
    url.set_password(Some("falsch")).unwrap();
    let error = open(url.as_str()).ping().await.unwrap_err();
    assert!(!error.is_transient(), "{error}");
    assert!(error.to_string().contains("password"), "{error}");
    assert!(!error.to_string().contains("falsch"), "{error}");

    let missing = open(&postgres.url).begin(&run("t-7")).await.unwrap_err();
    assert!(!missing.is_transient(), "{missing}");
    tokio::task::spawn_blocking(move || drop(postgres))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_kept_encrypted_and_rotated() {
    const OLD: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";
    const NEW: &str = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=";
    let keys = |text: &str| Keys::parse(&SecretString::from(text)).unwrap();
    let places = places().await;
    for Place { database, .. } in &places {
        let user = unique("user");
        let token = SecretString::from("ghp_geheim");
        database
            .put_token(&keys(OLD), &user, "GitHub.com", &token)
            .await
            .unwrap();
        let both = keys(&format!("{NEW},{OLD}"));
        let found = database
            .get_token(&both, &user, "github.com")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found.expose_secret(), "ghp_geheim");
        assert_eq!(database.rotate_tokens(&both).await.unwrap(), 1);
        assert!(
            database
                .get_token(&keys(OLD), &user, "github.com")
                .await
                .is_err()
        );
        assert!(
            database
                .get_token(&keys(NEW), &user, "github.com")
                .await
                .unwrap()
                .is_some()
        );
        let listed = database.list_tokens().await.unwrap();
        assert_eq!(
            (listed[0].user_id.as_str(), listed[0].host.as_str()),
            (&*user, "github.com")
        );
        assert!(database.delete_token(&user, "github.com").await.unwrap());
        assert!(!database.delete_token(&user, "github.com").await.unwrap());
        assert!(
            database
                .get_token(&keys(NEW), &user, "github.com")
                .await
                .unwrap()
                .is_none()
        );
    }
    leave(places).await;
}

#[test]
fn tokens_travel_both_ways_between_python_and_here() {
    const KEY: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";
    let keys = Keys::parse(&SecretString::from(KEY)).unwrap();
    let ours = keys.encrypt(&SecretString::from("ghp_geheim")).unwrap();
    let python = Python::new("memory://", "disabled://", "none");
    let script = "
from cryptography.fernet import Fernet
fernet = Fernet(sys.argv[1].encode())
assert fernet.decrypt(sys.argv[2].encode()) == b'ghp_geheim'
answer(fernet.encrypt('ghp_ö'.encode()).decode())
";
    let theirs = python.run(script, &[KEY, &ours]);
    let opened = keys
        .decrypt_if_fernet(theirs.as_str().unwrap().to_owned(), Some(600))
        .unwrap();
    assert_eq!(opened.expose_secret(), "ghp_ö");
}
