//! Processes: spawning them, being one, killing and reaping them. The crate's only unsafe code.
//!
//! [`Keeper`] is a thread that lives as long as the pool. It spawns every child (the parent-death
//! signal is tied to the spawning thread), watches all of them at once in one `poll`, kills the
//! rest of the group of a child that ended, and reaps it. It knows no jobs.
//!
//! A child is started with `posix_spawn` (that is what `Command` does as long as nothing is to
//! run between fork and exec): no fork of a threaded process, no copied page tables. What has to
//! happen inside the child happens after exec in [`settle`]. Between the two the child is covered
//! by the end of its sockets: it reads end-of-file and leaves when its parent is gone.
#![expect(
    unsafe_code,
    reason = "signal dispositions, close_range, pidfd, madvise and malloc_trim have no safe wrapper"
)]

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, killpg, signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout, getpid, getppid};
use tokio::sync::{mpsc as tokio_mpsc, watch};

use super::{CHILD_ARGUMENT, Error};

/// What every child is started with.
pub(super) struct Blueprint {
    /// The program, usually `/proc/self/exe`.
    pub program: PathBuf,
    /// The whole environment of a child.
    pub environment: Vec<(OsString, OsString)>,
    /// Below it each child gets a directory of its own.
    pub root: Option<PathBuf>,
}

/// A child that was just started, seen from the parent.
pub(super) struct Spawned {
    pub handle: Arc<Handle>,
    /// The other end of the child's standard input, non-blocking.
    pub jobs: UnixStream,
}

/// Everything about a child that outlives its jobs; shared by pool, slot and keeper.
pub(super) struct Handle {
    pub pid: Pid,
    /// As in log lines: `ForkPoolWorker-2`.
    pub name: String,
    /// The child's own directory; removed when the child is gone.
    pub directory: Option<PathBuf>,
    /// The other end of the child's control socket, non-blocking.
    pub control: UnixStream,
    /// `Some` once the child has been reaped.
    pub exit: watch::Receiver<Option<ExitStatus>>,
    /// A reaped process id may belong to a stranger: no signal once this is true.
    reaped: Mutex<bool>,
}

impl Handle {
    /// Sends a signal to the child's whole group, unless the child was reaped already.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        let reaped = lock(&self.reaped);
        !*reaped && killpg(self.pid, signal).is_ok()
    }

    /// Sends a signal given by number; `false` when there is no such signal or child.
    pub(super) fn signal_number(&self, number: i32) -> bool {
        Signal::try_from(number).is_ok_and(|signal| self.signal(signal))
    }

    /// Removes the child's directory with all that is in it.
    pub(super) fn remove_directory(&self) {
        if let Some(directory) = &self.directory
            && let Err(error) = std::fs::remove_dir_all(directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!(
                "pool: cannot remove the directory {} of {}: {error}",
                directory.display(),
                self.name
            );
        }
    }
}

/// How a process ended, in the words of Celery's `WorkerLostError`.
pub(super) fn reason(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exitcode {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("signal {number} ({signal})"),
            Err(_) => format!("signal {number}"),
        },
        (None, None) => String::from("unknown"),
    }
}

/// Takes a lock whose holders never leave anything half done, panicking or not.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- the keeper -------------------------------------------------------------------------------

type Answer = Box<dyn FnOnce(Result<Spawned, Error>) + Send>;

enum Wish {
    Spawn { name: String, answer: Answer },
    Stop,
}

/// The thread that spawns, watches and reaps.
pub(super) struct Keeper {
    commands: mpsc::Sender<Wish>,
    /// A byte written here wakes the thread from its `poll`.
    bell: UnixStream,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the thread; every reaped child is told to `exits`.
    pub(super) fn start(
        blueprint: Blueprint,
        exits: tokio_mpsc::UnboundedSender<Arc<Handle>>,
    ) -> Result<Keeper, Error> {
        let (bell, wake) = UnixStream::pair().map_err(Error::Keeper)?;
        bell.set_nonblocking(true).map_err(Error::Keeper)?;
        wake.set_nonblocking(true).map_err(Error::Keeper)?;
        let (commands, inbox) = mpsc::channel();
        let nursery = Nursery {
            blueprint,
            exits,
            wake,
            children: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name(String::from("pool-keeper"))
            .stack_size(256 << 10)
            .spawn(move || nursery.run(&inbox))
            .map_err(Error::Keeper)?;
        Ok(Keeper {
            commands,
            bell,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Asks for a child; the answer is called on the keeper's thread.
    pub(super) fn spawn(
        &self,
        name: String,
        answer: impl FnOnce(Result<Spawned, Error>) + Send + 'static,
    ) {
        let answer: Answer = Box::new(answer);
        if let Err(mpsc::SendError(Wish::Spawn { answer, .. })) =
            self.commands.send(Wish::Spawn { name, answer })
        {
            answer(Err(Error::Stopped));
        }
        self.ring();
    }

    /// A full bell has been rung already.
    fn ring(&self) {
        let _ = (&self.bell).write(&[1]);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.commands.send(Wish::Stop);
        self.ring();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

/// A child as the keeper sees it.
struct Kept {
    child: Child,
    handle: Arc<Handle>,
    exit: watch::Sender<Option<ExitStatus>>,
    /// Readable when the child has ended. Old kernels have none; then the end of the control
    /// socket tells.
    pidfd: Option<OwnedFd>,
    /// Since when the control socket is at its end although the process still exists.
    silent_since: Option<Instant>,
}

/// How long a process may take to end after it closed its sockets.
const FADING: Duration = Duration::from_millis(100);

/// How long the keeper waits for killed children when the pool is dropped.
const LAST_WAIT: Duration = Duration::from_secs(5);

struct Nursery {
    blueprint: Blueprint,
    exits: tokio_mpsc::UnboundedSender<Arc<Handle>>,
    wake: UnixStream,
    children: Vec<Kept>,
}

impl Nursery {
    fn run(mut self, inbox: &mpsc::Receiver<Wish>) {
        loop {
            loop {
                match inbox.try_recv() {
                    Ok(Wish::Spawn { name, answer }) => answer(self.spawn(name)),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Ok(Wish::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                        return self.end();
                    }
                }
            }
            self.reap();
            self.wait();
        }
    }

    fn spawn(&mut self, name: String) -> Result<Spawned, Error> {
        let directory = match &self.blueprint.root {
            Some(root) => Some(make_directory(&root.join(&name))?),
            None => None,
        };
        let started = self.start_process(&name, directory.clone());
        if started.is_err()
            && let Some(directory) = directory
        {
            let _ = std::fs::remove_dir(directory);
        }
        started.map_err(|source| Error::Spawn {
            program: self.blueprint.program.clone(),
            source,
        })
    }

    fn start_process(&mut self, name: &str, directory: Option<PathBuf>) -> io::Result<Spawned> {
        let (jobs, jobs_of_child) = UnixStream::pair()?;
        let (control, control_of_child) = UnixStream::pair()?;
        jobs.set_nonblocking(true)?;
        control.set_nonblocking(true)?;
        let child = Command::new(&self.blueprint.program)
            .arg0(format!("celeriac: {name}"))
            .arg(CHILD_ARGUMENT)
            .arg(getpid().to_string())
            .env_clear()
            .envs(self.blueprint.environment.iter().cloned())
            .current_dir(directory.as_deref().unwrap_or(Path::new("/")))
            .process_group(0)
            .stdin(OwnedFd::from(jobs_of_child))
            .stdout(OwnedFd::from(control_of_child))
            .stderr(Stdio::inherit())
            .spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let (exit, seen) = watch::channel(None);
        let handle = Arc::new(Handle {
            pid,
            name: name.to_owned(),
            directory,
            control,
            exit: seen,
            reaped: Mutex::new(false),
        });
        self.children.push(Kept {
            child,
            handle: Arc::clone(&handle),
            exit,
            pidfd: open_pidfd(pid),
            silent_since: None,
        });
        Ok(Spawned { handle, jobs })
    }

    /// Reaps what has ended; what remains of its group is killed first, while the zombie still
    /// keeps the group's number from being given to somebody else.
    fn reap(&mut self) {
        let exits = &self.exits;
        self.children.retain_mut(|kept| {
            let ended = !matches!(
                waitid(
                    Id::Pid(kept.handle.pid),
                    WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT,
                ),
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR)
            );
            if !ended {
                if kept
                    .silent_since
                    .is_some_and(|since| since.elapsed() > FADING)
                {
                    kept.handle.signal(Signal::SIGKILL);
                }
                return true;
            }
            let mut reaped = lock(&kept.handle.reaped);
            let _ = killpg(kept.handle.pid, Signal::SIGKILL);
            let status = match kept.child.try_wait() {
                Ok(Some(status)) => status,
                Ok(None) => return true,
                // Somebody else reaped it; its status is not known, its end is.
                Err(_) => ExitStatus::from_raw(Signal::SIGKILL as i32),
            };
            *reaped = true;
            drop(reaped);
            let _ = kept.exit.send(Some(status));
            let _ = exits.send(Arc::clone(&kept.handle));
            false
        });
    }

    /// Sleeps until somebody rings or a child ends.
    fn wait(&mut self) {
        let watched = self.children.iter().filter_map(|kept| {
            let fd = match &kept.pidfd {
                Some(pidfd) => pidfd.as_fd(),
                None if kept.silent_since.is_none() => kept.handle.control.as_fd(),
                None => return None,
            };
            Some(PollFd::new(fd, PollFlags::POLLIN))
        });
        let mut fds: Vec<PollFd<'_>> =
            std::iter::once(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN))
                .chain(watched)
                .collect();
        let fading = self.children.iter().any(|kept| kept.silent_since.is_some());
        let timeout = if fading {
            PollTimeout::from(2_u8)
        } else {
            PollTimeout::NONE
        };
        // An interrupted or failed poll only means that we look at everybody again.
        let _ = poll(&mut fds, timeout);
        let mut events = fds
            .iter()
            .map(|fd| fd.any().unwrap_or(true))
            .collect::<Vec<_>>()
            .into_iter()
            .skip(1);
        for kept in &mut self.children {
            if kept.pidfd.is_none() && kept.silent_since.is_none() && events.next() == Some(true) {
                kept.silent_since = Some(Instant::now());
            } else if kept.pidfd.is_some() {
                events.next();
            }
        }
        let mut bytes = [0; 64];
        while matches!((&self.wake).read(&mut bytes), Ok(count) if count > 0) {}
    }

    /// The pool is gone: nothing may survive it.
    fn end(mut self) {
        let deadline = Instant::now() + LAST_WAIT;
        let handles: Vec<_> = self
            .children
            .iter()
            .map(|kept| Arc::clone(&kept.handle))
            .collect();
        for handle in &handles {
            handle.signal(Signal::SIGKILL);
        }
        while !self.children.is_empty() && Instant::now() < deadline {
            self.reap();
            if !self.children.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        for handle in handles {
            handle.remove_directory();
        }
    }
}

fn make_directory(path: &Path) -> Result<PathBuf, Error> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| Error::Directory {
            path: path.to_owned(),
            source,
        })?;
    Ok(path.to_owned())
}

fn open_pidfd(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just given us this descriptor (close-on-exec), nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

// ---- being a child ----------------------------------------------------------------------------

/// The two sockets of a child.
pub(super) struct Sockets {
    pub jobs: UnixStream,
    pub control: UnixStream,
}

/// Makes this process a well-behaved child: it dies with its parent, leaves signals from terminals
/// and service managers to the parent, owns nothing but its sockets and standard error, and is
/// what the kernel takes first when memory is short.
///
/// `parent` is the process that started us; `None` when it is gone already.
pub(super) fn settle(parent: i32) -> io::Result<Option<Sockets>> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid().as_raw() != parent {
        return Ok(None);
    }
    for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: ignoring a signal installs no handler, so no code of ours runs in one.
        unsafe { signal(number, SigHandler::SigIgn) }?;
    }
    // SAFETY: this is the first thing the process does; nothing has been opened by it, so
    // descriptors from 3 on are strays inherited from a careless parent and owned by nobody.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
    let jobs = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let control = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    dup2_stdin(std::fs::File::open("/dev/null")?)?;
    // A library that prints must not write into our socket.
    dup2_stdout(io::stderr())?;
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    // No core dump, which could hold a token, and nothing of ours for processes of the same user.
    nix::sys::prctl::set_dumpable(false)?;
    Ok(Some(Sockets { jobs, control }))
}

/// Gives freed memory back to the system, so that one large job does not make a child large for
/// the rest of its life.
pub(super) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the pages of program text that only the start needed: settings, tables, the first
/// handshakes. They stay in the kernel's cache, and what is called again is mapped again by a
/// minor fault; but an idle worker no longer counts them as its memory.
pub fn release_start_up_text() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return;
    };
    let here = release_start_up_text as *const () as usize;
    if let Some(text) = maps.lines().find_map(|line| text_around(line, here)) {
        // SAFETY: the range is a private mapping of a file that nobody writes (it is executable and
        // not writable), so pages that are dropped come back from the file as they were.
        unsafe { libc::madvise(text.start as *mut _, text.len(), libc::MADV_DONTNEED) };
    }
}

/// The range of this line of `/proc/self/maps` if it is program text and holds the address.
fn text_around(line: &str, address: usize) -> Option<std::ops::Range<usize>> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    let parse = |hexadecimal| usize::from_str_radix(hexadecimal, 16).ok();
    let range = parse(start)?..parse(end)?;
    (words.next()? == "r-xp" && range.contains(&address)).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_text_that_holds_an_address_is_found() {
        let line = "55d0c0000000-55d0c0f00000 r-xp 00400000 fe:00 77   /usr/bin/celeriac";
        let inside = 0x55d0_c000_1000;
        assert_eq!(
            text_around(line, inside),
            Some(0x55d0_c000_0000..0x55d0_c0f0_0000)
        );
        assert_eq!(text_around(line, 0x55d0_c0f0_0000), None);
        assert_eq!(text_around(&line.replace("r-xp", "rw-p"), inside), None);
        assert_eq!(text_around("", inside), None);
    }

    #[test]
    fn the_program_goes_on_after_its_text_was_released() {
        release_start_up_text();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let here = release_start_up_text as *const () as usize;
        assert!(maps.lines().any(|line| text_around(line, here).is_some()));
    }

    #[test]
    fn the_reason_of_an_end_is_told_in_celerys_words() {
        assert_eq!(reason(ExitStatus::from_raw(9)), "signal 9 (SIGKILL)");
        assert_eq!(reason(ExitStatus::from_raw(3 << 8)), "exitcode 3");
        assert_eq!(reason(ExitStatus::from_raw(40)), "signal 40");
    }
}
