//! Reading replies, and the forms of commands several places need.

use redis::{Cmd, ServerError, Value};

use crate::transport::Error;

/// Wraps commands in MULTI and EXEC.
pub(super) fn transaction(commands: impl IntoIterator<Item = Cmd>) -> Vec<Cmd> {
    let mut all = vec![redis::cmd("MULTI")];
    all.extend(commands);
    all.push(redis::cmd("EXEC"));
    all
}

/// The error in a reply, also inside the reply to EXEC.
pub(super) fn refusal(reply: &Value) -> Option<&ServerError> {
    match reply {
        Value::ServerError(error) => Some(error),
        Value::Array(items) => items.iter().find_map(|item| match item {
            Value::ServerError(error) => Some(error),
            _ => None,
        }),
        _ => None,
    }
}

/// Whether the server cannot serve at all at the moment, so that another may have to be found.
pub(super) fn is_fatal(error: &ServerError) -> bool {
    matches!(
        error.code(),
        "LOADING" | "READONLY" | "MASTERDOWN" | "CLUSTERDOWN" | "NOAUTH" | "NOREPLICAS" | "BUSY"
    )
}

pub(super) fn refused(operation: &'static str, error: &ServerError) -> Error {
    Error::Refused {
        operation,
        reason: error.to_string(),
    }
}

/// The texts in an array or set of replies.
pub(super) fn texts(value: Value) -> Vec<String> {
    let (Value::Array(items) | Value::Set(items)) = value else {
        return Vec::new();
    };
    items
        .into_iter()
        .filter_map(|item| match item {
            Value::BulkString(text) => Some(String::from_utf8_lossy(&text).into_owned()),
            Value::SimpleString(text) => Some(text),
            Value::Double(number) => Some(number.to_string()),
            Value::Int(number) => Some(number.to_string()),
            _ => None,
        })
        .collect()
}
