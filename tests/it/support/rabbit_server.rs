//! A RabbitMQ of one test's own, to be stopped, started and asked about its queues.

use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::rabbit_api::RabbitApi;
use super::{project, services, wait_for};

/// Where Debian keeps the scripts that do not switch to the system's user.
const SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

/// A private server with a name server of its own.
pub struct RabbitServer {
    /// `amqp://guest:guest@127.0.0.1:port//`.
    pub url: String,
    port: u16,
    api_port: u16,
    environment: Vec<(String, String)>,
    processes: Vec<Child>,
    // Removed last.
    _directory: TempDir,
}

impl RabbitServer {
    /// One with the defaults.
    pub fn start() -> Self {
        Self::with("[].")
    }

    /// One that speaks TLS as well, with a certificate of `tests/fixtures/tls` for 127.0.0.1; it
    /// listens on 127.0.0.2, too, and wants a certificate of its clients, for which the same will do.
    pub fn secure() -> Self {
        let file = |name: &str| format!("{}/tests/fixtures/tls/{name}", project().display());
        let options = format!(
            "[{{cacertfile, \"{}\"}}, {{certfile, \"{}\"}}, {{keyfile, \"{}\"}}, \
             {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}}]",
            file("loopback-ca.pem"),
            file("loopback.pem"),
            file("loopback.key.pem")
        );
        let [port, ..] = fixed_ports::<1>();
        let settings = format!(
            "[{{rabbit, [{{ssl_listeners, [{{\"127.0.0.1\", {port}}}, {{\"127.0.0.2\", {port}}}]}}, {{ssl_options, {options}}}]}}]."
        );
        let mut server = Self::with(&settings);
        server.url = format!(
            "amqps://guest:guest@127.0.0.1:{port}//?ssl_ca_certs={}&ssl_certfile={}&ssl_keyfile={}",
            file("loopback-ca.pem"),
            file("loopback.pem"),
            file("loopback.key.pem")
        );
        server
    }

    /// One with these Erlang terms as its `advanced.config`.
    pub fn with(settings: &str) -> Self {
        if !Path::new(SCRIPTS).exists() {
            // Installs the package on its way, or fails with the remedy.
            drop(services::rabbitmq());
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let [port, names, distribution, api_port] = fixed_ports();
        let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        let conf = format!(
            "loopback_users = none\nlog.console = false\n\
             management_agent.disable_metrics_collector = true\n\
             management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {api_port}\n"
        );
        std::fs::write(path("rabbitmq.conf"), conf).expect("rabbitmq.conf");
        std::fs::write(path("advanced.config"), settings).expect("advanced.config");
        std::fs::write(path("plugins"), "[rabbitmq_management].\n").expect("plugins");
        let environment = [
            ("HOME", path("")),
            ("ERL_EPMD_PORT", names.to_string()),
            ("RABBITMQ_NODENAME", format!("test{port}@localhost")),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODE_PORT", port.to_string()),
            ("RABBITMQ_DIST_PORT", distribution.to_string()),
            ("RABBITMQ_MNESIA_BASE", path("mnesia")),
            ("RABBITMQ_LOG_BASE", path("logs")),
            ("RABBITMQ_CONFIG_FILE", path("rabbitmq")),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config")),
            ("RABBITMQ_CONF_ENV_FILE", path("none")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins")),
            ("RABBITMQ_PID_FILE", path("pid")),
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+S 1:1 +sbwt none".to_owned(),
            ),
        ];
        let mut server = Self {
            url: format!("amqp://guest:guest@127.0.0.1:{port}//"),
            port,
            api_port,
            environment: environment.map(|(k, v)| (k.to_owned(), v)).into(),
            processes: Vec::new(),
            _directory: directory,
        };
        let epmd = Command::new(epmd())
            .args(["-port", &names.to_string(), "-address", "127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("epmd of Erlang runs");
        server.processes.push(epmd);
        wait_for("epmd", Duration::from_secs(10), || {
            TcpStream::connect(("127.0.0.1", names)).ok()
        });
        let node = Command::new(format!("{SCRIPTS}/rabbitmq-server"))
            .envs(server.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("rabbitmq-server is installed: apt-get install rabbitmq-server");
        server.processes.push(node);
        server.wait();
        server
    }

    /// Its address without TLS.
    pub fn plain_url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}//", self.port)
    }

    /// Runs `rabbitmqctl`; returns what it printed.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let output = Command::new(script("rabbitmqctl"))
            .args(
                ["--quiet", "--no-table-headers"]
                    .iter()
                    .filter(|_| arguments[0].starts_with("list")),
            )
            .args(arguments)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .output()
            .expect("rabbitmqctl runs");
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Its management interface.
    pub fn api(&self) -> RabbitApi {
        RabbitApi::at(&format!("http://guest:guest@127.0.0.1:{}", self.api_port))
    }

    /// Stops the broker and starts it again; what is persistent is still there.
    pub fn restart(&self) {
        self.stop();
        self.ctl(&["start_app"]);
        self.wait();
    }

    /// Stops the broker; nothing answers at its port.
    pub fn stop(&self) {
        self.ctl(&["stop_app"]);
    }

    /// Messages of a queue that wait, and that are delivered and not settled.
    pub fn counts(&self, queue: &str) -> (usize, usize) {
        let queues = self.api().queues("%2F");
        let found = queues.iter().find(|held| held.queue == queue);
        let held = found.unwrap_or_else(|| panic!("no queue {queue} in {queues:?}"));
        (held.ready, held.unacked)
    }

    fn wait(&self) {
        wait_for(
            &format!("RabbitMQ at {}", self.url),
            Duration::from_secs(120),
            || {
                use std::io::{Read, Write};
                let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
                stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
                stream.write_all(b"AMQP\0\0\x09\x01").ok()?;
                let mut first = [0];
                stream.read_exact(&mut first).ok()?;
                (first == [1]).then_some(())
            },
        );
    }
}

impl Drop for RabbitServer {
    fn drop(&mut self) {
        // The node before its name server.
        for mut process in self.processes.drain(..).rev() {
            if let Ok(pid) = i32::try_from(process.id()) {
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// A script itself: Debian's wrapper around some of them switches to the system's user.
fn script(name: &str) -> PathBuf {
    let library = Path::new("/usr/lib/rabbitmq/lib");
    let versions = std::fs::read_dir(library).into_iter().flatten().flatten();
    let found = versions
        .map(|entry| entry.path().join("sbin").join(name))
        .find(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from(name))
}

fn epmd() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/erlang")
        .into_iter()
        .flatten()
        .flatten();
    let found = versions
        .map(|entry| entry.path().join("bin/epmd"))
        .find(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from("epmd"))
}

/// Free ports below the range of outgoing connections.
fn fixed_ports<const COUNT: usize>() -> [u16; COUNT] {
    let mut taken = Vec::new();
    [(); COUNT].map(|()| {
        loop {
            let random = uuid::Uuid::new_v4().as_u128() % 8000;
            let port = 20_000 + u16::try_from(random).expect("below 8000");
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
                taken.push(listener);
                return port;
            }
        }
    })
}
