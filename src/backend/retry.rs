//! How often a backend that is away is tried again, and with which pauses.
//!
//! Answers for `retry_policy` in `result_backend_transport_options` and for
//! `result_backend_always_retry`.

use std::future::Future;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::Options;
use super::error::Error;

/// Celery's retry policy: the pause begins with `start` and grows by `step` up to `max`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Tries after the first; `None` is for ever.
    pub max_retries: Option<u32>,
    /// Pause before the first retry.
    pub start: Duration,
    /// What each further pause adds.
    pub step: Duration,
    /// The longest pause.
    pub max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_retries: Some(20),
            start: Duration::ZERO,
            step: Duration::from_secs(1),
            max: Duration::from_secs(1),
        }
    }
}

impl RetryPolicy {
    /// What the options say together: `result_backend_max_retries` goes before
    /// `result_backend_always_retry`, and that before `retry_policy`.
    pub(crate) fn of(options: &Options) -> Self {
        let mut policy = Self::from_options(&options.transport_options);
        if options.always_retry {
            policy.max_retries = None;
        }
        policy.max_retries = options.max_retries.or(policy.max_retries);
        policy
    }

    /// The default with what `retry_policy` of the transport options says.
    pub fn from_options(options: &Map<String, Value>) -> Self {
        let mut policy = Self::default();
        let Some(Value::Object(given)) = options.get("retry_policy") else {
            return policy;
        };
        let seconds = |key: &str, fallback| {
            let number = given.get(key).and_then(Value::as_f64);
            number
                .and_then(|number| Duration::try_from_secs_f64(number).ok())
                .unwrap_or(fallback)
        };
        policy.start = seconds("interval_start", policy.start);
        policy.step = seconds("interval_step", policy.step);
        policy.max = seconds("interval_max", policy.max);
        match given.get("max_retries") {
            Some(Value::Null) => policy.max_retries = None,
            Some(number) => {
                let number = number
                    .as_u64()
                    .and_then(|number| u32::try_from(number).ok());
                policy.max_retries = number.or(policy.max_retries);
            }
            None => {}
        }
        policy
    }

    /// The pause before retry number `retry`, from 1.
    pub fn pause(&self, retry: u32) -> Duration {
        let grown = self.step.saturating_mul(retry.saturating_sub(1));
        self.start.saturating_add(grown).min(self.max)
    }
}

/// Retries for one backend, and its complaint in the log, made once a second however many
/// results wait.
pub(crate) struct Retrier {
    pub(crate) policy: RetryPolicy,
    /// What connection was lost: `Redis`, `the database`.
    to: &'static str,
    complained: Mutex<Option<Instant>>,
}

impl Retrier {
    pub(crate) fn new(policy: RetryPolicy, to: &'static str) -> Self {
        Self {
            policy,
            to,
            complained: Mutex::new(None),
        }
    }

    /// Calls `attempt` until it succeeds, fails for good, or the tries are used up.
    pub(crate) async fn run<T, F, A>(&self, mut attempt: F) -> Result<T, Error>
    where
        F: FnMut() -> A,
        A: Future<Output = Result<T, Error>>,
    {
        let mut retry = 0;
        loop {
            let error = match attempt().await {
                Err(error) if error.is_transient() => error,
                outcome => return outcome,
            };
            retry += 1;
            if self.policy.max_retries.is_some_and(|most| retry > most) {
                return Err(error);
            }
            let pause = self.policy.pause(retry);
            self.complain(retry, pause, &error);
            tokio::time::sleep(pause).await;
        }
    }

    fn complain(&self, retry: u32, pause: Duration, error: &Error) {
        let mut complained = self
            .complained
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if complained.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            return;
        }
        *complained = Some(Instant::now());
        let most = match self.policy.max_retries {
            Some(most) => most.to_string(),
            None => "Inf".to_owned(),
        };
        let when = match pause.is_zero() {
            true => "now".to_owned(),
            false => format!("in {:.2} seconds", pause.as_secs_f64()),
        };
        log::warn!(
            "Connection to {} lost: Retry ({retry}/{most}) {when}. {error}",
            self.to
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pauses_are_none_then_a_second() {
        let policy = RetryPolicy::default();
        let pauses: Vec<_> = (1..=4).map(|retry| policy.pause(retry).as_secs()).collect();
        assert_eq!(pauses, [0, 1, 1, 1]);
    }

    #[test]
    fn the_policy_of_the_transport_options_is_taken_over() {
        let options = json!({"retry_policy": {"max_retries": 3, "interval_start": 0.5,
            "interval_step": 0.25, "interval_max": 0.8}});
        let policy = RetryPolicy::from_options(options.as_object().unwrap());
        assert_eq!(policy.max_retries, Some(3));
        let pauses: Vec<_> = (1..=4)
            .map(|retry| policy.pause(retry).as_millis())
            .collect();
        assert_eq!(pauses, [500, 750, 800, 800]);
        let for_ever = json!({"retry_policy": {"max_retries": null}});
        let policy = RetryPolicy::from_options(for_ever.as_object().unwrap());
        assert_eq!(policy.max_retries, None);
    }

    #[test]
    fn the_more_particular_setting_decides_how_often() {
        let given = json!({"retry_policy": {"max_retries": 3}});
        let given = given.as_object().unwrap();
        for (policy, always_retry, max_retries, tries) in [
            (false, false, None, Some(20)),
            (true, false, None, Some(3)),
            (true, true, None, None),
            (true, true, Some(7), Some(7)),
            (true, false, Some(7), Some(7)),
        ] {
            let options = Options {
                transport_options: if policy { given.clone() } else { Map::new() },
                always_retry,
                max_retries,
                ..Options::default()
            };
            assert_eq!(RetryPolicy::of(&options).max_retries, tries, "{options:?}");
        }
    }

    #[tokio::test]
    async fn tries_are_counted_and_the_last_error_returned() {
        let at_once = RetryPolicy {
            max: Duration::ZERO,
            ..RetryPolicy::default()
        };
        let retrier = Retrier::new(at_once, "Redis");
        let mut tries = 0;
        let outcome: Result<(), _> = retrier
            .run(|| {
                tries += 1;
                async {
                    Err(Error::Unavailable {
                        operation: "store the result",
                        reason: "x".into(),
                    })
                }
            })
            .await;
        assert!(outcome.is_err_and(|error| error.is_transient()));
        assert_eq!(tries, 21);
    }

    #[tokio::test]
    async fn what_cannot_heal_is_not_tried_again() {
        let retrier = Retrier::new(RetryPolicy::default(), "Redis");
        let mut tries = 0;
        let outcome: Result<(), _> = retrier
            .run(|| {
                tries += 1;
                async {
                    Err(Error::Refused {
                        operation: "store the result",
                        reason: "x".into(),
                    })
                }
            })
            .await;
        assert!(outcome.is_err());
        assert_eq!(tries, 1);
    }
}
