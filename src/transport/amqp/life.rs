//! How long a channel lives, and what ended it.

use tokio::sync::watch;

use crate::transport::Error;

/// Shared by everything that belongs to one channel; the first fault ends all of it.
#[derive(Clone)]
pub(super) struct Life(watch::Sender<Option<End>>);

#[derive(Clone)]
enum End {
    Closed,
    Fault(&'static str, String),
}

impl Life {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// The end has come; only the first reason counts.
    pub(super) fn fail(&self, error: Error) {
        self.0.send_if_modified(|end| {
            if end.is_some() {
                return false;
            }
            *end = Some(match error {
                Error::Connection { operation, reason } | Error::Refused { operation, reason } => {
                    End::Fault(operation, reason)
                }
                Error::Closed => End::Closed,
                Error::Url(reason) => End::Fault("connecting to RabbitMQ", reason),
            });
            true
        });
    }

    /// What ended it, if it has ended.
    pub(super) fn error(&self) -> Option<Error> {
        self.0.borrow().as_ref().map(|end| match end {
            End::Closed => Error::Closed,
            End::Fault(operation, reason) => Error::Connection {
                operation,
                reason: reason.clone(),
            },
        })
    }

    /// Waits for the end.
    pub(super) async fn over(&self) {
        // We hold a sender, so it cannot end otherwise.
        drop(self.0.subscribe().wait_for(Option::is_some).await);
    }

    /// Waits for the end and says what it was.
    pub(super) async fn end(&self) -> Error {
        self.over().await;
        self.error().unwrap_or(Error::Closed)
    }
}
