//! The wish to stop, as long work sees it.
//!
//! A flag is cheap to look at, but not for every byte. Loops say how much they have done, in bytes of text or in
//! steps that cost about as much as one; the flag is looked at once per [`STRIDE`] of it, which is a millisecond or
//! a few. No loop may do more than that between two reports: the tests of each stage count it.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Error;

/// Work between two looks at the flag.
pub const STRIDE: usize = 1 << 20;

/// A flag somebody else sets, and how much work may still be done without a look at it.
#[derive(Debug)]
pub struct Interrupt<'a> {
    flag: &'a AtomicBool,
    left: Cell<usize>,
    #[cfg(test)]
    count: Count,
}

/// What the tests count.
#[cfg(test)]
#[derive(Debug, Default)]
pub(in crate::git) struct Count {
    /// All work reported.
    pub(in crate::git) done: Cell<usize>,
    /// The largest report.
    pub(in crate::git) most: Cell<usize>,
    /// So much work sets the flag.
    stops_after: Cell<Option<usize>>,
}

impl<'a> Interrupt<'a> {
    /// Work ends when this is set.
    pub const fn new(flag: &'a AtomicBool) -> Interrupt<'a> {
        Interrupt {
            flag,
            left: Cell::new(STRIDE),
            #[cfg(test)]
            count: Count {
                done: Cell::new(0),
                most: Cell::new(0),
                stops_after: Cell::new(None),
            },
        }
    }

    /// For work that nobody wants to stop.
    pub const fn never() -> Interrupt<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Interrupt::new(&NEVER)
    }

    /// An error if the flag is set.
    pub fn look(&self) -> Result<(), Error> {
        if self.flag.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Reports work, done or about to be done; an error if the flag was seen to be set.
    #[inline]
    pub fn work(&self, amount: usize) -> Result<(), Error> {
        #[cfg(test)]
        self.count(amount);
        match self.left.get().checked_sub(amount) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.left.set(STRIDE);
                self.look()
            }
        }
    }
}

#[cfg(test)]
impl<'a> Interrupt<'a> {
    fn count(&self, amount: usize) {
        let count = &self.count;
        count.done.set(count.done.get() + amount);
        count.most.set(count.most.get().max(amount));
        if count
            .stops_after
            .get()
            .is_some_and(|limit| count.done.get() > limit)
        {
            self.flag.store(true, Ordering::Relaxed);
        }
    }

    /// Asserts that `stage` reports at least `least` work in small portions, and that it ends with
    /// [`Error::Interrupted`] soon after the flag is set, whenever that is. Counts work, not time.
    pub(in crate::git) fn check(
        least: usize,
        mut stage: impl FnMut(&Interrupt<'_>) -> Result<(), Error>,
    ) {
        let flag = AtomicBool::new(false);
        let whole = Interrupt::new(&flag);
        stage(&whole).unwrap();
        let all = whole.count.done.get();
        assert!(all >= least, "only {all} of {least} were reported");
        let most = whole.count.most.get();
        assert!(most <= STRIDE, "{most} at once");
        for eighth in 0..8 {
            let moment = all * eighth / 8;
            let flag = AtomicBool::new(false);
            let interrupt = Interrupt::new(&flag);
            interrupt.count.stops_after.set(Some(moment));
            let answer = stage(&interrupt);
            let after = interrupt.count.done.get() - moment;
            assert!(
                after <= 2 * STRIDE,
                "set after {moment} of {all}, {after} more were done"
            );
            // What ends within a stride of the flag may end without having seen it.
            assert!(
                matches!(answer, Err(Error::Interrupted)) || all - moment <= 2 * STRIDE,
                "set after {moment} of {all}: {answer:?}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_seen_within_a_stride_of_work() {
        let flag = AtomicBool::new(false);
        let interrupt = Interrupt::new(&flag);
        interrupt.work(STRIDE * 3).unwrap();
        flag.store(true, Ordering::Relaxed);
        assert!(interrupt.look().is_err());
        let mut done = 0;
        while interrupt.work(1000).is_ok() {
            done += 1000;
        }
        assert!((STRIDE - 1000..=STRIDE).contains(&done), "{done}");
    }

    #[test]
    fn a_stage_that_does_not_report_is_found_out() {
        let silent = std::panic::catch_unwind(|| Interrupt::check(10, |_| Ok(())));
        assert!(silent.is_err());
        let deaf = std::panic::catch_unwind(|| {
            Interrupt::check(STRIDE * 16, |interrupt| {
                (0..16).for_each(|_| drop(interrupt.work(STRIDE)));
                Ok(())
            });
        });
        assert!(deaf.is_err());
        Interrupt::check(STRIDE * 16, |interrupt| {
            (0..16).try_for_each(|_| interrupt.work(STRIDE))
        });
    }
}
