//! Database URLs as people write them, in libpq's and in SQLAlchemy's spelling.
//!
//! `postgresql://user:password@host:port/name?sslmode=…` with any driver after a plus sign,
//! several hosts, a socket directory as host; `sqlite:///relative/path` and
//! `sqlite:////absolute/path`. Answers for libpq's connection URIs and the part of
//! SQLAlchemy's that an existing `DATABASE_URL` uses. Knows nothing of connecting.

mod server;

use std::fmt;
use std::path::PathBuf;

use tokio_postgres::config::Config;

use super::error::Error;
use server::{decoded, server};

/// Where the analyses are kept. `Display` and `Debug` mask the password.
#[derive(Clone)]
pub struct DatabaseUrl {
    pub(crate) place: Place,
    shown: String,
}

/// The two kinds of database.
#[derive(Clone)]
pub(crate) enum Place {
    /// A server.
    Postgres(Box<Server>),
    /// A file.
    Sqlite(PathBuf),
}

/// A PostgreSQL server and how to speak to it.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) config: Config,
    pub(crate) tls: Tls,
}

/// libpq's `sslmode` and its files, as far as they concern certificates.
#[derive(Clone, Default)]
pub(crate) struct Tls {
    pub(crate) verify: Verify,
    /// `sslrootcert`: trusted instead of the built-in roots.
    pub(crate) root: Option<PathBuf>,
    /// `sslcert` and `sslkey`.
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// How much of the server's certificate is checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Verify {
    /// `prefer` and `require`: encrypted, but whoever answers is believed.
    #[default]
    Nothing,
    /// `verify-ca`: signed by a trusted authority.
    Authority,
    /// `verify-full`: and for this host.
    Host,
}

const EXAMPLE: &str = "postgresql://user:password@db:5432/celeriac or sqlite:///celeriac.db";

impl DatabaseUrl {
    /// Reads the value of `DATABASE_URL`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::parse_named("DATABASE_URL", text)
    }

    /// Reads a URL; errors name `variable`.
    pub fn parse_named(variable: &str, text: &str) -> Result<Self, Error> {
        let text = text.trim();
        parse(text).map_err(|reason| {
            Error::Url(format!(
                "{variable}={}: {reason}; a correct value looks like {EXAMPLE}",
                masked(text)
            ))
        })
    }

    /// `postgresql` or `sqlite`.
    pub fn kind(&self) -> &'static str {
        match self.place {
            Place::Postgres(_) => "postgresql",
            Place::Sqlite(_) => "sqlite",
        }
    }

    /// The file, if it is one, in one spelling for all who name it.
    pub fn file(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Postgres(_) => None,
            Place::Sqlite(path) => Some(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        }
    }

    /// A database in this file.
    pub fn sqlite(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            shown: format!("sqlite:///{}", path.display()),
            place: Place::Sqlite(path),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({})", self.shown)
    }
}

fn parse(text: &str) -> Result<DatabaseUrl, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err("there is no scheme such as postgresql:// in it".to_owned());
    };
    let dialect = scheme
        .split('+')
        .next()
        .unwrap_or(scheme)
        .to_ascii_lowercase();
    let place = match dialect.as_str() {
        "postgresql" | "postgres" => Place::Postgres(Box::new(server(rest)?)),
        "sqlite" => Place::Sqlite(file(rest)?),
        other => {
            return Err(format!(
                "{other:?} databases are not supported, only postgresql:// and sqlite://"
            ));
        }
    };
    Ok(DatabaseUrl {
        place,
        shown: masked(text),
    })
}

fn file(rest: &str) -> Result<PathBuf, String> {
    let path = rest.split('?').next().unwrap_or(rest);
    let Some(path) = path.strip_prefix('/') else {
        return Err(
            "a file needs three slashes (sqlite:///relative.db) or four (sqlite:////absolute.db)"
                .to_owned(),
        );
    };
    if path.is_empty() || path == ":memory:" {
        return Err("it names no file, and a database in memory would be lost".to_owned());
    }
    Ok(PathBuf::from(decoded(path)?))
}

/// The URL with every password in it replaced, also when it is malformed.
pub(crate) fn masked(text: &str) -> String {
    let (head, query) = match text.split_once('?') {
        // A question mark before an @ belongs to a password that was not encoded.
        Some((head, query)) if !query.contains('@') => (head, Some(query)),
        _ => (text, None),
    };
    let start = head.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = head.split_at(start);
    let mut shown = String::from(scheme);
    match rest.rsplit_once('@') {
        Some((login, place)) => {
            match login.split_once(':') {
                Some((user, _)) => shown.push_str(&format!("{user}:**@")),
                None => shown.push_str(&format!("{login}@")),
            }
            shown.push_str(place);
        }
        None => shown.push_str(rest),
    }
    if let Some(query) = query {
        shown.push('?');
        let pairs = query.split('&').map(|pair| match pair.split_once('=') {
            Some((key, _)) if key.to_ascii_lowercase().contains("password") => format!("{key}=**"),
            _ => pair.to_owned(),
        });
        shown.push_str(&pairs.collect::<Vec<_>>().join("&"));
    }
    shown
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::SslMode;

    use super::*;

    fn server_of(text: &str) -> Server {
        match DatabaseUrl::parse(text).unwrap().place {
            Place::Postgres(server) => *server,
            Place::Sqlite(path) => panic!("{path:?} is a file"),
        }
    }

    #[test]
    fn spellings_of_sqlalchemy_drivers_are_understood() {
        for scheme in [
            "postgres",
            "postgresql",
            "postgresql+psycopg2",
            "postgresql+asyncpg",
            "postgresql+psycopg",
        ] {
            let server = server_of(&format!("{scheme}://ann:s%40cr%2Fet@db.example:6000/store"));
            assert_eq!(server.config.get_user(), Some("ann"));
            assert_eq!(server.config.get_password(), Some(&b"s@cr/et"[..]));
            assert_eq!(server.config.get_ports(), [6000]);
            assert_eq!(server.config.get_dbname(), Some("store"));
        }
    }

    #[test]
    fn sslmode_chooses_what_is_verified() {
        let verify = |mode| server_of(&format!("postgresql://u@h/d?sslmode={mode}"));
        assert_eq!(verify("disable").config.get_ssl_mode(), SslMode::Disable);
        assert_eq!(verify("prefer").config.get_ssl_mode(), SslMode::Prefer);
        assert_eq!(verify("require").tls.verify, Verify::Nothing);
        assert_eq!(verify("verify-ca").tls.verify, Verify::Authority);
        assert_eq!(verify("verify-full").tls.verify, Verify::Host);
        assert_eq!(
            verify("verify-full").config.get_ssl_mode(),
            SslMode::Require
        );
    }

    #[test]
    fn several_hosts_and_ipv6_keep_their_ports() {
        let server = server_of("postgresql://u@one,[::1]:5433/d");
        assert_eq!(server.config.get_hosts().len(), 2);
        assert_eq!(server.config.get_ports(), [5432, 5433]);
    }

    #[test]
    fn three_slashes_are_relative_and_four_absolute() {
        for (text, path) in [
            ("sqlite:///a%20b.db", "a b.db"),
            ("sqlite:////var/x.db", "/var/x.db"),
        ] {
            match DatabaseUrl::parse(text).unwrap().place {
                Place::Sqlite(found) => assert_eq!(found, PathBuf::from(path)),
                Place::Postgres(_) => panic!("{text} is a file"),
            }
        }
    }

    #[test]
    fn a_password_is_shown_neither_by_display_nor_by_debug_nor_by_an_error() {
        let good = DatabaseUrl::parse("postgresql://ann:geheim@db/x?password=geheim").unwrap();
        assert_eq!(good.to_string(), "postgresql://ann:**@db/x?password=**");
        let mut texts = vec![good.to_string(), format!("{good:?}")];
        for bad in [
            "postgresql://ann:geheim@db:port/x",
            "postgresql://ann:a/geheim@db/x",
            "postgresql://ann:a?geheim@db/x",
            "postgresql://ann:a#%geheim@db/x",
            "postgresql://ann:geheim@db/x?colour=blue",
            "mysql://ann:geheim@db/x",
            "ann:geheim@db",
        ] {
            let error = DatabaseUrl::parse(bad).unwrap_err().to_string();
            assert!(error.contains("DATABASE_URL"), "{error}");
            assert!(
                error.contains("postgresql://user:password@db:5432"),
                "{error}"
            );
            texts.push(error);
        }
        for text in texts {
            assert!(!text.contains("geheim"), "{text}");
        }
    }

    #[test]
    fn any_text_is_an_error_or_a_url_and_never_a_panic() {
        for text in [
            "",
            "%",
            "://",
            "sqlite://",
            "sqlite:///",
            "postgresql://",
            "postgres://@",
            "postgres://u@[::1/d",
            "postgres://u@h/%f",
            "postgres://u@h?=&=",
            "postgres://u@h/é%c3",
        ] {
            let _ = DatabaseUrl::parse(text).map(|url| url.to_string());
        }
    }
}
