//! kombu's tagged objects as the Python values they stand for.

use chrono::{Datelike, Offset, Timelike};
use serde_json::{Map, Value};

use crate::protocol::{json, time};

/// The repr of the Python value a tagged object stands for.
pub(super) fn repr(object: &Map<String, Value>) -> Option<String> {
    let (tag, value) = json::tagged(object)?;
    let text = value.as_str();
    Some(match tag.as_str()? {
        "datetime" => {
            let text = text?;
            let at = time::parse_iso(text).ok()?;
            let date = format!("{}, {}, {}", at.year(), at.month(), at.day());
            format!(
                "datetime.datetime({date}, {}{})",
                clock_parts(&at),
                zone(text, &at)
            )
        }
        "date" => {
            let at = time::parse_iso(text?).ok()?;
            format!("datetime.date({}, {}, {})", at.year(), at.month(), at.day())
        }
        "time" => {
            let text = text?;
            let at = time::parse_iso(&format!("2000-01-01T{text}")).ok()?;
            format!("datetime.time({}{})", clock_parts(&at), zone(text, &at))
        }
        "decimal" => format!("Decimal('{}')", super::str(value)),
        "uuid" => {
            let uuid = uuid::Uuid::parse_str(value.get("hex")?.as_str()?).ok()?;
            format!("UUID('{uuid}')")
        }
        "bytes" | "base64" => repr_bytes(&json::tagged_bytes(object)?),
        _ => return None,
    })
}

/// Its `str()`, where that is not its repr.
pub(super) fn str(object: &Map<String, Value>) -> Option<String> {
    let (tag, value) = json::tagged(object)?;
    match tag.as_str()? {
        "datetime" => Some(value.as_str()?.replacen('T', " ", 1)),
        "date" | "time" | "decimal" => Some(super::str(value)),
        "uuid" => Some(
            uuid::Uuid::parse_str(value.get("hex")?.as_str()?)
                .ok()?
                .to_string(),
        ),
        _ => None,
    }
}

/// Hour and minute, then seconds and microseconds unless they are zero.
fn clock_parts(at: &time::Timestamp) -> String {
    let mut text = format!("{}, {}", at.hour(), at.minute());
    let micros = at.nanosecond() / 1000;
    if at.second() > 0 || micros > 0 {
        text.push_str(&format!(", {}", at.second()));
    }
    if micros > 0 {
        text.push_str(&format!(", {micros}"));
    }
    text
}

fn zone(text: &str, at: &time::Timestamp) -> String {
    let clock = text.split_once(['T', ' ']).map_or(text, |(_, clock)| clock);
    if !clock.contains(['Z', 'z', '+', '-']) {
        return String::new();
    }
    let seconds = at.offset().fix().local_minus_utc();
    if seconds == 0 {
        return ", tzinfo=datetime.timezone.utc".to_owned();
    }
    let delta = if seconds < 0 {
        format!("days=-1, seconds={}", seconds + 86_400)
    } else {
        format!("seconds={seconds}")
    };
    format!(", tzinfo=datetime.timezone(datetime.timedelta({delta}))")
}

fn repr_bytes(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') {
        '"'
    } else {
        '\''
    };
    let mut out = format!("b{quote}");
    for byte in bytes {
        match byte {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            byte if char::from(*byte) == quote => {
                out.push('\\');
                out.push(quote);
            }
            b' '..=b'~' => out.push(char::from(*byte)),
            byte => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out.push(quote);
    out
}
