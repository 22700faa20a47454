//! One place of the pool while somebody holds it, and one child's job as the parent sees it.
//!
//! ```text
//! acquire ─▶ Slot ─ run ─▶ job written ─ Started ─▶ Progress, Log … ─▶ Success │ Failure
//!                              │ soft limit: a word on the control socket, go on
//!                              │ hard limit, terminate, kill: group killed ─▶ HardTimeLimit │ Terminated
//!                              └ socket ends or talks nonsense ─▶ Lost
//! drop ─▶ the place is free again: same child, or the spare when the child is worn or gone
//! ```
//!
//! Whatever happens to the future of [`Slot::run`], the place stays usable: a child that was left
//! in the middle of a job is killed when the slot is dropped.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Error;
use super::frame::{Control, Decoder, Encoded, LIMIT, Order, Report, Secrecy};
use super::job::{Event, Job, Outcome};
use super::places::Shared;
use super::process::{self, Handle, Spawned};
use super::sandbox::Sandbox;

/// How long a killed process may take to disappear before its job is answered without waiting.
const DISAPPEARING: Duration = Duration::from_secs(5);

/// How long a child may take to get ready.
const READY: Duration = Duration::from_secs(20);

/// A child that is ready for jobs. Owned by its place, or by the slot while that is held.
pub(super) struct Child {
    pub handle: Arc<Handle>,
    /// Jobs it has been given.
    pub tasks: u64,
    /// The pool's generation it was started in; an older one is replaced.
    pub generation: u64,
    jobs: UnixStream,
    decoder: Decoder,
    /// See [`Child::is_spent`].
    spent: bool,
}

impl Child {
    /// Tells a fresh child who it is and waits until it is ready; with it come the warnings of
    /// its sandbox.
    pub(super) async fn prepare(
        spawned: Spawned,
        sandbox: &Sandbox,
        log_level: log::LevelFilter,
        generation: u64,
    ) -> Result<(Child, Vec<String>), Error> {
        let Spawned { handle, jobs } = spawned;
        let name = handle.name.clone();
        let prepare = async {
            let jobs = UnixStream::from_std(jobs).map_err(socket_error("send"))?;
            let mut sandbox = sandbox.clone();
            if handle.directory.is_some() {
                sandbox.directory.clone_from(&handle.directory);
            }
            let mut child = Child {
                handle: Arc::clone(&handle),
                tasks: 0,
                generation,
                jobs,
                decoder: Decoder::new(LIMIT, Secrecy::Plain),
                spent: false,
            };
            let setup = Order::Setup {
                name: handle.name.clone(),
                sandbox,
                log_level: log_level as u8,
            };
            child
                .write(&Encoded::new(&setup, LIMIT, Secrecy::Plain)?)
                .await?;
            match child.read().await? {
                Some(Report::Ready { warnings }) => Ok::<_, Error>(Some((child, warnings))),
                _ => Ok(None),
            }
        };
        let result = match tokio::time::timeout(READY, prepare).await {
            Ok(Ok(Some(ready))) => return Ok(ready),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("not ready after {} s", READY.as_secs())),
        };
        let ended = end(&handle).await;
        Err(Error::Stillborn {
            name,
            reason: result.unwrap_or(ended),
        })
    }

    /// Whether it can take another job.
    pub(super) fn is_sound(&self) -> bool {
        !self.spent && self.handle.exit.borrow().is_none()
    }

    /// Whether it may not have another job: it is in the middle of one that nobody waits for,
    /// said that it leaves, or was signalled.
    pub(super) fn is_spent(&self) -> bool {
        self.spent
    }

    async fn write(&mut self, frame: &Encoded) -> Result<(), Error> {
        let mut rest = frame.bytes();
        while !rest.is_empty() {
            match self.jobs.try_write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.jobs.writable().await.map_err(socket_error("send"))?;
                }
                Err(error) => return Err(socket_error("send")(error)),
            }
        }
        Ok(())
    }

    /// The next report, `None` at the end of the socket.
    async fn read(&mut self) -> Result<Option<Report>, Error> {
        loop {
            if let Some(report) = self.decoder.next()? {
                return Ok(Some(report));
            }
            match self.jobs.try_read(self.decoder.space()) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.filled(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.jobs.readable().await.map_err(socket_error("read"))?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(socket_error("read")(error)),
            }
        }
    }

    async fn run(
        &mut self,
        job: Job,
        terminated: &AtomicI32,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Outcome {
        let begun = Instant::now();
        let mut soft = job.soft_limit.and_then(|limit| begun.checked_add(limit));
        let hard = job
            .hard_limit
            .and_then(|limit| Some((limit, begun.checked_add(limit)?)));
        let sequence = self.tasks + 1;
        let frame = match Encoded::new(&Order::Job { sequence, job }, LIMIT, Secrecy::Wipe) {
            Ok(frame) => frame,
            Err(error) => {
                return Outcome::Lost {
                    reason: error.to_string(),
                };
            }
        };
        // From here to a complete report the child is of no use to anybody else.
        self.spent = true;
        self.tasks = sequence;
        let written = match hard {
            Some((_, at)) => tokio::time::timeout_at(at, self.write(&frame)).await.ok(),
            None => Some(self.write(&frame).await),
        };
        drop(frame);
        if let Some(Ok(())) = written {
            // A receiver that has gone away does not want to know.
            let _ = events.send(Event::Started {
                pid: self.handle.pid.as_raw().cast_unsigned(),
            });
        } else if let Some(Err(_)) = written {
            return self.lost(terminated).await;
        }
        loop {
            let wake = match (soft, hard) {
                (Some(soft), Some((_, hard))) => Some(soft.min(hard)),
                (Some(soft), None) => Some(soft),
                (None, Some((_, hard))) => Some(hard),
                (None, None) => None,
            };
            let read = match wake {
                Some(at) => tokio::time::timeout_at(at, self.read()).await.ok(),
                None => Some(self.read().await),
            };
            match read {
                Some(Ok(Some(Report::Success(value)))) => {
                    self.spent = false;
                    return Outcome::Success(value);
                }
                Some(Ok(Some(Report::Failure { failure, last }))) => {
                    self.spent = last;
                    return Outcome::Failure(failure);
                }
                Some(Ok(Some(Report::Progress(progress)))) => {
                    let _ = events.send(Event::Progress(progress));
                }
                Some(Ok(Some(Report::Log { level, text }))) => {
                    let level = log::Level::iter()
                        .find(|known| *known as u8 == level)
                        .unwrap_or(log::Level::Info);
                    let _ = events.send(Event::Log { level, text });
                }
                Some(Ok(Some(Report::Ready { .. }))) => {}
                Some(Ok(None)) => return self.lost(terminated).await,
                Some(Err(error)) => {
                    self.handle.signal(Signal::SIGKILL);
                    end(&self.handle).await;
                    return Outcome::Lost {
                        reason: error.to_string(),
                    };
                }
                None => {}
            }
            // A child that reports without pause must not outrun its limits.
            let now = Instant::now();
            if let Some((limit, at)) = hard
                && now >= at
            {
                self.handle.signal(Signal::SIGKILL);
                end(&self.handle).await;
                return Outcome::HardTimeLimit(limit);
            }
            if soft.is_some_and(|at| now >= at) {
                soft = None;
                self.warn(sequence);
                let _ = events.send(Event::SoftLimit);
            }
        }
    }

    /// Tells the child that its soft limit is over. The socket is empty but for this word, so a
    /// write that does not go through at once means that the child is gone.
    fn warn(&self, sequence: u64) {
        if let Ok(frame) = Encoded::new(&Control::SoftLimit { sequence }, LIMIT, Secrecy::Plain) {
            let _ = io::Write::write_all(&mut &self.handle.control, frame.bytes());
        }
    }

    /// The socket ended: how did the process?
    async fn lost(&self, terminated: &AtomicI32) -> Outcome {
        let reason = end(&self.handle).await;
        match terminated.load(Ordering::Acquire) {
            0 => Outcome::Lost { reason },
            signal => Outcome::Terminated { signal },
        }
    }
}

/// Waits until a child whose socket ended is gone altogether, and helps when it is not.
async fn end(handle: &Handle) -> String {
    let mut exit = handle.exit.clone();
    for patience in [Duration::from_millis(200), DISAPPEARING] {
        match tokio::time::timeout(patience, exit.wait_for(Option::is_some)).await {
            Ok(Ok(status)) => {
                return status.map_or_else(|| String::from("unknown"), process::reason);
            }
            Ok(Err(_)) => return String::from("unknown"),
            Err(_) => handle.signal(Signal::SIGKILL),
        };
    }
    String::from("killed, still disappearing")
}

fn socket_error(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Socket { operation, source }
}

/// A place of the pool, held. Dropping it makes the place free.
///
/// A task that runs inside the parent holds a slot too, without using its child, so that the
/// concurrency is what the operator asked for.
pub struct Slot {
    pool: Arc<Shared>,
    place: usize,
    /// `None` only while the slot is being dropped.
    child: Option<Child>,
    pid: u32,
    name: String,
    /// The signal of [`super::Pool::terminate`], 0 = nobody asked.
    terminated: Arc<AtomicI32>,
}

impl Slot {
    pub(super) fn new(
        pool: Arc<Shared>,
        place: usize,
        child: Child,
        terminated: Arc<AtomicI32>,
    ) -> Slot {
        Slot {
            pool,
            place,
            pid: child.handle.pid.as_raw().cast_unsigned(),
            name: child.handle.name.clone(),
            child: Some(child),
            terminated,
        }
    }

    /// The process id of the child.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The child's name as in log lines: `ForkPoolWorker-2`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The child's own directory below [`super::Options::root`]: the only place it can write to.
    /// The job's directory is made inside it; the pool removes it with the child.
    pub fn directory(&self) -> Option<&Path> {
        self.child.as_ref()?.handle.directory.as_deref()
    }

    /// Runs a job in the slot's child. [`Event::Started`] is sent when the child has it: an
    /// outcome without that event means that the job never ran.
    pub async fn run(&mut self, job: Job, events: mpsc::UnboundedSender<Event>) -> Outcome {
        let Some(child) = &mut self.child else {
            return Outcome::Lost {
                reason: String::from("the slot is being given back"),
            };
        };
        if !child.is_sound() || self.terminated.load(Ordering::Acquire) != 0 {
            return child.lost(&self.terminated).await;
        }
        let _running = Running::new(&self.pool, self.place, &job.id);
        child.run(job, &self.terminated, &events).await
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // A signal that came as its job ended must not hit the next one.
            child.spent |= self.terminated.load(Ordering::Acquire) != 0;
            self.pool.release(self.place, child);
        }
    }
}

/// While it lives, [`super::Pool::terminate`] finds the job.
struct Running<'a> {
    pool: &'a Shared,
    place: usize,
}

impl<'a> Running<'a> {
    fn new(pool: &'a Shared, place: usize, job: &str) -> Running<'a> {
        pool.begin(place, job);
        Running { pool, place }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.pool.finish(self.place);
    }
}
