//! Requests that wait for their time: ETA and countdown.
//!
//! A heap of (time, number) beside the waiting items; the consumer's loop sleeps until the
//! first is due. Wall-clock times are turned into the monotonic clock once, on arrival.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use tokio::time::Instant;

/// Items ordered by the moment they are due; equal moments keep their order of arrival.
#[derive(Debug)]
pub struct Timer<T> {
    heap: BinaryHeap<Reverse<(Instant, u64)>>,
    items: HashMap<u64, T>,
    next: u64,
}

impl<T> Default for Timer<T> {
    fn default() -> Self {
        Self {
            heap: BinaryHeap::new(),
            items: HashMap::new(),
            next: 0,
        }
    }
}

impl<T> Timer<T> {
    /// Holds an item until `due`.
    pub fn push(&mut self, due: Instant, item: T) {
        self.heap.push(Reverse((due, self.next)));
        self.items.insert(self.next, item);
        self.next += 1;
    }

    /// How many items wait.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes every item that is due now.
    pub fn due(&mut self, now: Instant) -> Vec<T> {
        let mut due = Vec::new();
        while let Some(&Reverse((when, number))) = self.heap.peek() {
            if when > now {
                break;
            }
            self.heap.pop();
            due.extend(self.items.remove(&number));
        }
        due
    }

    /// Waits until the first item is due; for ever when there is none. Cancel safe.
    pub async fn wait(&self) {
        match self.heap.peek() {
            Some(&Reverse((when, _))) => tokio::time::sleep_until(when).await,
            None => std::future::pending().await,
        }
    }

    /// Removes everything that does not satisfy `keep`.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.items.retain(|_, item| keep(item));
        let items = &self.items;
        self.heap
            .retain(|Reverse((_, number))| items.contains_key(number));
    }

    /// The waiting items, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn items_come_when_due_and_in_order() {
        let mut timer = Timer::default();
        let start = Instant::now();
        timer.push(start + Duration::from_secs(60), "later");
        timer.push(start + Duration::from_millis(30), "first");
        timer.push(start + Duration::from_millis(30), "second");
        assert!(timer.due(start).is_empty());
        timer.wait().await;
        assert_eq!(timer.due(Instant::now()), ["first", "second"]);
        timer.retain(|item| *item != "later");
        assert!(timer.is_empty() && timer.due(start + Duration::from_secs(90)).is_empty());
    }
}
