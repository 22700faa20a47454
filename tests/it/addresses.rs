//! Every kind of address that leads to a Redis, as broker and as result backend at once.
//!
//! The messages are put into the server by its plain address, so that only the worker has to
//! find the way that is tried.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::support::{Raw, RedisServer, Worker, fixed_port, project, wait_for};

/// A task is taken from the server and its result comes back to it.
#[track_caller]
fn works(server: &RedisServer, worker: &Worker) {
    let mut raw = Raw::new(&server.url, &worker.queue);
    let id = raw.send("test_task", json!(["hello"]));
    assert_eq!(raw.value(&id), json!("celeriac received: hello"));
    raw.wait_drained();
}

/// Starts a worker that uses one address for both.
#[track_caller]
fn start(address: &str) -> Worker {
    Worker::on(address).start()
}

fn certificate(name: &str) -> String {
    format!("{}/tests/fixtures/tls/{name}", project().display())
}

#[test]
fn over_tls_both_sides_show_their_certificates() {
    let port = fixed_port();
    let (authority, own, key) = (
        certificate("loopback-ca.pem"),
        certificate("loopback.pem"),
        certificate("loopback.key.pem"),
    );
    let server = RedisServer::with(&[
        "--tls-port",
        &port.to_string(),
        "--tls-ca-cert-file",
        &authority,
        "--tls-cert-file",
        &own,
        "--tls-key-file",
        &key,
        "--tls-auth-clients",
        "yes",
    ]);
    let trusting = format!(
        "rediss://127.0.0.1:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={authority}\
         &ssl_certfile={own}&ssl_keyfile={key}"
    );
    works(&server, &start(&trusting));

    // Without the authority the certificate means nothing: no word is said to such a server.
    let wary = format!(
        "rediss://127.0.0.1:{port}/0?ssl_cert_reqs=required&ssl_certfile={own}&ssl_keyfile={key}"
    );
    let worker = Worker::on(&wary).backend(&trusting).start_without_waiting();
    worker.wait_log("cannot be reached: invalid peer certificate: UnknownIssuer");
}

#[test]
fn over_a_socket_of_the_file_system() {
    let server = RedisServer::with(&["--unixsocket", "redis.sock"]);
    let path = server.directory().join("redis.sock");
    let address = format!("redis+socket://{}?virtual_host=0", path.display());
    works(&server, &start(&address));
}

#[test]
fn the_first_of_several_that_answers_is_used() {
    let server = RedisServer::start();
    let nobody = format!("redis://127.0.0.1:{}/0", fixed_port());
    let worker = Worker::on(&format!("{nobody};{}", server.url))
        .backend(&server.url)
        .start();
    works(&server, &worker);
}

/// A sentinel that watches one server.
struct Sentinel {
    port: u16,
    process: Child,
    // Removed last.
    _directory: tempfile::TempDir,
}

impl Sentinel {
    /// Watches the server under the name `tasks`; alone, it decides alone.
    fn start(master: &RedisServer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = fixed_port();
        let settings = format!(
            "bind 127.0.0.1\nport {port}\ndir {}\n\
             sentinel monitor tasks 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds tasks 1000\n\
             sentinel failover-timeout tasks 5000\n",
            directory.path().display(),
            master.port()
        );
        let file = directory.path().join("sentinel.conf");
        std::fs::write(&file, settings).unwrap();
        let process = redis_sentinel(&file);
        Self {
            port,
            process,
            _directory: directory,
        }
    }

    /// The port of the server it names.
    fn master(&self) -> Option<u16> {
        let url = format!("redis://127.0.0.1:{}", self.port);
        let mut connection = redis::Client::open(url).ok()?.get_connection().ok()?;
        let (_, port): (String, String) = redis::cmd("SENTINEL")
            .arg(&["get-master-addr-by-name", "tasks"])
            .query(&mut connection)
            .ok()?;
        port.parse().ok()
    }

    /// How many replicas it has found.
    fn replicas(&self) -> usize {
        let url = format!("redis://127.0.0.1:{}", self.port);
        let found = || {
            let mut connection = redis::Client::open(url).ok()?.get_connection().ok()?;
            let found: Vec<redis::Value> = redis::cmd("SENTINEL")
                .arg(&["replicas", "tasks"])
                .query(&mut connection)
                .ok()?;
            Some(found.len())
        };
        found().unwrap_or(0)
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn redis_sentinel(settings: &Path) -> Child {
    Command::new("redis-server")
        .arg(settings)
        .arg("--sentinel")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is installed: apt-get install redis-server")
}

#[test]
fn a_sentinel_is_asked_again_when_another_server_has_taken_over() {
    let patience = Duration::from_secs(40);
    let mut master = RedisServer::start();
    let replica = RedisServer::with(&[
        "--save",
        "",
        "--replicaof",
        "127.0.0.1",
        &master.port().to_string(),
    ]);
    let sentinel = Sentinel::start(&master);
    wait_for("a sentinel that knows both", patience, || {
        (sentinel.replicas() == 1).then_some(())
    });
    let address = format!("sentinel://127.0.0.1:{}/0", sentinel.port);
    let options = r#"{"master_name": "tasks"}"#;
    let worker = Worker::on(&address)
        .env("CELERY_BROKER_TRANSPORT_OPTIONS", options)
        .env("CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS", options)
        .start();
    works(&master, &worker);

    master.kill();
    wait_for("another master", patience, || {
        (sentinel.master()? == replica.port()).then_some(())
    });
    wait_for("a replica that is a master", patience, || {
        let role: Vec<redis::Value> = redis::cmd("ROLE").query(&mut replica.connect()).ok()?;
        (role.first() == Some(&redis::Value::BulkString(b"master".to_vec()))).then_some(())
    });
    works(&replica, &worker);
}

/// A server that closes without having read says why, but that is lost with the connection.
#[test]
fn a_server_that_lets_nobody_in_is_told_with_the_likely_reasons() {
    let server = RedisServer::with(&["--maxclients", "1"]);
    let client = redis::Client::open(server.url.as_str()).unwrap();
    let only = wait_for("the only place", Duration::from_secs(20), || {
        let mut only = client.get_connection().ok()?;
        let asked = redis::cmd("PING").query::<String>(&mut only);
        asked.is_ok().then_some(only)
    });
    let worker = Worker::on(&server.url).start_without_waiting();
    worker.wait_log("closed the connection: ");
    worker.wait_log("in protected mode does that");
    drop(only);
}
