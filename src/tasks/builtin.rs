//! Tasks that every Celery worker has, and that clients, beat and other workers count on.
//!
//! `celery.chord_unlock` watches the parts of a chord where the result backend cannot count
//! them, `celery.backend_cleanup` removes expired results, `celery.accumulate` collects the
//! results of a group that took a task's place. The other names that Python registers have no
//! use here: `celery.group`, `celery.chord` and `celery.chain` are published by no Celery since
//! 4.0, and `celery.map`, `celery.starmap` and `celery.chunks` call Python functions in one
//! process, where the tasks of this worker have time limits, children and results of their own.

use serde_json::{Map, Value};

use super::Definition;

/// Before the name of every built-in task.
pub const PREFIX: &str = "celery.";

/// `celery.chord_unlock`.
pub struct ChordUnlock;

impl Definition for ChordUnlock {
    const NAME: &'static str = "celery.chord_unlock";
}

/// `celery.backend_cleanup`.
pub struct BackendCleanup;

impl Definition for BackendCleanup {
    const NAME: &'static str = "celery.backend_cleanup";
}

/// `celery.accumulate`.
pub struct Accumulate;

impl Definition for Accumulate {
    const NAME: &'static str = "celery.accumulate";
}

/// The result of `celery.accumulate(*args, index=None)`; the error is Python's IndexError.
pub fn accumulate(args: &[Value], kwargs: &Map<String, Value>) -> Result<Value, &'static str> {
    let Some(index) = kwargs.get("index").and_then(Value::as_i64) else {
        return Ok(Value::Array(args.to_vec()));
    };
    let position = if index < 0 {
        index
            .unsigned_abs()
            .try_into()
            .ok()
            .and_then(|back| args.len().checked_sub(back))
    } else {
        usize::try_from(index).ok()
    };
    let found = position.and_then(|position| args.get(position));
    found.cloned().ok_or("tuple index out of range")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn accumulate_gives_all_arguments_or_the_one_asked_for() {
        let args = [json!(1), json!("b")];
        let of = |kwargs: Value| accumulate(&args, kwargs.as_object().unwrap());
        assert_eq!(of(json!({})), Ok(json!([1, "b"])));
        assert_eq!(of(json!({"index": 1})), Ok(json!("b")));
        assert_eq!(of(json!({"index": -2})), Ok(json!(1)));
        for index in [2, -3] {
            assert_eq!(of(json!({"index": index})), Err("tuple index out of range"));
        }
    }
}
