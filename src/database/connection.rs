//! Connections, and the small pool that lends them.
//!
//! A [`Database`] connects when it is first used and never in its constructor, so a worker
//! starts while the database is still coming up. Every operation has a deadline. A connection
//! on which anything failed is thrown away: a transaction left open rolls back with it, and
//! the next operation gets a fresh one.
//!
//! PostgreSQL and SQLite are spoken to by the same diesel statements; the macro [`on!`]
//! compiles a statement for both.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diesel::result::Error as Diesel;
use diesel::{Connection as _, QueryResult, SqliteConnection};
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::Error;
use super::tls;
use super::url::{DatabaseUrl, Place, Server};

/// How long one operation, with all its statements, may take.
const OPERATION_DEADLINE: Duration = Duration::from_secs(60);
/// How long connecting may take, all hosts together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);
/// A connection idle for longer is asked whether it still lives before it is used.
const TRUSTED_IDLE: Duration = Duration::from_secs(5);
/// Connections to a server. Analyses take seconds, their rows milliseconds.
const POOL_SIZE: usize = 4;

/// A handle on the database; clones share the connections.
#[derive(Clone)]
pub struct Database {
    inner: Arc<Inner>,
}

struct Inner {
    url: DatabaseUrl,
    idle: Mutex<Vec<(Instant, Connection)>>,
    permits: Semaphore,
}

pub(crate) type Sqlite = SyncConnectionWrapper<SqliteConnection>;

/// One connection to either database.
pub(crate) enum Connection {
    Postgres(Box<Postgres>),
    Sqlite(Sqlite),
}

/// A connection to a server, and whether the server has gone.
pub(crate) struct Postgres {
    pub(crate) link: AsyncPgConnection,
    closed: Arc<AtomicBool>,
}

/// A connection for one operation; it goes back to the pool by [`Lease::run`] alone.
pub(crate) struct Lease<'a> {
    database: &'a Database,
    operation: &'static str,
    connection: Option<Connection>,
    _permit: SemaphorePermit<'a>,
}

/// Compiles one body for the connection of either database.
macro_rules! on {
    ($connection:expr, $link:ident => $body:expr) => {
        match $connection {
            $crate::database::connection::Connection::Postgres(postgres) => {
                let $link = &mut postgres.link;
                $body
            }
            $crate::database::connection::Connection::Sqlite($link) => $body,
        }
    };
}
pub(crate) use on;

impl Database {
    /// A database that will be connected to when first needed.
    pub fn new(url: DatabaseUrl) -> Self {
        // SQLite has one writer anyway, and one connection never waits for itself.
        let size = match url.place {
            Place::Postgres(_) => POOL_SIZE,
            Place::Sqlite(_) => 1,
        };
        let idle = Mutex::new(Vec::with_capacity(size));
        Self {
            inner: Arc::new(Inner {
                url,
                idle,
                permits: Semaphore::new(size),
            }),
        }
    }

    /// The URL; it shows no password.
    pub fn url(&self) -> &DatabaseUrl {
        &self.inner.url
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), Error> {
        let lease = self.lease("ask the database").await?;
        lease
            .run(async |connection| on!(connection, link => link.batch_execute("SELECT 1").await))
            .await
    }

    /// A connection for `operation`, waiting for a free one.
    pub(crate) async fn lease(&self, operation: &'static str) -> Result<Lease<'_>, Error> {
        let permit = timeout(OPERATION_DEADLINE, self.inner.permits.acquire())
            .await
            .map_err(|_| self.unavailable(operation, "all connections are busy".to_owned()))?
            .expect("because the semaphore is never closed");
        let mut connection = None;
        while let Some((since, mut idle)) = self.take_idle() {
            if since.elapsed() < TRUSTED_IDLE && idle.is_open() || idle.answers().await {
                connection = Some(idle);
                break;
            }
        }
        let connection = match connection {
            Some(connection) => connection,
            None => self.connect(operation).await?,
        };
        Ok(Lease {
            database: self,
            operation,
            connection: Some(connection),
            _permit: permit,
        })
    }

    fn take_idle(&self) -> Option<(Instant, Connection)> {
        self.inner
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    /// A connection outside the pool.
    pub(crate) async fn connect(&self, operation: &'static str) -> Result<Connection, Error> {
        let connecting = async {
            match &self.inner.url.place {
                Place::Postgres(server) => open_postgres(server)
                    .await
                    .map(|postgres| Connection::Postgres(Box::new(postgres))),
                Place::Sqlite(path) => {
                    let path = path.clone();
                    tokio::task::spawn_blocking(move || open_sqlite(&path))
                        .await
                        .map_err(|error| Fault::Passing(error.to_string()))?
                        .map(|link| Connection::Sqlite(Sqlite::new(link)))
                }
            }
        };
        match timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(Fault::Passing(reason))) => Err(self.unavailable(operation, reason)),
            Ok(Err(Fault::Lasting(reason))) => Err(Error::Refused {
                operation,
                database: self.inner.url.to_string(),
                reason,
            }),
            Err(_) => {
                let reason = format!("no answer within {} s", CONNECT_DEADLINE.as_secs());
                Err(self.unavailable(operation, reason))
            }
        }
    }

    pub(crate) fn unavailable(&self, operation: &'static str, reason: String) -> Error {
        Error::Unavailable {
            operation,
            database: self.inner.url.to_string(),
            reason,
        }
    }

    pub(crate) fn failed(&self, operation: &'static str, error: &Diesel) -> Error {
        Error::from_diesel(operation, self.inner.url.to_string(), error)
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Database({})", self.inner.url)
    }
}

impl Lease<'_> {
    /// Runs the statements of the operation and gives the connection back when they succeed.
    pub(crate) async fn run<T, F>(mut self, statements: F) -> Result<T, Error>
    where
        F: AsyncFnOnce(&mut Connection) -> QueryResult<T>,
    {
        let mut connection = self
            .connection
            .take()
            .expect("because a lease holds a connection until it is run");
        let outcome = timeout(OPERATION_DEADLINE, statements(&mut connection)).await;
        let (database, operation) = (self.database, self.operation);
        match outcome {
            Ok(Ok(value)) => {
                let mut idle = database
                    .inner
                    .idle
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                idle.push((Instant::now(), connection));
                Ok(value)
            }
            Ok(Err(error)) => Err(database.failed(operation, &error)),
            Err(_) => {
                let reason = format!("no answer within {} s", OPERATION_DEADLINE.as_secs());
                Err(database.unavailable(operation, reason))
            }
        }
    }
}

impl Connection {
    /// Opens a transaction; dropping the connection rolls it back.
    pub(crate) async fn begin(&mut self) -> QueryResult<()> {
        match self {
            Self::Postgres(postgres) => postgres.link.batch_execute("BEGIN").await,
            // Immediate, because a reader that becomes a writer can be refused.
            Self::Sqlite(link) => link.batch_execute("BEGIN IMMEDIATE").await,
        }
    }

    /// Makes the transaction's effects last.
    pub(crate) async fn commit(&mut self) -> QueryResult<()> {
        on!(self, link => link.batch_execute("COMMIT").await)
    }

    fn is_open(&self) -> bool {
        match self {
            Self::Postgres(postgres) => !postgres.closed.load(Ordering::Relaxed),
            Self::Sqlite(_) => true,
        }
    }

    async fn answers(&mut self) -> bool {
        let asking = async { on!(self, link => link.batch_execute("SELECT 1").await) };
        self_is_fine(timeout(Duration::from_secs(5), asking).await)
    }
}

fn self_is_fine(outcome: Result<QueryResult<()>, tokio::time::error::Elapsed>) -> bool {
    matches!(outcome, Ok(Ok(())))
}

/// Why a connection could not be opened.
enum Fault {
    /// Trying again may help.
    Passing(String),
    /// It will not: password, name, certificate.
    Lasting(String),
}

async fn open_postgres(server: &Server) -> Result<Postgres, Fault> {
    let config = tls::client_config(&server.tls).map_err(Fault::Lasting)?;
    let (client, connection) = server
        .config
        .connect(MakeRustlsConnect::new(config))
        .await
        .map_err(postgres_fault)?;
    let closed = Arc::new(AtomicBool::new(false));
    let closing = Arc::clone(&closed);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            log::debug!("the connection to the database ended: {error}");
        }
        closing.store(true, Ordering::Relaxed);
    });
    let link = AsyncPgConnection::try_from(client)
        .await
        .map_err(|error| Fault::Passing(error.to_string()))?;
    Ok(Postgres { link, closed })
}

fn postgres_fault(error: tokio_postgres::Error) -> Fault {
    use tokio_postgres::error::SqlState;
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        let text = cause.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        source = cause.source();
    }
    let lasting = error.code().is_some_and(|code| {
        [
            &SqlState::INVALID_PASSWORD,
            &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            &SqlState::UNDEFINED_DATABASE,
            &SqlState::INVALID_CATALOG_NAME,
            &SqlState::INSUFFICIENT_PRIVILEGE,
        ]
        .contains(&code)
    });
    if lasting || reason.contains("certificate") {
        Fault::Lasting(reason)
    } else {
        Fault::Passing(reason)
    }
}

/// Opens the file, making it and its directory when they are missing.
pub(crate) fn open_sqlite_file(path: &std::path::Path) -> Result<SqliteConnection, String> {
    if let Some(directory) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        std::fs::create_dir_all(directory)
            .map_err(|error| format!("create {}: {error}", directory.display()))?;
    }
    let Some(name) = path.to_str() else {
        return Err(format!("{} is not UTF-8", path.display()));
    };
    // A bare name could be taken for a URI or for a database in memory.
    let name = if path.is_absolute() {
        name.to_owned()
    } else {
        format!("./{name}")
    };
    let mut link = SqliteConnection::establish(&name)
        .map_err(|error| format!("open {}: {error}", path.display()))?;
    use diesel::connection::SimpleConnection;
    link.batch_execute(
        "PRAGMA busy_timeout = 20000; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; \
         PRAGMA foreign_keys = ON;",
    )
    .map_err(|error| format!("open {}: {error}", path.display()))?;
    Ok(link)
}

fn open_sqlite(path: &std::path::Path) -> Result<SqliteConnection, Fault> {
    open_sqlite_file(path).map_err(|reason| {
        if reason.contains("locked") {
            Fault::Passing(reason)
        } else {
            Fault::Lasting(reason)
        }
    })
}
