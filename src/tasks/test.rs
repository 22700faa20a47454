//! `test_task(message)`: a connection check. It succeeds with a text that holds the message.

use serde_json::Value;

use super::Definition;
use crate::protocol::arguments::{Parameter, Parameters};
use crate::protocol::saferepr;

/// `test_task`.
pub struct Test;

impl Definition for Test {
    const NAME: &'static str = "test_task";
}

/// `def test_task(message)`.
pub const PARAMETERS: Parameters = Parameters {
    function: "test_task",
    names: &[Parameter::required("message")],
};

/// The result for one bound argument.
pub fn answer(message: &Value) -> Value {
    Value::String(format!("celeriac received: {}", saferepr::str(message)))
}
