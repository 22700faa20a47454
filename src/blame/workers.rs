//! Threads that work while the caller's thread reports and watches the interrupt flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use super::{Error, REPORT_EVERY, TICK};

/// Room for directories nested as deep as is allowed.
const STACK_BYTES: usize = 32 << 20;

/// Runs jobs side by side; the first failure stops them all.
pub(super) struct Workers<'a> {
    interrupt: &'a AtomicBool,
    stop: AtomicBool,
}

impl<'a> Workers<'a> {
    pub(super) fn new(interrupt: &'a AtomicBool) -> Workers<'a> {
        Workers {
            interrupt,
            stop: AtomicBool::new(false),
        }
    }

    /// The flag the jobs have to watch.
    pub(super) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// Gives back the answers of all jobs, in no particular order.
    pub(super) fn run<T, J>(&self, jobs: Vec<J>, report: &dyn Fn()) -> Result<Vec<T>, Error>
    where
        T: Send,
        J: FnOnce() -> Result<T, Error> + Send,
    {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let mut failure = None;
            for job in jobs {
                let sender = sender.clone();
                let started = thread::Builder::new()
                    .name("blame".to_owned())
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, move || {
                        // Nobody listens any more only if this scope panicked.
                        let _ = sender.send(job());
                    });
                if let Err(source) = started {
                    failure = self.fail(failure, Error::Thread { source });
                }
            }
            drop(sender);
            let mut answers = Vec::new();
            let mut reported = Instant::now();
            loop {
                if self.interrupt.load(Ordering::Relaxed) {
                    failure = self.fail(failure, Error::Interrupted);
                }
                match receiver.recv_timeout(TICK) {
                    Ok(Ok(answer)) => answers.push(answer),
                    Ok(Err(error)) => failure = self.fail(failure, error),
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        if reported.elapsed() >= REPORT_EVERY && failure.is_none() {
                            report();
                            reported = Instant::now();
                        }
                    }
                }
            }
            match failure {
                Some(error) => Err(error),
                None => Ok(answers),
            }
        })
    }

    /// The first failure counts; those that follow were caused by stopping.
    fn fail(&self, first: Option<Error>, error: Error) -> Option<Error> {
        self.stop.store(true, Ordering::Relaxed);
        first.or(Some(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until_stopped(workers: &Workers<'_>) -> Result<u32, Error> {
        while !workers.stop().load(Ordering::Relaxed) {
            thread::yield_now();
        }
        Err(Error::Interrupted)
    }

    #[test]
    fn a_failure_stops_the_others_and_is_the_one_that_is_told() {
        let interrupt = AtomicBool::new(false);
        let workers = Workers::new(&interrupt);
        let fails = |first: bool| match first {
            true => Err(Error::Lost {
                settled: 1,
                lines: 2,
            }),
            false => until_stopped(&workers),
        };
        let jobs: Vec<_> = [true, false].map(|first| move || fails(first)).into();
        let error = workers.run(jobs, &|| ()).unwrap_err();
        assert!(matches!(error, Error::Lost { .. }), "{error}");
    }

    #[test]
    fn the_interrupt_reaches_the_jobs() {
        let interrupt = AtomicBool::new(false);
        let workers = Workers::new(&interrupt);
        let job = || {
            interrupt.store(true, Ordering::Relaxed);
            until_stopped(&workers)
        };
        let error = workers.run(vec![job], &|| ()).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
    }
}
