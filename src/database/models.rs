//! The rows, and what is said to the database about a run.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use serde_json::Value;

use super::schema::analyses;
use super::sql_types::Moment;

/// What became of an analysis, in Celery's words where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// A worker is at it, or was when it died.
    Running,
    /// Its contributors are stored.
    Success,
    /// It failed for good.
    Failure,
    /// It was revoked or had expired.
    Revoked,
    /// It failed and will be tried again.
    Retry,
}

impl State {
    /// The word in the `state` column.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "RUNNING",
            Self::Success => "SUCCESS",
            Self::Failure => "FAILURE",
            Self::Revoked => "REVOKED",
            Self::Retry => "RETRY",
        }
    }

    /// The state a column's word means; the column is checked by the database.
    pub fn parse(word: &str) -> Option<Self> {
        [
            Self::Running,
            Self::Success,
            Self::Failure,
            Self::Revoked,
            Self::Retry,
        ]
        .into_iter()
        .find(|state| state.as_str() == word)
    }
}

/// One run of the task: who wants what analysed, and who is at it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Celery's id of the task.
    pub task_id: String,
    /// The user the backend named, as text.
    pub user_id: Option<String>,
    /// As the caller gave it. Credentials in it are not stored.
    pub repo_url: String,
    /// The branch asked for; `None` is the repository's HEAD.
    pub branch: Option<String>,
    /// Whether history was cut off, which makes a blame wrong by nature.
    pub shallow: bool,
    /// Node name of the worker.
    pub worker: Option<String>,
    /// When this attempt began.
    pub started_at: DateTime<Utc>,
}

/// Who wrote how much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contributor {
    /// The author's address; any text.
    pub email: String,
    /// Lines at HEAD.
    pub lines: i64,
}

/// What a successful run found.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// The commit that was analysed; `None` for an empty repository.
    pub head_commit: Option<String>,
    /// When the analysis was done.
    pub finished_at: DateTime<Utc>,
    /// Lines of all contributors.
    pub total_lines: i64,
    /// Files whose lines were counted.
    pub total_files: i64,
    /// Files left out: binary, too large.
    pub skipped_files: i64,
    /// Most lines first; this order becomes the rank.
    pub contributors: Vec<Contributor>,
    /// The task's return value, order kept.
    pub result: Value,
}

/// How a run ended that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// [`State::Failure`], [`State::Revoked`] or [`State::Retry`].
    pub state: State,
    /// What a person is told; without secrets.
    pub error: String,
    /// When.
    pub finished_at: DateTime<Utc>,
}

/// A row of `analyses`.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = analyses)]
pub struct Analysis {
    /// Key of the row.
    pub id: i64,
    /// Celery's id of the task.
    pub task_id: String,
    /// Who asked for it.
    pub user_id: Option<String>,
    /// What was analysed.
    pub repo_url: String,
    /// At which commit.
    pub head_commit: Option<String>,
    /// The branch asked for.
    pub branch: Option<String>,
    /// Whether history was cut off.
    pub shallow: bool,
    /// One of the words of [`State`].
    pub state: String,
    /// When the last attempt began.
    #[diesel(deserialize_as = Moment)]
    pub started_at: DateTime<Utc>,
    /// When it ended.
    #[diesel(deserialize_as = OptionalMoment)]
    pub finished_at: Option<DateTime<Utc>>,
    /// How many contributors have lines at HEAD.
    pub total_contributors: Option<i64>,
    /// Lines of all contributors.
    pub total_lines: Option<i64>,
    /// Files whose lines were counted.
    pub total_files: Option<i64>,
    /// Files left out.
    pub skipped_files: Option<i64>,
    /// The task's return value.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<String>,
    /// Node name of the worker.
    pub worker: Option<String>,
    /// How often a worker began it.
    pub attempts: i32,
}

/// Carries a column that may be null past the orphan rule.
#[derive(Debug, Clone, Copy, diesel::deserialize::FromSqlRow)]
pub struct OptionalMoment(Option<Moment>);

impl<DB>
    diesel::deserialize::FromSql<diesel::sql_types::Nullable<super::sql_types::Timestamptz>, DB>
    for OptionalMoment
where
    DB: diesel::backend::Backend,
    Option<Moment>: diesel::deserialize::FromSql<diesel::sql_types::Nullable<super::sql_types::Timestamptz>, DB>,
{
    fn from_sql(bytes: DB::RawValue<'_>) -> diesel::deserialize::Result<Self> {
        <Option<Moment>>::from_sql(bytes).map(Self)
    }

    fn from_nullable_sql(bytes: Option<DB::RawValue<'_>>) -> diesel::deserialize::Result<Self> {
        <Option<Moment>>::from_nullable_sql(bytes).map(Self)
    }
}

impl From<OptionalMoment> for Option<DateTime<Utc>> {
    fn from(moment: OptionalMoment) -> Self {
        moment.0.map(|moment| moment.0)
    }
}

/// The writable columns of `analyses`.
#[derive(Debug, Insertable, AsChangeset)]
#[diesel(table_name = analyses)]
#[diesel(treat_none_as_null = true)]
pub(crate) struct Row {
    pub(crate) task_id: String,
    pub(crate) user_id: Option<String>,
    pub(crate) repo_url: String,
    pub(crate) head_commit: Option<String>,
    pub(crate) branch: Option<String>,
    pub(crate) shallow: bool,
    pub(crate) state: &'static str,
    pub(crate) started_at: Moment,
    pub(crate) finished_at: Option<Moment>,
    pub(crate) total_contributors: Option<i64>,
    pub(crate) total_lines: Option<i64>,
    pub(crate) total_files: Option<i64>,
    pub(crate) skipped_files: Option<i64>,
    pub(crate) result: Option<Value>,
    pub(crate) error: Option<String>,
    pub(crate) worker: Option<String>,
}

impl Row {
    /// The row of a run that has just begun.
    pub(crate) fn running(run: &Run) -> Self {
        Self {
            task_id: text(&run.task_id),
            user_id: run.user_id.as_deref().map(text),
            repo_url: text(&without_credentials(&run.repo_url)),
            head_commit: None,
            branch: run.branch.as_deref().map(text),
            shallow: run.shallow,
            state: State::Running.as_str(),
            started_at: run.started_at.into(),
            finished_at: None,
            total_contributors: None,
            total_lines: None,
            total_files: None,
            skipped_files: None,
            result: None,
            error: None,
            worker: run.worker.as_deref().map(text),
        }
    }

    /// The row of a run that succeeded with so many contributors.
    pub(crate) fn succeeded(run: &Run, completed: &Completed, contributors: usize) -> Self {
        Self {
            state: State::Success.as_str(),
            head_commit: completed.head_commit.as_deref().map(text),
            finished_at: Some(completed.finished_at.into()),
            total_contributors: i64::try_from(contributors).ok(),
            total_lines: Some(completed.total_lines),
            total_files: Some(completed.total_files),
            skipped_files: Some(completed.skipped_files),
            result: Some(value(&completed.result)),
            ..Self::running(run)
        }
    }

    /// The row of a run that ended otherwise.
    pub(crate) fn ended(run: &Run, ended: &Ended) -> Self {
        Self {
            state: ended.state.as_str(),
            finished_at: Some(ended.finished_at.into()),
            error: Some(text(&ended.error)),
            ..Self::running(run)
        }
    }
}

/// Contributors as they can be stored: no U+0000, and those that became the same put together.
pub(crate) fn storable(contributors: &[Contributor]) -> Vec<Contributor> {
    if !contributors
        .iter()
        .any(|contributor| contributor.email.contains('\0'))
    {
        return contributors.to_vec();
    }
    let mut places = HashMap::new();
    let mut stored: Vec<Contributor> = Vec::with_capacity(contributors.len());
    for contributor in contributors {
        let email = text(&contributor.email);
        let place = *places.entry(email.clone()).or_insert(stored.len());
        match stored.get_mut(place) {
            Some(same) => same.lines += contributor.lines,
            None => stored.push(Contributor {
                email,
                lines: contributor.lines,
            }),
        }
    }
    stored
}

/// PostgreSQL's text holds every character but U+0000.
pub(crate) fn text(text: &str) -> String {
    text.replace('\0', "\u{FFFD}")
}

/// The same for all texts inside a JSON value. PostgreSQL accepts the escape of U+0000 in a
/// json column but refuses to read it, so it must not get there.
fn value(json: &Value) -> Value {
    match json {
        Value::String(string) => Value::String(text(string)),
        Value::Array(items) => Value::Array(items.iter().map(value).collect()),
        Value::Object(map) => {
            let mut stored = serde_json::Map::with_capacity(map.len());
            for (key, item) in map {
                let (key, item) = (text(key), value(item));
                // Two addresses that became one: their lines are added up.
                let sum = match (stored.get(&key).and_then(Value::as_i64), item.as_i64()) {
                    (Some(one), Some(other)) => Value::from(one + other),
                    _ => item,
                };
                stored.insert(key, sum);
            }
            Value::Object(stored)
        }
        other => other.clone(),
    }
}

/// The URL without `user:password@`, query and fragment: no address of a repository has them,
/// and what a caller puts there may be a token.
pub(crate) fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let end = rest.find('/').unwrap_or(rest.len());
    let start = rest[..end].rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}://{}", &rest[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_taken_out_of_a_url_and_nothing_else() {
        assert_eq!(
            without_credentials("https://x:tok@h/o/r@1?a=@b#c"),
            "https://h/o/r@1"
        );
        assert_eq!(without_credentials("https://h/o/r@1"), "https://h/o/r@1");
        assert_eq!(without_credentials("git@h:o/r"), "git@h:o/r");
    }

    #[test]
    fn addresses_that_become_equal_are_added_up() {
        let of = |email: &str, lines| Contributor {
            email: email.into(),
            lines,
        };
        let stored = storable(&[of("a\0", 3), of("b", 2), of("a\u{FFFD}", 1)]);
        assert_eq!(stored, [of("a\u{FFFD}", 4), of("b", 2)]);
        let json = serde_json::json!({"result": {"a\0": 3, "b": 2, "a\u{FFFD}": 1}});
        assert_eq!(
            value(&json),
            serde_json::json!({"result": {"a\u{FFFD}": 4, "b": 2}})
        );
    }
}
