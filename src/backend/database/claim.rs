//! Who ends a chord whose parts nobody counts.
//!
//! More than one `celery.chord_unlock` may find the parts of a chord ready: a message that is
//! delivered again, or two that grew out of one when a worker died between its retry and the
//! acknowledgement. One row per chord in Celery's own group table keeps them apart. Its id is
//! the group's with a prefix, its value the token of the one who ends the chord, and `done`
//! afterwards; it expires with the results. Python's workers know nothing of it, and harm
//! nothing.
//!
//! A worker that dies with the claim leaves it to another, [`PATIENCE`] later. That one cannot
//! know whether the body was published, for broker and database are two: it looks whether the
//! body has a state. What remains is a worker that is killed after the publication and before
//! the one statement that follows it, while the body stands unfinished in its queue for as long
//! as the claim lasts: that body runs twice. Celery's own task does so whenever its worker dies
//! before the acknowledgement. The same goes for an owner that renews the claim, is then
//! stopped for as long as it lasts, and publishes afterwards.

use diesel::sql_types::{Binary, Text};
use diesel_async::RunQueryDsl;

use super::{DatabaseBackend, GroupRow};
use crate::backend::{Claim, Error, Taken};
use crate::database::connection::on;

const TAKE: &str = "claim the chord";
const KEEP: &str = "keep the claim of the chord";
const END: &str = "end the chord";

/// How long a claim lasts that nobody renews, in seconds.
const PATIENCE: u32 = 60;

const DONE: &str = "done";

/// The row of a chord.
fn row(group_id: &str) -> String {
    super::clipped(&format!("chord-end-{group_id}"))
}

impl DatabaseBackend {
    /// Now and a claim's length ago, both by the clock of the database: those of the workers
    /// may differ.
    fn clock(&self) -> [String; 2] {
        if self.is_postgres() {
            let now = "(now() AT TIME ZONE 'UTC')";
            return [
                now.to_owned(),
                format!("({now} - interval '{PATIENCE} seconds')"),
            ];
        }
        let format = "strftime('%Y-%m-%d %H:%M:%f', 'now'";
        [
            format!("{format})"),
            format!("{format}, '-{PATIENCE} seconds')"),
        ]
    }

    /// What stands before a parameter's number: for SQLite `$2` is a name, and names are
    /// numbered as they come.
    fn mark(&self) -> char {
        if self.is_postgres() { '$' } else { '?' }
    }

    pub(super) async fn take_chord(&self, group_id: &str) -> Result<Taken, Error> {
        // One token for all tries: a claim whose answer was lost is found again by the next.
        let token = uuid::Uuid::new_v4().to_string();
        let attempt = || self.take_once(group_id, &token);
        self.retrier.run(attempt).await
    }

    async fn take_once(&self, group_id: &str, token: &str) -> Result<Taken, Error> {
        self.ensure_tables(TAKE).await?;
        let table = &self.names.group;
        let (id, next) = self.next_group();
        let [now, ended] = self.clock();
        let mark = self.mark();
        let row = row(group_id);
        let insert = format!(
            "INSERT INTO {table} ({id}taskset_id, result, date_done) VALUES ({next}$1, $2, {now}) \
             ON CONFLICT (taskset_id) DO NOTHING"
        );
        if self.change(TAKE, &insert, &row, &[token]).await? == 1 {
            return Ok(Taken::First(Claim(token.to_owned())));
        }
        let owner = self.group_value(TAKE, &row).await?;
        if owner.as_deref() == Some(DONE.as_bytes()) {
            return Ok(Taken::Done);
        }
        if owner.as_deref() == Some(token.as_bytes()) {
            return Ok(Taken::Left(Claim(token.to_owned())));
        }
        let update = format!(
            "UPDATE {table} SET result = {mark}2, date_done = {now} \
             WHERE taskset_id = {mark}1 AND result <> {mark}3 AND date_done < {ended}"
        );
        match self.change(TAKE, &update, &row, &[token, DONE]).await? {
            1 => Ok(Taken::Left(Claim(token.to_owned()))),
            _ => Ok(Taken::Claimed),
        }
    }

    /// Whether the claim is still there; it lasts its full length from now on.
    pub(super) async fn keep_chord(&self, group_id: &str, claim: &Claim) -> Result<bool, Error> {
        let (table, mark) = (&self.names.group, self.mark());
        let [now, _] = self.clock();
        let sql = format!(
            "UPDATE {table} SET date_done = {now} \
             WHERE taskset_id = {mark}1 AND result = {mark}2"
        );
        let (row, values) = (row(group_id), [claim.0.as_str()]);
        let attempt = || self.change(KEEP, &sql, &row, &values);
        self.retrier.run(attempt).await.map(|changed| changed == 1)
    }

    pub(super) async fn end_chord(&self, group_id: &str, claim: &Claim) -> Result<(), Error> {
        let (table, mark) = (&self.names.group, self.mark());
        let sql = format!(
            "UPDATE {table} SET result = {mark}3 WHERE taskset_id = {mark}1 AND result = {mark}2"
        );
        let (row, values) = (row(group_id), [claim.0.as_str(), DONE]);
        let attempt = || self.change(END, &sql, &row, &values);
        self.retrier.run(attempt).await.map(|_| ())
    }

    /// Changes a row of the group table; `values` are what follows its id.
    async fn change(
        &self,
        operation: &'static str,
        sql: &str,
        row: &str,
        values: &[&str],
    ) -> Result<usize, Error> {
        let lease = self.lease(operation).await?;
        lease
            .run(async |connection| {
                on!(connection, link => {
                    let query = diesel::sql_query(sql).into_boxed().bind::<Text, _>(row);
                    let bound = values.iter().fold(query, |query, value| {
                        query.bind::<Binary, _>(value.as_bytes())
                    });
                    bound.execute(link).await
                })
            })
            .await
            .map_err(|error| Error::from_database(operation, &error))
    }

    /// The value of a row of the group table.
    pub(super) async fn group_value(
        &self,
        operation: &'static str,
        row: &str,
    ) -> Result<Option<Vec<u8>>, Error> {
        let sql = format!(
            "SELECT result FROM {} WHERE taskset_id = $1",
            self.names.group
        );
        let lease = self.lease(operation).await?;
        let rows: Vec<GroupRow> = lease
            .run(async |connection| {
                on!(connection, link =>
                    diesel::sql_query(&sql).bind::<Text, _>(row).load(link).await)
            })
            .await
            .map_err(|error| Error::from_database(operation, &error))?;
        Ok(rows.into_iter().next().and_then(|row| row.result))
    }
}
