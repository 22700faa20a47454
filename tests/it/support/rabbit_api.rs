//! RabbitMQ's management interface: virtual hosts, what queues hold, messages past all clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::{Value, json};

/// How long a server may be away.
const PATIENCE: Duration = Duration::from_secs(40);

/// What one queue holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its name.
    pub queue: String,
    /// Messages that wait.
    pub ready: usize,
    /// Messages that are delivered and not settled.
    pub unacked: usize,
}

/// The interface of one server, with one connection to it.
pub struct RabbitApi {
    server: String,
    authorization: String,
    connection: Option<BufReader<TcpStream>>,
}

impl RabbitApi {
    /// Connects when it is used.
    pub fn at(url: &str) -> Self {
        let url = url::Url::parse(url).expect("the management interface's URL");
        let login = format!("{}:{}", url.username(), url.password().unwrap_or_default());
        Self {
            server: format!(
                "{}:{}",
                url.host_str().expect("a host"),
                url.port_or_known_default().expect("a port")
            ),
            authorization: base64::engine::general_purpose::STANDARD.encode(login),
            connection: None,
        }
    }

    /// Makes a virtual host.
    #[track_caller]
    pub fn make_vhost(&mut self, name: &str) {
        self.request("PUT", &format!("vhosts/{name}"), &json!({}));
    }

    /// Deletes a virtual host with its queues; its connections are closed.
    pub fn delete_vhost(&mut self, name: &str) {
        let _ = self.try_request("DELETE", &format!("vhosts/{name}"), &Value::Null);
    }

    /// Every queue of a virtual host, counted at this moment; quorum queues up to five seconds ago.
    #[track_caller]
    pub fn queues(&mut self, vhost: &str) -> Vec<Held> {
        // Without the statistics, which are seconds old.
        let path = format!("queues/{vhost}?disable_stats=true&enable_queue_totals=true");
        let list = self.request("GET", &path, &Value::Null);
        let count = |queue: &Value, name: &str| {
            usize::try_from(queue[name].as_u64().unwrap_or(0)).expect("a count")
        };
        let queues = list.as_array().expect("a list of queues").iter();
        queues
            .map(|queue| Held {
                queue: queue["name"].as_str().expect("a name").to_owned(),
                ready: count(queue, "messages_ready"),
                unacked: count(queue, "messages_unacknowledged"),
            })
            .collect()
    }

    /// Publishes to an exchange; whether a queue got it. `amq.default` is the nameless one. Tried
    /// again while the server is away.
    #[track_caller]
    pub fn publish(
        &mut self,
        vhost: &str,
        exchange: &str,
        routing_key: &str,
        properties: &Value,
        body: &[u8],
    ) -> bool {
        let path = format!("exchanges/{vhost}/{exchange}/publish");
        let message = json!({
            "routing_key": routing_key, "properties": properties, "payload_encoding": "base64",
            "payload": base64::engine::general_purpose::STANDARD.encode(body),
        });
        let began = Instant::now();
        loop {
            match self.try_request("POST", &path, &message) {
                Ok(answer) => return answer["routed"] == true,
                Err(text) => assert!(began.elapsed() < PATIENCE, "publishing: {text}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The messages that wait, the next one first, their bodies in base64; they go back to their
    /// places.
    #[track_caller]
    pub fn messages(&mut self, vhost: &str, queue: &str) -> Vec<Value> {
        let wanted = json!({"count": 10_000, "ackmode": "ack_requeue_true", "encoding": "base64"});
        let list = self.request("POST", &format!("queues/{vhost}/{queue}/get"), &wanted);
        list.as_array().expect("a list of messages").clone()
    }

    /// Closes every connection to a virtual host that is listed, as an operator would; one that
    /// was just made may not be listed yet.
    #[track_caller]
    pub fn close_connections(&mut self, vhost: &str) {
        let vhost = vhost.replace("%2F", "/");
        // The list of one virtual host is made of statistics, which are switched off.
        let list = self.request("GET", "connections", &Value::Null);
        let all = list.as_array().expect("a list of connections").iter();
        for connection in all.filter(|connection| connection["vhost"] == vhost.as_str()) {
            let name = connection["name"].as_str().expect("a name");
            let path = format!(
                "connections/{}",
                name.replace(' ', "%20").replace('>', "%3E")
            );
            let _ = self.try_request("DELETE", &path, &Value::Null);
        }
    }

    /// A request that must succeed.
    #[track_caller]
    pub fn request(&mut self, method: &str, path: &str, body: &Value) -> Value {
        match self.try_request(method, path, body) {
            Ok(answer) => answer,
            Err(text) => panic!("RabbitMQ's management interface: {method} {path}: {text}"),
        }
    }

    fn try_request(&mut self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let mut answer = self.exchange(method, path, body);
        if answer.is_err() {
            // The server closes connections that were idle for a while.
            self.connection = None;
            answer = self.exchange(method, path, body);
        }
        let (status, text) = answer.map_err(|error| {
            format!(
                "{error}; it is expected at {}: set TEST_AMQP_API_URL to where it is, after \
                 rabbitmq-plugins enable rabbitmq_management",
                self.server
            )
        })?;
        if !(200..300).contains(&status) {
            return Err(format!("{status} {}", String::from_utf8_lossy(&text)));
        }
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&text).map_err(|error| error.to_string())
    }

    fn exchange(
        &mut self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> std::io::Result<(u16, Vec<u8>)> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        if self.connection.is_none() {
            let stream = TcpStream::connect(&self.server)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            self.connection = Some(BufReader::new(stream));
        }
        let connection = self.connection.as_mut().ok_or_else(invalid)?;
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let request = format!(
            "{method} /api/{path} HTTP/1.1\r\nhost: {}\r\nauthorization: Basic {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.server,
            self.authorization,
            body.len()
        );
        connection.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        connection.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(invalid)?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let mut line = String::new();
            connection.read_line(&mut line)?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(|_| invalid())?;
            }
            chunked |= line.starts_with("transfer-encoding:") && line.ends_with("chunked");
        }
        let mut text = vec![0; length];
        connection.read_exact(&mut text)?;
        while chunked {
            let mut line = String::new();
            connection.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim(), 16).map_err(|_| invalid())?;
            let begin = text.len();
            text.resize(begin + size, 0);
            connection.read_exact(&mut text[begin..])?;
            connection.read_line(&mut line)?;
            chunked = size > 0;
        }
        Ok((status, text))
    }
}
