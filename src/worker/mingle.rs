//! Mingle: at each connection, the clock and the revoked ids of the other workers.
//!
//! Answers for `celery.worker.consumer.mingle`. Nobody waits for it: the worker is of use
//! before the answers are in.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::Worker;
use crate::pidbox::{self, Mailbox};

/// How long other workers have to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks the other workers, and tells them what we know.
pub async fn mingle(worker: Arc<Worker>, mailbox: Mailbox, aloud: bool) {
    if aloud {
        log::info!("mingle: searching for neighbors");
    }
    let request = pidbox::Request {
        timeout: PATIENCE,
        ..pidbox::Request::new("hello")
            .with("from_node", worker.node.as_str())
            .with("revoked", worker.revoked.ids())
    };
    let mut count = 0;
    let mut namesakes = 0;
    let outcome = mailbox
        .call_each(&request, |reply, _| {
            if reply.node == worker.node {
                namesakes += 1;
                return;
            }
            if !reply.value.is_object() {
                return;
            }
            count += 1;
            log::debug!("mingle: sync with {}", reply.node);
            if let Some(clock) = reply.value.get("clock").and_then(Value::as_u64) {
                worker.clock.adjust(clock);
            }
            worker.revoked.add(revoked_ids(reply.value.get("revoked")));
        })
        .await;
    // One of them are we ourselves.
    if namesakes > 1 {
        super::gossip::warn_of_namesake(&worker.node, None);
    }
    match outcome {
        Err(error) => log::debug!("mingle: {error}"),
        Ok(()) if !aloud => {}
        Ok(()) if count == 0 => log::info!("mingle: all alone"),
        Ok(()) => {
            log::info!("mingle: sync with {count} nodes");
            log::info!("mingle: sync complete");
        }
    }
}

/// Revoked ids as workers send them: a list, or (before 5.7) an object by id.
pub fn revoked_ids(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::Array(ids)) => ids
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        Some(Value::Object(ids)) => ids.keys().cloned().collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::revoked_ids;
    use serde_json::json;

    #[test]
    fn revoked_ids_come_as_a_list_or_with_their_times() {
        assert_eq!(revoked_ids(Some(&json!(["a", 1, "b"]))), ["a", "b"]);
        assert_eq!(revoked_ids(Some(&json!({"a": 1.5}))), ["a"]);
        assert!(revoked_ids(Some(&json!("a"))).is_empty());
        assert!(revoked_ids(None).is_empty());
    }
}
