//! The `--pidfile`: refuses a live one, replaces a stale one, goes with the process.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// A file that holds this process' id as long as it lives.
pub(super) struct PidFile(PathBuf);

impl PidFile {
    /// Writes the file, unless it names another live process.
    pub(super) fn create(path: PathBuf) -> anyhow::Result<Self> {
        if let Ok(text) = fs::read_to_string(&path)
            && let Ok(pid) = text.trim().parse::<i32>()
            && kill(Pid::from_raw(pid), None).is_ok()
            && pid != i32::try_from(std::process::id()).unwrap_or(0)
        {
            bail!(
                "Pidfile ({}) already exists.\nSeems we're already running? (pid: {pid})",
                path.display()
            );
        }
        let mut file = fs::File::create(&path)
            .with_context(|| format!("--pidfile: cannot write {}", path.display()))?;
        writeln!(file, "{}", std::process::id())
            .with_context(|| format!("--pidfile: cannot write {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A file that somebody else removed is as gone as it should be.
        drop(fs::remove_file(&self.0));
    }
}
