//! Waiting for a condition with a deadline, for what gives no signal of its own.

use std::time::{Duration, Instant};

/// No wait is shorter: on a busy machine everything takes longer, and who waits in vain fails anyway.
const LEAST: Duration = Duration::from_secs(60);

/// Asks until the condition yields something; panics with `what` when the deadline passes.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let (start, deadline) = (Instant::now(), deadline.max(LEAST));
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < deadline,
            "waited {deadline:?} in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
