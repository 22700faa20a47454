//! The value of a chord whose header is nested: results joined in the structure that was saved
//! when the header was published.

use std::time::Duration;

use futures::future::BoxFuture;
use serde_json::Value;
use tokio::time::Instant;

use crate::protocol::exception::Exception;
use crate::worker::Worker;

const PAUSE: Duration = Duration::from_millis(50);

/// The values of a saved group's members. Its parts have all returned, so their results are
/// there, unless they are not stored at all; `result_chord_join_timeout` ends that wait.
pub(super) async fn group(worker: &Worker, tuple: &Value) -> Result<Vec<Value>, Exception> {
    let limit = worker.settings.result_chord_join_timeout;
    let limit = Duration::try_from_secs_f64(limit).unwrap_or(Duration::from_secs(3));
    let deadline = Instant::now() + limit;
    let mut values = Vec::new();
    for member in tuple.get(1).and_then(Value::as_array).into_iter().flatten() {
        values.push(value_of(worker, member, deadline).await?);
    }
    Ok(values)
}

fn value_of<'a>(
    worker: &'a Worker,
    tuple: &'a Value,
    deadline: Instant,
) -> BoxFuture<'a, Result<Value, Exception>> {
    Box::pin(async move {
        if let Some(members) = tuple.get(1).and_then(Value::as_array) {
            let mut values = Vec::with_capacity(members.len());
            for member in members {
                values.push(value_of(worker, member, deadline).await?);
            }
            return Ok(Value::Array(values));
        }
        let id = tuple
            .pointer("/0/0")
            .and_then(Value::as_str)
            .unwrap_or_default();
        loop {
            let stored = worker.backend.get(id).await;
            let stored = stored.map_err(|error| Exception::operational(error.to_string()))?;
            match stored {
                Some(meta) if meta.is_success() => return Ok(meta.result),
                Some(meta) if ["FAILURE", "REVOKED"].contains(&meta.status.as_str()) => {
                    let raised = Exception::from_value(&meta.result);
                    return Err(
                        raised.unwrap_or_else(|| Exception::builtin("Exception", meta.status))
                    );
                }
                _ if Instant::now() > deadline => {
                    let text = "The operation timed out.";
                    return Err(Exception::new(
                        "celery.exceptions",
                        "TimeoutError",
                        vec![text.into()],
                    ));
                }
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
    })
}
