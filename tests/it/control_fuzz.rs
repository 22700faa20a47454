//! Whatever anybody publishes on the mailbox's channel, the worker goes on answering.

use base64::Engine as _;
use serde_json::{Map, Value, json};

use crate::control::call;
use crate::support::{Worker, services};

/// Commands whose arguments are made up. Not `shutdown`, and none that makes queues or processes.
const COMMANDS: &str = "ping active reserved scheduled revoked registered stats conf report clock \
    query_task active_queues hello election objgraph memsample memdump revoke \
    revoke_by_stamped_headers terminate rate_limit time_limit enable_events disable_events \
    heartbeat pool_restart autoscale pool_shrink cancel_consumer nope";
const ARGUMENTS: &str = "task_id terminate signal headers task_name rate_limit soft hard queue n max \
    min ids id topic action from_node revoked taskinfoitems safe with_defaults samples builtins";

/// The same numbers at every run.
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below as u64).unwrap()
    }

    fn word<'a>(&mut self, words: &'a str) -> &'a str {
        let words: Vec<&str> = words.split_whitespace().collect();
        words[self.below(words.len())]
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth > 3 { 12 } else { 16 }) {
            0 | 1 => Value::Null,
            2 => json!(self.below(2) == 0),
            3 => json!(i64::MIN),
            4 => json!(u64::MAX),
            5 => json!(-1.5),
            6 => json!(1e308),
            7 => json!("\u{0}\u{fffd}한"),
            8 => json!("test_task"),
            9 => json!("1/s"),
            10 => json!("KILL"),
            11 => json!("a".repeat(self.below(3000))),
            12 | 13 => (0..self.below(4)).map(|_| self.value(depth + 1)).collect(),
            _ => Value::Object(self.object(depth + 1)),
        }
    }

    fn object(&mut self, depth: usize) -> Map<String, Value> {
        let entry = |random: &mut Self| {
            let name = random.word(ARGUMENTS).to_owned();
            (name, random.value(depth))
        };
        (0..self.below(4)).map(|_| entry(self)).collect()
    }

    fn request(&mut self) -> Vec<u8> {
        let mut request = json!({
            "method": self.word(COMMANDS),
            "arguments": self.object(0),
            "ticket": self.value(0),
            "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "nobody"},
        });
        for name in ["arguments", "destination", "pattern", "matcher", "reply_to"] {
            if self.below(8) == 0 {
                request[name] = self.value(0);
            }
        }
        let mut bytes = request.to_string().into_bytes();
        if self.below(8) == 0 {
            let at = self.below(bytes.len());
            bytes[at] = u8::try_from(self.below(256)).unwrap();
        }
        bytes
    }

    fn message(&mut self) -> Vec<u8> {
        if self.below(20) == 0 {
            return (0..self.below(300))
                .map(|_| u8::try_from(self.below(256)).unwrap())
                .collect();
        }
        let body = base64::engine::general_purpose::STANDARD.encode(self.request());
        let mut envelope = json!({
            "body": body, "content-encoding": "utf-8", "content-type": "application/json",
            "headers": {"clock": 1, "expires": 0},
            "properties": {"body_encoding": "base64", "delivery_tag": "t", "delivery_mode": 2,
                "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}, "priority": 0},
        });
        for name in ["content-encoding", "content-type", "headers", "properties"] {
            if self.below(20) == 0 {
                envelope[name] = self.value(0);
            }
        }
        envelope.to_string().into_bytes()
    }
}

#[test]
fn whatever_comes_to_the_mailbox_the_worker_still_answers() {
    let redis = services::redis();
    let worker = Worker::start(&redis);
    let channel = format!("/{}.celery.pidbox", redis.url.rsplit('/').next().unwrap());
    let count = std::env::var("MAILBOX_MESSAGES").map_or(3000, |count| count.parse().unwrap());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut connection = redis.connect();
    // The last message: when its command has left its line in the log, all have been read.
    let mark = json!({"method": "revoke", "arguments": {"task_id": "the-mark"}}).to_string();
    let mark = base64::engine::general_purpose::STANDARD.encode(mark);
    let mark = json!({"body": mark, "content-encoding": "utf-8",
        "content-type": "application/json", "headers": {},
        "properties": {"body_encoding": "base64", "delivery_tag": "t",
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}}});
    for _ in 0..count {
        let _: () = redis::cmd("PUBLISH")
            .arg(&channel)
            .arg(random.message())
            .query(&mut connection)
            .unwrap();
    }
    let _: () = redis::cmd("PUBLISH")
        .arg(&channel)
        .arg(mark.to_string())
        .query(&mut connection)
        .unwrap();
    worker.wait_log("Tasks flagged as revoked: the-mark");
    let pong = call(&worker, "ping", json!({}));
    assert_eq!(pong, json!({"ok": "pong"}));
    assert!(!worker.log().contains("panicked"), "a command panicked");
}
