//! The JSON of a list element, in both directions.
//!
//! Reading is lenient where kombu is (missing properties, odd types in fields nobody needs)
//! and strict where a wrong guess would run the wrong thing (the body's encoding). Writing
//! yields what kombu writes, without the blanks. What was read is never written from the
//! parsed form: a delivery that goes back to its queue keeps every field it came with.
//! Answers for `kombu/transport/virtual/base.py` (Message, Base64) and
//! `kombu/transport/redis.py` (`_do_restore_message`).

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, general_purpose};
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::protocol::envelope::{Envelope, Properties};

/// Header that counts the workers that died on a message. Ours; Python carries it along.
pub(super) const DEATHS_HEADER: &str = "celeriac_deaths";

/// Python's decoder does not insist on padding bits.
const LENIENT_BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A list element that was understood.
#[derive(Debug)]
pub(super) struct Decoded {
    pub(super) envelope: Envelope,
    pub(super) exchange: String,
    pub(super) routing_key: Option<String>,
    pub(super) delivery_tag: Option<String>,
    pub(super) redelivered: bool,
    pub(super) deaths: u32,
    /// Why the body could not be decoded; it is empty then.
    pub(super) damage: Option<String>,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow, default)]
    body: Text<'a>,
    #[serde(borrow, default, rename = "content-type")]
    content_type: Text<'a>,
    #[serde(borrow, default, rename = "content-encoding")]
    content_encoding: Text<'a>,
    #[serde(default)]
    headers: Option<Map<String, Value>>,
    #[serde(borrow, default)]
    properties: Option<WireProperties<'a>>,
}

#[derive(Deserialize, Default)]
struct WireProperties<'a> {
    #[serde(borrow, default)]
    correlation_id: Text<'a>,
    #[serde(borrow, default)]
    reply_to: Text<'a>,
    #[serde(borrow, default)]
    delivery_mode: Text<'a>,
    #[serde(borrow, default)]
    priority: Text<'a>,
    #[serde(borrow, default)]
    expiration: Text<'a>,
    #[serde(borrow, default)]
    body_encoding: Text<'a>,
    #[serde(borrow, default)]
    delivery_tag: Text<'a>,
    #[serde(borrow, default)]
    delivery_info: Option<WireInfo<'a>>,
}

#[derive(Deserialize, Default)]
struct WireInfo<'a> {
    #[serde(borrow, default)]
    exchange: Text<'a>,
    #[serde(borrow, default)]
    routing_key: Text<'a>,
    #[serde(default)]
    redelivered: Value,
}

/// A scalar as text; anything else counts as absent.
#[derive(Default, Debug)]
struct Text<'a>(Option<Cow<'a, str>>);

impl Text<'_> {
    fn owned(self) -> Option<String> {
        self.0.map(Cow::into_owned)
    }

    fn number(&self) -> Option<u8> {
        let text = self.0.as_deref()?;
        text.parse::<u8>().ok().or_else(|| {
            // Priorities beyond 9 and below 0 are clamped by whoever uses them.
            text.parse::<f64>()
                .ok()
                .map(|number| number.clamp(0.0, 255.0) as u8)
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Borrowed(text))))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Owned(text.to_owned()))))
            }
            fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Owned(number.to_string()))))
            }
            fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Owned(number.to_string()))))
            }
            fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Owned(number.to_string()))))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Text(None))
            }
            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Text(None))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Text(None))
            }
            // Numbers arrive as a map of one text under `arbitrary_precision`.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut text = None;
                while let Some(key) = map.next_key::<Cow<'_, str>>()? {
                    if key == "$serde_json::private::Number" {
                        text = Some(Cow::Owned(map.next_value::<String>()?));
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Text(text))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// Reads a list element. The error says why it is no message at all.
pub(super) fn decode(raw: &[u8]) -> Result<Decoded, String> {
    // Python reads the element as UTF-8 as well; a first check gives the better text.
    let raw = std::str::from_utf8(raw).map_err(|error| format!("not UTF-8: {error}"))?;
    if !raw.trim_start().starts_with('{') {
        return Err("not a JSON object".to_owned());
    }
    let wire: Wire<'_> =
        serde_json::from_str(raw).map_err(|error| format!("not a message: {error}"))?;
    let mut headers = wire.headers.unwrap_or_default();
    let properties = wire.properties.unwrap_or_default();
    let info = properties.delivery_info.unwrap_or_default();
    let deaths = headers
        .shift_remove(DEATHS_HEADER)
        .and_then(|count| count.as_u64())
        .map_or(0, |count| count.min(u64::from(u32::MAX)) as u32);
    let redelivered = headers.get("redelivered").is_some_and(truthy) || truthy(&info.redelivered);

    let mut damage = None;
    let body = match (wire.body.0, properties.body_encoding.0.as_deref()) {
        (None, _) => {
            damage = Some("the body is missing or not a text".to_owned());
            Vec::new()
        }
        (Some(text), Some(name)) if name.eq_ignore_ascii_case("base64") => decode_base64(&text)
            .unwrap_or_else(|error| {
                damage = Some(format!("the body is not base64: {error}"));
                Vec::new()
            }),
        (Some(text), None) => text.into_owned().into_bytes(),
        (Some(text), Some(name))
            if name.is_empty()
                || name.eq_ignore_ascii_case("utf-8")
                || name.eq_ignore_ascii_case("utf8") =>
        {
            text.into_owned().into_bytes()
        }
        (Some(_), Some(name)) => {
            let name: String = name.chars().take(40).collect();
            damage = Some(format!("unknown body_encoding {name:?}"));
            Vec::new()
        }
    };
    Ok(Decoded {
        envelope: Envelope {
            body,
            content_type: wire.content_type.owned(),
            content_encoding: wire.content_encoding.owned(),
            headers,
            properties: Properties {
                delivery_mode: properties.delivery_mode.number(),
                priority: properties.priority.number(),
                correlation_id: properties.correlation_id.owned(),
                reply_to: properties.reply_to.owned(),
                expiration: properties.expiration.owned(),
            },
        },
        exchange: info.exchange.owned().unwrap_or_default(),
        routing_key: info.routing_key.owned(),
        delivery_tag: properties
            .delivery_tag
            .owned()
            .filter(|tag| !tag.is_empty()),
        redelivered,
        deaths,
        damage,
    })
}

fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

fn decode_base64(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    LENIENT_BASE64.decode(text).or_else(|error| {
        // MIME style line breaks are rare; only then pay for the copy.
        if text.bytes().any(|b| b.is_ascii_whitespace()) {
            let packed: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
            LENIENT_BASE64.decode(packed)
        } else {
            Err(error)
        }
    })
}

/// Writes an envelope as a list element or a fan-out payload.
pub(super) fn encode(
    envelope: &Envelope,
    exchange: &str,
    routing_key: &str,
    delivery_tag: &str,
) -> Vec<u8> {
    #[derive(Serialize)]
    struct Info<'a> {
        exchange: &'a str,
        routing_key: &'a str,
    }
    #[derive(Serialize)]
    struct Props<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        correlation_id: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        reply_to: Option<&'a str>,
        delivery_mode: u8,
        #[serde(skip_serializing_if = "Option::is_none")]
        expiration: Option<&'a str>,
        delivery_info: Info<'a>,
        priority: u8,
        body_encoding: &'a str,
        delivery_tag: &'a str,
    }
    #[derive(Serialize)]
    struct Wire<'a> {
        body: &'a str,
        #[serde(rename = "content-encoding")]
        content_encoding: Option<&'a str>,
        #[serde(rename = "content-type")]
        content_type: Option<&'a str>,
        headers: &'a Map<String, Value>,
        properties: Props<'a>,
    }
    let properties = &envelope.properties;
    let body = general_purpose::STANDARD.encode(&envelope.body);
    let mut raw = Vec::with_capacity(body.len() + 512);
    let wire = Wire {
        body: &body,
        content_encoding: envelope.content_encoding.as_deref(),
        content_type: envelope.content_type.as_deref(),
        headers: &envelope.headers,
        properties: Props {
            correlation_id: properties.correlation_id.as_deref(),
            reply_to: properties.reply_to.as_deref(),
            delivery_mode: properties.delivery_mode.unwrap_or(2),
            expiration: properties.expiration.as_deref(),
            delivery_info: Info {
                exchange,
                routing_key,
            },
            priority: properties.priority.unwrap_or(0),
            body_encoding: "base64",
            delivery_tag,
        },
    };
    serde_json::to_writer(&mut raw, &wire).expect("because maps with text keys always serialize");
    raw
}

/// What goes back to a queue for a value of the `unacked` hash.
#[derive(Debug, PartialEq)]
pub(super) struct Returned {
    /// The envelope, marked as redelivered; nothing else has changed.
    pub(super) raw: Vec<u8>,
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) priority: u8,
}

/// Reads a value of the `unacked` hash and marks its envelope as redelivered. `died` adds one
/// to the number of workers that died on it.
pub(super) fn returned(stored: &[u8], died: bool) -> Result<Returned, String> {
    let (mut envelope, exchange, routing_key): (Map<String, Value>, Value, Value) =
        serde_json::from_slice(stored)
            .map_err(|error| format!("not an unacked record: {error}"))?;
    let headers = object(&mut envelope, "headers");
    headers.insert("redelivered".to_owned(), Value::Bool(true));
    if died {
        let deaths = headers
            .get(DEATHS_HEADER)
            .and_then(Value::as_u64)
            .unwrap_or(0);
        headers.insert(
            DEATHS_HEADER.to_owned(),
            Value::from(deaths.saturating_add(1)),
        );
    }
    let properties = object(&mut envelope, "properties");
    object(properties, "delivery_info").insert("redelivered".to_owned(), Value::Bool(true));
    let priority = match properties.get("priority") {
        Some(Value::Number(number)) => number.as_f64().unwrap_or(0.0).clamp(0.0, 9.0) as u8,
        Some(Value::String(text)) => text.parse::<i64>().unwrap_or(0).clamp(0, 9) as u8,
        _ => 0,
    };
    let raw = serde_json::to_vec(&envelope).map_err(|error| error.to_string())?;
    let text = |value: Value| match value {
        Value::String(text) => text,
        _ => String::new(),
    };
    Ok(Returned {
        raw,
        exchange: text(exchange),
        routing_key: text(routing_key),
        priority,
    })
}

/// The object under a key, made if something else is there.
fn object<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let slot = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot.as_object_mut()
        .expect("because it was made an object above")
}

/// An entry of the quarantine list.
pub(super) fn quarantined(reason: &str, queue: &str, micros: u64, message: &[u8]) -> Vec<u8> {
    let mut entry = Map::new();
    entry.insert("reason".into(), reason.into());
    entry.insert("queue".into(), queue.into());
    entry.insert("time".into(), Value::from(micros as f64 / 1e6));
    match std::str::from_utf8(message) {
        Ok(text) => entry.insert("message".into(), text.into()),
        Err(_) => entry.insert(
            "message_base64".into(),
            general_purpose::STANDARD.encode(message).into(),
        ),
    };
    serde_json::to_vec(&entry).expect("because a map of texts and a number serializes")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As written by kombu 5.7 for `send_task("celery_app.test_task", ["p0"])`.
    const BY_KOMBU: &str = r#"{"body": "W1sicDAiXSwge30sIHsiY2FsbGJhY2tzIjogbnVsbCwgImVycmJhY2tzIjogbnVsbCwgImNoYWluIjogbnVsbCwgImNob3JkIjogbnVsbH1d", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", "task": "celery_app.test_task", "id": "cbe98c30-8669-4c60-a431-762ab68a8e33", "timelimit": [null, null], "argsrepr": "('p0\u00e9',)", "big": 123456789012345678901234567890, "empty": []}, "properties": {"correlation_id": "cbe98c30-8669-4c60-a431-762ab68a8e33", "reply_to": "cfb8cd9d-8e7b-33b9-9d59-500b843be305", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "celery"}, "priority": 4, "body_encoding": "base64", "delivery_tag": "46f89fef-7713-461e-a915-127294185706"}}"#;

    #[test]
    fn element_written_by_kombu_is_read() {
        let decoded = decode(BY_KOMBU.as_bytes()).unwrap();
        assert!(decoded.envelope.body.starts_with(b"[[\"p0\"], {}, "));
        assert_eq!(
            decoded.envelope.content_type.as_deref(),
            Some("application/json")
        );
        assert_eq!(decoded.envelope.headers["task"], "celery_app.test_task");
        assert_eq!(decoded.envelope.properties.priority, Some(4));
        assert_eq!(decoded.envelope.properties.delivery_mode, Some(2));
        assert_eq!(decoded.routing_key.as_deref(), Some("celery"));
        assert_eq!(
            decoded.delivery_tag.as_deref(),
            Some("46f89fef-7713-461e-a915-127294185706")
        );
        assert!(!decoded.redelivered);
    }

    #[test]
    fn envelope_survives_writing_and_reading() {
        let envelope = decode(BY_KOMBU.as_bytes()).unwrap().envelope;
        let raw = encode(&envelope, "ex", "rk", "tag");
        let again = decode(&raw).unwrap();
        assert_eq!(again.envelope, envelope);
        assert_eq!(
            (again.exchange.as_str(), again.routing_key.as_deref()),
            ("ex", Some("rk"))
        );
        let json: Value = serde_json::from_slice(&raw).unwrap();
        assert_eq!(json["properties"]["body_encoding"], "base64");
    }

    #[test]
    fn returned_envelope_differs_in_the_redelivered_marks_only() {
        let stored = format!("[{BY_KOMBU}, \"\", \"celery\"]");
        let returned = returned(stored.as_bytes(), false).unwrap();
        assert_eq!(
            (returned.exchange.as_str(), returned.routing_key.as_str()),
            ("", "celery")
        );
        assert_eq!(returned.priority, 4);
        let mut expected: Value = serde_json::from_str(BY_KOMBU).unwrap();
        expected["headers"]["redelivered"] = json!(true);
        expected["properties"]["delivery_info"]["redelivered"] = json!(true);
        let got: Value = serde_json::from_slice(&returned.raw).unwrap();
        assert_eq!(got, expected);
        let text = String::from_utf8(returned.raw).unwrap();
        assert!(text.contains("123456789012345678901234567890") && text.contains("\"empty\":[]"));
        assert!(decode(text.as_bytes()).unwrap().redelivered);
    }

    #[test]
    fn deaths_are_counted_in_a_header_the_consumer_does_not_see() {
        let mut stored = format!("[{BY_KOMBU}, \"\", \"celery\"]");
        for count in 1..=3 {
            let raw = returned(stored.as_bytes(), true).unwrap().raw;
            let decoded = decode(&raw).unwrap();
            assert_eq!(decoded.deaths, count);
            assert!(!decoded.envelope.headers.contains_key(DEATHS_HEADER));
            stored = format!("[{}, \"\", \"celery\"]", String::from_utf8(raw).unwrap());
        }
    }

    #[test]
    fn body_follows_its_encoding() {
        let body = |encoding: Value, body: &str| {
            let raw = json!({"body": body, "properties": {"body_encoding": encoding}});
            decode(raw.to_string().as_bytes()).unwrap()
        };
        assert_eq!(body(json!("base64"), "W10=").envelope.body, b"[]");
        assert_eq!(body(json!("BASE64"), "W10").envelope.body, b"[]");
        assert_eq!(body(Value::Null, "[]").envelope.body, b"[]");
        assert_eq!(body(json!("UTF-8"), "é").envelope.body, "é".as_bytes());
        assert!(body(json!("rot13"), "[]").damage.unwrap().contains("rot13"));
        assert!(
            body(json!("base64"), "???")
                .damage
                .unwrap()
                .contains("base64")
        );
    }

    #[test]
    fn odd_types_in_fields_nobody_needs_do_no_harm() {
        let raw = json!({"body": "x", "content-type": 7, "headers": null, "properties":
            {"priority": "high", "correlation_id": [1], "reply_to": {"a": 1}, "delivery_mode": 2.0}});
        let decoded = decode(raw.to_string().as_bytes()).unwrap();
        assert_eq!(decoded.envelope.properties.priority, None);
        assert_eq!(decoded.envelope.properties.correlation_id, None);
        assert_eq!(decoded.envelope.properties.reply_to, None);
        assert_eq!(decoded.envelope.properties.delivery_mode, Some(2));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error() {
        let mut seeds: Vec<Vec<u8>> = vec![b"".to_vec(), b"[]".to_vec(), b"\xff\xfe".to_vec()];
        seeds.push(b"{\"headers\": 1}".to_vec());
        seeds.push([b'['].repeat(100_000));
        for cut in 0..BY_KOMBU.len() {
            seeds.push(BY_KOMBU.as_bytes()[..cut].to_vec());
            let mut bent = BY_KOMBU.as_bytes().to_vec();
            bent[cut] = bent[cut].wrapping_add(1);
            seeds.push(bent);
        }
        for seed in seeds {
            drop(decode(&seed));
            drop(returned(&seed, true));
        }
        assert!(decode(b"[1]").is_err());
    }

    #[test]
    fn quarantined_entry_keeps_any_bytes() {
        let entry: Value =
            serde_json::from_slice(&quarantined("why", "q", 1_500_000, b"raw")).unwrap();
        assert_eq!(
            entry,
            json!({"reason": "why", "queue": "q", "time": 1.5, "message": "raw"})
        );
        let entry: Value = serde_json::from_slice(&quarantined("why", "q", 0, b"\xff")).unwrap();
        assert_eq!(entry["message_base64"], "/w==");
    }
}
