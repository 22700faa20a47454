//! Task messages handed to a broker byte by byte, and results read from Redis without a client:
//! for tests that send what no client would, and for those whose servers go away under them.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use base64::Engine;
use celeriac::protocol::envelope::{Envelope, Properties};
use celeriac::transport::amqp::{AmqpTransport, Options};
use celeriac::transport::url::BrokerUrl;
use celeriac::transport::{Channel, Exchange, Publication, Transport};
use redis::Commands;
use serde_json::{Value, json};

use super::rabbit_api::RabbitApi;
use super::wait_for;

/// How long a result may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// One queue of one broker, and one Redis with results, which may be away for a while.
pub struct Raw {
    url: String,
    queue: String,
    connection: Option<redis::Connection>,
    rabbit: Option<Rabbit>,
    /// Times the last message was sent.
    tries: u32,
    /// Ids of messages that were sent again because their connection broke: they may be there
    /// twice, and then they run twice.
    pub resent: HashSet<String>,
}

/// Where messages go that do not go to Redis.
struct Rabbit {
    api: RabbitApi,
    vhost: String,
    url: String,
    channel: Option<Arc<dyn Channel>>,
}

impl Raw {
    /// Connects when it is used.
    pub fn new(url: &str, queue: &str) -> Self {
        Self {
            url: url.to_owned(),
            queue: queue.to_owned(),
            connection: None,
            rabbit: None,
            tries: 0,
            resent: HashSet::new(),
        }
    }

    /// Messages go to a queue of RabbitMQ, results come from Redis.
    pub fn rabbitmq(api: RabbitApi, vhost: &str, url: &str, results: &str, queue: &str) -> Self {
        Self {
            rabbit: Some(Rabbit {
                api,
                vhost: vhost.to_owned(),
                url: url.to_owned(),
                channel: None,
            }),
            ..Self::new(results, queue)
        }
    }

    /// The queue's name.
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Does something with a connection, again while Redis is away.
    pub fn with<T>(
        &mut self,
        mut what: impl FnMut(&mut redis::Connection) -> redis::RedisResult<T>,
    ) -> T {
        let url = self.url.clone();
        wait_for(&format!("Redis at {url}"), PATIENCE, || {
            if self.connection.is_none() {
                let client = redis::Client::open(url.as_str()).expect("a Redis URL");
                self.connection = client
                    .get_connection_with_timeout(Duration::from_secs(5))
                    .ok();
            }
            let connection = self.connection.as_mut()?;
            self.tries += 1;
            let outcome = what(connection);
            if outcome.is_err() {
                self.connection = None;
            }
            outcome.ok()
        })
    }

    /// Pushes bytes, whatever they are: an envelope where the broker is Redis, else a body.
    pub fn push(&mut self, message: &[u8]) {
        if self.rabbit.is_some() {
            return self.publish(Envelope {
                body: message.to_vec(),
                content_type: Some("application/json".to_owned()),
                ..Envelope::default()
            });
        }
        let queue = self.queue.clone();
        self.with(|connection| connection.lpush::<_, _, ()>(&queue, message));
    }

    /// Sends a call; returns its id.
    pub fn send(&mut self, task: &str, arguments: Value) -> String {
        self.send_with(task, arguments, &json!({}))
    }

    /// Sends a call with more headers, or others.
    pub fn send_with(&mut self, task: &str, arguments: Value, headers: &Value) -> String {
        let id = uuid::Uuid::new_v4().to_string();
        let message = envelope(&self.queue, task, &id, &arguments, headers);
        self.tries = 0;
        self.push_envelope(&message);
        if self.tries > 1 {
            self.resent.insert(id.clone());
        }
        id
    }

    /// Pushes a message in the form it has in Redis; RabbitMQ gets its parts.
    pub fn push_envelope(&mut self, message: &Value) {
        if self.rabbit.is_none() {
            return self.push(message.to_string().as_bytes());
        }
        let text = |part: &Value| part.as_str().map(str::to_owned);
        let properties = &message["properties"];
        let mode = properties["delivery_mode"].as_u64();
        let priority = properties["priority"].as_u64();
        let body = message["body"].as_str().unwrap_or_default();
        let decoded = base64::engine::general_purpose::STANDARD.decode(body);
        self.publish(Envelope {
            body: decoded.unwrap_or_else(|_| body.into()),
            content_type: text(&message["content-type"]),
            content_encoding: text(&message["content-encoding"]),
            headers: message["headers"].as_object().cloned().unwrap_or_default(),
            properties: Properties {
                correlation_id: text(&properties["correlation_id"]),
                reply_to: text(&properties["reply_to"]),
                delivery_mode: mode.and_then(|mode| u8::try_from(mode).ok()),
                priority: priority.and_then(|priority| u8::try_from(priority).ok()),
                expiration: None,
            },
        });
    }

    /// Publishes with the broker's word for it, again while it is away.
    fn publish(&mut self, envelope: Envelope) {
        static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            let built = builder.worker_threads(1).enable_all().build();
            built.expect("a tokio runtime")
        });
        let publication = Publication {
            exchange: Exchange::default_exchange(),
            routing_key: self.queue.clone(),
            envelope,
        };
        let rabbit = self.rabbit.as_mut().expect("the broker is RabbitMQ");
        let tries = &mut self.tries;
        wait_for(&format!("RabbitMQ at {}", rabbit.url), PATIENCE, || {
            RUNTIME.block_on(async {
                if rabbit.channel.is_none() {
                    let url = BrokerUrl::parse(&rabbit.url).expect("a URL of RabbitMQ");
                    let transport = AmqpTransport::new(&[url], Options::default());
                    rabbit.channel = transport.expect("a transport").connect().await.ok();
                }
                let channel = rabbit.channel.as_ref()?;
                *tries += 1;
                let sent = channel.publish(publication.clone()).await;
                if sent.is_err() {
                    rabbit.channel = None;
                }
                sent.ok()
            })
        });
    }

    /// Messages of a queue of RabbitMQ that wait, and that are delivered and not settled.
    fn held(&mut self, queue: &str) -> (usize, usize) {
        let rabbit = self.rabbit.as_mut().expect("the broker is RabbitMQ");
        let queues = rabbit.api.queues(&rabbit.vhost);
        let found = queues.iter().find(|held| held.queue == queue);
        found.map_or((0, 0), |held| (held.ready, held.unacked))
    }

    /// The stored state of a task, if there is one.
    pub fn meta(&mut self, id: &str) -> Option<Value> {
        let key = format!("celery-task-meta-{id}");
        let text: Option<String> = self.with(|connection| connection.get(&key));
        text.map(|text| serde_json::from_str(&text).expect("a stored state is JSON"))
    }

    /// The status of a task; `PENDING` when nothing is stored.
    pub fn status(&mut self, id: &str) -> String {
        let meta = self.meta(id);
        let status = meta
            .as_ref()
            .and_then(|meta| meta["status"].as_str())
            .unwrap_or("PENDING");
        status.to_owned()
    }

    /// Waits for the end of a task and returns its stored state.
    #[track_caller]
    pub fn wait(&mut self, id: &str) -> Value {
        let began = std::time::Instant::now();
        while began.elapsed() < PATIENCE {
            let meta = self.meta(id).unwrap_or_default();
            let status = meta["status"].as_str().unwrap_or_default();
            if matches!(status, "SUCCESS" | "FAILURE" | "REVOKED") {
                return meta;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let place = if self.rabbit.is_some() {
            "nobody knows where it is"
        } else if self.ids().contains(id) {
            "its message waits or is held"
        } else {
            "its message is gone"
        };
        panic!("no end of task {id}, which is {}; {place}", self.status(id));
    }

    /// Waits for the success of a task and returns its value.
    #[track_caller]
    pub fn value(&mut self, id: &str) -> Value {
        let meta = self.wait(id);
        assert_eq!(meta["status"], "SUCCESS", "{meta}");
        meta["result"].clone()
    }

    /// How many messages wait.
    pub fn waiting(&mut self) -> usize {
        let queue = self.queue.clone();
        if self.rabbit.is_some() {
            return self.held(&queue).0;
        }
        self.with(|connection| connection.llen(&queue))
    }

    /// The messages that wait, the next one first.
    pub fn messages(&mut self) -> Vec<Value> {
        let queue = self.queue.clone();
        if let Some(rabbit) = &mut self.rabbit {
            let messages = rabbit.api.messages(&rabbit.vhost, &queue);
            let envelope = |message: &Value| {
                let mut properties = message["properties"].clone();
                let mut headers = properties["headers"].take();
                nulls(&mut headers);
                properties["delivery_info"] = json!({"redelivered": message["redelivered"]});
                json!({"headers": headers, "properties": properties, "body": message["payload"]})
            };
            return messages.iter().map(envelope).collect();
        }
        let mut texts: Vec<String> = self.with(|connection| connection.lrange(&queue, 0, -1));
        texts.reverse();
        texts
            .iter()
            .map(|text| serde_json::from_str(text).expect("an envelope is JSON"))
            .collect()
    }

    /// How many messages are delivered and not settled.
    pub fn unacked(&mut self) -> usize {
        if self.rabbit.is_some() {
            let queue = self.queue.clone();
            return self.held(&queue).1;
        }
        self.with(|connection| connection.hlen("unacked"))
    }

    /// The ids of the messages that wait or are noted as delivered in Redis, read in the order of a
    /// message's way, so that none passes unseen.
    pub fn ids(&mut self) -> HashSet<String> {
        let mut messages = self.messages();
        let noted: Vec<String> = self.with(|connection| connection.hvals("unacked"));
        messages.extend(noted.iter().map(|text| {
            let mut noted: Value = serde_json::from_str(text).expect("a note is JSON");
            noted[0].take()
        }));
        let id = |message: &Value| message["headers"]["id"].as_str().map(str::to_owned);
        messages.iter().filter_map(id).collect()
    }

    /// Ends every BRPOP that waits in this database: who waits asks again, and who cannot ask any
    /// more is given nothing.
    pub fn end_blocked_pops(&mut self) {
        let url = redis::Client::open(self.url.as_str()).expect("a Redis URL");
        let database = format!(" db={} ", url.get_connection_info().redis_settings().db());
        let clients: String =
            self.with(|connection| redis::cmd("CLIENT").arg("LIST").query(connection));
        let blocked = clients
            .lines()
            .filter(|line| line.contains(&database) && line.contains(" cmd=brpop "));
        for line in blocked {
            let id = line
                .strip_prefix("id=")
                .and_then(|rest| rest.split(' ').next());
            let id = id.expect("a client has an id");
            self.with(|connection| {
                redis::cmd("CLIENT")
                    .arg("UNBLOCK")
                    .arg(id)
                    .query::<()>(connection)
            });
        }
    }

    /// How many messages were set aside.
    pub fn quarantined(&mut self) -> usize {
        if self.rabbit.is_some() {
            return self.held("celeriac.quarantine").0;
        }
        self.with(|connection| connection.llen("celeriac.quarantine"))
    }

    /// Waits until no message waits or is held.
    #[track_caller]
    pub fn wait_drained(&mut self) {
        let began = std::time::Instant::now();
        while self.waiting() + self.unacked() > 0 {
            if began.elapsed() > PATIENCE {
                assert!(
                    self.rabbit.is_none(),
                    "{} wait, {} are held",
                    self.waiting(),
                    self.unacked()
                );
                let held: Vec<String> = self.with(|connection| connection.hvals("unacked"));
                panic!("{} wait, and these are held: {held:#?}", self.waiting());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The management interface has a word of Erlang's for what is null.
fn nulls(value: &mut Value) {
    match value {
        Value::String(word) if word == "undefined" => *value = Value::Null,
        Value::Array(items) => items.iter_mut().for_each(nulls),
        Value::Object(map) => map.values_mut().for_each(nulls),
        _ => {}
    }
}

/// The envelope of a call, as kombu writes it.
pub fn envelope(queue: &str, task: &str, id: &str, arguments: &Value, headers: &Value) -> Value {
    let body =
        json!([arguments, {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]);
    let mut all = json!({
        "lang": "py", "task": task, "id": id, "root_id": id, "parent_id": null, "group": null,
        "retries": 0, "eta": null, "expires": null, "timelimit": [null, null],
        "argsrepr": "()", "kwargsrepr": "{}", "origin": "gen1@test",
    });
    for (name, value) in headers.as_object().expect("headers are an object") {
        all[name] = value.clone();
    }
    json!({
        "body": base64::engine::general_purpose::STANDARD.encode(body.to_string()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": all,
        "properties": {
            "correlation_id": id, "reply_to": "nobody", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "body_encoding": "base64", "delivery_tag": uuid::Uuid::new_v4().to_string(),
        },
    })
}

/// Gives an envelope what is to follow its task.
pub fn set_embed(envelope: &mut Value, embed: &Value) {
    let mut decoded = body(envelope);
    decoded[2] = embed.clone();
    let engine = base64::engine::general_purpose::STANDARD;
    envelope["body"] = engine.encode(decoded.to_string()).into();
}

/// The body of an envelope.
pub fn body(envelope: &Value) -> Value {
    let engine = base64::engine::general_purpose::STANDARD;
    let body = envelope["body"].as_str().expect("a body");
    let body = engine.decode(body).expect("base64");
    serde_json::from_slice(&body).expect("JSON")
}
