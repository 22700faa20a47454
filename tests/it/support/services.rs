//! The servers of a test run, and a corner of them for each test.
//!
//! Their URLs are `TEST_REDIS_URL`, `TEST_DATABASE_URL` and `TEST_AMQP_URL` (with
//! `TEST_AMQP_API_URL`, its management interface). Where one is not
//! set (a bare `cargo test`), `scripts/services` starts private ones that all processes of
//! the run share and that end with it.

use std::process::Command;
use std::sync::Mutex;

use super::rabbit_api::RabbitApi;
use super::{project, unique};

/// One Redis database of a test's own, as far as the server has enough of them; queues still
/// need names of their own ([`unique`]), because a server from outside may have only 16.
pub struct Redis {
    /// `redis://host:port/number`.
    pub url: String,
}

/// A Redis database of the test's own.
pub fn redis() -> Redis {
    let server = url("redis", "TEST_REDIS_URL");
    let mut connection = redis::Client::open(server.as_str())
        .and_then(|client| client.get_connection())
        .unwrap_or_else(|error| panic!("no Redis at {server}: {error}; see scripts/services"));
    let (_, databases): (String, u64) = redis::cmd("CONFIG")
        .arg("GET")
        .arg("databases")
        .query(&mut connection)
        .expect("CONFIG GET databases");
    let turn: u64 = redis::cmd("INCR")
        .arg("celeriac-test:turn")
        .query(&mut connection)
        .expect("INCR");
    let mut url = url::Url::parse(&server).expect("TEST_REDIS_URL is a URL");
    // Database 0 keeps the count.
    url.set_path(&(1 + turn % (databases - 1)).to_string());
    Redis { url: url.into() }
}

impl Redis {
    /// A connection for looking behind the worker's back.
    pub fn connect(&self) -> redis::Connection {
        redis::Client::open(self.url.as_str())
            .and_then(|client| client.get_connection())
            .unwrap_or_else(|error| panic!("no Redis at {}: {error}", self.url))
    }

    /// Every key of this database, sorted.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = redis::cmd("KEYS")
            .arg("*")
            .query(&mut self.connect())
            .expect("KEYS *");
        keys.sort();
        keys
    }
}

/// One PostgreSQL database, dropped at the end of the test.
pub struct Postgres {
    /// `postgresql://user:password@host:port/name`.
    pub url: String,
    server: String,
    name: String,
}

/// An empty PostgreSQL database of the test's own.
pub fn postgres() -> Postgres {
    let server = url("postgres", "TEST_DATABASE_URL");
    let name = unique("it").replace('-', "_");
    simple_query(
        &server,
        &format!("CREATE DATABASE {name} TEMPLATE template0"),
    );
    let mut url = url::Url::parse(&server).expect("TEST_DATABASE_URL is a URL");
    url.set_path(&name);
    Postgres {
        url: url.into(),
        server,
        name,
    }
}

impl Postgres {
    /// The rows of a query, every value as text.
    pub fn rows(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        simple_query(&self.url, sql)
    }

    /// All rows of all tables that contain the text somewhere, as `table: row`.
    pub fn rows_with(&self, text: &str) -> Vec<String> {
        let tables = self.rows(
            "SELECT quote_ident(table_schema) || '.' || quote_ident(table_name)
             FROM information_schema.tables WHERE table_type = 'BASE TABLE'
             AND table_schema NOT IN ('pg_catalog', 'information_schema')",
        );
        let text = text.replace('\'', "''");
        let mut found = Vec::new();
        for table in tables.into_iter().flatten().flatten() {
            let sql =
                format!("SELECT t::text FROM {table} t WHERE position('{text}' in t::text) > 0");
            for row in self.rows(&sql).into_iter().flatten().flatten() {
                found.push(format!("{table}: {row}"));
            }
        }
        found
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        if std::thread::panicking() {
            // A second panic would hide the first.
            let server = self.server.clone();
            let _ = std::panic::catch_unwind(|| simple_query(&server, &drop));
        } else {
            simple_query(&self.server, &drop);
        }
    }
}

/// The URL of a RabbitMQ; its virtual host is shared, so queues need names of their own.
pub fn rabbitmq() -> String {
    url("rabbitmq", "TEST_AMQP_URL")
}

/// The management interface of that RabbitMQ. Of a server from outside it is expected where
/// RabbitMQ has it, 10,000 ports above the broker's.
pub fn rabbitmq_api() -> RabbitApi {
    let from_outside = std::env::var("TEST_AMQP_URL").is_ok_and(|url| !url.is_empty())
        && std::env::var_os("TEST_AMQP_API_URL").is_none();
    if !from_outside {
        return RabbitApi::at(&url("rabbitmq", "TEST_AMQP_API_URL"));
    }
    let mut url = url::Url::parse(&rabbitmq()).expect("TEST_AMQP_URL is a URL");
    let port = url.port().unwrap_or(5672) + 10_000;
    url = url::Url::parse(&url.as_str().replacen("amqp", "http", 1)).expect("a URL");
    url.set_port(Some(port)).expect("a port");
    RabbitApi::at(url.as_str())
}

fn simple_query(url: &str, sql: &str) -> Vec<Vec<Option<String>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a tokio runtime");
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
            .await
            .unwrap_or_else(|error| {
                panic!("no PostgreSQL at {url}: {error}; see scripts/services")
            });
        let connection = tokio::spawn(connection);
        let messages = client
            .simple_query(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        drop(client);
        let _ = connection.await;
        messages
            .into_iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(
                    (0..row.len())
                        .map(|column| row.get(column).map(str::to_owned))
                        .collect(),
                ),
                _ => None,
            })
            .collect()
    })
}

/// The URL from the environment, else of the private server of this run.
fn url(service: &str, variable: &str) -> String {
    if let Some(url) = std::env::var(variable).ok().filter(|url| !url.is_empty()) {
        return url;
    }
    static STARTED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
    let mut started = STARTED
        .lock()
        .expect("no test panics while it starts a service");
    if let Some((_, url)) = started.iter().find(|(name, _)| name == variable) {
        return url.clone();
    }
    // The parent is the test runner: the services end with it.
    let runner = std::os::unix::process::parent_id().to_string();
    let output = Command::new(project().join("scripts/services"))
        .args(["up", "--for", &runner, service])
        .output()
        .expect("scripts/services can be run (it needs bash)");
    let lines = String::from_utf8_lossy(&output.stdout);
    let url = lines
        .lines()
        .find_map(|line| line.strip_prefix(&format!("export {variable}=")));
    let Some(url) = url.filter(|_| output.status.success()) else {
        panic!(
            "no {service}: set {variable}, or let scripts/services start one:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    started.push((variable.to_owned(), url.to_owned()));
    url.to_owned()
}
