//! Which backend a URL means.

use std::sync::Arc;

use super::database::DatabaseBackend;
use super::disabled::Disabled;
use super::redis::Redis;
use super::rpc::Rpc;
use super::{Backend, Error, Options};
use crate::transport::Transport;

const SUPPORTED: &str = "redis://, rediss://, socket://, sentinel://, rpc://, db+postgresql://, \
                         db+sqlite:// and disabled://";

/// The backend of a URL. Connects to nothing; the URL and the options are checked completely.
/// `broker` is what `rpc://` answers over.
pub fn connect(
    url: &str,
    options: &Options,
    broker: Option<Arc<dyn Transport>>,
) -> Result<Arc<dyn Backend>, Error> {
    let url = url.trim();
    let scheme = url.split("://").next().unwrap_or(url).trim_end_matches(':');
    Ok(match scheme {
        "redis" | "rediss" | "socket" | "redis+socket" | "unix" | "sentinel" => {
            Arc::new(Redis::new(url, options)?)
        }
        "rpc" => {
            let broker = broker.ok_or(Error::Unsupported(
                "the rpc result backend needs a broker to answer over, and there is none",
            ))?;
            Arc::new(Rpc::new(broker, options)?)
        }
        "disabled" => Arc::new(Disabled),
        database if database.starts_with("db+") => Arc::new(DatabaseBackend::new(url, options)?),
        other => {
            return Err(Error::Url(format!(
                "CELERY_RESULT_BACKEND: result backend {other:?} is not supported; use one of \
                 {SUPPORTED}, such as redis://localhost:6379/1"
            )));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(url: &str) -> String {
        match connect(url, &Options::default(), None) {
            Ok(backend) => panic!("{url} is {}", backend.driver()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_unknown_backend_lists_what_is_supported() {
        for url in [
            "mongodb://u:geheim@h/db",
            "cache+memcached://h",
            "file:///tmp",
            "",
            "x",
        ] {
            let error = error_of(url);
            assert!(error.contains("db+postgresql://"), "{error}");
            assert!(!error.contains("geheim"), "{error}");
        }
        assert!(error_of("db+mysql://u:geheim@h/d").contains("postgresql"));
    }

    #[test]
    fn the_scheme_chooses_the_backend() {
        for (url, driver) in [
            ("redis://:pw@h:1/3", "redis"),
            ("rediss://h?ssl_cert_reqs=required", "redis"),
            ("socket:///run/redis.sock?virtual_host=2", "redis"),
            ("db+postgresql+psycopg2://u:p@h/d", "database"),
            ("db+sqlite:///r.db", "database"),
            ("disabled://", "disabled"),
        ] {
            let backend = connect(url, &Options::default(), None).unwrap();
            assert_eq!(backend.driver(), driver);
            assert!(
                !backend.display_url().contains("pw"),
                "{}",
                backend.display_url()
            );
        }
    }
}
