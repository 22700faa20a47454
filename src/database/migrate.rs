//! The embedded migrations, brought to the database at start or by `celeriac migrate`.
//!
//! Several workers start at once. On PostgreSQL an advisory lock lets one of them migrate
//! while the others wait and then find nothing to do; on SQLite a loser of the race looks
//! again. Answers for the directories `migrations/postgres` and `migrations/sqlite`.

use diesel::connection::SimpleConnection;
use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::connection::{Connection, Database, open_sqlite_file};
use super::error::Error;
use super::url::Place;

const POSTGRES: EmbeddedMigrations = embed_migrations!("migrations/postgres");
const SQLITE: EmbeddedMigrations = embed_migrations!("migrations/sqlite");

const OPERATION: &str = "migrate";

/// Any number will do as long as it is always the same: the letters "celeriac".
const LOCK: i64 = 0x6365_6c65_7269_6163;

impl Database {
    /// Brings the schema up to date and says which migrations were run.
    pub async fn migrate(&self) -> Result<Vec<String>, Error> {
        let outcome = match &self.url().place {
            Place::Postgres(_) => {
                let connection = self.connect(OPERATION).await?;
                let Connection::Postgres(postgres) = connection else {
                    unreachable!("because the URL names a server");
                };
                let link = AsyncConnectionWrapper::from(postgres.link);
                tokio::task::spawn_blocking(move || migrate_postgres(link)).await
            }
            Place::Sqlite(path) => {
                let path = path.clone();
                tokio::task::spawn_blocking(move || migrate_sqlite(&path)).await
            }
        };
        match outcome {
            Ok(Ok(names)) => Ok(names),
            Ok(Err(Failure::Diesel(error))) => Err(self.failed(OPERATION, &error)),
            Ok(Err(Failure::Other(reason))) => Err(Error::Refused {
                operation: OPERATION,
                database: self.url().to_string(),
                reason,
            }),
            Err(panicked) => Err(self.unavailable(OPERATION, panicked.to_string())),
        }
    }
}

enum Failure {
    Diesel(diesel::result::Error),
    Other(String),
}

impl From<diesel::result::Error> for Failure {
    fn from(error: diesel::result::Error) -> Self {
        Self::Diesel(error)
    }
}

fn migrate_postgres(
    mut link: AsyncConnectionWrapper<diesel_async::AsyncPgConnection>,
) -> Result<Vec<String>, Failure> {
    // The lock is the session's: it ends with the connection, however this function ends.
    link.batch_execute(&format!(
        "SET lock_timeout = '60s'; SELECT pg_advisory_lock({LOCK}); SET lock_timeout = 0;"
    ))?;
    run(&mut link, POSTGRES)
}

fn migrate_sqlite(path: &std::path::Path) -> Result<Vec<String>, Failure> {
    let mut link = open_sqlite_file(path).map_err(Failure::Other)?;
    let mut tries = 0;
    loop {
        match run(&mut link, SQLITE) {
            Ok(names) => return Ok(names),
            Err(failure) if tries == 5 => return Err(failure),
            Err(_) => tries += 1,
        }
    }
}

fn run<DB, C>(link: &mut C, migrations: EmbeddedMigrations) -> Result<Vec<String>, Failure>
where
    DB: diesel::backend::Backend,
    C: MigrationHarness<DB>,
{
    link.run_pending_migrations(migrations)
        .map(|versions| versions.iter().map(ToString::to_string).collect())
        .map_err(|error| match error.downcast::<diesel::result::Error>() {
            Ok(error) => Failure::Diesel(*error),
            Err(other) => Failure::Other(other.to_string()),
        })
}
