//! Task messages pushed to Redis byte by byte, and results read without a client: for tests that
//! send what no client would, and for those whose Redis goes away under them.

use std::time::Duration;

use base64::Engine;
use redis::Commands;
use serde_json::{Value, json};

use super::wait_for;

/// How long a result may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

/// One queue of one Redis, which may be away for a while.
pub struct Raw {
    url: String,
    queue: String,
    connection: Option<redis::Connection>,
}

impl Raw {
    /// Connects when it is used.
    pub fn new(url: &str, queue: &str) -> Self {
        Self {
            url: url.to_owned(),
            queue: queue.to_owned(),
            connection: None,
        }
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
            let outcome = what(self.connection.as_mut()?);
            if outcome.is_err() {
                self.connection = None;
            }
            outcome.ok()
        })
    }

    /// Pushes bytes, whatever they are.
    pub fn push(&mut self, message: &[u8]) {
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
        self.push(message.to_string().as_bytes());
        id
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
        wait_for(&format!("the end of task {id}"), PATIENCE, || {
            let meta = self.meta(id)?;
            let status = meta["status"].as_str().unwrap_or_default();
            matches!(status, "SUCCESS" | "FAILURE" | "REVOKED").then_some(meta)
        })
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
        self.with(|connection| connection.llen(&queue))
    }

    /// The messages that wait, the next one first.
    pub fn messages(&mut self) -> Vec<Value> {
        let queue = self.queue.clone();
        let mut texts: Vec<String> = self.with(|connection| connection.lrange(&queue, 0, -1));
        texts.reverse();
        texts
            .iter()
            .map(|text| serde_json::from_str(text).expect("an envelope is JSON"))
            .collect()
    }

    /// How many messages are delivered and not settled.
    pub fn unacked(&mut self) -> usize {
        self.with(|connection| connection.hlen("unacked"))
    }

    /// How many messages were set aside.
    pub fn quarantined(&mut self) -> usize {
        self.with(|connection| connection.llen("celeriac.quarantine"))
    }

    /// Waits until no message waits or is held.
    #[track_caller]
    pub fn wait_drained(&mut self) {
        let began = std::time::Instant::now();
        while self.waiting() + self.unacked() > 0 {
            if began.elapsed() > PATIENCE {
                let held: Vec<String> = self.with(|connection| connection.hvals("unacked"));
                panic!("{} wait, and these are held: {held:#?}", self.waiting());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
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
