//! AMQP's properties and header tables, in both directions.
//!
//! Tables are written with the types py-amqp uses, so that a header Python reads back is the
//! one that was meant: text as long string, whole numbers as `I` or `l`, nothing as `V`. What
//! is read may be of any type; what JSON cannot say becomes text. Answers for
//! `amqp/serialization.py` and `amqp/basic_message.py`.

use base64::Engine as _;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, ShortString};
use serde_json::{Map, Number, Value};

use crate::protocol::envelope::{Envelope, Properties};
use crate::transport::{Error, MOST_DEATHS};

/// Nothing kombu sends is nested as deeply.
const DEEPEST: usize = 64;
/// Quorum queues count in it how often a message came back.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// A name, key or property; AMQP allows 255 bytes.
pub(super) fn short(text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text).map_err(|_| Error::Refused {
        operation: "writing a message for RabbitMQ",
        reason: format!(
            "'{}…' is longer than the 255 bytes AMQP allows for names and properties",
            text.chars().take(40).collect::<String>()
        ),
    })
}

/// A table of headers or arguments.
pub(super) fn table(map: &Map<String, Value>) -> Result<FieldTable, Error> {
    let mut table = FieldTable::default();
    for (name, value) in map {
        table.insert(short(name)?, field(value)?);
    }
    Ok(table)
}

fn field(value: &Value) -> Result<AMQPValue, Error> {
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(flag) => AMQPValue::Boolean(*flag),
        Value::Number(number) => numeric(number),
        Value::String(text) => AMQPValue::LongString(text.as_str().into()),
        Value::Array(items) => {
            let mut array = FieldArray::default();
            for item in items {
                array.push(field(item)?);
            }
            AMQPValue::FieldArray(array)
        }
        Value::Object(map) => AMQPValue::FieldTable(table(map)?),
    })
}

fn numeric(number: &Number) -> AMQPValue {
    match (number.as_i64(), number.as_f64()) {
        (Some(whole), _) => match i32::try_from(whole) {
            Ok(small) => AMQPValue::LongInt(small),
            Err(_) => AMQPValue::LongLongInt(whole),
        },
        (None, Some(float)) => AMQPValue::Double(float),
        // Beyond 64 bits: its digits, as text.
        (None, None) => AMQPValue::LongString(number.to_string().into()),
    }
}

/// The properties of a message on its way out.
pub(super) fn properties(envelope: &Envelope) -> Result<BasicProperties, Error> {
    let given = &envelope.properties;
    let mut properties = BasicProperties::default();
    if let Some(text) = &envelope.content_type {
        properties = properties.with_content_type(short(text)?);
    }
    if let Some(text) = &envelope.content_encoding {
        properties = properties.with_content_encoding(short(text)?);
    }
    properties = properties.with_headers(table(&envelope.headers)?);
    if let Some(mode) = given.delivery_mode {
        properties = properties.with_delivery_mode(mode);
    }
    if let Some(priority) = given.priority {
        properties = properties.with_priority(priority);
    }
    if let Some(text) = &given.correlation_id {
        properties = properties.with_correlation_id(short(text)?);
    }
    if let Some(text) = given.reply_to.as_ref().filter(|text| !text.is_empty()) {
        properties = properties.with_reply_to(short(text)?);
    }
    if let Some(text) = &given.expiration {
        properties = properties.with_expiration(short(text)?);
    }
    Ok(properties)
}

/// A message that came in.
pub(super) fn envelope(properties: &BasicProperties, body: Vec<u8>) -> Envelope {
    let text = |property: &Option<ShortString>| property.as_ref().map(ToString::to_string);
    let headers = match properties.headers() {
        Some(table) => object(table, 0),
        None => Map::new(),
    };
    Envelope {
        body,
        content_type: text(properties.content_type()),
        content_encoding: text(properties.content_encoding()),
        headers,
        properties: Properties {
            correlation_id: text(properties.correlation_id()),
            reply_to: text(properties.reply_to()),
            delivery_mode: *properties.delivery_mode(),
            priority: *properties.priority(),
            expiration: text(properties.expiration()),
        },
    }
}

fn object(table: &FieldTable, depth: usize) -> Map<String, Value> {
    let fields = table.inner().iter();
    fields
        .map(|(name, field)| (name.to_string(), value(field, depth + 1)))
        .collect()
}

fn value(field: &AMQPValue, depth: usize) -> Value {
    if depth > DEEPEST {
        return Value::Null;
    }
    match field {
        AMQPValue::Boolean(flag) => Value::Bool(*flag),
        AMQPValue::ShortShortInt(number) => Value::from(*number),
        AMQPValue::ShortShortUInt(number) => Value::from(*number),
        AMQPValue::ShortInt(number) => Value::from(*number),
        AMQPValue::ShortUInt(number) => Value::from(*number),
        AMQPValue::LongInt(number) => Value::from(*number),
        AMQPValue::LongUInt(number) => Value::from(*number),
        AMQPValue::LongLongInt(number) => Value::from(*number),
        AMQPValue::Float(number) => Value::from(f64::from(*number)),
        AMQPValue::Double(number) => Value::from(*number),
        AMQPValue::DecimalValue(decimal) => {
            let number = f64::from(decimal.value) / 10_f64.powi(i32::from(decimal.scale));
            Value::from(number)
        }
        AMQPValue::ShortString(text) => Value::from(text.as_str()),
        AMQPValue::LongString(bytes) => Value::from(lossy(bytes.as_bytes())),
        AMQPValue::FieldArray(items) => items
            .as_slice()
            .iter()
            .map(|item| value(item, depth + 1))
            .collect(),
        AMQPValue::Timestamp(seconds) => Value::from(*seconds),
        AMQPValue::FieldTable(table) => Value::Object(object(table, depth)),
        AMQPValue::ByteArray(bytes) => match std::str::from_utf8(bytes.as_slice()) {
            Ok(text) => Value::from(text),
            Err(_) => base64::engine::general_purpose::STANDARD
                .encode(bytes.as_slice())
                .into(),
        },
        AMQPValue::Void => Value::Null,
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// How often a worker may have died on a message.
///
/// A classic queue only says that there was an earlier delivery. A quorum queue counts, but not
/// deaths alone: what is held and not begun comes back with every restart and every lost
/// connection. One in four counts, so that three deaths are reached before the limit of 20
/// deliveries at which RabbitMQ 4 gives a message up, and not by three deployments. Where the
/// queue has a limit of its own (`x-delivery-limit`), the last delivery it grants is one too many:
/// RabbitMQ drops the message if it comes back once more, and nobody would be told.
pub(super) fn deaths(headers: &Map<String, Value>, redelivered: bool, limit: Option<u64>) -> u32 {
    let Some(count) = headers.get(DELIVERY_COUNT).and_then(Value::as_u64) else {
        return u32::from(redelivered);
    };
    match limit {
        Some(limit) if count >= limit.max(1) => MOST_DEATHS,
        Some(_) => 0,
        None => u32::try_from(count / 4).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn headers_come_back_as_they_were_sent() {
        let headers = map(json!({
            "text": "분석", "none": null, "yes": true, "small": -7, "large": 4_294_967_296_i64,
            "float": 1.5, "list": [1, [null, "x"]], "table": {"a": {"b": 2}},
        }));
        let envelope_out = Envelope {
            headers: headers.clone(),
            properties: Properties {
                correlation_id: Some("id".into()),
                reply_to: Some(String::new()),
                delivery_mode: Some(2),
                priority: Some(9),
                expiration: Some("1500".into()),
            },
            ..Envelope::default()
        };
        let written = properties(&envelope_out).unwrap();
        let read = envelope(&written, b"body".to_vec());
        assert_eq!(Value::Object(read.headers), Value::Object(headers));
        assert_eq!(read.properties.correlation_id.as_deref(), Some("id"));
        assert_eq!(read.properties.reply_to, None, "an empty one is not sent");
        assert_eq!(read.properties.priority, Some(9));
        assert_eq!(read.properties.expiration.as_deref(), Some("1500"));
        assert_eq!(read.body, b"body");
    }

    #[test]
    fn numbers_have_the_types_of_py_amqp() {
        for (number, kind) in [
            (json!(2_147_483_647), 'I'),
            (json!(2_147_483_648_u64), 'l'),
            (json!(-2_147_483_649_i64), 'l'),
            (json!(0.5), 'd'),
        ] {
            assert_eq!(
                field(&number).unwrap().get_type().get_id(),
                kind,
                "{number}"
            );
        }
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused_in_words() {
        let error = short(&"x".repeat(256)).unwrap_err();
        assert!(error.to_string().contains("255 bytes"), "{error}");
        let headers = Map::from_iter([("h".repeat(300), Value::Null)]);
        assert!(table(&headers).is_err());
    }

    #[test]
    fn deaths_are_read_from_the_count_of_quorum_queues() {
        let counted = |count: u32| map(json!({"x-delivery-count": count}));
        assert_eq!(deaths(&Map::new(), false, None), 0);
        assert_eq!(deaths(&Map::new(), true, None), 1);
        assert_eq!(deaths(&counted(3), true, None), 0);
        assert_eq!(deaths(&counted(12), true, None), MOST_DEATHS);
        // The queue's own limit is reached when it is reached, not before.
        assert_eq!(deaths(&counted(19), true, Some(20)), 0);
        assert_eq!(deaths(&counted(20), true, Some(20)), MOST_DEATHS);
        assert_eq!(deaths(&counted(1), true, Some(1)), MOST_DEATHS);
        assert_eq!(deaths(&counted(0), false, Some(0)), 0);
    }
}
