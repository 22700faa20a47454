//! Whatever arrives, the worker goes on: where an id can be read its client is told, and what
//! nobody can process is kept.

use std::collections::HashMap;

use base64::Engine;
use serde_json::{Value, json};

use crate::support::raw::envelope;
use crate::support::{Broker, Raw, Worker, on_brokers, services};

/// Envelopes made by hand, with what the Python worker did with them.
const MALFORMED: &str = include_str!("../fixtures/wire/malformed.json");
const SEED: u64 = 0x5eed_ce1e;

on_brokers!(every_malformed_message_is_answered_or_kept_and_the_next_task_runs);
fn every_malformed_message_is_answered_or_kept_and_the_next_task_runs(broker: &Broker) {
    let mut worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let cases: Vec<Value> = serde_json::from_str(MALFORMED).unwrap();
    assert!(cases.len() >= 30);
    let mut kept = 0;
    for case in &cases {
        let name = case["case"].as_str().unwrap();
        let text = case["envelope"].to_string();
        let text = text.replace("celery_app.test_task", "test_task");
        raw.push_envelope(&serde_json::from_str(&text).unwrap());
        let next = raw.send("test_task", json!([name]));
        assert!(
            raw.value(&next).to_string().contains(name),
            "the task after {name}"
        );
        let id = readable_id(&case["envelope"]);
        let status = id.as_deref().map(|id| raw.wait(id)["status"].clone());
        match (name, case["runs"].as_bool().unwrap(), status) {
            ("no delivery_tag", _, status) => assert_eq!(status.unwrap(), "SUCCESS"),
            ("expires past", _, status) => assert_eq!(status.unwrap(), "REVOKED"),
            (_, true, status) => assert_eq!(status.unwrap(), "SUCCESS", "{name}"),
            // It reached its task, which could not be called with such arguments.
            ("args is null", _, status) => assert_eq!(status.unwrap(), "FAILURE"),
            (_, false, status) => {
                assert!(status.is_none_or(|status| status == "FAILURE"), "{name}");
                kept += 1;
            }
        }
    }
    raw.wait_drained();
    let quarantined = raw.quarantined();
    assert!(
        quarantined + 2 >= kept && quarantined >= 10,
        "{quarantined} of {kept} are in quarantine"
    );
    assert!(worker.stop().success());
}

/// The id that a client could wait for: in the headers, or in the body of protocol 1.
fn readable_id(envelope: &Value) -> Option<String> {
    if let Some(id) = envelope["headers"]["id"].as_str() {
        return Some(id.to_owned());
    }
    let body = base64::engine::general_purpose::STANDARD
        .decode(envelope["body"].as_str()?)
        .ok()?;
    let body: Value = serde_json::from_slice(&body).ok()?;
    body["id"].as_str().map(str::to_owned)
}

on_brokers!(random_bytes_and_damaged_envelopes_do_not_stop_the_worker);
fn random_bytes_and_damaged_envelopes_do_not_stop_the_worker(broker: &Broker) {
    let mut worker = broker.worker().start();
    let mut raw = broker.raw(&worker.queue);
    let seed = std::env::var("CHAOS_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SEED);
    eprintln!("CHAOS_SEED={seed}");
    let mut random = fastrand(seed);
    let mut whole = HashMap::new();
    for number in 0..400 {
        let id = format!("damaged-{number}");
        let arguments = json!([format!("word {number}")]);
        let message = envelope(&worker.queue, "test_task", &id, &arguments, &json!({}));
        let mut bytes = message.to_string().into_bytes();
        match number % 4 {
            0 => bytes = (0..random(200)).map(|_| random(256) as u8).collect(),
            1 => bytes.truncate(random(bytes.len())),
            2 => {
                for _ in 0..=random(5) {
                    let at = random(bytes.len());
                    bytes[at] = random(256) as u8;
                }
            }
            _ => {
                raw.push_envelope(&damage(message, &mut random));
                bytes.clear();
            }
        }
        if !bytes.is_empty() {
            raw.push(&bytes);
        }
        if number % 20 == 0 {
            whole.insert(raw.send("test_task", arguments), number);
        }
    }
    for (id, number) in whole {
        assert_eq!(raw.value(&id), format!("celeriac received: word {number}"));
    }
    raw.wait_drained();
    assert!(raw.quarantined() >= 100);
    let log = worker.log();
    assert!(!log.contains("panicked") && !log.contains("bug of celeriac"));
    assert!(worker.stop().success());
}

/// Replaces one value somewhere in the envelope by one of another kind.
fn damage(mut message: Value, random: &mut impl FnMut(usize) -> usize) -> Value {
    let values = [
        json!(null),
        json!(-1),
        json!(1e300),
        json!(""),
        json!("\u{0}\u{ffff}"),
        json!([]),
        json!({}),
        json!([[[[]]]]),
        json!(true),
    ];
    let pointers = pointers(&message, "");
    let chosen = &pointers[random(pointers.len())];
    *message.pointer_mut(chosen).unwrap() = values[random(values.len())].clone();
    message
}

fn pointers(value: &Value, at: &str) -> Vec<String> {
    let mut found = vec![at.to_owned()];
    for (name, inner) in value.as_object().into_iter().flatten() {
        found.extend(pointers(inner, &format!("{at}/{name}")));
    }
    found
}

/// A number below the limit, the same sequence for the same seed (xorshift).
fn fastrand(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.max(1);
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % limit.max(1) as u64).unwrap()
    }
}

#[test]
fn a_message_that_killed_three_workers_is_given_up_and_kept() {
    let redis = services::redis();
    let worker = Worker::start(&redis);
    let mut raw = Raw::new(&redis.url, &worker.queue);
    let headers = json!({"celeriac_deaths": 3});
    let id = raw.send_with("test_task", json!(["poison"]), &headers);
    let meta = raw.wait(&id);
    assert_eq!(meta["status"], "FAILURE");
    assert_eq!(meta["result"]["exc_type"], "WorkerLostError");
    raw.wait_drained();
    assert_eq!(raw.quarantined(), 1);
    let next = raw.send("test_task", json!(["next"]));
    raw.value(&next);
}
