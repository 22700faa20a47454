//! The other tests believe their support; these make it prove itself.

use std::time::Duration;

use crate::support::python::Python;
use crate::support::{
    GitServer, Proxy, RedisServer, Repository, repository, services, unique, wait_for,
};

#[test]
fn two_tests_get_two_redis_databases() {
    let (one, other) = (services::redis(), services::redis());
    assert_ne!(one.url, other.url);
    let key = unique("key");
    let _: () = redis::cmd("SET")
        .arg(&key)
        .arg(1)
        .query(&mut one.connect())
        .unwrap();
    assert!(one.keys().contains(&key));
    assert!(!other.keys().contains(&key));
}

#[test]
fn a_postgres_database_is_dropped_with_its_test() {
    let kept = services::postgres();
    let name = {
        let dropped = services::postgres();
        assert_eq!(
            dropped.rows("SELECT current_database()")[0][0].as_deref(),
            dropped.url.rsplit('/').next()
        );
        dropped.rows("CREATE TABLE word (text text); INSERT INTO word VALUES ('celery')");
        assert_eq!(dropped.rows_with("celer"), ["public.word: (celery)"]);
        dropped.url.rsplit('/').next().unwrap().to_owned()
    };
    let query = format!("SELECT 1 FROM pg_database WHERE datname = '{name}'");
    assert!(kept.rows(&query).is_empty());
}

#[test]
fn the_python_client_sends_a_task_to_the_queue_of_the_test() {
    let redis = services::redis();
    let queue = unique("q");
    let sent = Python::new(&redis.url, &redis.url, &queue).run(
        "from features.v1.github_analysis.worker_tasks import enqueue_analysis_task, get_task_status\n\
         sent = enqueue_analysis_task(int(sys.argv[1]), 'https://github.com/o/r', None)\n\
         answer([sent, get_task_status(sent['task_id'])])",
        &["7"],
    );
    assert_eq!(sent[0]["status"], "PENDING");
    assert_eq!(sent[1]["status"], "PENDING");
    assert_eq!(sent[1]["task_id"], sent[0]["task_id"]);
    let waiting: u64 = redis::cmd("LLEN")
        .arg(&queue)
        .query(&mut redis.connect())
        .unwrap();
    assert_eq!(waiting, 1);
}

#[test]
fn blame_totals_count_every_line_once() {
    let mut repository = Repository::new();
    repository
        .commit(
            "Ada <ada@example.com>",
            &[("a.txt", "one\ntwo\n"), ("b/c.txt", "three\n")],
        )
        .commit("Bob <bob@example.com>", &[("a.txt", "one\n2\nend")]);
    let totals = repository.blame_totals();
    assert_eq!(totals["ada@example.com"], 2);
    assert_eq!(totals["bob@example.com"], 2);
}

#[test]
fn the_git_server_holds_a_clone_until_its_gate_opens() {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let (url, gate) = server.gated(&repository);
    let directory = tempfile::tempdir().unwrap();
    let mut clone = repository::command(directory.path())
        .args(["clone", "-q", "--bare", &url, "clone"])
        .spawn()
        .unwrap();
    gate.wait_arrivals(1);
    assert!(clone.try_wait().unwrap().is_none());
    gate.open();
    let status = wait_for("the clone", Duration::from_secs(30), || {
        clone.try_wait().unwrap()
    });
    assert!(status.success());
    assert!(directory.path().join("clone/HEAD").exists());
}

#[test]
fn the_git_server_wants_its_token_and_cuts_where_it_is_told() {
    let mut repository = Repository::new();
    repository.commit("Ada <ada@example.com>", &[("a.txt", "one\n")]);
    let server = GitServer::start();
    let clone = |url: &str| {
        let directory = tempfile::tempdir().unwrap();
        repository::command(directory.path())
            .args(["clone", "-q", "--bare", url, "clone"])
            .output()
            .unwrap()
            .status
            .success()
    };
    let url = server.with_token(&repository, "secret");
    assert!(!clone(&url));
    assert!(clone(&url.replace("http://", "http://user:secret@")));
    assert!(!clone(&url.replace("http://", "http://user:wrong@")));
    assert!(!clone(&server.refusing(&repository, 503)));
    assert!(!clone(&server.cutting(&repository, 20)));
    assert!(clone(&server.cutting(&repository, usize::MAX)));
    assert!(
        server
            .requests()
            .iter()
            .any(|request| request.method == "POST")
    );
}

#[test]
fn a_durable_redis_of_a_test_remembers_across_a_kill() {
    let mut server = RedisServer::durable();
    let _: () = redis::cmd("SET")
        .arg("word")
        .arg("celery")
        .query(&mut server.connect())
        .unwrap();
    server.kill();
    assert!(
        redis::Client::open(server.url.as_str())
            .unwrap()
            .get_connection()
            .is_err()
    );
    server.restart();
    let word: String = redis::cmd("GET")
        .arg("word")
        .query(&mut server.connect())
        .unwrap();
    assert_eq!(word, "celery");
}

#[test]
fn a_proxy_stalls_cuts_and_heals() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server.url);
    let client = redis::Client::open(proxy.url(&server.url)).unwrap();
    let ping = |connection: &mut redis::Connection| redis::cmd("PING").query::<String>(connection);
    let mut connection = client.get_connection().unwrap();
    assert_eq!(ping(&mut connection).unwrap(), "PONG");
    assert_eq!(proxy.accepted(), 1);

    proxy.stall();
    connection
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert!(ping(&mut connection).unwrap_err().is_timeout());
    proxy.cut();
    assert!(client.get_connection().is_err());
    proxy.heal();
    let mut connection = client.get_connection().unwrap();
    assert_eq!(ping(&mut connection).unwrap(), "PONG");

    proxy.cut_after_answer_bytes(3);
    assert!(ping(&mut connection).is_err());
    proxy.heal();
    proxy.reset();
    assert_eq!(ping(&mut client.get_connection().unwrap()).unwrap(), "PONG");
}
