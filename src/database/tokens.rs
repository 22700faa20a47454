//! The token store: what a user may use at a git host, so that tokens need not travel with
//! tasks. Only ciphertext reaches the database; without keys nothing can be put or read.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::upsert::excluded;
use diesel_async::RunQueryDsl;
use secrecy::SecretString;

use super::cipher::Keys;
use super::connection::{Database, on};
use super::error::Error;
use super::models::text;
use super::schema::user_tokens;
use super::sql_types::Moment;

/// A stored token without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenEntry {
    /// Whose it is.
    pub user_id: String,
    /// The host it is for, such as `github.com`.
    pub host: String,
    /// When the user first entrusted one.
    pub created_at: DateTime<Utc>,
    /// When it was last replaced.
    pub updated_at: DateTime<Utc>,
}

/// Host names know no case.
fn host_key(host: &str) -> String {
    let host = text(host).to_ascii_lowercase();
    // The port of https goes without saying.
    host.strip_suffix(":443")
        .map_or(host.clone(), str::to_owned)
}

impl Database {
    /// Stores or replaces a user's token for a host.
    pub async fn put_token(
        &self,
        keys: &Keys,
        user_id: &str,
        host: &str,
        token: &SecretString,
    ) -> Result<(), Error> {
        let ciphertext = keys.encrypt(token)?;
        let now = Moment(Utc::now());
        let (user, host) = (text(user_id), host_key(host));
        let lease = self.lease("store a token").await?;
        lease
            .run(async |connection| {
                on!(connection, link => diesel::insert_into(user_tokens::table)
                    .values((
                        user_tokens::user_id.eq(&user),
                        user_tokens::host.eq(&host),
                        user_tokens::ciphertext.eq(&ciphertext),
                        user_tokens::created_at.eq(now),
                        user_tokens::updated_at.eq(now),
                    ))
                    .on_conflict((user_tokens::user_id, user_tokens::host))
                    .do_update()
                    .set((
                        user_tokens::ciphertext.eq(excluded(user_tokens::ciphertext)),
                        user_tokens::updated_at.eq(excluded(user_tokens::updated_at)),
                    ))
                    .execute(link)
                    .await)
            })
            .await
            .map(|_| ())
    }

    /// A user's token for a host.
    pub async fn get_token(
        &self,
        keys: &Keys,
        user_id: &str,
        host: &str,
    ) -> Result<Option<SecretString>, Error> {
        let (user, host) = (text(user_id), host_key(host));
        let lease = self.lease("read a token").await?;
        let found: Option<String> = lease
            .run(async |connection| {
                on!(connection, link => user_tokens::table
                    .find((&user, &host))
                    .select(user_tokens::ciphertext)
                    .first(link)
                    .await
                    .optional())
            })
            .await?;
        found
            .map(|ciphertext| keys.decrypt(&ciphertext, None))
            .transpose()
    }

    /// Removes a user's token for a host; false when there was none.
    pub async fn delete_token(&self, user_id: &str, host: &str) -> Result<bool, Error> {
        let (user, host) = (text(user_id), host_key(host));
        let lease = self.lease("remove a token").await?;
        lease
            .run(async |connection| {
                on!(connection, link => diesel::delete(user_tokens::table.find((&user, &host)))
                    .execute(link)
                    .await)
            })
            .await
            .map(|removed| removed > 0)
    }

    /// All stored tokens, by user and host, without their secrets.
    pub async fn list_tokens(&self) -> Result<Vec<TokenEntry>, Error> {
        let lease = self.lease("list the tokens").await?;
        let rows: Vec<(String, String, Moment, Moment)> = lease
            .run(async |connection| {
                on!(connection, link => user_tokens::table
                    .order((user_tokens::user_id, user_tokens::host))
                    .select((
                        user_tokens::user_id,
                        user_tokens::host,
                        user_tokens::created_at,
                        user_tokens::updated_at,
                    ))
                    .load(link)
                    .await)
            })
            .await?;
        Ok(rows
            .into_iter()
            .map(|(user_id, host, created, updated)| TokenEntry {
                user_id,
                host,
                created_at: created.0,
                updated_at: updated.0,
            })
            .collect())
    }

    /// Encrypts every stored token anew with the first key, in one transaction; returns how
    /// many there are. One that no key opens stops it and leaves all as they were.
    pub async fn rotate_tokens(&self, keys: &Keys) -> Result<usize, Error> {
        let lease = self.lease("read the tokens").await?;
        let rows: Vec<(String, String, String)> = lease
            .run(async |connection| {
                on!(connection, link => user_tokens::table
                    .select((user_tokens::user_id, user_tokens::host, user_tokens::ciphertext))
                    .load(link)
                    .await)
            })
            .await?;
        let mut renewed = Vec::with_capacity(rows.len());
        for (user, host, old) in rows {
            let opened = keys.decrypt(&old, None).map_err(|source| Error::Stored {
                user: user.clone(),
                host: host.clone(),
                source: Box::new(source),
            })?;
            let new = keys.encrypt(&opened)?;
            renewed.push((user, host, old, new));
        }
        let count = renewed.len();
        let lease = self.lease("store the tokens").await?;
        lease
            .run(async |connection| {
                connection.begin().await?;
                for (user, host, old, new) in &renewed {
                    // Only if it is still the one that was read: the user may have replaced it.
                    on!(connection, link => diesel::update(user_tokens::table.find((user, host)))
                        .filter(user_tokens::ciphertext.eq(old))
                        .set(user_tokens::ciphertext.eq(new))
                        .execute(link)
                        .await)?;
                }
                connection.commit().await
            })
            .await?;
        Ok(count)
    }
}
