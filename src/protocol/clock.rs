//! The logical clock that orders events of all workers of a cluster.
//!
//! Answers for `kombu.clocks.LamportClock`. Shared by everything that sends or receives
//! events; cloning shares the same counter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A Lamport clock.
#[derive(Debug, Clone, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// A clock that starts at `value`, for one read back from a state file.
    pub fn new(value: u64) -> Self {
        Self(Arc::new(AtomicU64::new(value)))
    }

    /// Counts one event of our own and returns its time.
    pub fn forward(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Takes note of the time another node gave: afterwards ours is later than both.
    pub fn adjust(&self, other: u64) -> u64 {
        // A hostile node may send u64::MAX; the clock then stays behind it instead of
        // wrapping to zero, which would put all later events before all earlier ones.
        let after = |own: u64| own.max(other.min(u64::MAX / 2)).saturating_add(1);
        match self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |own| Some(after(own)))
        {
            Ok(own) | Err(own) => after(own),
        }
    }

    /// The time of the latest event.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Clock;

    #[test]
    fn the_clock_is_later_than_what_it_has_seen() {
        let clock = Clock::new(5);
        assert_eq!(clock.forward(), 6);
        assert_eq!(clock.adjust(3), 7);
        assert_eq!(clock.adjust(100), 101);
        assert_eq!(clock.clone().forward(), 102);
        assert_eq!(clock.value(), 102);
    }

    #[test]
    fn a_time_at_the_end_of_the_range_does_not_wrap_the_clock() {
        let clock = Clock::default();
        clock.adjust(u64::MAX);
        let before = clock.value();
        assert!(clock.forward() > before);
    }
}
