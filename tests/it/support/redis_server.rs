//! A Redis of one test's own, to be stopped, killed and started again under its clients.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::{services, wait_for};

/// A private server; its port and its directory outlive its process.
pub struct RedisServer {
    /// `redis://127.0.0.1:port/0`.
    pub url: String,
    port: u16,
    directory: TempDir,
    options: Vec<String>,
    process: Option<Child>,
}

impl RedisServer {
    /// One that forgets everything when it ends.
    pub fn start() -> Self {
        Self::with(&["--save", "", "--appendonly", "no"])
    }

    /// One that writes every change down before it answers.
    pub fn durable() -> Self {
        Self::with(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// With these options of redis-server.
    pub fn with(options: &[&str]) -> Self {
        if Command::new("redis-server")
            .arg("--version")
            .output()
            .is_err()
        {
            // Installs the package on its way, or fails with the remedy.
            drop(services::redis());
        }
        let mut server = Self {
            url: String::new(),
            port: 0,
            directory: tempfile::tempdir().expect("a temporary directory"),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            process: None,
        };
        // Somebody else may take the port between our look and its bind.
        let starts = (0..5).any(|_| {
            server.port = fixed_port();
            server.url = format!("redis://127.0.0.1:{}/0", server.port);
            server.launch()
        });
        assert!(starts, "redis-server ends at once: {options:?}");
        server
    }

    /// Starts it again, on the same port and with what it wrote down.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.launch(), "redis-server ends at once");
    }

    /// Starts it and waits until it answers itself, or has ended.
    #[track_caller]
    fn launch(&mut self) -> bool {
        let mut process = Command::new("redis-server")
            .args([
                "--bind",
                "127.0.0.1",
                "--port",
                &self.port.to_string(),
                "--dir",
            ])
            .arg(self.directory.path())
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed: apt-get install redis-server");
        let own = process.id();
        let what = format!("Redis at {}", self.url);
        let runs = wait_for(&what, Duration::from_secs(20), || {
            if process.try_wait().expect("it is our child").is_some() {
                return Some(false);
            }
            let mut connection = self.connection().ok()?;
            let info: redis::InfoDict = redis::cmd("INFO").query(&mut connection).ok()?;
            // It tells this also before it has read what it wrote down.
            let ready = info.get::<u32>("process_id")? == own && info.get::<u8>("loading")? == 0;
            ready.then_some(true)
        });
        self.process = Some(process);
        runs
    }

    /// Ends it as a power cut does.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Its port without TLS.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it keeps its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A connection for looking behind the worker's back.
    pub fn connect(&self) -> redis::Connection {
        self.connection()
            .unwrap_or_else(|error| panic!("no Redis at {}: {error}", self.url))
    }

    fn connection(&self) -> redis::RedisResult<redis::Connection> {
        redis::Client::open(self.url.as_str())?.get_connection()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A free port below the range of outgoing connections, or one of them could take it while the
/// server is down.
pub fn fixed_port() -> u16 {
    loop {
        let random = uuid::Uuid::new_v4().as_u128() % 8000;
        let port = 12_000 + u16::try_from(random).expect("below 8000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
