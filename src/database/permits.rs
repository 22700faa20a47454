//! Permits where the broker cannot count them: over all workers that share this database.
//!
//! PostgreSQL decides in a function of the migration, under a lock for each scope; in SQLite the
//! same is decided here, for its file has one writer at a time. Only the database's clock counts.
//! A start is a permit of the length of its window that nobody renews or gives back, so one table
//! holds all. The caller keeps scopes and tasks short: they are keys.

use std::time::Duration;

use diesel::expression::SqlLiteral;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Integer, Text};
use diesel::upsert::excluded;
use diesel_async::RunQueryDsl;

use super::connection::{Connection, Database, Sqlite, on};
use super::error::Error;
use super::schema::permits;
use crate::protocol::permit::{Answer, Ask, LEASE, Scope};

/// What PostgreSQL's function answers.
#[derive(QueryableByName)]
struct Decided {
    #[diesel(sql_type = Integer)]
    verdict: i32,
    #[diesel(sql_type = BigInt)]
    number: i64,
}

/// A row of the table that counts now.
type Live = (String, String, i64);

/// An [`Ask`] in the table's words.
struct Wanted<'a> {
    running: String,
    holder: &'a str,
    most: i64,
    started: String,
    task: &'a str,
    starts: i64,
    span: i64,
}

impl<'a> Wanted<'a> {
    fn new(ask: &Ask<'a>) -> Self {
        let (Scope::User(name) | Scope::Repository(name)) = ask.scope;
        Self {
            running: running(ask.scope),
            holder: ask.holder,
            most: signed(ask.allowance.running),
            started: format!("started {name}"),
            task: ask.task,
            starts: signed(ask.allowance.starts),
            span: milliseconds(ask.allowance.window),
        }
    }

    /// What `take_permit` of the PostgreSQL migration decides. The rows that count come with the
    /// last to end first; those to be written are added to `written`.
    fn decide(&self, live: &[Live], now: i64, written: &mut Vec<Live>) -> Answer {
        if self.most > 0 && !of(live, &self.running).any(|row| row.1 == self.holder) {
            let count = of(live, &self.running).count() as u64;
            if signed(count) >= self.most {
                return Answer::TooMany(count);
            }
        }
        if self.starts > 0 && !of(live, &self.started).any(|row| row.1 == self.task) {
            let place = usize::try_from(self.starts - 1).unwrap_or(usize::MAX);
            if let Some(first) = of(live, &self.started).nth(place) {
                return too_soon(first.2 - now);
            }
            written.push((self.started.clone(), self.task.to_owned(), now + self.span));
        }
        if self.most > 0 {
            let ends = now + milliseconds(LEASE);
            written.push((self.running.clone(), self.holder.to_owned(), ends));
        }
        Answer::Granted
    }
}

impl Database {
    /// Asks whether one more may run within a scope.
    pub async fn take_permit(&self, ask: &Ask<'_>) -> Result<Answer, Error> {
        let wanted = Wanted::new(ask);
        let lease = self.lease("count what runs").await?;
        lease
            .run(async |connection| match connection {
                Connection::Postgres(postgres) => {
                    let sql = "SELECT * FROM take_permit($1, $2, $3, $4, $5, $6, $7, $8)";
                    let decided: Decided = diesel::sql_query(sql)
                        .bind::<Text, _>(&wanted.running)
                        .bind::<Text, _>(wanted.holder)
                        .bind::<BigInt, _>(wanted.most)
                        .bind::<BigInt, _>(milliseconds(LEASE))
                        .bind::<Text, _>(&wanted.started)
                        .bind::<Text, _>(wanted.task)
                        .bind::<BigInt, _>(wanted.starts)
                        .bind::<BigInt, _>(wanted.span)
                        .get_result(&mut postgres.link)
                        .await?;
                    Ok(match decided.verdict {
                        0 => Answer::Granted,
                        1 => Answer::TooMany(decided.number.unsigned_abs()),
                        _ => too_soon(decided.number),
                    })
                }
                Connection::Sqlite(_) => {
                    connection.begin().await?;
                    let Connection::Sqlite(link) = connection else {
                        unreachable!("because it was one before");
                    };
                    let answer = take_in_file(link, &wanted).await?;
                    connection.commit().await?;
                    Ok(answer)
                }
            })
            .await
    }

    /// Says that these are still held. One that has ended meanwhile is entered again: its task does
    /// run.
    pub async fn renew_permits(&self, held: &[(Scope, String)]) -> Result<(), Error> {
        let pairs = pairs(held);
        let lease = self.lease("renew the permits of running tasks").await?;
        lease
            .run(async |connection| {
                let [now, each] = words(connection, "$2");
                let sql = format!(
                    "INSERT INTO permits (scope, holder, ends_ms) \
                     SELECT value ->> 0, value ->> 1, {now} + $1 FROM {each} WHERE true \
                     ON CONFLICT (scope, holder) DO UPDATE SET ends_ms = excluded.ends_ms"
                );
                on!(connection, link => diesel::sql_query(&sql)
                    .bind::<BigInt, _>(milliseconds(LEASE))
                    .bind::<Text, _>(&pairs)
                    .execute(link)
                    .await)
            })
            .await
            .map(|_| ())
    }

    /// Gives permits back.
    pub async fn release_permits(&self, held: &[(Scope, String)]) -> Result<(), Error> {
        let pairs = pairs(held);
        let lease = self.lease("give permits back").await?;
        lease
            .run(async |connection| {
                let [_, each] = words(connection, "$1");
                let sql = format!(
                    "DELETE FROM permits WHERE (scope, holder) IN \
                     (SELECT value ->> 0, value ->> 1 FROM {each})"
                );
                on!(connection, link =>
                    diesel::sql_query(&sql).bind::<Text, _>(&pairs).execute(link).await)
            })
            .await
            .map(|_| ())
    }

    /// Removes what has ended; returns how many rows that were.
    pub async fn prune_permits(&self) -> Result<usize, Error> {
        let lease = self.lease("remove what has ended").await?;
        lease
            .run(async |connection| {
                let [now, _] = words(connection, "");
                // Rows that somebody renews at this moment are theirs.
                let locked = match connection {
                    Connection::Postgres(_) => "FOR UPDATE SKIP LOCKED",
                    Connection::Sqlite(_) => "",
                };
                let sql = format!(
                    "DELETE FROM permits WHERE (scope, holder) IN \
                     (SELECT scope, holder FROM permits WHERE ends_ms <= {now} {locked})"
                );
                on!(connection, link => diesel::sql_query(&sql).execute(link).await)
            })
            .await
    }
}

fn of<'a>(live: &'a [Live], scope: &'a str) -> impl Iterator<Item = &'a Live> {
    live.iter().filter(move |row| row.0 == scope)
}

async fn take_in_file(link: &mut Sqlite, wanted: &Wanted<'_>) -> QueryResult<Answer> {
    let clock: SqlLiteral<BigInt> = diesel::dsl::sql(FILE_NOW);
    let now: i64 = diesel::select(clock).get_result(link).await?;
    let live: Vec<Live> = permits::table
        .filter(permits::scope.eq_any([&wanted.running, &wanted.started]))
        .filter(permits::ends_ms.gt(now))
        .order(permits::ends_ms.desc())
        .load(link)
        .await?;
    let mut written = Vec::new();
    let answer = wanted.decide(&live, now, &mut written);
    for (scope, holder, ends) in &written {
        diesel::insert_into(permits::table)
            .values((
                permits::scope.eq(scope),
                permits::holder.eq(holder),
                permits::ends_ms.eq(ends),
            ))
            .on_conflict((permits::scope, permits::holder))
            .do_update()
            .set(permits::ends_ms.eq(excluded(permits::ends_ms)))
            .execute(link)
            .await?;
    }
    Ok(answer)
}

const FILE_NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";

/// How either database says now, and the rows of a JSON array that is this parameter.
fn words(connection: &Connection, parameter: &str) -> [String; 2] {
    match connection {
        Connection::Postgres(_) => [
            "permits_now()".to_owned(),
            format!("json_array_elements({parameter}::json) AS each (value)"),
        ],
        Connection::Sqlite(_) => [FILE_NOW.to_owned(), format!("json_each({parameter})")],
    }
}

fn running(scope: &Scope) -> String {
    match scope {
        Scope::User(name) => format!("running {name}"),
        Scope::Repository(name) => format!("analysing {name}"),
    }
}

fn pairs(held: &[(Scope, String)]) -> String {
    let pairs = held
        .iter()
        .map(|(scope, holder)| serde_json::json!([running(scope), holder]));
    serde_json::Value::Array(pairs.collect()).to_string()
}

fn too_soon(milliseconds: i64) -> Answer {
    Answer::TooSoon(Duration::from_millis(milliseconds.max(1).unsigned_abs()))
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
