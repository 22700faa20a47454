//! When what waits for its time is due: ETA and countdown.
//!
//! A heap of (time, serial number); the consumer's loop sleeps until the first is due.
//! Wall-clock times are turned into the monotonic clock once, on arrival. What is removed
//! elsewhere may stay here until it is due, and then comes to nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use tokio::time::Instant;

/// Serial numbers ordered by the moment they are due; equal moments keep their order.
#[derive(Debug, Default)]
pub struct Timer {
    heap: BinaryHeap<Reverse<(Instant, u64)>>,
}

impl Timer {
    /// Holds a number until `due`.
    pub fn push(&mut self, due: Instant, serial: u64) {
        self.heap.push(Reverse((due, serial)));
    }

    /// Takes every number that is due now.
    pub fn due(&mut self, now: Instant) -> Vec<u64> {
        let mut due = Vec::new();
        while let Some(&Reverse((when, serial))) = self.heap.peek() {
            if when > now {
                break;
            }
            self.heap.pop();
            due.push(serial);
        }
        due
    }

    /// Waits until the first is due; for ever when there is none. Cancel safe.
    pub async fn wait(&self) {
        match self.heap.peek() {
            Some(&Reverse((when, _))) => tokio::time::sleep_until(when).await,
            None => std::future::pending().await,
        }
    }

    /// Removes everything that does not satisfy `keep`.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.heap.retain(|Reverse((_, serial))| keep(*serial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn numbers_come_when_due_and_in_order() {
        let mut timer = Timer::default();
        let start = Instant::now();
        timer.push(start + Duration::from_secs(60), 3);
        timer.push(start + Duration::from_millis(30), 1);
        timer.push(start + Duration::from_millis(30), 2);
        assert!(timer.due(start).is_empty());
        timer.wait().await;
        assert_eq!(timer.due(Instant::now()), [1, 2]);
        timer.retain(|serial| serial != 3);
        assert!(timer.due(start + Duration::from_secs(90)).is_empty());
    }
}
