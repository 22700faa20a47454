//! The node and the mailbox, through a real redis-server.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use super::{Answer, Handler, Node, serve};
use crate::pidbox::{Addresses, CommandError, Mailbox, Reply, Request};
use crate::protocol::clock::Clock;
use crate::protocol::envelope::Envelope;
use crate::protocol::serialization::Accept;
use crate::transport::redis::server::{Ear, Server};
use crate::transport::{Channel, Delivery, Tag};

struct Table;

#[async_trait]
impl Handler for Table {
    async fn handle(
        &self,
        method: &str,
        arguments: Map<String, Value>,
        _: u64,
    ) -> Result<Answer, CommandError> {
        match method {
            "ping" => Ok(Answer::Value(json!({"ok": "pong"}))),
            "echo" => Ok(Answer::Value(Value::Object(arguments))),
            "heartbeat" => Ok(Answer::Value(Value::Null)),
            "shutdown" => Ok(Answer::Silence),
            "panic" => panic!("on purpose"),
            "slow" => std::future::pending().await,
            "autoscale" => Err(CommandError::value_error("Autoscale not enabled")),
            other => Err(CommandError::unknown_command(other)),
        }
    }
}

/// A broker with two nodes, and a mailbox to ask them.
async fn cluster() -> (Server, Mailbox) {
    let server = Server::start().await;
    for name in ["worker1@example", "worker2@example"] {
        let channel = server.channel().await;
        tokio::spawn(async move {
            let patience = Duration::from_millis(50);
            let node = Node {
                patience,
                ..Node::new(name, Clock::default())
            };
            serve(&node, channel, &Table).await
        });
    }
    let mailbox = Mailbox::new(
        server.channel().await,
        Addresses::default(),
        Accept::default(),
    );
    // They have subscribed when both answer.
    let both = Request {
        limit: Some(2),
        ..brief("ping")
    };
    while mailbox.call(&both).await.expect("asks").len() < 2 {}
    (server, mailbox)
}

/// A request to all, which waits for its whole time, and nobody has to come in time.
fn brief(method: &str) -> Request {
    Request {
        timeout: Duration::from_millis(100),
        ..Request::new(method)
    }
}

/// The same, with time for every answer.
fn patient(method: &str) -> Request {
    Request {
        timeout: Duration::from_secs(5),
        ..Request::new(method)
    }
}

async fn one(mailbox: &Mailbox, request: Request) -> Value {
    let request = Request {
        destination: Some(vec!["worker1@example".to_owned()]),
        timeout: Duration::from_secs(60),
        ..request
    };
    let replies = mailbox.call(&request).await.expect("asks");
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].node, "worker1@example");
    replies[0].value.clone()
}

#[tokio::test]
async fn all_nodes_answer_a_broadcast_until_the_timeout() {
    let (server, mailbox) = cluster().await;
    let channel = server.channel().await;
    let requests = Addresses::default().node_queue("ear@example");
    let mut ear = Ear::on(channel, &requests, "").await;
    let mut replies = mailbox.call(&patient("ping")).await.expect("asks");
    replies.sort_by(|one, other| one.node.cmp(&other.node));
    let pong = |node: &str| Reply {
        node: node.to_owned(),
        value: json!({"ok": "pong"}),
    };
    assert_eq!(replies, [pong("worker1@example"), pong("worker2@example")]);
    let sent = ear.next().await.envelope;
    let request: Value = serde_json::from_slice(&sent.body).expect("JSON");
    let keys: Vec<&String> = request.as_object().expect("object").keys().collect();
    let expected = "method arguments destination pattern matcher ticket reply_to";
    assert_eq!(keys, expected.split(' ').collect::<Vec<_>>());
    assert_eq!(request["reply_to"]["exchange"], "reply.celery.pidbox");
    assert!(sent.headers["clock"].as_u64().expect("a clock") > 0);
}

#[tokio::test]
async fn a_reply_bears_the_ticket_and_a_later_clock() {
    let body = json!({"method": "ping", "ticket": "t-1",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "r"}});
    let replies = replies(&body.to_string(), json!({"clock": 41})).await;
    assert_eq!(replies[0].headers["ticket"], "t-1");
    assert_eq!(replies[0].headers["clock"], 43, "adjusted, then forwarded");
}

#[tokio::test]
async fn destination_pattern_and_limit_choose_who_answers() {
    let (_server, mailbox) = cluster().await;
    assert_eq!(
        one(&mailbox, Request::new("ping")).await,
        json!({"ok": "pong"})
    );
    let chosen = async |pattern: &str, matcher: &str| {
        let request = Request {
            pattern: Some((pattern.to_owned(), matcher.to_owned())),
            ..patient("ping")
        };
        mailbox.call(&request).await.expect("asks").len()
    };
    let chosen = tokio::join!(
        chosen("*2@*", "glob"),
        chosen("worker", "pcre"),
        chosen("nobody", "glob"),
        chosen("x", "soundex"),
    );
    assert_eq!(chosen, (1, 2, 0, 0));
    let request = Request {
        limit: Some(1),
        timeout: Duration::from_secs(60),
        ..Request::new("ping")
    };
    assert_eq!(mailbox.call(&request).await.expect("asks").len(), 1);
}

#[tokio::test]
async fn commands_that_fail_answer_with_pythons_repr() {
    let (_server, mailbox) = cluster().await;
    for (method, expected) in [
        ("heartbeat", json!(null)),
        (
            "no_such_command",
            json!({"error": "KeyError('no_such_command')"}),
        ),
        (
            "autoscale",
            json!({"error": "ValueError('Autoscale not enabled')"}),
        ),
        ("panic", json!({"error": "RuntimeError('panic panicked')"})),
        ("ping", json!({"ok": "pong"})),
    ] {
        assert_eq!(
            one(&mailbox, Request::new(method)).await,
            expected,
            "{method}"
        );
    }
    assert_eq!(
        one(&mailbox, Request::new("slow")).await["error"],
        "TimeoutError('slow took longer than 50ms')"
    );
    assert_eq!(
        one(&mailbox, Request::new("echo").with("a", 1)).await,
        json!({"a": 1})
    );
    assert_eq!(mailbox.call(&brief("shutdown")).await.expect("asks"), []);
}

fn delivery(body: &[u8], headers: Value) -> Delivery {
    Delivery {
        tag: Tag("1".into()),
        envelope: Envelope {
            body: body.to_vec(),
            content_type: Some("application/json".to_owned()),
            headers: headers.as_object().cloned().expect("object"),
            ..Envelope::default()
        },
        queue: String::new(),
        exchange: "celery.pidbox".to_owned(),
        routing_key: String::new(),
        redelivered: false,
        deaths: 0,
    }
}

/// A node without a loop around it, and somebody who hears what it replies to `r`.
struct Alone {
    server: Server,
    channel: Arc<dyn Channel>,
    node: Node,
    ear: Ear,
}

impl Alone {
    async fn new() -> Self {
        let server = Server::start().await;
        let queue = Addresses::default().reply_queue("r");
        let ear = Ear::on(server.channel().await, &queue, "r").await;
        Self {
            channel: server.channel().await,
            server,
            node: Node::new("worker1@example", Clock::default()),
            ear,
        }
    }

    async fn answer(&self, body: &[u8], headers: Value) {
        let delivery = delivery(body, headers);
        self.node.answer(&*self.channel, &delivery, &Table).await;
    }

    async fn replies(&mut self) -> Vec<Envelope> {
        let heard = self.ear.heard(&*self.channel).await;
        heard.into_iter().map(|reply| reply.envelope).collect()
    }
}

async fn replies(body: &str, headers: Value) -> Vec<Envelope> {
    let mut alone = Alone::new().await;
    alone.answer(body.as_bytes(), headers).await;
    let advanced = alone.node.clock.value();
    assert_eq!(advanced, 1, "every request advances the clock");
    alone.replies().await
}

#[tokio::test]
async fn a_stale_request_is_not_executed() {
    let body =
        r#"{"method":"ping","reply_to":{"exchange":"reply.celery.pidbox","routing_key":"r"}}"#;
    let mut alone = Alone::new().await;
    let now = super::unix_time();
    for expires in [
        json!(now + 60.0),
        json!(0),
        // Clocks differ.
        json!(now - 2.0),
        json!(now - 300.0),
    ] {
        let headers = json!({"expires": expires});
        alone.answer(body.as_bytes(), headers).await;
    }
    // The last one is too old.
    assert_eq!(alone.replies().await.len(), 3);
}

#[tokio::test]
async fn no_request_can_make_a_worker_write_into_a_task_queue() {
    let mut alone = Alone::new().await;
    for exchange in ["", "celery", "celery.pidbox"] {
        let body =
            json!({"method": "ping", "reply_to": {"exchange": exchange, "routing_key": "celery"}});
        alone.answer(body.to_string().as_bytes(), json!({})).await;
    }
    // What was sent before this has reached the server.
    assert_eq!(alone.replies().await, []);
    let keys = alone.server.keys().await;
    assert!(!keys.iter().any(|key| key == "celery"), "{keys:?}");
}

#[tokio::test]
async fn bytes_that_are_no_request_do_no_harm() {
    let mut alone = Alone::new().await;
    for body in [
        "",
        "\u{0}",
        "[",
        "null",
        "[]",
        "{}",
        r#"{"method":1}"#,
        r#"{"method":"ping","arguments":[]}"#,
        r#"{"method":"ping","destination":{},"reply_to":7}"#,
        r#"{"method":"ping","pattern":1,"matcher":2}"#,
        r#"{"method":"ping","destination":[1,null,[]]}"#,
        r#"{"method":"ping","reply_to":{"exchange":1}}"#,
    ] {
        let headers = json!({"clock": "x", "expires": []});
        alone.answer(body.as_bytes(), headers).await;
    }
    assert_eq!(alone.replies().await, []);
}

/// Requests with random damage, from a fixed seed.
#[tokio::test]
async fn damaged_requests_never_stop_the_node() {
    let mut alone = Alone::new().await;
    let reply_to = json!({"exchange": "reply.celery.pidbox", "routing_key": "r"});
    let valid = json!({"method": "echo", "arguments": {"a": [1, {"b": null}]},
        "destination": ["worker1@example"], "pattern": "w*", "matcher": "glob",
        "ticket": "t", "reply_to": reply_to})
    .to_string()
    .into_bytes();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % below as u64).expect("below fits")
    };
    for _ in 0..5000 {
        let mut body = valid.clone();
        for _ in 0..=next(4) {
            let at = next(body.len());
            match next(3) {
                0 => body[at] = u8::try_from(next(256)).expect("a byte"),
                1 => drop(body.remove(at)),
                _ => body.insert(at, b"[]{}\":,*?0e-\\n"[next(14)]),
            }
        }
        alone.answer(&body, json!({"clock": 1})).await;
    }
    let answered = alone.replies().await.len();
    assert!(answered > 100, "{answered} answered");
    assert_eq!(alone.node.clock.value(), 5000);
}
