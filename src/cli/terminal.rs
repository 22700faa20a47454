//! A terminal that is drawn on: keys come one by one, and whatever happens, the terminal is
//! afterwards as it was.

use std::io::{IsTerminal, Read};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

use super::output;

/// Another page without a cursor and without wrapped lines, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

/// The terminal while it is ours.
pub(super) struct Terminal {
    /// How it was; absent when keys do not come from a terminal.
    before: Option<Termios>,
    drawn: console::Term,
}

impl Terminal {
    /// Takes it over. Signals of the keyboard go on working.
    pub(super) fn open() -> Self {
        let before = tcgetattr(std::io::stdin()).ok();
        if let Some(before) = &before {
            let mut flags = before.clone();
            flags
                .local_flags
                .remove(LocalFlags::ICANON | LocalFlags::ECHO);
            // Without it, keys come with the line, and are seen.
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &flags);
        }
        output::print(ENTER);
        Self {
            before,
            drawn: console::Term::stdout(),
        }
    }

    /// Columns and rows as they are now.
    pub(super) fn size(&self) -> (usize, usize) {
        let (rows, columns) = self.drawn.size();
        (usize::from(columns).max(20), usize::from(rows).max(4))
    }

    /// Replaces what is seen by these lines, in one write, so that nothing flickers.
    pub(super) fn draw(&self, lines: &[String]) {
        let mut page = String::from("\x1b[H");
        for (at, line) in lines.iter().enumerate() {
            if at > 0 {
                page.push_str("\r\n");
            }
            page.push_str(line);
            page.push_str("\x1b[0m\x1b[K");
        }
        page.push_str("\x1b[J");
        output::print(&page);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        output::print(LEAVE);
        if let Some(before) = &self.before {
            // There is nobody left to tell.
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}

/// The keys as they are pressed; none where standard input is no terminal. The thread that
/// waits for them ends with the process.
pub(super) fn keys() -> mpsc::UnboundedReceiver<u8> {
    let (sender, receiver) = mpsc::unbounded_channel();
    if std::io::stdin().is_terminal() {
        std::thread::spawn(move || {
            for byte in std::io::stdin().lock().bytes() {
                if byte.map_or(true, |byte| sender.send(byte).is_err()) {
                    return;
                }
            }
        });
    } else {
        // An open channel that never speaks.
        std::mem::forget(sender);
    }
    receiver
}
