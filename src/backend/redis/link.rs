//! The one connection all results share, opened anew after a fault.
//!
//! Commands of concurrent stores travel in the same pipeline without waiting for one another.
//! Whoever finds the connection broken gives it up by its number, and the next command opens
//! a new one; those that come meanwhile wait for the same attempt.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, Value};

use super::super::{Error, Options};
use super::address::Address;
use super::script::Script;

/// Commands that may wait for the socket before a sender has to.
const QUEUE: usize = 1024;

/// What a server says that is starting, electing, out of memory or no longer the master: the
/// same command will succeed later.
const PASSING: &[&str] = &[
    "LOADING",
    "BUSY",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "READONLY",
    "OOM",
    "MISCONF",
    "NOREPLICAS",
];

/// What it says when another server has to be asked.
const ELSEWHERE: &[&str] = &["READONLY", "MASTERDOWN"];

/// An attempt at connecting that several commands wait for.
type Opening = Shared<BoxFuture<'static, Result<MultiplexedConnection, Arc<RedisError>>>>;

/// A connection that heals.
pub(super) struct Link {
    address: Arc<Address>,
    config: AsyncConnectionConfig,
    connect_timeout: Duration,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    number: u64,
    opening: Option<Opening>,
    /// When the attempt failed.
    failed: Option<Instant>,
}

/// How long a failed attempt answers for those that come after it: results that wait for the
/// backend do not wake at the same moment, and each would knock anew.
const FAILURE_SHARED: Duration = Duration::from_millis(200);

/// What is sent as one.
pub(super) enum Request<'a> {
    Command(&'a Cmd),
    /// A transaction.
    Pipeline(&'a Pipeline),
}

impl Link {
    pub(super) fn new(address: Address, options: &Options) -> Self {
        let connect_timeout = address.connect_timeout.unwrap_or(options.connect_timeout);
        let response = address.socket_timeout.unwrap_or(options.socket_timeout);
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(connect_timeout))
            .set_response_timeout(Some(response))
            .set_pipeline_buffer_size(QUEUE);
        let held = Mutex::new(Held::default());
        Self {
            address: Arc::new(address),
            config,
            connect_timeout,
            held,
        }
    }

    pub(super) fn shown(&self) -> &str {
        self.address.shown()
    }

    async fn connection(&self) -> Result<(u64, MultiplexedConnection), Fault> {
        let (number, opening) = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            if held.failed.is_some_and(|at| at.elapsed() > FAILURE_SHARED) {
                *held = Held {
                    number: held.number + 1,
                    ..Held::default()
                };
            }
            let opening = held.opening.get_or_insert_with(|| {
                let (address, config) = (Arc::clone(&self.address), self.config.clone());
                // A sentinel is asked before the server is; the crate bounds each step alone.
                let deadline = self.connect_timeout * 3;
                async move {
                    match tokio::time::timeout(deadline, address.connect(&config)).await {
                        Ok(outcome) => outcome.map_err(Arc::new),
                        Err(_) => Err(Arc::new(RedisError::from(std::io::Error::from(
                            std::io::ErrorKind::TimedOut,
                        )))),
                    }
                }
                .boxed()
                .shared()
            });
            let opening = opening.clone();
            (held.number, opening)
        };
        opening
            .await
            .map(|connection| (number, connection))
            .map_err(|error| {
                self.give_up(number);
                Fault::Connect(error)
            })
    }

    /// Forgets a connection that failed, unless somebody else did already.
    fn give_up(&self, number: u64) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.number == number {
            *held = Held {
                number: number + 1,
                ..Held::default()
            };
        }
    }

    /// Sends a request and gives the connection up when the answer says that it is broken.
    pub(super) async fn send(&self, request: Request<'_>) -> Result<Value, Fault> {
        let (number, mut connection) = self.connection().await?;
        let outcome = match request {
            Request::Command(command) => command.query_async(&mut connection).await,
            Request::Pipeline(pipeline) => pipeline.query_async(&mut connection).await,
        };
        outcome.map_err(|error: RedisError| {
            let elsewhere = error.code().is_some_and(|code| ELSEWHERE.contains(&code));
            if is_broken(&error) || elsewhere {
                self.give_up(number);
            }
            Fault::Command(error)
        })
    }

    /// Runs a script by its hash, sending its text when the server does not know it.
    pub(super) async fn script<'a>(
        &self,
        script: &Script,
        keys: &[&str],
        arguments: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<Value, Fault> {
        let command = |name: &str, body: &str| {
            let mut command = redis::cmd(name);
            command.arg(body).arg(keys.len()).arg(keys);
            for argument in arguments.clone() {
                command.arg(argument);
            }
            command
        };
        let by_hash = command("EVALSHA", &script.hash);
        match self.send(Request::Command(&by_hash)).await {
            Err(fault) if fault.code() == Some("NOSCRIPT") => {
                self.send(Request::Command(&command("EVAL", script.text)))
                    .await
            }
            outcome => outcome,
        }
    }
}

fn is_broken(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_timeout()
        || error.is_connection_dropped()
        || error.is_connection_refusal()
        || error.is_unrecoverable_error()
}

/// An error of the library, before it is known which operation it belongs to.
pub(super) enum Fault {
    Connect(Arc<RedisError>),
    Command(RedisError),
}

impl Fault {
    fn error(&self) -> &RedisError {
        match self {
            Self::Connect(error) => error,
            Self::Command(error) => error,
        }
    }

    /// The word an error of the server begins with.
    pub(super) fn code(&self) -> Option<&str> {
        self.error().code()
    }

    /// Whether this user or this server cannot run scripts at all.
    pub(super) fn refuses_scripts(&self) -> bool {
        let text = self.error().to_string().to_ascii_lowercase();
        matches!(self, Self::Command(_))
            && ((self.code() == Some("NOPERM") && text.contains("eval"))
                || text.contains("unknown command"))
    }

    pub(super) fn of(self, operation: &'static str) -> Error {
        let error = self.error();
        let reason = error.to_string();
        let passing = match (&self, error.code()) {
            (_, Some(code)) => PASSING.contains(&code),
            // Whoever ended the connection during the greeting may be starting; the library
            // calls that by many names.
            (Self::Connect(_), None) => !matches!(
                error.kind(),
                ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig
            ),
            (Self::Command(_), None) => false,
        };
        if passing || is_broken(error) {
            Error::Unavailable { operation, reason }
        } else {
            Error::Refused { operation, reason }
        }
    }
}

/// Takes an answer apart.
pub(super) fn read<T: FromRedisValue>(operation: &'static str, value: Value) -> Result<T, Error> {
    redis::from_redis_value(value).map_err(|error| Error::Refused {
        operation,
        reason: error.to_string(),
    })
}
