//! Every captured message, every malformed one, and damaged copies of both.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{DeliveryInfo, InvalidKind, Message};
use crate::protocol::Limits;
use crate::protocol::envelope::{Envelope, Properties};
use crate::protocol::serialization::Accept;

const TASKS: &str = include_str!("../../../tests/fixtures/wire/tasks.json");
const MALFORMED: &str = include_str!("../../../tests/fixtures/wire/malformed.json");

fn rows(text: &str) -> Vec<Value> {
    serde_json::from_str(text).expect("the fixture is valid")
}

/// The envelope as kombu writes it on Redis.
fn envelope(raw: &Value) -> Envelope {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let properties = &raw["properties"];
    let body = text(&raw["body"]).unwrap_or_default();
    Envelope {
        body: match properties["body_encoding"].as_str() {
            Some("base64") => STANDARD.decode(&body).unwrap_or_else(|_| body.into_bytes()),
            _ => body.into_bytes(),
        },
        content_type: text(&raw["content-type"]),
        content_encoding: text(&raw["content-encoding"]),
        headers: raw["headers"].as_object().cloned().unwrap_or_default(),
        properties: Properties {
            correlation_id: text(&properties["correlation_id"]),
            reply_to: text(&properties["reply_to"]),
            delivery_mode: None,
            priority: properties["priority"]
                .as_u64()
                .and_then(|number| u8::try_from(number).ok()),
            expiration: text(&properties["expiration"]),
        },
    }
}

fn decode(envelope: &Envelope) -> Result<Message, Box<super::Invalid>> {
    let accept = Accept::parse("json,msgpack,yaml").expect("known names");
    let delivery = DeliveryInfo {
        routing_key: "celery".to_owned(),
        ..DeliveryInfo::default()
    };
    Message::decode(envelope, &delivery, &accept, &Limits::default())
}

fn captured(case: &str) -> Message {
    let rows = rows(TASKS);
    let row = rows.iter().find(|row| row["case"] == case).expect(case);
    let raw: Value = serde_json::from_str(row["raw"].as_str().expect("text")).expect("valid");
    decode(&envelope(&raw)).expect(case)
}

#[test]
fn every_captured_message_is_read() {
    let mut zstd = 0;
    for row in rows(TASKS) {
        let case = row["case"].as_str().expect("named");
        let raw: Value = serde_json::from_str(row["raw"].as_str().expect("text")).expect("valid");
        let result = decode(&envelope(&raw));
        if case == "serializer-pickle" {
            let invalid = result.expect_err(case);
            assert_eq!(invalid.kind, InvalidKind::Refused);
            assert_eq!(
                invalid.reason,
                "Refusing to deserialize untrusted content of type pickle (application/x-python-serialize)"
            );
            assert_eq!(invalid.id.as_deref(), raw["headers"]["id"].as_str());
            continue;
        }
        let message = result.unwrap_or_else(|invalid| panic!("{case}: {invalid}"));
        zstd += usize::from(case.contains("zstd"));
        let body = &row["body"];
        let (args, kwargs) = if body.is_array() {
            (&body[0], &body[1])
        } else {
            (&body["args"], &body["kwargs"])
        };
        if !body.is_null() {
            assert_eq!(Value::Array(message.args.clone()), *args, "{case}");
            assert_eq!(Value::Object(message.kwargs.clone()), *kwargs, "{case}");
        }
        if let Some(shown) = raw["headers"]["argsrepr"].as_str() {
            assert_eq!(message.argsrepr, shown, "{case}");
            // What this side would have written for the same arguments.
            if case != "redacted-repr" {
                assert_eq!(
                    super::saferepr::saferepr_args(&message.args, 1024, 3),
                    shown,
                    "{case}"
                );
            }
        }
        assert_eq!(
            message.correlation_id.as_deref(),
            Some(message.id.as_str()),
            "{case}"
        );
    }
    assert_eq!(zstd, 1);
}

#[test]
fn fields_stand_where_the_worker_looks_for_them() {
    let message = captured("timelimit");
    assert!(message.time_limit.is_some() && message.soft_time_limit.is_some());
    assert!(
        message.time_limit > message.soft_time_limit,
        "hard first, then soft"
    );
    let message = captured("ignore-result-shadow-headers");
    assert_eq!(
        (message.display_name(), message.ignore_result),
        ("shadow-name", Some(true))
    );
    assert_eq!(Value::Object(message.headers), json!({"x-custom": "v"}));
    let message = captured("stamped");
    assert_eq!(
        message.stamped_headers.expect("stamped"),
        ["owner", "stage"]
    );
    assert_eq!(message.stamps["owner"], json!(["a", "b"]));
    let message = captured("link-link_error");
    assert_eq!(message.embed.callbacks.expect("one")[0].args(), [json!(10)]);
    assert_eq!(
        message.embed.errbacks.expect("one")[0].task(),
        "celery_app.old_errback"
    );
    assert_eq!(message.embed.chain, None);
    let message = captured("chain");
    let chain = message.embed.chain.expect("a chain");
    assert!(chain.iter().all(|step| step.task_id().is_some()));
    let message = captured("chord");
    let body = message.embed.chord.expect("a body");
    assert_eq!(
        (body.task(), body.option_str("group_id")),
        ("celery_app.xsum", message.group.as_deref())
    );
    let message = captured("eta-naive");
    assert_eq!(
        message.eta.map(|eta| eta.offset().local_minus_utc()),
        Some(0)
    );
}

#[test]
fn protocol_1_and_the_hybrid_become_the_same_message() {
    let message = captured("protocol1");
    assert_eq!(
        (
            message.task.as_str(),
            message.argsrepr.as_str(),
            message.kwargsrepr.as_str()
        ),
        ("celery_app.test_task", "['hi']", "{}")
    );
    assert!(message.eta.is_some() && message.expires.is_some() && message.root_id.is_none());
    let message = captured("protocol1-chain");
    assert_eq!(
        message.embed.callbacks.expect("one")[0].task_id(),
        Some("e8e8cca1-3c94-4206-930c-776826706b5b")
    );
    let hybrid = Envelope {
        body: br#"{"args":["a"],"kwargs":{},"id":"old","retries":2,"callbacks":[{"task":"c"}],"taskset":"x","chain":[1]}"#.to_vec(),
        content_type: Some("application/json".to_owned()),
        headers: json!({"task": "t", "id": "new", "group": null}).as_object().cloned().expect("object"),
        ..Envelope::default()
    };
    let message = decode(&hybrid).expect("valid");
    assert_eq!(
        (message.id.as_str(), message.retries, message.embed.chain),
        ("new", 2, None)
    );
    assert_eq!(message.embed.callbacks.expect("one")[0].task(), "c");
    let grouped = Envelope {
        body: br#"{"task":"t","id":"i","args":[1,2],"kwargs":{},"group":null,"taskset":"x"}"#
            .to_vec(),
        content_type: Some("application/json".to_owned()),
        ..Envelope::default()
    };
    let message = decode(&grouped).expect("valid");
    assert_eq!(
        (message.group.as_deref(), message.argsrepr.as_str()),
        (Some("x"), "[1, 2]")
    );
}

#[test]
fn every_malformed_message_is_invalid_with_the_id_and_the_rest_run() {
    for row in rows(MALFORMED) {
        let case = row["case"].as_str().expect("named");
        let raw = &row["envelope"];
        let result = decode(&envelope(raw));
        let runs = row["runs"].as_bool().expect("bool")
            // Python loses or mistreats these two only because of its transport and its clock.
            || matches!(case, "no delivery_tag" | "expires past");
        match result {
            Ok(message) => {
                assert!(runs, "{case} was accepted");
                assert_eq!(message.args, [json!("a")], "{case}");
            }
            Err(invalid) => {
                assert!(!runs, "{case}: {invalid}");
                let id = raw["headers"]["id"]
                    .as_str()
                    .or(raw["properties"]["correlation_id"].as_str());
                assert_eq!(invalid.id.as_deref(), id, "{case}");
                assert_eq!(
                    invalid.exception().exc_message,
                    [json!(invalid.reason)],
                    "{case}"
                );
            }
        }
    }
}

#[test]
fn reasons_are_those_of_celery() {
    let rows = rows(MALFORMED);
    let reason = |case: &str| {
        let row = rows.iter().find(|row| row["case"] == case).expect(case);
        let invalid = decode(&envelope(&row["envelope"])).expect_err(case);
        let log = row["log"].as_str().expect("text").to_owned();
        (invalid, log)
    };
    for case in [
        "eta garbage",
        "eta number",
        "unknown content type",
        "text/plain",
    ] {
        let (invalid, log) = reason(case);
        let expected = log
            .split_once("Received invalid task message: ")
            .expect(case)
            .1;
        assert_eq!(invalid.reason, expected, "{case}");
        assert!(
            invalid
                .to_string()
                .starts_with("Received invalid task message: "),
            "{case}"
        );
    }
    assert_eq!(
        reason("body only two elements").0.reason,
        "not enough values to unpack (expected 3, got 2)"
    );
    assert_eq!(
        reason("body not json").0.reason,
        "Expecting value: line 1 column 1 (char 0)"
    );
    assert_eq!(
        reason("kwargs is a list").0.reason,
        "Task keyword arguments is not a mapping"
    );
    let (null, _) = reason("args is null");
    assert_eq!(
        (null.exception().repr(), null.kind),
        (
            "TypeError('celery_app.test_task() argument after * must be an iterable, not NoneType')".to_owned(),
            InvalidKind::InvalidArguments
        )
    );
    let (unknown, log) = reason("missing task header");
    assert_eq!(unknown.kind, InvalidKind::UnknownMessage);
    assert!(log.contains("Received and deleted unknown message.  Wrong destination?!?"));
    assert_eq!(reason("bad compression").0.kind, InvalidKind::Undecodable);
    assert_eq!(
        reason("unknown compression").0.kind,
        InvalidKind::Undecodable
    );
}

#[test]
fn neither_debug_output_nor_reasons_show_arguments() {
    let secret = "hunter2-and-more";
    let bodies = [
        json!([[secret], {"k": secret}, {"callbacks": [{"task": "c", "args": [secret]}]}]),
        json!([[secret], {"k": secret}, {"callbacks": [{"task": "c", "args": secret}]}]),
        json!([[secret], {"k": secret}, {"callbacks": [secret]}]),
        json!([[secret], {}, secret]),
        json!([[secret], secret, {}]),
        json!([secret, {}, {}]),
        json!([secret]),
        json!(secret),
        json!({"args": [secret], "kwargs": [secret]}),
        json!({"args": {"__type__": "base64", "__value__": secret}}),
    ];
    for body in bodies {
        let envelope = Envelope {
            body: body.to_string().into_bytes(),
            content_type: Some("application/json".to_owned()),
            headers: json!({"task": "t", "id": "i"})
                .as_object()
                .cloned()
                .expect("object"),
            ..Envelope::default()
        };
        let shown = match decode(&envelope) {
            Ok(message) => {
                let call = crate::protocol::publish::TaskCall::retry_of(&message, None);
                format!("{message:?} {:?} {call:?}", message.embed)
            }
            Err(invalid) => format!("{invalid:?} {invalid}"),
        };
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[test]
fn the_deepest_nesting_allowed_needs_little_stack() {
    let depth = Limits::default().depth;
    let json = |open: &str, close: &str, levels: usize| {
        format!(
            "[[{}1{}], {{}}, {{}}]",
            open.repeat(levels),
            close.repeat(levels)
        )
        .into_bytes()
    };
    let mut msgpack = vec![0x93, 0x91];
    msgpack.extend(vec![0x91; depth - 2]);
    msgpack.extend([0x01, 0x80, 0x80]);
    let bodies = [
        ("application/json", json("[", "]", depth - 2), true),
        ("application/json", json("{\"a\":", "}", depth - 2), true),
        ("application/json", json("[", "]", depth - 1), false),
        ("application/json", vec![b'['; 10_000_000], false),
        ("application/x-msgpack", msgpack, true),
        ("application/x-msgpack", vec![0x91; 10_000_000], false),
        ("application/x-yaml", json("[", "]", 5000), false),
        ("application/x-yaml", vec![b'['; 100_000], false),
    ];
    // Half of what tokio gives its threads, and this is a build without optimisation.
    let small = std::thread::Builder::new().stack_size(1 << 20);
    let thread = small.spawn(move || {
        for (content_type, body, is_valid) in bodies {
            let envelope = Envelope {
                body,
                content_type: Some(content_type.to_owned()),
                headers: json!({"task": "t", "id": "i"})
                    .as_object()
                    .cloned()
                    .expect("object"),
                ..Envelope::default()
            };
            let decoded = decode(&envelope);
            assert_eq!(decoded.is_ok(), is_valid, "{content_type}");
            if let Ok(message) = decoded {
                let call = crate::protocol::publish::TaskCall::retry_of(&message.clone(), None);
                for name in ["json", "msgpack", "yaml"] {
                    let serializer = crate::protocol::serialization::Serializer::parse(name);
                    let call = crate::protocol::publish::TaskCall {
                        serializer: serializer.expect("known"),
                        ..call.clone()
                    };
                    call.to_envelope().expect("writes");
                }
                crate::protocol::saferepr::repr(&Value::Array(message.args));
            }
        }
    });
    thread.expect("starts").join().expect("no panic");
}

/// A small generator with a fixed seed, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below.max(1) as u64).expect("below fits")
    }

    fn value(&mut self) -> Value {
        match self.next(12) {
            0 => json!(null),
            1 => json!(-1),
            2 => json!(1e308),
            3 => json!(""),
            4 => json!("x"),
            5 => json!([]),
            6 => json!({}),
            7 => json!([[null, {"task": 1}], "args"]),
            8 => json!({"task": "t", "args": {"a": 1}}),
            9 => json!(true),
            10 => json!(u64::MAX),
            _ => json!({"__type__": "datetime", "__value__": "2020-01-01"}),
        }
    }
}

/// Damages one place of an envelope.
fn damage(random: &mut Random, envelope: &mut Envelope) {
    match random.next(8) {
        0..=3 if !envelope.body.is_empty() => {
            let at = random.next(envelope.body.len());
            match random.next(4) {
                0 => envelope.body[at] = u8::try_from(random.next(256)).expect("a byte"),
                1 => envelope.body.truncate(at),
                2 => envelope.body[at] ^= 1 << random.next(8),
                _ => {
                    let byte = b"[]{}\",:0-eNnI\\u\xff\x00"[random.next(17)];
                    envelope.body.insert(at, byte);
                }
            }
        }
        4 | 5 if !envelope.headers.is_empty() => {
            let at = random.next(envelope.headers.len());
            let name = envelope.headers.keys().nth(at).expect("inside").clone();
            let value = random.value();
            envelope.headers.insert(name, value);
        }
        6 => {
            let names = [
                "application/json",
                "application/x-msgpack",
                "application/x-yaml",
                "x",
                "",
            ];
            envelope.content_type = Some(names[random.next(5)].to_owned());
        }
        _ => {
            let names = ["zlib", "bzip2", "lzma", "zstd", "brotli", "x"];
            envelope
                .headers
                .insert("compression".to_owned(), names[random.next(6)].into());
        }
    }
}

#[test]
fn any_bytes_and_any_headers_end_in_a_message_or_in_an_invalid_one() {
    let originals: Vec<Envelope> = rows(TASKS)
        .iter()
        .map(|row| serde_json::from_str(row["raw"].as_str().expect("text")).expect("valid"))
        .chain(rows(MALFORMED).iter().map(|row| row["envelope"].clone()))
        .map(|raw: Value| envelope(&raw))
        .collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut read, mut refused) = (0, 0);
    for round in 0..20_000 {
        let mut damaged = originals[random.next(originals.len())].clone();
        for _ in 0..=random.next(3) {
            damage(&mut random, &mut damaged);
        }
        match decode(&damaged) {
            Ok(message) => {
                read += 1;
                // What was read can be shown and sent again.
                let call = crate::protocol::publish::TaskCall::retry_of(&message, message.eta);
                call.to_envelope()
                    .unwrap_or_else(|error| panic!("round {round}: {error}"));
            }
            Err(invalid) => {
                refused += 1;
                assert!(!invalid.to_string().is_empty(), "round {round}");
            }
        }
    }
    assert!(
        read > 1000 && refused > 1000,
        "{read} read, {refused} refused"
    );
}
