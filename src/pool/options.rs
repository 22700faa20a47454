//! How a pool is to be, and what of the parent's environment its children see.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use super::{Sandbox, limits};

/// Variables a child may see when the parent has them. Nothing about brokers, databases, tokens
/// or proxies is among them.
const PASSED_ON: &[&str] = &[
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUST_BACKTRACE",
];

/// A home that does not exist: libraries look for settings in the home directory, and an empty
/// name would make some of them look in the working directory.
const NO_HOME: &str = "/nonexistent";

/// How the pool is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Places, at least 1.
    pub size: usize,
    /// A child is replaced after so many jobs; `None` or 0 = never.
    pub max_tasks_per_child: Option<u64>,
    /// A child is replaced after the job at whose end it had more resident memory, KiB.
    pub max_memory_per_child: Option<u64>,
    /// The program to start; it must call [`super::child::serve`] on
    /// [`super::CHILD_ARGUMENT`].
    pub program: PathBuf,
    /// Children are called this, a dash and a number that never comes back.
    pub name: String,
    /// More variables that a child may see when the parent has them.
    pub pass_environment: Vec<String>,
    /// Variables that every child sees; they win.
    pub environment: Vec<(String, String)>,
    /// Below it every child gets a directory of its own, which is removed with the child. It
    /// belongs to this pool alone.
    pub root: Option<PathBuf>,
    /// How children lock themselves in.
    pub sandbox: Sandbox,
    /// What children log at this level and above while a job runs arrives as [`super::Event::Log`].
    pub log_level: log::LevelFilter,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            size: limits::available_cpus(),
            max_tasks_per_child: None,
            max_memory_per_child: None,
            program: PathBuf::from("/proc/self/exe"),
            name: String::from("ForkPoolWorker"),
            pass_environment: Vec::new(),
            environment: Vec::new(),
            root: None,
            sandbox: Sandbox::default(),
            log_level: log::LevelFilter::Info,
        }
    }
}

impl Options {
    /// The whole environment of a child.
    pub(super) fn whole_environment(&self) -> Vec<(OsString, OsString)> {
        let mut environment = BTreeMap::from([(OsString::from("HOME"), OsString::from(NO_HOME))]);
        let names = PASSED_ON
            .iter()
            .copied()
            .chain(self.pass_environment.iter().map(String::as_str));
        for name in names {
            if let Some(value) = std::env::var_os(name) {
                environment.insert(OsString::from(name), value);
            }
        }
        for (name, value) in &self.environment {
            environment.insert(OsString::from(name), OsString::from(value));
        }
        environment.into_iter().collect()
    }
}
