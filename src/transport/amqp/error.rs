//! lapin's errors in the transport's words.
//!
//! What RabbitMQ says is kept; where the reader can do something about it, the text says what.
//! No text here contains a password: lapin's errors do not.

use lapin::ErrorKind;

use crate::transport::Error;

/// AMQP's reply codes that mean "not like this" while the connection stays good. 404 is among
/// them only where it means that there is no such thing ([`MISSING`]): a queue whose node is down
/// is not found for a while.
const REFUSALS: [u16; 3] = [403, 405, 406];
const NOT_FOUND: u16 = 404;
const MISSING: &str = "NOT_FOUND - no ";

/// A fault of an operation.
pub(super) fn failed(operation: &'static str, error: &lapin::Error) -> Error {
    let reason = explain(error);
    match error.kind() {
        ErrorKind::ProtocolError(error)
            if REFUSALS.contains(&error.get_id())
                || (error.get_id() == NOT_FOUND
                    && error.get_message().as_str().starts_with(MISSING)) =>
        {
            Error::Refused { operation, reason }
        }
        _ => Error::Connection { operation, reason },
    }
}

/// The same where only a new channel can help.
pub(super) fn broken(operation: &'static str, error: &lapin::Error) -> Error {
    Error::Connection {
        operation,
        reason: explain(error),
    }
}

/// What was said, and what to do about it.
pub(super) fn explain(error: &lapin::Error) -> String {
    let ErrorKind::ProtocolError(protocol) = error.kind() else {
        return error.to_string();
    };
    let text = protocol.get_message().as_str();
    if protocol.get_id() == 406 && text.contains("delivery acknowledgement") {
        let limit = milliseconds(text).map_or_else(String::new, |milliseconds| {
            format!(" of {} seconds", milliseconds as f64 / 1000.0)
        });
        return format!(
            "RabbitMQ closed the channel, because a message was held longer than its \
             consumer_timeout{limit} without being acknowledged. The message comes again and a \
             running task goes on. Set consumer_timeout in rabbitmq.conf (milliseconds), or \
             x-consumer-timeout by a policy of the queue, above task_time_limit and the longest \
             ETA ({text})"
        );
    }
    if protocol.get_id() == 406 && text.contains("inequivalent arg") {
        return format!(
            "{text}. The queue or exchange exists with other attributes; configure the same \
             ones here, or delete it so that it can be made again"
        );
    }
    format!("{} {text}", protocol.get_id())
}

/// The number in front of ` ms`.
fn milliseconds(text: &str) -> Option<u64> {
    let (before, _) = text.split_once(" ms")?;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use lapin::protocol::{AMQPError, AMQPHardError, AMQPSoftError};

    use super::*;

    fn soft(kind: AMQPSoftError, text: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind.into(), text.into())).into()
    }

    #[test]
    fn consumer_timeout_is_named_with_its_limit_and_remedy() {
        let error = soft(
            AMQPSoftError::PRECONDITIONFAILED,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout \
             value used: 10000 ms. This timeout value can be configured, see consumers doc guide",
        );
        let text = broken("consuming", &error).to_string();
        assert!(text.contains("consumer_timeout of 10 seconds"), "{text}");
        assert!(text.contains("rabbitmq.conf"), "{text}");
    }

    #[test]
    fn refusals_are_told_from_what_a_new_connection_may_cure() {
        let refused = soft(
            AMQPSoftError::PRECONDITIONFAILED,
            "inequivalent arg 'durable'",
        );
        assert!(!failed("declaring", &refused).is_connection());
        let missing = soft(
            AMQPSoftError::NOTFOUND,
            "NOT_FOUND - no queue 'q' in vhost '/'",
        );
        assert!(!failed("purging", &missing).is_connection());
        let away = soft(
            AMQPSoftError::NOTFOUND,
            "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' is down or inaccessible",
        );
        assert!(failed("declaring", &away).is_connection());
        let forced = AMQPError::new(AMQPHardError::CONNECTIONFORCED.into(), "shutdown".into());
        let forced = ErrorKind::ProtocolError(forced).into();
        assert!(failed("declaring", &forced).is_connection());
    }
}
