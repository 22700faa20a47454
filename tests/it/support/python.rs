//! The real Python Celery client (and, where a test wants a peer, the real Python worker),
//! from the virtual environment that `scripts/python-venv` keeps.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::project;

/// Ready for every script: the example backend's application and the way to answer.
const PRELUDE: &str = "\
import json, sys
from celery_app import celery_app as app
from celery.result import AsyncResult
def answer(value):
    print('\\nanswer: ' + json.dumps(value, default=repr), flush=True)
";

/// A Python process with the Celery client and the example backend's modules.
pub struct Python {
    environment: Vec<(String, String)>,
}

impl Python {
    /// The client of one broker and result backend, sending to one queue.
    pub fn new(broker: &str, backend: &str, queue: &str) -> Self {
        let environment = [
            ("QUEUE_BROKER_URL", broker),
            ("CELERY_RESULT_BACKEND", backend),
            ("ANALYSIS_QUEUE", queue),
        ];
        Self {
            environment: environment
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
        }
    }

    /// Sets one more variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs a script to its end, at most four minutes, and returns what it gave to `answer`.
    /// The arguments are its `sys.argv[1:]`.
    #[track_caller]
    pub fn run(&self, script: &str, arguments: &[&str]) -> Value {
        let output = self
            .command("timeout")
            .args(["--kill-after=5", "240"])
            .arg(interpreter())
            .args(["-c", &format!("{PRELUDE}{script}")])
            .args(arguments)
            .output()
            .expect("timeout of coreutils runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let answer = text
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("answer: "));
        match answer {
            Some(answer) if output.status.success() => {
                serde_json::from_str(answer).expect("answer prints JSON")
            }
            _ => panic!(
                "the Python script ended with {} {}\n--- script\n{script}\n--- stdout\n{text}\n--- stderr\n{}",
                output.status,
                if answer.is_some() {
                    "after its answer"
                } else {
                    "without an answer"
                },
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }

    /// Starts `python ARGUMENTS…` in the background; killed when dropped.
    pub fn spawn(&self, arguments: &[&str]) -> Background {
        let log = tempfile::NamedTempFile::new().expect("a log file");
        let child = self
            .command(interpreter().as_os_str())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(reopen(&log))
            .stderr(reopen(&log))
            .spawn()
            .expect("the virtual environment's python runs");
        Background { child, log }
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .env("PYTHONPATH", project().join("examples/backend"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }
}

/// A Python process in the background.
pub struct Background {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Background {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log.path()).expect("its log")).into_owned()
    }

    /// The process, to signal it or wait for it.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn reopen(log: &tempfile::NamedTempFile) -> File {
    File::options()
        .append(true)
        .open(log.path())
        .expect("the log file opens")
}

/// The python of the virtual environment, made on first use.
pub fn interpreter() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let output = Command::new(project().join("scripts/python-venv"))
            .output()
            .expect("scripts/python-venv can be run (it needs bash)");
        assert!(
            output.status.success(),
            "no Python client:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
    .clone()
}
