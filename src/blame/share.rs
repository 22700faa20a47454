//! Work for threads, and work that changes hands while it is done.
//!
//! The files begin as one part for each thread. No count of files or lines tells beforehand how long a part takes,
//! so a thread that has nothing left says so, and one that is still walking gives it half of what it has:
//! everything that is live at paths from some path on, at all commits at once. More and smaller parts from the
//! start would balance as well, but each walks through the same trees again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Error;
use super::shard::Live;
use crate::git::history::CommitIndex;

/// What is live where; the commit with the smallest number is next.
pub(super) type Pending = BTreeMap<CommitIndex, Live>;

/// Some files on their way through history.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) pending: Pending,
    /// Commits passed so far.
    pub(super) passed: u64,
    /// Its share of the work, as far as progress is concerned; all shares together are [`WHOLE`].
    pub(super) share: u64,
}

/// All shares together.
pub(super) const WHOLE: u64 = 1 << 20;

/// A thread that waits looks at the flag that stops it so often.
const PATIENCE: Duration = Duration::from_millis(20);

/// Parts nobody works at, and the threads that wait for one.
#[derive(Debug, Default)]
pub(super) struct Share {
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that wait and will not find a part; read without the lock by those that work.
    wanted: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    parts: Vec<Part>,
    /// Threads that work, and may still give something away.
    working: usize,
    waiting: usize,
}

impl Share {
    /// These parts, in this order.
    pub(super) fn new(mut parts: Vec<Part>) -> Share {
        parts.reverse();
        Share {
            state: Mutex::new(State {
                parts,
                ..State::default()
            }),
            ..Share::default()
        }
    }

    /// The next part; waits for one as long as there may still be one.
    pub(super) fn take(&self, stop: &AtomicBool) -> Result<Option<Taken<'_>>, Error> {
        let mut state = self.lock();
        state.waiting += 1;
        self.tell(&state);
        let part = loop {
            if stop.load(Ordering::Relaxed) {
                break Err(Error::Interrupted);
            }
            if let Some(part) = state.parts.pop() {
                state.working += 1;
                break Ok(Some(part));
            }
            if state.working == 0 {
                break Ok(None);
            }
            let waited = self.changed.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        self.tell(&state);
        Ok(part?.map(|part| Taken { part, share: self }))
    }

    /// Whether a thread waits for work.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Gives a part away.
    pub(super) fn give(&self, part: Part) {
        let mut state = self.lock();
        state.parts.push(part);
        // Whoever waits for it may take a while to wake up; it must not get two.
        self.tell(&state);
        self.changed.notify_all();
    }

    fn tell(&self, state: &State) {
        let wanted = state.waiting.saturating_sub(state.parts.len());
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked held it for no more than a push or a pop.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part somebody works at, until this is dropped.
pub(super) struct Taken<'s> {
    pub(super) part: Part,
    share: &'s Share,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.share.lock().working -= 1;
        self.share.changed.notify_all();
    }
}

/// Cuts off about half of what is live, or nothing if that is not worth it.
pub(super) fn cut(pending: &mut Pending) -> Option<Pending> {
    // Nearly everything is at one commit, or the same paths are at several.
    let largest = pending.values().max_by_key(|live| live.files())?;
    if largest.files() < FEWEST_FILES {
        return None;
    }
    let path = largest.middle(&|ranges| ranges.len() as u64)?;
    let mut cut = Pending::new();
    pending.retain(|&commit, live| {
        let rest = live.split_off(&path);
        if !rest.is_empty() {
            cut.insert(commit, rest);
        }
        !live.is_empty()
    });
    Some(cut)
}

/// With fewer live files than this the rest is not worth sharing.
const FEWEST_FILES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::ranges::{self, Range};

    fn pending(count: u32) -> Pending {
        let mut pending = Pending::new();
        for commit in [3, 9] {
            let live: &mut Live = pending.entry(commit).or_default();
            for file in 0..count {
                let path = format!("{}/{}/f{file}", file % 3, file % 7);
                let all = Range {
                    start: 0,
                    len: file + 1,
                    file,
                };
                live.insert(path.as_bytes(), vec![all], ranges::union)
                    .unwrap();
            }
        }
        pending
    }

    fn lines(pending: &Pending) -> Vec<(u32, u32)> {
        let mut lines = Vec::new();
        for live in pending.values() {
            live.each(&mut |_, ranges| lines.extend(ranges.iter().map(|r| (r.file, r.len))));
        }
        lines.sort_unstable();
        lines
    }

    #[test]
    fn a_cut_loses_nothing_and_leaves_about_half() {
        for count in [4, 5, 50, 300] {
            let mut kept = pending(count);
            let all = lines(&kept);
            let given = cut(&mut kept).unwrap();
            let mut both = lines(&kept);
            assert!(
                both.len() >= all.len() / 3,
                "{} of {}",
                both.len(),
                all.len()
            );
            let given = lines(&given);
            assert!(
                given.len() >= all.len() / 3,
                "{} of {}",
                given.len(),
                all.len()
            );
            both.extend(given);
            both.sort_unstable();
            assert_eq!(both, all);
        }
        assert!(cut(&mut pending(3)).is_none());
    }

    #[test]
    fn who_waits_gets_what_is_given_and_leaves_when_nobody_works_any_more() {
        let share = Share::new(vec![Part {
            share: WHOLE,
            ..Part::default()
        }]);
        let stop = AtomicBool::new(false);
        let first = share.take(&stop).unwrap().unwrap();
        // Asking again counts as waiting again, so the other thread must not before this one has looked.
        let looked = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let taken = share.take(&stop).unwrap().map(|taken| taken.part.share);
                looked.wait();
                (taken, share.take(&stop).unwrap().is_some())
            });
            while !share.is_wanted() {
                std::thread::yield_now();
            }
            share.give(Part {
                share: 7,
                ..Part::default()
            });
            let wanted = share.is_wanted();
            looked.wait();
            assert!(!wanted);
            drop(first);
            assert_eq!(other.join().unwrap(), (Some(7), false));
        });
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(share.take(&stop), Err(Error::Interrupted)));
    }
}
