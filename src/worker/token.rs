//! The token a task works with: opened if it came encrypted, looked up if none came.
//!
//! Happens in the parent, for children know neither keys nor database. The opened token is
//! masked wherever the request shows anything, and erased with the request.

use secrecy::{ExposeSecret, SecretString};

use super::Worker;
use super::request::Request;
use crate::database::{Error, cipher};
use crate::protocol::exception::Exception;
use crate::protocol::saferepr::one_line;
use crate::tasks::analyze_repo::Call;
use crate::tasks::registry::seconds;

/// Why there is no token.
pub enum Unusable {
    /// The token that came cannot be opened; trying again will not help.
    Refused(Exception),
    /// The stored tokens cannot be read now.
    Later(Exception),
}

/// Gives the call its token in plain text.
pub async fn provide(worker: &Worker, request: &Request, call: &mut Call) -> Result<(), Unusable> {
    let found = match call.token.take() {
        Some(token) if cipher::is_fernet(&token) => Some(open(worker, token)?),
        Some(token) => {
            call.token = Some(token);
            return Ok(());
        }
        None => stored(worker, call).await?,
    };
    if let Some(token) = found {
        call.token = Some(token.expose_secret().to_owned());
        request.keep_secret(token);
    }
    Ok(())
}

fn open(worker: &Worker, token: String) -> Result<SecretString, Unusable> {
    let max_age = seconds(worker.settings.token_ttl).map(|age| age.as_secs().max(1));
    let opened = worker.token_keys.decrypt_if_fernet(token, max_age);
    opened.map_err(|error| {
        Unusable::Refused(Exception::builtin(
            "ValueError",
            format!("user_github_token: {error}"),
        ))
    })
}

/// The user's own token for the host of the repository, and for no other.
async fn stored(worker: &Worker, call: &Call) -> Result<Option<SecretString>, Unusable> {
    let (Some(user), false) = (&call.user_id, worker.token_keys.is_empty()) else {
        return Ok(None);
    };
    let Some(host) = call.token_host(&worker.settings) else {
        return Ok(None);
    };
    let found = async {
        let database = worker.database().await?;
        database.get_token(&worker.token_keys, user, &host).await
    };
    found.await.map_err(|error: Error| {
        let text = one_line(&format!(
            "the token stored for user {user} and {host}: {error}"
        ));
        if error.is_transient() {
            Unusable::Later(Exception::operational(text))
        } else {
            Unusable::Refused(Exception::builtin("ValueError", text))
        }
    })
}
