//! For tests, also of what is built on channels: a real redis-server, one private instance per
//! test, and an ear that hears what is published.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Options, RedisTransport};
use crate::protocol::envelope::Envelope;
use crate::transport::url::BrokerUrl;
use crate::transport::{Channel, Delivery, Exchange, Publication, Queue, Transport};

/// Nothing in a test takes longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A redis-server of one's own on a free port.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) port: u16,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub(crate) async fn start_with(arguments: &[&str]) -> Self {
        // Somebody else may take the port between our look and its bind.
        for _ in 0..5 {
            if let Some(server) = Self::try_start(arguments).await {
                return server;
            }
        }
        panic!("redis-server ends at once: {arguments:?}");
    }

    async fn try_start(arguments: &[&str]) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let child = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
            ])
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is needed: apt-get install redis-server");
        let mut server = Self { child, port };
        let started = Instant::now();
        while server.answers().await != Some(server.child.id()) {
            if server.child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(started.elapsed() < DEADLINE, "redis-server does not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Some(server)
    }

    /// The process id of who answers at the port.
    async fn answers(&self) -> Option<u32> {
        let url = format!("redis://127.0.0.1:{}/0", self.port);
        let client = redis::Client::open(url).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        let mut info = redis::cmd("INFO");
        let info: redis::InfoDict = info.arg("server").query_async(&mut connection).await.ok()?;
        info.get("process_id")
    }

    pub(crate) fn transport(&self) -> RedisTransport {
        self.transport_with(Options::default())
    }

    pub(crate) fn transport_with(&self, options: Options) -> RedisTransport {
        let url = BrokerUrl::parse(&format!("redis://127.0.0.1:{}/0", self.port)).unwrap();
        RedisTransport::new(&[url], options).unwrap()
    }

    pub(crate) async fn channel(&self) -> Arc<dyn Channel> {
        self.transport().connect().await.unwrap()
    }

    /// A plain connection to look at what is there.
    pub(crate) async fn redis(&self) -> MultiplexedConnection {
        let url = format!("redis://127.0.0.1:{}/0", self.port);
        redis::Client::open(url)
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .unwrap()
    }
}

impl Server {
    /// The names of all keys.
    pub(crate) async fn keys(&self) -> Vec<String> {
        let mut keys = redis::cmd("KEYS");
        let found = keys.arg("*").query_async(&mut self.redis().await).await;
        found.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hears what comes to one queue.
pub(crate) struct Ear {
    deliveries: mpsc::Receiver<Delivery>,
    /// The subscription ends with it.
    _channel: Arc<dyn Channel>,
    exchange: Exchange,
    key: String,
}

impl Ear {
    /// Listens for `key`; `#` is for everything.
    pub(crate) async fn on(channel: Arc<dyn Channel>, queue: &Queue, key: &str) -> Self {
        let keys = [key.to_owned()];
        let deliveries = channel.subscribe(queue, &keys).await.unwrap();
        Self {
            deliveries,
            _channel: channel,
            exchange: queue.exchange.clone(),
            key: if key == "#" { "end.of.test" } else { key }.to_owned(),
        }
    }

    /// What comes next.
    pub(crate) async fn next(&mut self) -> Delivery {
        let next = timeout(DEADLINE, self.deliveries.recv()).await;
        next.expect("something is published")
            .expect("the channel is there")
    }

    /// Everything that `channel` has sent so far: what stands before a mark of ours.
    pub(crate) async fn heard(&mut self, channel: &dyn Channel) -> Vec<Delivery> {
        channel.cast(Publication {
            exchange: self.exchange.clone(),
            routing_key: self.key.clone(),
            envelope: Envelope {
                content_type: Some("mark".to_owned()),
                ..Envelope::default()
            },
        });
        let mut heard = Vec::new();
        loop {
            let delivery = self.next().await;
            if delivery.envelope.content_type.as_deref() == Some("mark") {
                return heard;
            }
            heard.push(delivery);
        }
    }
}
