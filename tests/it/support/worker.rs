//! The worker under test: the real binary, started the way a deployment starts it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::python::Python;
use super::services::{Postgres, Redis};
use super::{unique, wait_for};

const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(20);

/// A running worker with its own queue, node name, temporary directory and log file.
pub struct Worker {
    /// `name@host`.
    pub node: String,
    /// The queue it takes tasks from.
    pub queue: String,
    child: Child,
    directory: TempDir,
    broker: String,
    backend: String,
}

/// What a worker is started with.
pub struct Builder {
    broker: String,
    backend: Option<String>,
    database: Option<String>,
    queue: String,
    name: String,
    concurrency: u32,
    loglevel: &'static str,
    options: Vec<String>,
    environment: Vec<(String, String)>,
    under: Vec<String>,
}

impl Worker {
    /// A worker of two processes on this Redis, with a queue of its own and no database server.
    pub fn start(redis: &Redis) -> Worker {
        Worker::on(&redis.url).start()
    }

    /// To be configured, then started.
    pub fn on(broker: &str) -> Builder {
        Builder {
            broker: broker.to_owned(),
            backend: None,
            database: None,
            queue: unique("q"),
            name: unique("w"),
            concurrency: 2,
            loglevel: "info",
            options: Vec::new(),
            environment: Vec::new(),
            under: Vec::new(),
        }
    }

    /// The Python client of this worker's queue.
    pub fn python(&self) -> Python {
        Python::new(&self.broker, &self.backend, &self.queue)
    }

    /// Runs a Python script with the client of this worker's queue; `QUEUE` is its name. `inspect`
    /// asks this worker alone, and so waits no longer than for its answer.
    #[track_caller]
    pub fn ask(&self, script: &str, arguments: &[&str]) -> Value {
        let script = format!(
            "import os\nQUEUE = os.environ['ANALYSIS_QUEUE']\n\
             inspect = app.control.inspect([os.environ['NODE']], timeout=60)\n{script}"
        );
        let python = self.python().env("NODE", &self.node);
        python.run(&script, arguments)
    }

    /// The broker's URL.
    pub fn broker(&self) -> &str {
        &self.broker
    }

    /// The process id of the parent.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its clones appear.
    pub fn clones(&self) -> PathBuf {
        self.directory.path().join("tmp")
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        log_of(self.directory.path())
    }

    /// Waits until the text stands in the log.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        wait_for(
            &format!("{text:?} in the log of {}", self.node),
            STOP,
            || self.log().contains(text).then_some(()),
        );
    }

    /// Sends a signal to the parent alone.
    pub fn signal(&self, signal: Signal) {
        kill(pid(&self.child), signal).expect("the worker is there to be signalled");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let node = self.node.clone();
        wait_for(&format!("the end of {node}"), STOP, || {
            self.child.try_wait().expect("the worker is our child")
        })
    }

    /// Warm shutdown.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// What a power cut does to the parent.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// The live processes it started, children of children too.
    pub fn descendants(&self) -> Vec<u32> {
        let mut found = vec![self.pid()];
        let mut next = 0;
        while next < found.len() {
            let parent = found[next];
            next += 1;
            found.extend(children_of(parent));
        }
        found.remove(0);
        found
    }
}

impl Builder {
    /// Results go here instead of to the broker.
    pub fn backend(mut self, url: &str) -> Self {
        self.backend = Some(url.to_owned());
        self
    }

    /// Analyses are kept here instead of in an SQLite file of the worker's directory.
    pub fn database(mut self, postgres: &Postgres) -> Self {
        self.database = Some(postgres.url.clone());
        self
    }

    /// The queue, where several workers share one.
    pub fn queue(mut self, name: &str) -> Self {
        self.queue = name.to_owned();
        self
    }

    /// The part of the node name before the host, where a test needs to know or share it.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Number of pool processes.
    pub fn concurrency(mut self, processes: u32) -> Self {
        self.concurrency = processes;
        self
    }

    /// How much it logs.
    pub fn loglevel(mut self, level: &'static str) -> Self {
        self.loglevel = level;
        self
    }

    /// One more word of the command line.
    pub fn option(mut self, word: &str) -> Self {
        self.options.push(word.to_owned());
        self
    }

    /// One more variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it as the last words of this command.
    pub fn under(mut self, words: &[&str]) -> Self {
        self.under = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Starts it and waits for its ready line.
    #[track_caller]
    pub fn start(self) -> Worker {
        let mut worker = self.start_without_waiting();
        let ready = format!("{} ready.", worker.node);
        wait_for(&format!("{ready:?}"), START, || {
            if let Some(status) = worker.child.try_wait().expect("the worker is our child") {
                panic!(
                    "the worker ended at its start with {status}:\n{}",
                    worker.log()
                );
            }
            worker.log().contains(&ready).then_some(())
        });
        worker
    }

    /// Starts it; it may find no broker, or refuse its options.
    pub fn start_without_waiting(self) -> Worker {
        let name = self.name;
        let host = nix::unistd::gethostname().expect("the host has a name");
        let node = format!("{name}@{}", host.to_string_lossy());
        let directory = tempfile::Builder::new()
            .prefix(&format!("celeriac-{name}-"))
            .tempdir()
            .expect("a temporary directory");
        std::fs::create_dir(directory.path().join("tmp")).expect("mkdir");
        let log = File::create(directory.path().join("log")).expect("a log file");
        let backend = self.backend.unwrap_or_else(|| {
            if self.broker.starts_with("amqp") {
                "rpc://".to_owned()
            } else {
                self.broker.clone()
            }
        });
        let binary = env!("CARGO_BIN_EXE_celeriac").to_owned();
        let mut words = self.under.into_iter().chain([binary]);
        let mut command = Command::new(words.next().expect("the binary is one"));
        command.args(words);
        // Settings of the developer's shell must not reach the test.
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            if [
                "CELERY_",
                "QUEUE_",
                "DATABASE_",
                "CLONE_",
                "GIT_",
                "RUST_LOG",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            {
                command.env_remove(&variable);
            }
        }
        if let Some(database) = &self.database {
            command.env("DATABASE_URL", database);
        }
        let child = command
            .arg("worker")
            .arg(format!("--concurrency={}", self.concurrency))
            .arg(format!("--loglevel={}", self.loglevel))
            .args(["-n", &format!("{name}@%h"), "-Q", &self.queue])
            .args(&self.options)
            .env("QUEUE_BROKER_URL", &self.broker)
            .env("CELERY_RESULT_BACKEND", &backend)
            .env("ALLOW_LOCAL_REPOS", "1")
            .env("TMPDIR", directory.path().join("tmp"))
            .env("HOME", directory.path())
            .env("XDG_DATA_HOME", directory.path())
            .envs(self.environment)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("the celeriac binary runs");
        Worker {
            node,
            queue: self.queue,
            child,
            directory,
            broker: self.broker,
            backend,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // Its pool children lead groups of their own and end with their parent.
            let _ = killpg(pid(&self.child), Signal::SIGKILL);
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- the last lines of {}", self.node);
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id is an i32"))
}

fn log_of(directory: &Path) -> String {
    let bytes = std::fs::read(directory.join("log")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn children_of(parent: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| {
            let pids: Vec<u32> = text
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect();
            pids
        })
        .collect()
}
