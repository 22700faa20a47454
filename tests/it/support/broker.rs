//! Tests that mean the same on every broker, written once and run on each.
//!
//! ```ignore
//! on_brokers!(a_task_is_done);
//! fn a_task_is_done(broker: &Broker) { … }
//! ```
//!
//! makes the tests `a_task_is_done::on_redis` and `a_task_is_done::on_rabbitmq`; with
//! `on_brokers!(a_task_is_done, own)` the servers are the test's own, to be restarted. What differs
//! between brokers is asked of [`Broker`]; a test that is about one of them does not belong here.

use std::sync::Arc;

use base64::Engine;
use celeriac::transport::amqp::AmqpTransport;
use celeriac::transport::redis::RedisTransport;
use celeriac::transport::url::BrokerUrl;
use celeriac::transport::{self, Transport};
use redis::Commands;
use serde_json::{Value, json};

use super::rabbit_api::RabbitApi;
use super::services::{self, Redis};
use super::worker::Builder;
use super::{RabbitServer, Raw, RedisServer, Worker, unique};

/// Makes one test for each broker of a function that takes a `&Broker`, or a `&mut Broker` of
/// servers of its own.
macro_rules! on_brokers {
    ($name:ident) => {
        mod $name {
            use crate::support::Broker;

            #[test]
            fn on_redis() {
                super::$name(&Broker::redis());
            }

            #[test]
            fn on_rabbitmq() {
                super::$name(&Broker::rabbitmq());
            }
        }
    };
    ($name:ident, own) => {
        mod $name {
            use crate::support::Broker;

            #[test]
            fn on_redis() {
                super::$name(&mut Broker::own_redis());
            }

            #[test]
            fn on_rabbitmq() {
                super::$name(&mut Broker::own_rabbitmq());
            }
        }
    };
}
pub(crate) use on_brokers;

/// A corner of a broker of one test's own, and where its results go: into Redis, so that they can
/// be read without a client.
pub struct Broker {
    /// The broker's URL.
    pub url: String,
    /// The result backend's URL.
    pub results: String,
    server: Server,
}

enum Server {
    /// A database of the common server.
    Redis(Redis),
    /// A virtual host of the common server.
    Vhost(String),
    OwnRedis(RedisServer),
    OwnRabbit(RabbitServer),
}

impl Broker {
    /// A Redis database.
    pub fn redis() -> Self {
        let redis = services::redis();
        Self {
            url: redis.url.clone(),
            results: redis.url.clone(),
            server: Server::Redis(redis),
        }
    }

    /// A virtual host of RabbitMQ: remote control and events reach everybody in it.
    pub fn rabbitmq() -> Self {
        let vhost = unique("it");
        services::rabbitmq_api().make_vhost(&vhost);
        let mut url = url::Url::parse(&services::rabbitmq()).expect("TEST_AMQP_URL is a URL");
        url.set_path(&vhost);
        Self {
            url: url.into(),
            results: services::redis().url,
            server: Server::Vhost(vhost),
        }
    }

    /// A Redis server that writes everything down.
    pub fn own_redis() -> Self {
        let server = RedisServer::durable();
        Self {
            url: server.url.clone(),
            results: server.url.clone(),
            server: Server::OwnRedis(server),
        }
    }

    /// A RabbitMQ server.
    pub fn own_rabbitmq() -> Self {
        let server = RabbitServer::start();
        Self {
            url: server.url.clone(),
            results: services::redis().url,
            server: Server::OwnRabbit(server),
        }
    }

    /// Whether it is Redis.
    pub fn is_redis(&self) -> bool {
        matches!(self.server, Server::Redis(_) | Server::OwnRedis(_))
    }

    /// A worker, to be configured and started.
    pub fn worker(&self) -> Builder {
        Worker::on(&self.url).backend(&self.results)
    }

    /// The product's own way to it.
    pub fn transport(&self) -> Arc<dyn Transport> {
        let urls = BrokerUrl::parse_list(&self.url).expect("the URL of a broker");
        if self.is_redis() {
            let transport = RedisTransport::new(&urls, transport::redis::Options::default());
            Arc::new(transport.expect("a transport"))
        } else {
            let transport = AmqpTransport::new(&urls, transport::amqp::Options::default());
            Arc::new(transport.expect("a transport"))
        }
    }

    /// Messages to one queue and results, past the client.
    pub fn raw(&self, queue: &str) -> Raw {
        match self.rabbit() {
            None => Raw::new(&self.url, queue),
            Some((api, vhost)) => Raw::rabbitmq(api, &vhost, &self.url, &self.results, queue),
        }
    }

    /// Sends bytes to the mailboxes of all workers: an envelope as kombu has it in Redis, or
    /// whatever it is.
    pub fn mail(&self) -> Mail {
        match self.rabbit() {
            None => {
                let client = redis::Client::open(self.url.as_str()).expect("a Redis URL");
                let database = self.url.rsplit('/').next().expect("a database");
                Mail::Redis(
                    Box::new(client.get_connection().expect("Redis is up")),
                    format!("/{database}.celery.pidbox"),
                )
            }
            Some((api, vhost)) => Mail::Rabbit(api, vhost),
        }
    }

    /// Its queues, or the keys that Redis has instead.
    pub fn queues(&self) -> Vec<String> {
        match (&self.server, self.rabbit()) {
            (Server::Redis(redis), _) => redis.keys(),
            (_, Some((mut api, vhost))) => {
                let queues = api.queues(&vhost);
                queues.into_iter().map(|held| held.queue).collect()
            }
            (_, None) => {
                let client = redis::Client::open(self.url.as_str()).expect("a Redis URL");
                let mut connection = client.get_connection().expect("Redis is up");
                connection.keys("*").expect("KEYS *")
            }
        }
    }

    /// Stops the server, until it is restarted.
    pub fn stop(&mut self) {
        match &mut self.server {
            Server::OwnRedis(server) => server.kill(),
            Server::OwnRabbit(server) => server.stop(),
            Server::Redis(_) | Server::Vhost(_) => panic!("the server is shared with other tests"),
        }
    }

    /// Stops the server and starts it again; what it wrote down is still there.
    pub fn restart(&mut self) {
        match &mut self.server {
            Server::OwnRedis(server) => server.restart(),
            Server::OwnRabbit(server) => server.restart(),
            Server::Redis(_) | Server::Vhost(_) => panic!("the server is shared with other tests"),
        }
    }

    /// Closes the connections of its clients, from its side.
    pub fn close_connections(&self) {
        match &self.server {
            Server::OwnRedis(server) => {
                for kind in ["normal", "pubsub"] {
                    let _: i64 = redis::cmd("CLIENT")
                        .arg(&["KILL", "TYPE", kind, "SKIPME", "yes"])
                        .query(&mut server.connect())
                        .expect("CLIENT KILL");
                }
            }
            Server::Redis(_) => panic!("the server is shared with other tests"),
            Server::Vhost(_) | Server::OwnRabbit(_) => {
                let (mut api, vhost) = self.rabbit().expect("it is RabbitMQ");
                api.close_connections(&vhost);
            }
        }
    }

    /// The management interface and the virtual host, in the form paths have it.
    pub fn rabbit(&self) -> Option<(RabbitApi, String)> {
        match &self.server {
            Server::Redis(_) | Server::OwnRedis(_) => None,
            Server::Vhost(vhost) => Some((services::rabbitmq_api(), vhost.clone())),
            Server::OwnRabbit(server) => Some((server.api(), "%2F".to_owned())),
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Server::Vhost(vhost) = &self.server {
            services::rabbitmq_api().delete_vhost(vhost);
        }
    }
}

/// The way to the mailboxes of all workers of a broker.
pub enum Mail {
    Redis(Box<redis::Connection>, String),
    Rabbit(RabbitApi, String),
}

impl Mail {
    /// Sends to everybody.
    pub fn send(&mut self, message: &[u8]) {
        match self {
            Self::Redis(connection, channel) => {
                let _: () = connection.publish(&*channel, message).expect("PUBLISH");
            }
            Self::Rabbit(api, vhost) => {
                let whole = message;
                let message: Value = serde_json::from_slice(whole).unwrap_or(Value::Null);
                let decoded = match message["body"].as_str() {
                    Some(body) => base64::engine::general_purpose::STANDARD
                        .decode(body)
                        .unwrap_or_else(|_| body.into()),
                    None => whole.to_vec(),
                };
                let mut properties =
                    json!({"content_type": "application/json", "content_encoding": "utf-8"});
                if message["headers"].is_object() {
                    properties["headers"] = message["headers"].clone();
                }
                api.publish(vhost, "celery.pidbox", "", &properties, &decoded);
            }
        }
    }
}
