//! The life of an analysis: begun, then succeeded or ended otherwise; and the questions asked
//! about analyses.
//!
//! Everything goes by the task's id and may be done twice. A success is final: what comes
//! after it neither changes its row nor is an error, unless the id was given to another request
//! (another user's, or for another repository), which takes the row over. A success is one
//! transaction: row and contributors appear together or not at all.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;

use super::connection::{Connection, Database, on};
use super::error::Error;
use super::models::{Analysis, Completed, Contributor, Ended, Row, Run, State, storable, text};
use super::schema::{analyses, contributors};

/// Contributors sent to the server in one statement.
const CHUNK: usize = 5000;

/// What [`Database::begin`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// The run is entered; this is how often a worker has begun it.
    Running {
        /// 1 for the first time.
        attempt: i32,
    },
    /// The same task has succeeded before: its message was delivered again, and the stored
    /// result is the answer.
    AlreadySucceeded(Box<Analysis>),
}

/// Which earlier analysis may stand for a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Same<'a> {
    /// The repository.
    pub repo_url: &'a str,
    /// Its HEAD now.
    pub head_commit: &'a str,
    /// The branch asked for.
    pub branch: Option<&'a str>,
    /// Whether history was cut off.
    pub shallow: bool,
    /// Finished not before this moment.
    pub since: DateTime<Utc>,
}

impl Database {
    /// Enters a run as RUNNING, unless the same request has succeeded before.
    pub async fn begin(&self, run: &Run) -> Result<Begun, Error> {
        let lease = self.lease("enter the analysis").await?;
        let row = Row::running(run);
        let id = row.task_id.clone();
        lease
            .run(async |connection| {
                if let Some(attempt) = enter(connection, row).await? {
                    return Ok(Begun::Running { attempt });
                }
                let done = on!(connection, link => analyses::table
                    .filter(analyses::task_id.eq(&id))
                    .select(Analysis::as_select())
                    .first(link)
                    .await)?;
                Ok(Begun::AlreadySucceeded(Box::new(done)))
            })
            .await
    }

    /// Stores what a run found: the row and one row for each contributor, all or nothing.
    pub async fn succeed(&self, run: &Run, completed: &Completed) -> Result<(), Error> {
        let lease = self.lease("store the analysis").await?;
        let found = storable(&completed.contributors);
        let row = Row::succeeded(run, completed, found.len());
        lease
            .run(async |connection| {
                connection.begin().await?;
                // A success is final: of two runs at the same time the first one counts.
                let Some(id) = replace(connection, row).await? else {
                    return connection.commit().await;
                };
                on!(connection, link => diesel::delete(
                        contributors::table.filter(contributors::analysis_id.eq(id)))
                    .execute(link)
                    .await)?;
                insert_contributors(connection, id, &found).await?;
                connection.commit().await
            })
            .await
    }

    /// Stores how a run ended that did not succeed. False when it had succeeded before, and
    /// nothing was changed.
    pub async fn fail(&self, run: &Run, ended: &Ended) -> Result<bool, Error> {
        let lease = self.lease("store the failure").await?;
        let row = Row::ended(run, ended);
        lease
            .run(async |connection| end(connection, row).await)
            .await
    }

    /// Adds to the number of workers that died while they were at a run, and returns it; 0 when
    /// nobody was entered as being at it.
    pub async fn add_deaths(&self, task_id: &str, count: i32) -> Result<i32, Error> {
        let lease = self.lease("count a death").await?;
        let id = text(task_id);
        let deaths = lease
            .run(async |connection| {
                on!(connection, link => diesel::update(analyses::table)
                    .filter(analyses::task_id.eq(&id))
                    .filter(analyses::state.eq(State::Running.as_str()))
                    .set(analyses::deaths.eq(analyses::deaths + count))
                    .returning(analyses::deaths)
                    .get_result::<i32>(link)
                    .await
                    .optional())
            })
            .await?;
        Ok(deaths.unwrap_or(0))
    }

    /// The analysis of a task.
    pub async fn find(&self, task_id: &str) -> Result<Option<Analysis>, Error> {
        let lease = self.lease("find the analysis").await?;
        let id = text(task_id);
        lease
            .run(async |connection| {
                on!(connection, link => analyses::table
                    .filter(analyses::task_id.eq(&id))
                    .select(Analysis::as_select())
                    .first(link)
                    .await
                    .optional())
            })
            .await
    }

    /// The newest successful analysis that may stand for a new one.
    pub async fn latest_for(&self, same: &Same<'_>) -> Result<Option<Analysis>, Error> {
        let lease = self.lease("find an earlier analysis").await?;
        let url = text(&super::models::without_credentials(same.repo_url));
        let since = super::sql_types::Moment(same.since);
        lease
            .run(async |connection| {
                on!(connection, link => analyses::table
                    .filter(analyses::repo_url.eq(&url))
                    .filter(analyses::head_commit.eq(same.head_commit))
                    .filter(analyses::branch.eq(same.branch).or(
                        analyses::branch.is_null().and(same.branch.is_none().into_sql::<Bool>())))
                    .filter(analyses::shallow.eq(same.shallow))
                    .filter(analyses::state.eq(State::Success.as_str()))
                    .filter(analyses::finished_at.ge(since))
                    .order(analyses::finished_at.desc())
                    .select(Analysis::as_select())
                    .first(link)
                    .await
                    .optional())
            })
            .await
    }

    /// The newest successful analysis of a whole history, whatever its commit, that may stand
    /// for a new one if HEAD is still there.
    pub async fn newest_for(
        &self,
        repo_url: &str,
        branch: Option<&str>,
        since: DateTime<Utc>,
    ) -> Result<Option<Analysis>, Error> {
        let lease = self.lease("find an earlier analysis").await?;
        let url = text(&super::models::without_credentials(repo_url));
        let since = super::sql_types::Moment(since);
        lease
            .run(async |connection| {
                on!(connection, link => analyses::table
                    .filter(analyses::repo_url.eq(&url))
                    .filter(analyses::head_commit.is_not_null())
                    .filter(analyses::branch.eq(branch).or(
                        analyses::branch.is_null().and(branch.is_none().into_sql::<Bool>())))
                    .filter(analyses::shallow.eq(false))
                    .filter(analyses::state.eq(State::Success.as_str()))
                    .filter(analyses::finished_at.ge(since))
                    .order(analyses::finished_at.desc())
                    .select(Analysis::as_select())
                    .first(link)
                    .await
                    .optional())
            })
            .await
    }

    /// The analyses begun last, newest first.
    pub async fn recent(&self, limit: i64) -> Result<Vec<Analysis>, Error> {
        let lease = self.lease("list the analyses").await?;
        lease
            .run(async |connection| {
                on!(connection, link => analyses::table
                    .order(analyses::started_at.desc())
                    .limit(limit)
                    .select(Analysis::as_select())
                    .load(link)
                    .await)
            })
            .await
    }

    /// The contributors of an analysis, most lines first.
    pub async fn contributors(&self, analysis_id: i64) -> Result<Vec<Contributor>, Error> {
        let lease = self.lease("list the contributors").await?;
        let rows: Vec<(String, i64)> = lease
            .run(async |connection| {
                on!(connection, link => contributors::table
                    .filter(contributors::analysis_id.eq(analysis_id))
                    .order(contributors::rank.asc())
                    .select((contributors::email, contributors::lines))
                    .load(link)
                    .await)
            })
            .await?;
        Ok(rows
            .into_iter()
            .map(|(email, lines)| Contributor { email, lines })
            .collect())
    }
}

/// Inserts or resets the row; `None` when it tells of a success.
async fn enter(connection: &mut Connection, row: Row) -> QueryResult<Option<i32>> {
    if insert(connection, &row).await?.is_some() {
        return Ok(Some(1));
    }
    on!(connection, link => diesel::update(analyses::table)
        .filter(analyses::task_id.eq(&row.task_id))
        .filter(analyses::state.ne(State::Success.as_str()))
        .set((&row, analyses::attempts.eq(analyses::attempts + 1)))
        .returning(analyses::attempts)
        .get_result::<i32>(link)
        .await
        .optional())
}

/// Inserts the row unless its request has one, and returns its key. Such a row is never deleted
/// while the task runs, so that this can be followed by an update without a transaction.
async fn insert(connection: &mut Connection, row: &Row) -> QueryResult<Option<i64>> {
    let inserted = insert_if_missing(connection, row).await?;
    if inserted.is_none() && make_room(connection, row).await? {
        return insert_if_missing(connection, row).await;
    }
    Ok(inserted)
}

async fn insert_if_missing(connection: &mut Connection, row: &Row) -> QueryResult<Option<i64>> {
    on!(connection, link => diesel::insert_into(analyses::table)
        .values(row)
        .on_conflict(analyses::task_id)
        .do_nothing()
        .returning(analyses::id)
        .get_result(link)
        .await
        .optional())
}

/// Removes the success of another request that had the same id.
async fn make_room(connection: &mut Connection, row: &Row) -> QueryResult<bool> {
    let other_user = diesel::dsl::sql::<Bool>("user_id IS DISTINCT FROM ")
        .bind::<Nullable<Text>, _>(&row.user_id);
    let removed = on!(connection, link => diesel::delete(analyses::table)
        .filter(analyses::task_id.eq(&row.task_id))
        .filter(analyses::state.eq(State::Success.as_str()))
        .filter(analyses::repo_url.ne(&row.repo_url).or(other_user))
        .execute(link)
        .await)?;
    Ok(removed > 0)
}

/// Writes the row of a success over everything but a success, and returns its key.
async fn replace(connection: &mut Connection, row: Row) -> QueryResult<Option<i64>> {
    let inserted = insert(connection, &row).await?;
    if inserted.is_some() {
        return Ok(inserted);
    }
    on!(connection, link => diesel::update(analyses::table)
        .filter(analyses::task_id.eq(&row.task_id))
        .filter(analyses::state.ne(State::Success.as_str()))
        .set(&row)
        .returning(analyses::id)
        .get_result::<i64>(link)
        .await
        .optional())
}

/// Writes the end of a run, unless it tells of a success.
async fn end(connection: &mut Connection, row: Row) -> QueryResult<bool> {
    if insert(connection, &row).await?.is_some() {
        return Ok(true);
    }
    let changed = on!(connection, link => diesel::update(analyses::table)
        .filter(analyses::task_id.eq(&row.task_id))
        .filter(analyses::state.ne(State::Success.as_str()))
        .set((
            analyses::state.eq(row.state),
            analyses::error.eq(&row.error),
            analyses::finished_at.eq(row.finished_at),
            analyses::worker.eq(&row.worker),
            analyses::deaths.eq(0),
        ))
        .execute(link)
        .await)?;
    Ok(changed > 0)
}

/// Ranks begin with 1. Both databases get whole chunks as one parameter each, so that the
/// statement is the same whatever the number of rows.
async fn insert_contributors(
    connection: &mut Connection,
    analysis: i64,
    found: &[Contributor],
) -> QueryResult<()> {
    let mut rank = 0_i32;
    for chunk in found.chunks(CHUNK) {
        let ranks: Vec<i32> = (rank + 1..).take(chunk.len()).collect();
        rank = ranks.last().copied().unwrap_or(rank);
        match connection {
            Connection::Postgres(postgres) => {
                let emails: Vec<&str> = chunk.iter().map(|one| one.email.as_str()).collect();
                let lines: Vec<i64> = chunk.iter().map(|one| one.lines).collect();
                diesel::sql_query(
                    "INSERT INTO contributors (analysis_id, rank, email, lines) \
                     SELECT $1, new.* FROM unnest($2, $3, $4) AS new (rank, email, lines)",
                )
                .bind::<BigInt, _>(analysis)
                .bind::<Array<Integer>, _>(ranks)
                .bind::<Array<Text>, _>(emails)
                .bind::<Array<BigInt>, _>(lines)
                .execute(&mut postgres.link)
                .await?;
            }
            Connection::Sqlite(link) => {
                let rows: Vec<_> = ranks
                    .iter()
                    .zip(chunk)
                    .map(|(rank, one)| serde_json::json!([rank, one.email, one.lines]))
                    .collect();
                diesel::sql_query(
                    "INSERT INTO contributors (analysis_id, rank, email, lines) \
                     SELECT ?, value ->> 0, value ->> 1, value ->> 2 FROM json_each(?)",
                )
                .bind::<BigInt, _>(analysis)
                .bind::<Text, _>(serde_json::Value::Array(rows).to_string())
                .execute(link)
                .await?;
            }
        }
    }
    Ok(())
}
