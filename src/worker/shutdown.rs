//! Signals, in the one place that receives them.
//!
//! [`block`] is called before any thread exists, so that every thread inherits the mask and
//! no library's handler ever runs (rusty-celery installs some). A dedicated thread waits for
//! the signals and turns them into [`Wish`]es; what a wish means is the controller's affair.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::mpsc;

/// What somebody asks of the process as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// TERM, the first INT, or the remote `shutdown`: finish what runs, hand back the rest.
    Warm {
        /// Asked by INT, which makes the exit code 1.
        interrupted: bool,
    },
    /// QUIT, a second INT, or TERM with `REMAP_SIGTERM=SIGQUIT`.
    Cold,
    /// HUP: start anew (unless started from a terminal).
    Restart,
    /// USR1: say what every slot does.
    Dump,
}

fn signals() -> SigSet {
    [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
    ]
    .into_iter()
    .collect()
}

/// Blocks the signals in this thread and all that it will start. Call it first of all.
pub fn block() -> nix::Result<()> {
    signals().thread_block()
}

/// Starts the thread that waits for signals. It lives as long as the process.
pub fn listen(wishes: mpsc::UnboundedSender<Wish>) -> std::io::Result<()> {
    let remapped = std::env::var("REMAP_SIGTERM").is_ok_and(|name| name == "SIGQUIT");
    let wait = move || {
        let set = signals();
        let mut interrupts = 0_u32;
        while let Ok(signal) = set.wait() {
            let wish = match signal {
                Signal::SIGTERM if remapped => Wish::Cold,
                Signal::SIGTERM => Wish::Warm { interrupted: false },
                Signal::SIGINT => {
                    interrupts += 1;
                    if interrupts > 1 {
                        Wish::Cold
                    } else {
                        Wish::Warm { interrupted: true }
                    }
                }
                Signal::SIGQUIT => Wish::Cold,
                Signal::SIGHUP => Wish::Restart,
                _ => Wish::Dump,
            };
            if wishes.send(wish).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map(drop)
}

/// For programs that only compute: blocks INT and TERM and turns them into a flag.
pub fn interrupt_flag() -> std::io::Result<&'static AtomicBool> {
    static FLAG: AtomicBool = AtomicBool::new(false);
    let set: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    set.thread_block()?;
    let wait = move || {
        while set.wait().is_ok() {
            if FLAG.swap(true, Ordering::Relaxed) {
                // Asked twice: whoever asks has no patience left.
                std::process::exit(130);
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)?;
    Ok(&FLAG)
}
