//! Results in Celery's tables: `db+postgresql://` and `db+sqlite://`.
//!
//! The tables are those of Celery 5.7 (`celery_taskmeta`, `celery_tasksetmeta`), made at start
//! unless they are there; values are stored serialized, as 5.7 does. A store is one statement
//! that leaves a success alone. Clients poll; nothing wakes them. Parts of chords are not
//! counted here: Celery's task `celery.chord_unlock` watches them, and a row per chord says who
//! ends it (see [`claim`]). Answers for `celery/backends/database`.

use chrono::{DateTime, NaiveDateTime, SubsecRound, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{Binary, Integer, Nullable, Text, Timestamp};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;

use super::retry::Retrier;
use super::{
    Backend, Claim, Codec, Error, Extended, Meta, Options, ReplyTo, RetryPolicy, Stored, Taken,
};
use crate::database::connection::on;
use crate::database::{Database, DatabaseUrl};
use async_trait::async_trait;

mod claim;

const STORE: &str = "store the result";
const READ: &str = "read the result";

/// Celery's columns are 155 characters wide.
const WIDTH: usize = 155;

/// The database backend.
pub struct DatabaseBackend {
    database: Database,
    codec: Codec,
    retrier: Retrier,
    expires: std::time::Duration,
    extended: bool,
    create_tables: bool,
    created: OnceCell<()>,
    names: Names,
}

/// Quoted names of tables and sequences, schema included.
struct Names {
    task: String,
    group: String,
    task_sequence: String,
    group_sequence: String,
    task_index: String,
    group_index: String,
}

impl Names {
    fn new(options: &Options) -> Self {
        let text = |map: &Map<String, Value>, key: &str| {
            map.get(key).and_then(Value::as_str).map(str::to_owned)
        };
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        let qualified = |schema: Option<String>, name: &str| match schema {
            Some(schema) => format!("{}.{}", quoted(&schema), quoted(name)),
            None => quoted(name),
        };
        let schema = |key| text(&options.table_schemas, key);
        let task = text(&options.table_names, "task").unwrap_or("celery_taskmeta".into());
        let group = text(&options.table_names, "group").unwrap_or("celery_tasksetmeta".into());
        Self {
            task_index: quoted(&format!("ix_{task}_date_done")),
            group_index: quoted(&format!("ix_{group}_date_done")),
            task_sequence: qualified(schema("task"), "task_id_sequence"),
            group_sequence: qualified(schema("group"), "taskset_id_sequence"),
            task: qualified(schema("task"), &task),
            group: qualified(schema("group"), &group),
        }
    }
}

#[derive(QueryableByName)]
struct TaskRow {
    #[diesel(sql_type = Nullable<Text>)]
    status: Option<String>,
    #[diesel(sql_type = Nullable<Binary>)]
    result: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Timestamp>)]
    date_done: Option<NaiveDateTime>,
    #[diesel(sql_type = Nullable<Text>)]
    traceback: Option<String>,
    #[diesel(sql_type = Nullable<Binary>)]
    children: Option<Vec<u8>>,
}

#[derive(QueryableByName)]
struct ExtendedRow {
    #[diesel(sql_type = Nullable<Text>)]
    name: Option<String>,
    #[diesel(sql_type = Nullable<Binary>)]
    args: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Binary>)]
    kwargs: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<Text>)]
    worker: Option<String>,
    #[diesel(sql_type = Nullable<Integer>)]
    retries: Option<i32>,
    #[diesel(sql_type = Nullable<Text>)]
    queue: Option<String>,
    #[diesel(sql_type = Nullable<Binary>)]
    stamps: Option<Vec<u8>>,
}

#[derive(QueryableByName)]
struct GroupRow {
    #[diesel(sql_type = Nullable<Binary>)]
    result: Option<Vec<u8>>,
}

impl DatabaseBackend {
    /// The backend of a `db+…` URL; connects when first used.
    pub fn new(url: &str, options: &Options) -> Result<Self, Error> {
        let url = url.strip_prefix("db+").unwrap_or(url);
        let url = DatabaseUrl::parse_named("CELERY_RESULT_BACKEND", url)
            .map_err(|error| Error::Url(error.to_string()))?;
        // Celery's database backend retries three times at first; that is too few for a server
        // that restarts.
        let policy = RetryPolicy::of(options);
        Ok(Self {
            database: Database::new(url),
            // Celery ignores the compression here: its columns are read by old clients too.
            codec: Codec::new(&options.serializer, None)?,
            retrier: Retrier::new(policy, "the database"),
            expires: options.expires,
            extended: options.extended,
            create_tables: options.create_tables,
            created: OnceCell::new(),
            names: Names::new(options),
        })
    }

    fn is_postgres(&self) -> bool {
        self.database.url().kind() == "postgresql"
    }

    /// The column and the value that give a new group its number.
    fn next_group(&self) -> (&'static str, String) {
        match self.is_postgres() {
            true => {
                let sequence = self.names.group_sequence.replace('\'', "''");
                ("id, ", format!("nextval('{sequence}'), "))
            }
            false => ("", String::new()),
        }
    }

    async fn ensure_tables(&self, operation: &'static str) -> Result<(), Error> {
        if !self.create_tables {
            return Ok(());
        }
        self.created
            .get_or_try_init(|| self.create(operation))
            .await
            .map(|_| ())
    }

    async fn create(&self, operation: &'static str) -> Result<(), Error> {
        let Names {
            task,
            group,
            task_sequence,
            group_sequence,
            task_index,
            group_index,
        } = &self.names;
        let (id, bytes, time) = match self.is_postgres() {
            true => (
                "INTEGER NOT NULL PRIMARY KEY",
                "BYTEA",
                "TIMESTAMP WITHOUT TIME ZONE",
            ),
            false => (
                "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT",
                "BLOB",
                "DATETIME",
            ),
        };
        let extended = match self.extended {
            true => format!(
                ", name VARCHAR(155), args {bytes}, kwargs {bytes}, worker VARCHAR(155), \
                 retries INTEGER, queue VARCHAR(155), stamps {bytes}"
            ),
            false => String::new(),
        };
        let mut sql = String::new();
        if self.is_postgres() {
            // IF NOT EXISTS is no protection when two workers start at once.
            sql.push_str(&format!(
                "SELECT pg_advisory_xact_lock(7161678162427966820); \
                 CREATE SEQUENCE IF NOT EXISTS {task_sequence}; \
                 CREATE SEQUENCE IF NOT EXISTS {group_sequence}; "
            ));
        }
        sql.push_str(&format!(
            "CREATE TABLE IF NOT EXISTS {task} (id {id}, task_id VARCHAR(155) UNIQUE, \
             status VARCHAR(50), result {bytes}, date_done {time}, traceback TEXT, \
             children {bytes}{extended}); \
             CREATE INDEX IF NOT EXISTS {task_index} ON {task} (date_done); \
             CREATE TABLE IF NOT EXISTS {group} (id {id}, taskset_id VARCHAR(155) UNIQUE, \
             result {bytes}, date_done {time}); \
             CREATE INDEX IF NOT EXISTS {group_index} ON {group} (date_done);"
        ));
        // SQLite wants the schema with the index's name and not with its table's.
        let lease = self.lease(operation).await?;
        lease
            .run(async |connection| {
                connection.begin().await?;
                on!(connection, link => link.batch_execute(&sql).await)?;
                connection.commit().await
            })
            .await
            .map_err(|error| Error::from_database(operation, &error))
    }

    async fn lease(
        &self,
        operation: &'static str,
    ) -> Result<crate::database::connection::Lease<'_>, Error> {
        let lease = self.database.lease(operation).await;
        lease.map_err(|error| Error::from_database(operation, &error))
    }

    fn bytes(&self, value: &Value) -> Result<Vec<u8>, Error> {
        self.codec.encode(value)
    }

    async fn store_once(&self, row: &NewRow<'_>) -> Result<Stored, Error> {
        self.ensure_tables(STORE).await?;
        let table = &self.names.task;
        let (id, next, differs) = match self.is_postgres() {
            true => {
                let next = format!(
                    "nextval('{}'), ",
                    self.names.task_sequence.replace('\'', "''")
                );
                ("id, ", next, "IS DISTINCT FROM")
            }
            false => ("", String::new(), "IS NOT"),
        };
        let mut columns = vec!["status", "result", "date_done", "traceback", "children"];
        if self.extended {
            columns.extend([
                "name", "args", "kwargs", "worker", "retries", "queue", "stamps",
            ]);
        }
        let places: Vec<_> = (2..columns.len() + 2)
            .map(|place| format!("${place}"))
            .collect();
        let updates: Vec<_> = columns
            .iter()
            .map(|column| format!("{column} = excluded.{column}"))
            .collect();
        let sql = format!(
            "INSERT INTO {table} AS old ({id}task_id, {}) VALUES ({next}$1, {}) \
             ON CONFLICT (task_id) DO UPDATE SET {} WHERE old.status {differs} 'SUCCESS' \
             OR (old.result = excluded.result AND old.date_done = excluded.date_done)",
            columns.join(", "),
            places.join(", "),
            updates.join(", "),
        );
        // The very same row is written again: an earlier try arrived and its answer was lost.
        let lease = self.lease(STORE).await?;
        let changed = lease
            .run(async |connection| {
                on!(connection, link => {
                    let query = diesel::sql_query(&sql)
                        .bind::<Text, _>(row.task_id)
                        .bind::<Text, _>(row.status)
                        .bind::<Nullable<Binary>, _>(Some(&row.result))
                        .bind::<Timestamp, _>(row.date_done)
                        .bind::<Nullable<Text>, _>(row.traceback.as_deref())
                        .bind::<Nullable<Binary>, _>(row.children.as_deref());
                    match &row.extended {
                        None => query.execute(link).await,
                        Some(extended) => {
                            query
                                .bind::<Nullable<Text>, _>(extended.name.as_deref())
                                .bind::<Nullable<Binary>, _>(extended.args.as_deref())
                                .bind::<Nullable<Binary>, _>(extended.kwargs.as_deref())
                                .bind::<Nullable<Text>, _>(extended.worker.as_deref())
                                .bind::<Nullable<Integer>, _>(extended.retries)
                                .bind::<Nullable<Text>, _>(extended.queue.as_deref())
                                .bind::<Nullable<Binary>, _>(extended.stamps.as_deref())
                                .execute(link)
                                .await
                        }
                    }
                })
            })
            .await
            .map_err(|error| Error::from_database(STORE, &error))?;
        Ok(if changed == 0 {
            Stored::AlreadySuccessful
        } else {
            Stored::Written
        })
    }

    fn extended_row(&self, extended: &Extended) -> Result<ExtendedRow, Error> {
        let text = |value: &Value| value.as_str().map(clipped);
        let bytes = |value: &Value| match value {
            Value::Null => Ok(None),
            value => self.bytes(value).map(Some),
        };
        let stamps = match &extended.stamped_headers {
            Some(names) if !names.is_empty() => {
                Some(self.bytes(&json!({"stamped_headers": names, "stamps": extended.stamps}))?)
            }
            _ => None,
        };
        Ok(ExtendedRow {
            name: text(&extended.name),
            args: bytes(&extended.args)?,
            kwargs: bytes(&extended.kwargs)?,
            worker: text(&extended.worker),
            retries: extended
                .retries
                .as_i64()
                .and_then(|retries| i32::try_from(retries).ok()),
            queue: text(&extended.queue),
            stamps,
        })
    }

    async fn get_once(&self, task_id: &str) -> Result<Option<Meta>, Error> {
        self.ensure_tables(READ).await?;
        let table = &self.names.task;
        let sql = format!(
            "SELECT status, result, date_done, traceback, children FROM {table} WHERE task_id = $1"
        );
        let lease = self.lease(READ).await?;
        let rows: Vec<TaskRow> = lease
            .run(async |connection| {
                on!(connection, link =>
                    diesel::sql_query(&sql).bind::<Text, _>(task_id).load(link).await)
            })
            .await
            .map_err(|error| Error::from_database(READ, &error))?;
        let Some(row) = rows.into_iter().next() else {
            return Ok(None);
        };
        let read = |bytes: Option<Vec<u8>>| match bytes {
            Some(bytes) => self.codec.decode(task_id, &bytes),
            None => Ok(Value::Null),
        };
        let mut meta = Meta {
            status: row.status.unwrap_or_else(|| "PENDING".to_owned()),
            result: read(row.result)?,
            traceback: row.traceback,
            children: read(row.children)?,
            date_done: row.date_done.map(|time| time.and_utc().fixed_offset()),
            task_id: task_id.to_owned(),
            ..Meta::default()
        };
        if self.extended {
            meta.extended = self.get_extended(task_id).await?;
        }
        Ok(Some(meta))
    }

    async fn get_extended(&self, task_id: &str) -> Result<Option<Extended>, Error> {
        let table = &self.names.task;
        let sql = format!(
            "SELECT name, args, kwargs, worker, retries, queue, stamps FROM {table} \
             WHERE task_id = $1"
        );
        let lease = self.lease(READ).await?;
        let rows: Vec<ExtendedRow> = lease
            .run(async |connection| {
                on!(connection, link =>
                    diesel::sql_query(&sql).bind::<Text, _>(task_id).load(link).await)
            })
            .await
            .map_err(|error| Error::from_database(READ, &error))?;
        let Some(row) = rows.into_iter().next() else {
            return Ok(None);
        };
        let read = |bytes: Option<Vec<u8>>| match bytes {
            Some(bytes) => self.codec.decode(task_id, &bytes),
            None => Ok(Value::Null),
        };
        let stamps = read(row.stamps)?;
        let names = stamps
            .get("stamped_headers")
            .and_then(Value::as_array)
            .map(|names| {
                names
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect()
            });
        Ok(Some(Extended {
            name: row.name.into(),
            args: read(row.args)?,
            kwargs: read(row.kwargs)?,
            worker: row.worker.into(),
            retries: row.retries.into(),
            queue: row.queue.into(),
            stamped_headers: names,
            stamps: stamps
                .get("stamps")
                .and_then(Value::as_object)
                .cloned()
                .unwrap_or_default(),
        }))
    }

    async fn delete_where(
        &self,
        operation: &'static str,
        sql: String,
        by: By<'_>,
    ) -> Result<u64, Error> {
        self.ensure_tables(operation).await?;
        let lease = self.lease(operation).await?;
        let removed = lease
            .run(async |connection| {
                on!(connection, link => {
                    let query = diesel::sql_query(&sql);
                    match by {
                        By::Id(id) => query.bind::<Text, _>(id).execute(link).await,
                        By::Time(time) => query.bind::<Timestamp, _>(time).execute(link).await,
                    }
                })
            })
            .await
            .map_err(|error| Error::from_database(operation, &error))?;
        Ok(removed as u64)
    }
}

enum By<'a> {
    Id(&'a str),
    Time(NaiveDateTime),
}

/// A row of the task table as it is written.
struct NewRow<'a> {
    task_id: &'a str,
    status: &'a str,
    result: Vec<u8>,
    date_done: NaiveDateTime,
    traceback: Option<String>,
    children: Option<Vec<u8>>,
    extended: Option<ExtendedRow>,
}

/// Times have microseconds, in PostgreSQL and in what Python reads from SQLite.
fn stamp(time: DateTime<Utc>) -> NaiveDateTime {
    time.naive_utc().trunc_subsecs(6)
}

/// Fits a text into Celery's columns.
fn clipped(text: &str) -> String {
    crate::database::models::text(text)
        .chars()
        .take(WIDTH)
        .collect()
}

#[async_trait]
impl Backend for DatabaseBackend {
    async fn store(&self, meta: &Meta, _: &ReplyTo<'_>) -> Result<Stored, Error> {
        let extended = match (&meta.extended, self.extended) {
            (_, false) => None,
            (Some(extended), true) => Some(self.extended_row(extended)?),
            (None, true) => Some(self.extended_row(&Extended::default())?),
        };
        let children = match &meta.children {
            Value::Array(children) if !children.is_empty() => Some(self.bytes(&meta.children)?),
            _ => None,
        };
        let row = NewRow {
            task_id: &meta.task_id,
            status: &meta.status,
            result: self.bytes(&meta.result)?,
            date_done: stamp(meta.date_done.map_or_else(Utc::now, |time| time.to_utc())),
            traceback: meta.traceback.as_deref().map(crate::database::models::text),
            children,
            extended,
        };
        self.retrier.run(|| self.store_once(&row)).await
    }

    async fn get(&self, task_id: &str) -> Result<Option<Meta>, Error> {
        self.retrier.run(|| self.get_once(task_id)).await
    }

    async fn forget(&self, task_id: &str) -> Result<(), Error> {
        let sql = format!("DELETE FROM {} WHERE task_id = $1", self.names.task);
        const OPERATION: &str = "forget the result";
        let attempt = || self.delete_where(OPERATION, sql.clone(), By::Id(task_id));
        self.retrier.run(attempt).await.map(|_| ())
    }

    async fn chord_take(&self, group_id: &str) -> Result<Taken, Error> {
        self.take_chord(group_id).await
    }

    async fn chord_keep(&self, group_id: &str, claim: &Claim) -> Result<bool, Error> {
        self.keep_chord(group_id, claim).await
    }

    async fn chord_done(&self, group_id: &str, claim: &Claim) -> Result<(), Error> {
        self.end_chord(group_id, claim).await
    }

    async fn save_group(&self, group_id: &str, tuple: &Value) -> Result<(), Error> {
        const OPERATION: &str = "save the group";
        let payload = self.bytes(tuple)?;
        let table = &self.names.group;
        let (id, next) = self.next_group();
        let sql = format!(
            "INSERT INTO {table} ({id}taskset_id, result, date_done) VALUES ({next}$1, $2, $3) \
             ON CONFLICT (taskset_id) DO UPDATE SET result = excluded.result"
        );
        let (sql, payload) = (&sql, &payload);
        let attempt = || async move {
            self.ensure_tables(OPERATION).await?;
            let lease = self.lease(OPERATION).await?;
            lease
                .run(async |connection| {
                    on!(connection, link => diesel::sql_query(sql)
                        .bind::<Text, _>(group_id)
                        .bind::<Binary, _>(payload)
                        .bind::<Timestamp, _>(stamp(Utc::now()))
                        .execute(link)
                        .await)
                })
                .await
                .map_err(|error| Error::from_database(OPERATION, &error))
        };
        self.retrier.run(attempt).await.map(|_| ())
    }

    async fn restore_group(&self, group_id: &str) -> Result<Option<Value>, Error> {
        const OPERATION: &str = "read the group";
        let attempt = || async move {
            self.ensure_tables(OPERATION).await?;
            self.group_value(OPERATION, group_id).await
        };
        match self.retrier.run(attempt).await? {
            Some(bytes) => self
                .codec
                .decode(&format!("group {group_id}"), &bytes)
                .map(Some),
            None => Ok(None),
        }
    }

    async fn cleanup(&self) -> Result<u64, Error> {
        const OPERATION: &str = "remove expired results";
        if self.expires.is_zero() {
            return Ok(0);
        }
        let before = stamp(Utc::now() - self.expires);
        let mut removed = 0;
        for table in [&self.names.task, &self.names.group] {
            let sql = format!("DELETE FROM {table} WHERE date_done < $1");
            let attempt = || self.delete_where(OPERATION, sql.clone(), By::Time(before));
            removed += self.retrier.run(attempt).await?;
        }
        Ok(removed)
    }

    fn display_url(&self) -> String {
        format!("db+{}", self.database.url())
    }

    fn driver(&self) -> &'static str {
        "database"
    }
}
