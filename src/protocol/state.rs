//! Task states as they are stored and shown.
//!
//! Answers for `celery.states`.

use std::fmt;

/// The state of a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// Not known to the backend.
    Pending,
    /// Received by a worker; an event state, never stored.
    Received,
    /// Running; stored only when tracked.
    Started,
    /// Returned.
    Success,
    /// Raised, was killed or never could start.
    Failure,
    /// Will be run again.
    Retry,
    /// Revoked or expired.
    Revoked,
    /// Rejected by its worker.
    Rejected,
    /// Asked to be ignored.
    Ignored,
    /// A state of the task's own, such as `PROGRESS`.
    Custom(String),
}

impl State {
    /// The name on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Pending => "PENDING",
            Self::Received => "RECEIVED",
            Self::Started => "STARTED",
            Self::Success => "SUCCESS",
            Self::Failure => "FAILURE",
            Self::Retry => "RETRY",
            Self::Revoked => "REVOKED",
            Self::Rejected => "REJECTED",
            Self::Ignored => "IGNORED",
            Self::Custom(name) => name,
        }
    }

    /// The state of that name; an unknown one is the task's own.
    pub fn parse(name: &str) -> Self {
        match name {
            "PENDING" => Self::Pending,
            "RECEIVED" => Self::Received,
            "STARTED" => Self::Started,
            "SUCCESS" => Self::Success,
            "FAILURE" => Self::Failure,
            "RETRY" => Self::Retry,
            "REVOKED" => Self::Revoked,
            "REJECTED" => Self::Rejected,
            "IGNORED" => Self::Ignored,
            other => Self::Custom(other.to_owned()),
        }
    }

    /// Whether the task has come to its end: success, failure or revoked.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Success | Self::Failure | Self::Revoked)
    }

    /// Whether the stored result is an exception.
    pub fn is_exception(&self) -> bool {
        matches!(self, Self::Failure | Self::Retry | Self::Revoked)
    }

    /// Whether it ended badly, so that its exception reaches a chord and errbacks.
    pub fn is_propagated(&self) -> bool {
        matches!(self, Self::Failure | Self::Revoked)
    }
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::State;

    #[test]
    fn every_name_is_read_back_as_the_state_that_wrote_it() {
        for name in [
            "PENDING", "RECEIVED", "STARTED", "SUCCESS", "FAILURE", "RETRY", "REVOKED", "REJECTED",
            "IGNORED", "PROGRESS",
        ] {
            assert_eq!(State::parse(name).as_str(), name);
        }
        assert_eq!(
            State::parse("PROGRESS"),
            State::Custom("PROGRESS".to_owned())
        );
        assert_ne!(State::parse("SUCCESS"), State::Custom("SUCCESS".to_owned()));
    }

    #[test]
    fn only_success_failure_and_revoked_are_final() {
        assert!(
            State::Success.is_ready() && State::Failure.is_ready() && State::Revoked.is_ready()
        );
        assert!(!State::Retry.is_ready() && !State::Started.is_ready());
        assert!(!State::Custom("PROGRESS".to_owned()).is_ready());
    }
}
