//! The eye on one fetch: stops it when it is told to, too slow, too long or too large.
//!
//! Sockets block as long as they like; a watcher thread looks at the counters every few milliseconds
//! and, when there is a cause to stop, notes the first one and shuts the sockets down, which wakes every
//! blocked read at once. Whatever error then comes up through the layers, [`Watch::cause`] tells why.
//!
//! Speed and silence are measured in time spent *waiting for the network*. While the indexer is busy and
//! nobody reads, the clock stands, so a slow disk is never blamed on the server.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Why a fetch was stopped from our side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The caller's interrupt flag was set.
    Interrupted,
    /// The time for the whole fetch is over.
    TotalTime(Duration),
    /// Not a byte for this long.
    Silent(Duration),
    /// Fewer bytes per second than demanded, over a whole window.
    Slow {
        /// What arrived per second.
        bytes_per_second: u64,
        /// What is demanded.
        minimum: u64,
        /// How long it was measured.
        window: Duration,
    },
    /// More bytes than allowed.
    Bytes(u64),
}

/// What is demanded of the network.
#[derive(Clone, Debug)]
pub struct Demands {
    /// For the whole fetch, indexing included.
    pub total: Option<Duration>,
    /// For one wait without a byte.
    pub silence: Duration,
    /// In bytes per second while a body is streaming; 0 demands nothing.
    pub speed: u64,
    /// Over which time the speed is measured.
    pub window: Duration,
    /// Everything received from all connections.
    pub bytes: u64,
}

/// Counters shared by the sockets, the watcher and the indexer.
#[derive(Debug)]
pub struct Watch {
    started: Instant,
    demands: Demands,
    stopped: AtomicBool,
    cause: OnceLock<Cause>,
    sockets: Mutex<Vec<Weak<TcpStream>>>,
    received: AtomicU64,
    /// Microseconds since `started` at which the read now blocking began; 0 when none does.
    reading_since: AtomicU64,
    /// Microseconds spent in finished reads since a body began to stream.
    read_time: AtomicU64,
    /// Whether speed is demanded at present: not while the server may think.
    measuring: AtomicBool,
    /// Whether the server is preparing a pack and may send keep-alives only.
    thinking: AtomicBool,
}

impl Watch {
    /// Starts the clock.
    pub fn new(demands: Demands) -> Watch {
        Watch {
            started: Instant::now(),
            demands,
            stopped: AtomicBool::new(false),
            cause: OnceLock::new(),
            sockets: Mutex::new(Vec::new()),
            received: AtomicU64::new(0),
            reading_since: AtomicU64::new(0),
            read_time: AtomicU64::new(0),
            measuring: AtomicBool::new(false),
            thinking: AtomicBool::new(false),
        }
    }

    /// Whether there was a cause to stop.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The same as a flag, for code that polls one.
    pub fn stopped_flag(&self) -> &AtomicBool {
        &self.stopped
    }

    /// The first cause to stop.
    pub fn cause(&self) -> Option<&Cause> {
        self.cause.get()
    }

    /// Bytes received from all sockets, TLS and HTTP framing included.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Notes the cause, unless there is one, and wakes every blocked read and write.
    pub fn stop(&self, cause: Cause) {
        let _ = self.cause.set(cause);
        self.stopped.store(true, Ordering::SeqCst);
        for socket in self.lock_sockets().iter().filter_map(Weak::upgrade) {
            // An error means that the socket is closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Closes the connections without a cause: our side has had enough and knows why itself.
    pub fn close(&self) {
        for socket in self.lock_sockets().iter().filter_map(Weak::upgrade) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Adds a socket that [`Watch::stop`] has to wake.
    pub(super) fn register(&self, socket: Weak<TcpStream>) {
        let mut sockets = self.lock_sockets();
        sockets.retain(|socket| socket.strong_count() > 0);
        if self.is_stopped()
            && let Some(socket) = socket.upgrade()
        {
            let _ = socket.shutdown(Shutdown::Both);
        }
        sockets.push(socket);
    }

    /// A request goes out: from now on the server may take its time, up to the demanded silence.
    pub(super) fn request_sent(&self) {
        self.measuring.store(false, Ordering::Relaxed);
    }

    /// The next answer may consist of keep-alives until [`Watch::pack_begins`].
    pub fn server_may_think(&self) {
        self.thinking.store(true, Ordering::Relaxed);
        self.measuring.store(false, Ordering::Relaxed);
    }

    /// The pack streams: speed is demanded.
    pub fn pack_begins(&self) {
        self.thinking.store(false, Ordering::Relaxed);
        self.measuring.store(true, Ordering::Relaxed);
    }

    /// A read that may block begins.
    pub(super) fn read_begins(&self) {
        self.reading_since
            .store(self.now().max(1), Ordering::Relaxed);
    }

    /// That read ended with so many bytes.
    pub(super) fn read_ended(&self, bytes: usize) {
        let since = self.reading_since.swap(0, Ordering::Relaxed);
        if since > 0 {
            let waited = self.now().saturating_sub(since);
            self.read_time.fetch_add(waited, Ordering::Relaxed);
        }
        let received = self.received.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if bytes > 0 && !self.thinking.load(Ordering::Relaxed) {
            self.measuring.store(true, Ordering::Relaxed);
        }
        if received > self.demands.bytes {
            self.stop(Cause::Bytes(self.demands.bytes));
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn lock_sockets(&self) -> std::sync::MutexGuard<'_, Vec<Weak<TcpStream>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watcher's own memory between two looks.
#[derive(Debug)]
pub struct Watcher<'a> {
    watch: &'a Watch,
    interrupt: &'a AtomicBool,
    window: Option<(u64, u64)>,
}

impl<'a> Watcher<'a> {
    /// A watcher that also obeys the caller's flag.
    pub fn new(watch: &'a Watch, interrupt: &'a AtomicBool) -> Watcher<'a> {
        Watcher {
            watch,
            interrupt,
            window: None,
        }
    }

    /// One look at everything that may be a cause to stop.
    pub fn look(&mut self) {
        let watch = self.watch;
        if watch.is_stopped() {
            return;
        }
        if self.interrupt.load(Ordering::Relaxed) {
            return watch.stop(Cause::Interrupted);
        }
        if let Some(total) = watch.demands.total
            && watch.started.elapsed() > total
        {
            return watch.stop(Cause::TotalTime(total));
        }
        let waiting = match watch.reading_since.load(Ordering::Relaxed) {
            0 => 0,
            since => watch.now().saturating_sub(since),
        };
        let silence = watch.demands.silence;
        if u128::from(waiting) > silence.as_micros() {
            return watch.stop(Cause::Silent(silence));
        }
        self.look_at_speed(waiting);
    }

    fn look_at_speed(&mut self, waiting: u64) {
        let watch = self.watch;
        if watch.demands.speed == 0 || !watch.measuring.load(Ordering::Relaxed) {
            self.window = None;
            return;
        }
        let time = watch.read_time.load(Ordering::Relaxed) + waiting;
        let bytes = watch.received();
        let (time_before, bytes_before) = *self.window.get_or_insert((time, bytes));
        let elapsed = time.saturating_sub(time_before);
        if u128::from(elapsed) < watch.demands.window.as_micros() {
            return;
        }
        let rate = u128::from(bytes - bytes_before) * 1_000_000 / u128::from(elapsed.max(1));
        if rate < u128::from(watch.demands.speed) {
            watch.stop(Cause::Slow {
                bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX),
                minimum: watch.demands.speed,
                window: watch.demands.window,
            });
        }
        self.window = Some((time, bytes));
    }
}
