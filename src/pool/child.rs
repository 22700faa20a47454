//! The child's loop: read a job, run the handler, report; until the socket ends.
//!
//! `main` calls [`serve`] before anything else when the program was started with
//! [`super::CHILD_ARGUMENT`]. Everything is synchronous. The main thread reads jobs and runs the
//! handler itself, so that a job costs no change of thread; a second thread sleeps on the control
//! socket and raises the interrupt flag when the soft limit of the running job is over. A panic
//! in the handler becomes a failure, and the child leaves after it: nobody knows what the panic
//! left behind.
//!
//! Knows nothing of what the handler does. Answers for billiard's `Worker.workloop`.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::frame::{Control, Decoder, Encoded, LIMIT, Order, Report, Secrecy};
use super::job::{Failure, Job};
use super::process::{self, Sockets, lock};
use super::{Error, sandbox};

/// After a job of this length freed memory is given back to the system; short jobs are not
/// worth the call.
const LONG: Duration = Duration::from_millis(50);

/// Strings of the payload that are shorter are not searched for in a panic's text.
const SECRET_LENGTH: usize = 6;

/// The child's way to be heard while a job runs, and to hear.
pub struct Reporter {
    socket: Arc<Mutex<UnixStream>>,
    signals: Arc<Signals>,
}

/// What the control thread tells the main thread.
#[derive(Default)]
struct Signals {
    interrupt: Arc<AtomicBool>,
    soft_limit: AtomicBool,
    /// The running job, 0 between jobs. The lock makes "is it this job?" and "raise the flag"
    /// one step, so that a late word about one job cannot interrupt the next.
    running: Mutex<u64>,
    /// For the handler's curiosity and tests.
    jobs: AtomicU64,
}

impl Reporter {
    /// Sends progress to the parent. A parent that is gone is no matter: the child is, too.
    pub fn progress(&self, progress: Value) {
        let _ = self.send(&Report::Progress(progress));
    }

    /// Sends a line for the parent's log.
    pub fn log(&self, level: log::Level, text: impl Into<String>) {
        let text = text.into();
        let level = level as u8;
        let _ = self.send(&Report::Log { level, text });
    }

    /// The flag that long loops poll; it is raised when the job should end.
    pub fn interrupt(&self) -> &AtomicBool {
        &self.signals.interrupt
    }

    /// The same flag for threads that outlive a borrow.
    pub fn interrupt_handle(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.signals.interrupt)
    }

    /// Whether the soft limit is what raised the flag.
    pub fn soft_limit_hit(&self) -> bool {
        self.signals.soft_limit.load(Ordering::Acquire)
    }

    /// How many jobs this child has begun, the running one included.
    pub fn jobs(&self) -> u64 {
        self.signals.jobs.load(Ordering::Relaxed)
    }

    fn send(&self, report: &Report) -> Result<(), Error> {
        send(&self.socket, report)
    }
}

fn send(socket: &Mutex<UnixStream>, report: &Report) -> Result<(), Error> {
    let frame = Encoded::new(report, LIMIT, Secrecy::Plain)?;
    let sent = lock(socket).write_all(frame.bytes());
    sent.map_err(|source| Error::Socket {
        operation: "send",
        source,
    })
}

/// Runs jobs until the parent closes the socket. The second argument of the process is the
/// parent's process id, as [`super::CHILD_ARGUMENT`] says.
pub fn serve(handler: impl Fn(&Job, &Reporter) -> Result<Value, Failure>) -> ExitCode {
    let parent = std::env::args().nth(2).and_then(|text| text.parse().ok());
    let Some(parent) = parent else {
        log::error!("pool child: started without a parent; it is for the worker's own use");
        return ExitCode::from(2);
    };
    match process::settle(parent) {
        Ok(Some(sockets)) => match work(sockets, handler) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log::error!("pool child: failed to {error}");
                ExitCode::FAILURE
            }
        },
        // The parent died while we were being started.
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("pool child: failed to set itself up: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(
    sockets: Sockets,
    handler: impl Fn(&Job, &Reporter) -> Result<Value, Failure>,
) -> Result<(), Error> {
    let socket_error = |operation| move |source| Error::Socket { operation, source };
    let writer = sockets.jobs.try_clone().map_err(socket_error("send"))?;
    let reporter = Reporter {
        socket: Arc::new(Mutex::new(writer)),
        signals: Arc::default(),
    };
    let mut decoder = Decoder::new(LIMIT, Secrecy::Wipe);
    let mut next = || decoder.read::<Order>(&sockets.jobs);

    let Some(Order::Setup {
        name,
        sandbox,
        log_level,
    }) = next()?
    else {
        return Ok(());
    };
    reporter.forward_log(log_level);
    if let Ok(short) = std::ffi::CString::new(name.as_str()) {
        let _ = nix::sys::prctl::set_name(&short);
    }
    let panic_text = remember_panics();
    // Before the second thread exists: a sandbox holds for its thread and those started by it.
    let warnings = sandbox::enter(&sandbox);
    let signals = Arc::clone(&reporter.signals);
    std::thread::Builder::new()
        .name(String::from("pool-control"))
        .stack_size(64 << 10)
        .spawn(move || listen(sockets.control, &signals))
        .map_err(socket_error("read"))?;
    reporter.send(&Report::Ready { warnings })?;

    while let Some(order) = next()? {
        let Order::Job { sequence, job } = order else {
            continue;
        };
        let begun = Instant::now();
        reporter.begin(sequence);
        let outcome = catch_unwind(AssertUnwindSafe(|| handler(&job, &reporter)));
        reporter.end();
        let (report, last) = match outcome {
            Ok(Ok(value)) => (Report::Success(value), false),
            Ok(Err(failure)) => (
                Report::Failure {
                    failure,
                    last: false,
                },
                false,
            ),
            Err(_) => {
                let text = lock(&panic_text).take().unwrap_or_default();
                let failure = panicked(&job, &text);
                (
                    Report::Failure {
                        failure,
                        last: true,
                    },
                    true,
                )
            }
        };
        drop(job);
        match reporter.send(&report) {
            Err(Error::FrameTooLong { length, limit }) => reporter.send(&Report::Failure {
                failure: too_long(length, limit),
                last: false,
            })?,
            sent => sent?,
        }
        drop(report);
        if last {
            break;
        }
        if begun.elapsed() > LONG {
            process::release_memory();
        }
    }
    Ok(())
}

impl Reporter {
    fn begin(&self, sequence: u64) {
        let mut running = lock(&self.signals.running);
        *running = sequence;
        self.signals.jobs.store(sequence, Ordering::Relaxed);
        self.signals.soft_limit.store(false, Ordering::Release);
        self.signals.interrupt.store(false, Ordering::Release);
    }

    fn end(&self) {
        *lock(&self.signals.running) = 0;
    }

    /// Sends what the code under the handler logs to the parent, which has the log file and knows
    /// the job. A program that set up a logger of its own keeps it.
    fn forward_log(&self, level: u8) {
        let level = log::LevelFilter::iter()
            .find(|known| *known as u8 == level)
            .unwrap_or(log::LevelFilter::Info);
        let forward = Forward {
            socket: Arc::clone(&self.socket),
            signals: Arc::clone(&self.signals),
        };
        if log::set_boxed_logger(Box::new(forward)).is_ok() {
            log::set_max_level(level);
        }
    }
}

/// The child's logger. Between jobs nobody reads the socket, so nothing is said there.
struct Forward {
    socket: Arc<Mutex<UnixStream>>,
    signals: Arc<Signals>,
}

impl log::Log for Forward {
    /// Our own modules at the chosen level, libraries only when something is wrong.
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("celeriac") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) && *lock(&self.signals.running) != 0 {
            let report = Report::Log {
                level: record.level() as u8,
                text: record.args().to_string(),
            };
            let _ = send(&self.socket, &report);
        }
    }

    fn flush(&self) {}
}

/// The control thread. It owns its socket and never gives it back: the socket's end is how an old
/// kernel's keeper learns of the child's death, so it must not end earlier.
fn listen(control: UnixStream, signals: &Signals) {
    let mut decoder = Decoder::new(LIMIT, Secrecy::Plain);
    while let Ok(Some(Control::SoftLimit { sequence })) = decoder.read(&control) {
        let running = lock(&signals.running);
        if *running == sequence {
            signals.soft_limit.store(true, Ordering::Release);
            signals.interrupt.store(true, Ordering::Release);
        }
    }
    if *lock(&signals.running) != 0 {
        // The parent is gone in the middle of a job; should the death signal have been lost
        // (it is when credentials change), this is the second net.
        std::process::exit(1);
    }
    std::mem::forget(control);
}

/// Keeps the first panic's place and text for the job's traceback instead of printing it. The
/// first one counts: a panic in a handler's thread is followed by one that only says so.
fn remember_panics() -> Arc<Mutex<Option<String>>> {
    let memory = Arc::new(Mutex::new(None));
    let written = Arc::clone(&memory);
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload_as_str().unwrap_or("no text");
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        lock(&written).get_or_insert_with(|| format!("{text} ({place})"));
    }));
    memory
}

fn panicked(job: &Job, text: &str) -> Failure {
    let mut text = text.to_owned();
    mask(&mut text, &job.payload);
    Failure {
        exc_type: String::from("RuntimeError"),
        exc_message: vec![Value::from(format!("the task panicked: {text}"))],
        traceback: format!("task {} panicked: {text}\n", job.name),
        ..Failure::default()
    }
}

/// Whatever the payload holds may be secret and must not be repeated by a panic.
fn mask(text: &mut String, payload: &Value) {
    match payload {
        Value::String(secret) if secret.len() >= SECRET_LENGTH => {
            *text = text.replace(secret.as_str(), "***");
        }
        Value::Array(items) => items.iter().for_each(|item| mask(text, item)),
        Value::Object(members) => members.values().for_each(|item| mask(text, item)),
        _ => {}
    }
}

fn too_long(length: usize, limit: usize) -> Failure {
    let text = format!("the result has {length} bytes, more than the limit of {limit}");
    Failure {
        exc_type: String::from("ValueError"),
        exc_message: vec![Value::from(text.clone())],
        traceback: format!("{text}\n"),
        ..Failure::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_panics_text_does_not_repeat_what_the_payload_holds() {
        let job = Job {
            id: "1".into(),
            name: "n".into(),
            payload: json!({"deep": [{"token": "ghp_secret"}], "short": "a"}),
            soft_limit: None,
            hard_limit: None,
            directory: None,
        };
        let failure = panicked(&job, "no answer for ghp_secret (src/a.rs:1:2)");
        let text = format!("{failure:?}");
        assert!(text.contains("no answer for *** (src/a.rs"), "{text}");
        assert!(!text.contains("ghp_secret"), "{text}");
    }

    #[test]
    fn a_soft_limit_for_an_earlier_job_does_not_interrupt_the_running_one() {
        let (parent, child) = UnixStream::pair().expect("because sockets are at hand");
        let reporter = Reporter {
            socket: Arc::new(Mutex::new(child)),
            signals: Arc::default(),
        };
        let (sent, control) = UnixStream::pair().expect("because sockets are at hand");
        reporter.begin(2);
        for sequence in [1, 3] {
            let frame = Encoded::new(&Control::SoftLimit { sequence }, LIMIT, Secrecy::Plain)
                .expect("because it is short");
            (&sent)
                .write_all(frame.bytes())
                .expect("because the socket is open");
        }
        reporter.end();
        drop(sent);
        listen(control, &reporter.signals);
        assert!(!reporter.soft_limit_hit());
        drop(parent);
    }
}
