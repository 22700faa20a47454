//! The transport against a real redis-server, one private instance per test.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, Value};
use serde_json::json;
use tokio::time::timeout;

use super::super::{
    Channel, Delivery, Error, Exchange, ExchangeKind, Incoming, Notes, Publication, Queue,
    Transport,
};
use super::server::{DEADLINE, Server};
use super::{Options, RedisTransport};
use crate::protocol::envelope::{Envelope, Properties};
use crate::transport::url::BrokerUrl;

fn task(name: &str) -> Envelope {
    Envelope {
        body: format!("[[\"{name}\"], {{}}, {{}}]").into_bytes(),
        content_type: Some("application/json".into()),
        content_encoding: Some("utf-8".into()),
        headers: json!({"id": name, "task": "t", "empty": []})
            .as_object()
            .unwrap()
            .clone(),
        properties: Properties::default(),
    }
}

async fn send(channel: &dyn Channel, queue: &str, name: &str, priority: Option<u8>) {
    let mut envelope = task(name);
    envelope.properties.priority = priority;
    let publication = Publication {
        exchange: Exchange::default_exchange(),
        routing_key: queue.into(),
        envelope,
    };
    channel.publish(publication).await.unwrap();
}

async fn consume(channel: &dyn Channel, queues: &[&str], prefetch: u32) {
    channel.set_prefetch(prefetch).await.unwrap();
    for queue in queues {
        let queue = Queue::task(*queue);
        channel.declare(&queue).await.unwrap();
        channel.consume(&queue).await.unwrap();
    }
}

async fn next(channel: &dyn Channel) -> Delivery {
    match timeout(DEADLINE, channel.next())
        .await
        .expect("a message arrives")
        .unwrap()
    {
        Incoming::Delivery(delivery) => *delivery,
        other => panic!("{other:?}"),
    }
}

fn name(delivery: &Delivery) -> String {
    delivery.envelope.headers["id"].as_str().unwrap().to_owned()
}

/// Takes and acknowledges `count` messages.
async fn drain(channel: &dyn Channel, count: usize) -> Vec<String> {
    let mut names = Vec::new();
    for _ in 0..count {
        let delivery = next(channel).await;
        channel.ack(&delivery.tag);
        names.push(name(&delivery));
    }
    names
}

async fn keys(redis: &mut MultiplexedConnection) -> Vec<String> {
    let mut keys: Vec<String> = redis.keys("*").await.unwrap();
    keys.sort();
    keys
}

/// Waits until a condition on the server holds.
macro_rules! eventually {
    ($what:expr, $condition:expr) => {{
        let started = Instant::now();
        while !$condition {
            assert!(started.elapsed() < DEADLINE, "{}", $what);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }};
}

#[tokio::test]
async fn message_is_recorded_as_kombu_does_and_ack_removes_both_keys() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    send(&*channel, "celery", "one", None).await;
    let raw: String = redis.lindex("celery", 0).await.unwrap();
    consume(&*channel, &["celery"], 4).await;
    let delivery = next(&*channel).await;
    assert_eq!(delivery.envelope.body, task("one").body);
    assert_eq!(
        (delivery.queue.as_str(), delivery.routing_key.as_str()),
        ("celery", "celery")
    );
    let stored: String = redis.hget("unacked", &*delivery.tag.0).await.unwrap();
    assert_eq!(stored, format!("[{raw}, \"\", \"celery\"]"));
    let score: f64 = redis
        .zscore("unacked_index", &*delivery.tag.0)
        .await
        .unwrap();
    assert!((score - super::core::now() as f64 / 1e6).abs() < 5.0);
    let bound: Vec<String> = redis.smembers("_kombu.binding.celery").await.unwrap();
    assert_eq!(bound, ["celery\u{6}\u{16}\u{6}\u{16}celery"]);
    let permanent: Vec<String> = redis
        .smembers("_kombu.binding_permanent.celery")
        .await
        .unwrap();
    assert_eq!(permanent, bound);
    channel.ack(&delivery.tag);
    channel.flush().await.unwrap();
    assert!(!redis.exists::<_, bool>("unacked").await.unwrap());
    assert!(!redis.exists::<_, bool>("unacked_index").await.unwrap());
}

#[tokio::test]
async fn queues_and_priorities_are_served_in_the_order_of_kombu() {
    let server = Server::start().await;
    let channel = server.channel().await;
    for prefetch in [1, 0] {
        send(&*channel, "a", "first", None).await;
        consume(&*channel, &["a", "b"], 1).await;
        let first = next(&*channel).await;
        for (queue, name, priority) in [
            ("a", "a9", 9),
            ("a", "a0", 0),
            ("a", "a1", 1),
            ("a", "a3", 3),
            ("b", "b0", 0),
            ("b", "b6", 6),
        ] {
            send(&*channel, queue, name, Some(priority)).await;
        }
        channel.set_prefetch(prefetch).await.unwrap();
        channel.ack(&first.tag);
        assert_eq!(
            drain(&*channel, 6).await,
            ["a0", "b0", "a1", "a3", "b6", "a9"]
        );
        for queue in ["a", "b"] {
            channel.cancel(queue).await.unwrap();
        }
    }
}

#[tokio::test]
async fn prefetch_limits_what_is_held() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    for number in 0..5 {
        send(&*channel, "q", &number.to_string(), None).await;
    }
    consume(&*channel, &["q"], 2).await;
    let first = next(&*channel).await;
    let second = next(&*channel).await;
    channel.flush().await.unwrap();
    assert_eq!(redis.llen::<_, usize>("q").await.unwrap(), 3);
    channel.ack(&first.tag);
    assert_eq!(name(&next(&*channel).await), "2");
    channel.set_prefetch(3).await.unwrap();
    assert_eq!(name(&next(&*channel).await), "3");
    channel.flush().await.unwrap();
    assert_eq!(redis.hlen::<_, usize>("unacked").await.unwrap(), 3);
    channel.cancel("q").await.unwrap();
    channel.ack(&second.tag);
    channel.flush().await.unwrap();
    assert_eq!(redis.llen::<_, usize>("q").await.unwrap(), 1);
}

#[tokio::test]
async fn as_many_more_are_taken_as_start_at_once_when_nothing_fetched_waits() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    for number in 0..12 {
        send(&*channel, "q", &number.to_string(), None).await;
    }
    let idle = Arc::new(AtomicUsize::new(2));
    let slots = Arc::clone(&idle);
    channel.set_idle_slots(Arc::new(move || slots.load(Ordering::Relaxed)));
    consume(&*channel, &["q"], 2).await;
    // Nothing is known yet of how long they take.
    let mut held = vec![next(&*channel).await, next(&*channel).await];
    channel.flush().await.unwrap();
    for (settled, idle_then, left) in [(2, 2, 6), (3, 2, 5), (2, 0, 3), (2, 9, 0)] {
        idle.store(idle_then, Ordering::Relaxed);
        for delivery in held.drain(..settled) {
            channel.ack(&delivery.tag);
        }
        channel.flush().await.unwrap();
        assert_eq!(redis.llen::<_, usize>("q").await.unwrap(), left);
        while held.len() < redis.hlen("unacked").await.unwrap() {
            held.push(next(&*channel).await);
        }
    }
}

#[tokio::test]
async fn requeued_message_goes_to_the_back_and_restored_one_to_the_front() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    for name in ["one", "two", "three"] {
        send(&*channel, "q", name, Some(3)).await;
    }
    consume(&*channel, &["q"], 1).await;
    let one = next(&*channel).await;
    channel.reject(&one.tag, true);
    let two = next(&*channel).await;
    channel.ack(&two.tag);
    let three = next(&*channel).await;
    assert_eq!((name(&two), name(&three)), ("two".into(), "three".into()));
    channel.cancel("q").await.unwrap();
    assert_eq!(channel.restore(&[]).await.unwrap(), 1);
    assert_eq!(redis.llen::<_, usize>("q\u{6}\u{16}3").await.unwrap(), 2);
    assert!(!redis.exists::<_, bool>("unacked").await.unwrap());
    let raw: String = redis.lindex("q\u{6}\u{16}3", -1).await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&raw).unwrap();
    assert_eq!(json["headers"]["redelivered"], true);
    assert_eq!(json["headers"]["empty"], json!([]));
    assert_eq!(json["properties"]["delivery_info"]["redelivered"], true);
    assert_eq!(json["properties"]["delivery_tag"], *three.tag.0);
    consume(&*channel, &["q"], 2).await;
    let (first, second) = (next(&*channel).await, next(&*channel).await);
    assert_eq!(
        (name(&first), name(&second)),
        ("three".into(), "one".into())
    );
    assert!(first.redelivered && second.redelivered);
}

#[tokio::test]
async fn message_that_arrives_while_idle_is_delivered_at_once() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let sender = server.channel().await;
    consume(&*channel, &["q"], 1).await;
    let mut best = DEADLINE;
    for number in 0..20 {
        send(&*sender, "q", &number.to_string(), None).await;
        let sent = Instant::now();
        let delivery = next(&*channel).await;
        best = best.min(sent.elapsed());
        channel.ack(&delivery.tag);
        channel.flush().await.unwrap();
    }
    assert!(best < Duration::from_millis(250), "{best:?}");
}

#[tokio::test]
async fn messages_of_a_killed_worker_come_back_in_order() {
    let server = Server::start().await;
    let killed = server.channel().await;
    for number in 0..4 {
        send(&*killed, "q", &number.to_string(), None).await;
    }
    consume(&*killed, &["q"], 3).await;
    let started = next(&*killed).await;
    killed.started(&started.tag);
    next(&*killed).await;
    killed.flush().await.unwrap();
    let survivor = server.channel().await;
    // Ends its tasks and connections without a word to the server.
    drop(killed);
    consume(&*survivor, &["q"], 0).await;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let delivery = next(&*survivor).await;
        survivor.ack(&delivery.tag);
        seen.push((name(&delivery), delivery.redelivered, delivery.deaths));
    }
    let expected = [
        ("3", false, 0),
        ("0", true, 1),
        ("1", true, 0),
        ("2", true, 0),
    ];
    assert_eq!(
        seen,
        expected.map(|(name, again, deaths)| (name.to_owned(), again, deaths))
    );
    survivor.close().await.unwrap();
    let left = keys(&mut server.redis().await).await;
    assert!(
        left.iter()
            .all(|key| key.starts_with("_kombu.") || key.starts_with("celeriac.fenced.")),
        "{left:?}"
    );
}

#[tokio::test]
async fn lease_is_renewed_beyond_the_visibility_timeout() {
    let server = Server::start().await;
    let options = Options {
        // A busy machine may stop both for a while.
        visibility_timeout: Duration::from_secs(3),
        unacked_restore_interval: Duration::from_millis(200),
        ..Options::default()
    };
    let holder = server
        .transport_with(options.clone())
        .connect()
        .await
        .unwrap();
    let other = server.transport_with(options).connect().await.unwrap();
    send(&*holder, "q", "long", None).await;
    consume(&*holder, &["q"], 1).await;
    let delivery = next(&*holder).await;
    consume(&*other, &["q"], 1).await;
    let stolen = timeout(Duration::from_secs(7), other.next()).await;
    assert!(stolen.is_err(), "{stolen:?}");
    assert_eq!(
        holder
            .adopt(std::slice::from_ref(&delivery.tag))
            .await
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn old_message_of_a_python_worker_is_restored_and_a_lost_lease_is_reported() {
    let server = Server::start().await;
    let options = Options {
        visibility_timeout: Duration::from_secs(1),
        unacked_restore_interval: Duration::from_millis(200),
        ..Options::default()
    };
    let channel = server.transport_with(options).connect().await.unwrap();
    let mut redis = server.redis().await;
    let raw = r#"{"body": "W10=", "headers": {"id": "python"}, "properties": {"delivery_info": {"exchange": "", "routing_key": "q"}, "priority": 6, "body_encoding": "base64", "delivery_tag": "tag-1"}}"#;
    let _: () = redis
        .hset("unacked", "tag-1", format!("[{raw}, \"\", \"q\"]"))
        .await
        .unwrap();
    let _: () = redis
        .zadd("unacked_index", "tag-1", 1_000_000.123_456_7)
        .await
        .unwrap();
    consume(&*channel, &["q"], 1).await;
    let delivery = next(&*channel).await;
    assert!(delivery.redelivered);
    assert_eq!(
        (name(&delivery), &*delivery.tag.0),
        ("python".into(), "tag-1")
    );
    // Somebody else takes it away and delivers it anew, and renews it for as long as this lasts.
    let renewed = super::core::now() as f64 / 1e6 + 600.0;
    let _: () = redis.zadd("unacked_index", "tag-1", renewed).await.unwrap();
    match timeout(DEADLINE, channel.next()).await.unwrap().unwrap() {
        Incoming::Lost(tag) => assert_eq!(tag, delivery.tag),
        other => panic!("{other:?}"),
    }
    channel.ack(&delivery.tag);
    channel.flush().await.unwrap();
    assert!(
        redis
            .hexists::<_, _, bool>("unacked", "tag-1")
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn undecodable_elements_are_quarantined_and_the_next_one_is_served() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    let bad: [&[u8]; 5] = [
        b"not json",
        b"[1, 2]",
        b"\xff\xfe{",
        br#"{"body": "???", "headers": {}, "properties": {"body_encoding": "base64", "delivery_tag": "x", "delivery_info": {"exchange": "", "routing_key": "q"}}}"#,
        br#"{"properties": {"delivery_tag": "y", "delivery_info": {"exchange": "", "routing_key": "q"}}} garbage"#,
    ];
    for raw in bad {
        let _: () = redis.lpush("q", raw).await.unwrap();
    }
    let _: () = redis
        .lpush("q", r#"{"body": "?", "headers": {"id": "named"}, "properties": {"body_encoding": "base64"}}"#)
        .await
        .unwrap();
    send(&*channel, "q", "good", None).await;
    consume(&*channel, &["q"], 2).await;
    match timeout(DEADLINE, channel.next()).await.unwrap().unwrap() {
        Incoming::Undecodable(delivery, reason) => {
            assert_eq!(name(&delivery), "named");
            assert!(reason.contains("base64"), "{reason}");
            channel.quarantine(&delivery.tag, &reason);
        }
        other => panic!("{other:?}"),
    }
    let good = next(&*channel).await;
    assert_eq!(name(&good), "good");
    channel.ack(&good.tag);
    channel.flush().await.unwrap();
    let kept: Vec<String> = redis.lrange("celeriac.quarantine", 0, -1).await.unwrap();
    assert_eq!(kept.len(), 6, "{kept:#?}");
    for entry in &kept {
        let entry: serde_json::Value = serde_json::from_str(entry).unwrap();
        assert_eq!(entry["queue"], "q");
        assert!(entry["reason"].is_string() && entry["time"].is_number());
    }
    assert!(!redis.exists::<_, bool>("unacked").await.unwrap());
}

#[tokio::test]
async fn message_without_a_tag_or_with_somebody_elses_is_delivered_under_a_new_one() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    let raw = r#"{"body": "W10=", "headers": {"id": "x"}, "properties": {"body_encoding": "base64", "delivery_tag": "twin", "delivery_info": {"exchange": "", "routing_key": "q"}}}"#;
    for raw in [
        raw,
        raw,
        r#"{"body": "[]", "headers": {"id": "x"}, "properties": {}}"#,
    ] {
        let _: () = redis.lpush("q", raw).await.unwrap();
    }
    consume(&*channel, &["q"], 0).await;
    let mut tags = Vec::new();
    for _ in 0..3 {
        tags.push(next(&*channel).await.tag);
    }
    assert_eq!(redis.hlen::<_, usize>("unacked").await.unwrap(), 3);
    for tag in &tags {
        channel.ack(tag);
    }
    channel.flush().await.unwrap();
    assert!(!redis.exists::<_, bool>("unacked").await.unwrap());
}

#[tokio::test]
async fn broadcast_reaches_subscribers_by_pattern() {
    let server = Server::start().await;
    let (channel, sender) = (server.channel().await, server.channel().await);
    let exchange = Exchange::new("celeryev", ExchangeKind::Fanout);
    let mut queue = Queue::bound("celeryev.1", exchange.clone(), "worker.#");
    queue.auto_delete = true;
    queue.expires = Some(60.0);
    let mut events = channel.subscribe(&queue, &[]).await.unwrap();
    for routing_key in ["task.sent", "worker.online"] {
        let envelope = task(routing_key);
        sender.cast(Publication {
            exchange: exchange.clone(),
            routing_key: routing_key.into(),
            envelope,
        });
    }
    sender.flush().await.unwrap();
    let event = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
    assert_eq!(name(&event), "worker.online");
    assert_eq!(
        (event.exchange.as_str(), event.routing_key.as_str()),
        ("celeryev", "worker.online")
    );
    let mut redis = server.redis().await;
    let table = "_kombu.binding.celeryev";
    assert_eq!(redis.scard::<_, usize>(table).await.unwrap(), 1);
    assert!(
        redis
            .zscore::<_, _, f64>("_kombu.binding_deadlines", "celeryev")
            .await
            .unwrap()
            > 1e12
    );
    drop(events);
    eventually!(
        "the binding goes",
        !redis.exists::<_, bool>(table).await.unwrap()
    );
    let mut patterns = redis::cmd("PUBSUB");
    patterns.arg("NUMPAT");
    eventually!(
        "the subscription goes",
        patterns.query_async::<i64>(&mut redis).await.unwrap() == 0
    );
}

#[tokio::test]
async fn reply_goes_to_the_bound_queue_and_is_dropped_without_one() {
    let server = Server::start().await;
    let (client, worker) = (server.channel().await, server.channel().await);
    let mut redis = server.redis().await;
    let mut exchange = Exchange::new("reply.celery.pidbox", ExchangeKind::Direct);
    exchange.durable = false;
    let reply = |key: &str| Publication {
        exchange: exchange.clone(),
        routing_key: key.into(),
        envelope: task(key),
    };
    worker.publish(reply("nobody")).await.unwrap();
    assert_eq!(keys(&mut redis).await, Vec::<String>::new());
    let mut queue = Queue::bound("oid.reply.celery.pidbox", exchange.clone(), "oid");
    queue.auto_delete = true;
    queue.expires = Some(10.0);
    let mut replies = client.subscribe(&queue, &[]).await.unwrap();
    worker.publish(reply("oid")).await.unwrap();
    assert_eq!(
        name(&timeout(DEADLINE, replies.recv()).await.unwrap().unwrap()),
        "oid"
    );
    drop(replies);
    eventually!(
        "the binding goes",
        !redis
            .exists::<_, bool>("_kombu.binding.reply.celery.pidbox")
            .await
            .unwrap()
    );
    // A client that died before reading leaves a list with an end.
    let _: () = redis
        .sadd(
            "_kombu.binding.reply.celery.pidbox",
            "dead\u{6}\u{16}\u{6}\u{16}dead.reply",
        )
        .await
        .unwrap();
    worker.publish(reply("dead")).await.unwrap();
    assert!(redis.ttl::<_, i64>("dead.reply").await.unwrap() > 0);
}

#[tokio::test]
async fn topic_exchange_routes_by_pattern() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let exchange = Exchange::new("media", ExchangeKind::Topic);
    for (queue, key) in [("video", "media.video.#"), ("all", "media.#")] {
        channel
            .declare(&Queue::bound(queue, exchange.clone(), key))
            .await
            .unwrap();
    }
    let routing_key = "media.audio.mp3".to_owned();
    channel
        .publish(Publication {
            exchange,
            routing_key,
            envelope: task("x"),
        })
        .await
        .unwrap();
    let mut redis = server.redis().await;
    assert_eq!(redis.llen::<_, usize>("all").await.unwrap(), 1);
    assert_eq!(redis.llen::<_, usize>("video").await.unwrap(), 0);
}

#[tokio::test]
async fn clean_close_hands_back_and_leaves_no_key_of_its_own() {
    let server = Server::start().await;
    let channel = server.channel().await;
    for name in ["one", "two"] {
        send(&*channel, "q", name, None).await;
    }
    consume(&*channel, &["q"], 2).await;
    next(&*channel).await;
    channel.close().await.unwrap();
    assert!(matches!(channel.next().await, Err(Error::Closed)));
    channel.close().await.unwrap();
    let mut redis = server.redis().await;
    assert_eq!(
        keys(&mut redis).await,
        ["_kombu.binding.q", "_kombu.binding_permanent.q", "q"]
    );
    let other = server.channel().await;
    consume(&*other, &["q"], 2).await;
    assert_eq!(drain(&*other, 2).await, ["one", "two"]);
}

#[tokio::test]
async fn broken_connection_ends_the_channel_and_the_next_one_goes_on() {
    let server = Server::start().await;
    let transport = server.transport();
    let channel = transport.connect().await.unwrap();
    for name in ["acked", "kept", "forgotten"] {
        send(&*channel, "q", name, None).await;
    }
    consume(&*channel, &["q"], 3).await;
    let (acked, kept) = (next(&*channel).await, next(&*channel).await);
    next(&*channel).await;
    let mut redis = server.redis().await;
    let _: Value = redis::cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("normal")
        .query_async(&mut redis)
        .await
        .unwrap();
    let error = timeout(DEADLINE, channel.next())
        .await
        .unwrap()
        .unwrap_err();
    assert!(error.is_connection(), "{error}");
    channel.ack(&acked.tag);
    let again = transport.connect().await.unwrap();
    let adopted = again.adopt(std::slice::from_ref(&kept.tag)).await.unwrap();
    assert_eq!(adopted, std::slice::from_ref(&kept.tag));
    let held: Vec<String> = redis.hkeys("unacked").await.unwrap();
    assert_eq!(held, [&*kept.tag.0]);
    consume(&*again, &["q"], 2).await;
    assert_eq!(name(&next(&*again).await), "forgotten");
    again.ack(&kept.tag);
    again.flush().await.unwrap();
    assert_eq!(redis.hlen::<_, usize>("unacked").await.unwrap(), 1);
}

#[tokio::test]
async fn flushed_server_does_not_take_away_what_is_held() {
    let server = Server::start().await;
    let options = Options {
        visibility_timeout: Duration::from_secs(1),
        ..Options::default()
    };
    let channel = server.transport_with(options).connect().await.unwrap();
    send(&*channel, "q", "one", None).await;
    consume(&*channel, &["q"], 1).await;
    let delivery = next(&*channel).await;
    let mut redis = server.redis().await;
    let _: Value = redis::cmd("FLUSHALL")
        .query_async(&mut redis)
        .await
        .unwrap();
    let _: Value = redis::cmd("SCRIPT")
        .arg("FLUSH")
        .query_async(&mut redis)
        .await
        .unwrap();
    assert_eq!(
        channel
            .adopt(std::slice::from_ref(&delivery.tag))
            .await
            .unwrap()
            .len(),
        1
    );
    channel.ack(&delivery.tag);
    send(&*channel, "q", "two", None).await;
    assert_eq!(drain(&*channel, 1).await, ["two"]);
}

#[tokio::test]
async fn server_without_memory_pauses_fetching_and_loses_nothing() {
    let server = Server::start().await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    for name in ["one", "two"] {
        send(&*channel, "q", name, None).await;
    }
    let limit = |bytes: &'static str| {
        let mut cmd = redis::cmd("CONFIG");
        cmd.arg("SET").arg("maxmemory").arg(bytes);
        cmd
    };
    consume(&*channel, &["q"], 1).await;
    let one = next(&*channel).await;
    let _: Value = limit("1").query_async(&mut redis).await.unwrap();
    channel.ack(&one.tag);
    eventually!(
        "the ack passes",
        !redis.exists::<_, bool>("unacked").await.unwrap()
    );
    assert_eq!(redis.llen::<_, usize>("q").await.unwrap(), 1);
    let publication = Publication {
        exchange: Exchange::default_exchange(),
        routing_key: "q".into(),
        envelope: task("refused"),
    };
    let error = channel.publish(publication).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    let _: Value = limit("0").query_async(&mut redis).await.unwrap();
    assert_eq!(drain(&*channel, 1).await, ["two"]);
}

#[tokio::test]
async fn server_that_refuses_scripts_is_served_with_plain_commands() {
    let server = Server::start_with(&[
        "--rename-command",
        "EVALSHA",
        "",
        "--rename-command",
        "EVAL",
        "",
        "--rename-command",
        "SCRIPT",
        "",
    ])
    .await;
    let channel = server.channel().await;
    let mut redis = server.redis().await;
    for name in ["one", "two", "three"] {
        send(&*channel, "q", name, None).await;
    }
    consume(&*channel, &["q"], 2).await;
    let one = next(&*channel).await;
    channel.reject(&one.tag, true);
    let two = next(&*channel).await;
    assert!(redis.zcard::<_, usize>("unacked_index").await.unwrap() >= 1);
    channel.ack(&two.tag);
    assert_eq!(drain(&*channel, 2).await, ["three", "one"]);
    send(&*channel, "q", "four", None).await;
    next(&*channel).await;
    channel.close().await.unwrap();
    assert_eq!(redis.llen::<_, usize>("q").await.unwrap(), 1);
    assert!(!redis.exists::<_, bool>("unacked").await.unwrap());
}

#[tokio::test]
async fn purge_and_delete_empty_all_steps() {
    let server = Server::start().await;
    let channel = server.channel().await;
    for priority in [0, 3, 9] {
        send(&*channel, "q", "x", Some(priority)).await;
    }
    let queue = Queue::task("q");
    assert_eq!(channel.declare(&queue).await.unwrap().messages, 3);
    assert_eq!(
        channel.bindings("q").await.unwrap(),
        [("q".to_owned(), "q".to_owned())]
    );
    assert_eq!(channel.purge("q").await.unwrap(), 3);
    channel.delete(&queue).await.unwrap();
    assert_eq!(keys(&mut server.redis().await).await, Vec::<String>::new());
}

#[tokio::test]
async fn unreachable_server_is_named_without_its_password() {
    let url = BrokerUrl::parse("redis://:topsecret@127.0.0.1:1/0").unwrap();
    let transport = RedisTransport::new(&[url], Options::default()).unwrap();
    let error = transport.connect().await.err().unwrap().to_string();
    assert!(error.contains("redis://:**@127.0.0.1:1/0"), "{error}");
    assert!(!error.contains("topsecret"), "{error}");
}

#[tokio::test]
async fn server_that_falls_silent_is_noticed_on_every_connection() {
    let options = Options {
        command_timeout: Duration::from_secs(1),
        health_check_interval: Duration::from_millis(500),
        ..Options::default()
    };
    // A channel that consumes, one that listens to broadcasts, one that waits for replies.
    let server = Server::start().await;
    let transport = server.transport_with(options);
    let consuming = transport.connect().await.unwrap();
    consume(&*consuming, &["q"], 1).await;
    let listening = transport.connect().await.unwrap();
    let pidbox = Exchange::new("celery.pidbox", ExchangeKind::Fanout);
    let queue = Queue::bound("me.celery.pidbox", pidbox, "");
    let mut broadcasts = listening.subscribe(&queue, &[]).await.unwrap();
    let waiting = transport.connect().await.unwrap();
    let reply = Exchange::new("reply.celery.pidbox", ExchangeKind::Direct);
    let mut replies = waiting
        .subscribe(&Queue::bound("me.reply", reply, "me"), &[])
        .await
        .unwrap();
    let stopped = Command::new("kill")
        .args(["-STOP", &server.child.id().to_string()])
        .status()
        .unwrap();
    assert!(stopped.success());
    for channel in [&consuming, &listening, &waiting] {
        let error = timeout(DEADLINE, channel.next())
            .await
            .unwrap()
            .unwrap_err();
        assert!(error.is_connection(), "{error}");
    }
    assert!(
        timeout(DEADLINE, broadcasts.recv())
            .await
            .unwrap()
            .is_none()
    );
    assert!(timeout(DEADLINE, replies.recv()).await.unwrap().is_none());
}

#[tokio::test]
async fn revoked_ids_are_shared_bounded_and_expire() {
    let server = Server::start().await;
    let keep = Duration::from_secs(100);
    let notes = Notes { most: 3, keep };
    let (one, other) = (server.channel().await, server.channel().await);
    let mut redis = server.redis().await;
    let _: () = redis.zadd("celeriac.revoked", "old", 1).await.unwrap();
    for ids in [&["a", "b"][..], &["c"], &["d", "a"]] {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        one.share_revoked(&ids, notes).await.unwrap();
    }
    let shared = other.shared_revoked(notes).await.unwrap();
    let ids: Vec<&str> = shared.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(
        ids,
        ["c", "a", "d"],
        "the youngest, those of one moment by name"
    );
    assert!(shared.iter().all(|(_, age)| *age < keep));
    let ttl: i64 = redis.ttl("celeriac.revoked").await.unwrap();
    assert!((90..=100).contains(&ttl), "{ttl}");
}
