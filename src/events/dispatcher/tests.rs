//! What is sent, through a real redis-server.

use serde_json::{Value, json};

use super::{Dispatcher, Options, Toggle};
use crate::events::{Event, Software, WorkerStatus, exchange};
use crate::protocol::clock::Clock;
use crate::transport::redis::server::{Ear, Server};
use crate::transport::{Channel, Queue};
use std::sync::Arc;

fn options() -> Options {
    Options::new(
        "worker1@example",
        Clock::default(),
        exchange("celeryev", "redis"),
    )
}

/// A dispatcher, and somebody who hears its events.
struct Scene {
    _server: Server,
    channel: Arc<dyn Channel>,
    dispatcher: Dispatcher,
    ear: Ear,
}

impl Scene {
    async fn new(options: Options) -> Self {
        let server = Server::start().await;
        let channel = server.channel().await;
        let queue = Queue {
            durable: false,
            exclusive: true,
            auto_delete: true,
            ..Queue::bound("monitor", options.exchange.clone(), "#")
        };
        let ear = Ear::on(server.channel().await, &queue, "#").await;
        Self {
            _server: server,
            channel,
            dispatcher: Dispatcher::new(options),
            ear,
        }
    }

    fn connect(&self) {
        self.dispatcher.connect(self.channel.clone());
    }

    /// What was sent since the last call: routing keys and bodies.
    async fn sent(&mut self) -> Vec<(String, Value)> {
        let heard = self.ear.heard(&*self.channel).await;
        let read = |delivery: crate::transport::Delivery| {
            let body = serde_json::from_slice(&delivery.envelope.body).expect("JSON");
            (delivery.routing_key, body)
        };
        heard.into_iter().map(read).collect()
    }
}

#[tokio::test]
async fn a_worker_event_has_celerys_fields_in_their_order() {
    let mut scene = Scene::new(options()).await;
    scene.connect();
    let status = WorkerStatus {
        active: 1,
        processed: 7,
        loadavg: [1.054, 0.58, 0.26],
    };
    scene.dispatcher.send(&Event::worker(
        "worker-online",
        2.0,
        Some(status),
        &Software::default(),
    ));
    let sent = scene.ear.next().await;
    assert_eq!(sent.routing_key, "worker.online");
    assert_eq!(sent.envelope.headers["hostname"], "worker1@example");
    let text = String::from_utf8(sent.envelope.body).expect("text");
    assert!(text.contains(r#""clock":1,"freq":2.0,"active":1,"processed":7,"loadavg":[1.05,0.58,0.26],"sw_ident":"#), "{text}");
    let event: Value = serde_json::from_str(&text).expect("JSON");
    let keys: Vec<&String> = event.as_object().expect("object").keys().collect();
    let expected = "hostname utcoffset pid clock freq active processed loadavg sw_ident sw_ver \
                    sw_sys timestamp type";
    assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    assert!(event["utcoffset"].to_string().contains('.'), "a float");
    assert!(event["timestamp"].as_f64().expect("a float") > 1.7e9);
}

#[tokio::test]
async fn task_events_are_sent_only_when_asked_for() {
    let mut scene = Scene::new(options()).await;
    scene.connect();
    let dispatcher = scene.dispatcher.clone();
    dispatcher.send(&Event::task_started("t"));
    dispatcher.flush();
    assert!(scene.sent().await.is_empty() && !dispatcher.sends_task_events());
    assert_eq!(dispatcher.disable_task_events(), Toggle::Already);
    assert_eq!(dispatcher.enable_task_events(), Toggle::Changed);
    assert_eq!(dispatcher.enable_task_events(), Toggle::Already);
    dispatcher.send(&Event::task_started("t"));
    dispatcher.flush();
    let sent = scene.sent().await;
    assert_eq!(
        (sent[0].0.as_str(), &sent[0].1[0]["uuid"]),
        ("task.multi", &json!("t"))
    );
    assert_eq!(dispatcher.disable_task_events(), Toggle::Changed);
    assert!(!dispatcher.sends_task_events());
    assert_eq!(
        Toggle::Changed.reply("disabled"),
        json!({"ok": "task events disabled"})
    );
}

#[test]
fn with_task_events_from_the_start_they_cannot_be_turned_off() {
    let dispatcher = Dispatcher::new(Options {
        task_events: true,
        ..options()
    });
    assert_eq!(dispatcher.enable_task_events(), Toggle::Already);
    assert_eq!(dispatcher.disable_task_events(), Toggle::Already);
    assert!(dispatcher.sends_task_events() && dispatcher.sends("custom"));
    let off = Dispatcher::new(Options {
        worker_events: false,
        ..options()
    });
    assert_eq!(off.enable_task_events(), Toggle::Unavailable);
    assert!(!off.sends("worker"));
}

#[tokio::test]
async fn the_flusher_sends_what_was_gathered_in_one_message() {
    let mut scene = Scene::new(Options {
        task_events: true,
        ..options()
    })
    .await;
    scene.connect();
    let dispatcher = scene.dispatcher.clone();
    for id in 0..30 {
        dispatcher.send(&Event::task_started(&id.to_string()));
    }
    let full = scene.sent().await;
    assert_eq!(full.len(), 1, "the first batch was full");
    assert_eq!(full[0].1.as_array().expect("array").len(), 24);
    let rest = tokio::select! {
        () = dispatcher.run() => panic!("it runs for ever"),
        rest = scene.ear.next() => rest,
    };
    let rest: Value = serde_json::from_slice(&rest.envelope.body).expect("JSON");
    assert_eq!(rest.as_array().expect("array").len(), 6);
    assert_eq!(rest[5]["clock"], 30);
}

#[tokio::test]
async fn a_bounded_number_of_events_waits_for_the_broker() {
    let mut scene = Scene::new(Options {
        task_events: true,
        backlog: 5,
        ..options()
    })
    .await;
    let dispatcher = scene.dispatcher.clone();
    for id in 0..8 {
        dispatcher.send(&Event::new("my-event").with("id", id));
    }
    dispatcher.send(&Event::worker(
        "worker-heartbeat",
        2.0,
        None,
        &Software::default(),
    ));
    assert_eq!(dispatcher.dropped(), 3);
    scene.connect();
    let sent = scene.sent().await;
    let ids: Vec<&Value> = sent.iter().map(|(_, event)| &event["id"]).collect();
    assert_eq!(ids, [3, 4, 5, 6, 7]);
    dispatcher.disconnect();
    dispatcher.send(&Event::task_started("t"));
    dispatcher.flush();
    assert!(scene.sent().await.is_empty());
    scene.connect();
    assert_eq!(scene.sent().await[0].0, "task.multi");
}
