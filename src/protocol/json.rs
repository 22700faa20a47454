//! JSON as Python's `json` and kombu read it.
//!
//! Differs from strict JSON in what those accept: `NaN`, `Infinity` and `-Infinity` are
//! numbers (kept as such in a [`Number`], and written again by `serde_json`), half a surrogate
//! pair is a character (here U+FFFD), nesting may be deep. kombu's tagged objects
//! `{"__type__": …, "__value__": …}` stay as they are in the value, but a tag kombu does not
//! know, or a value it could not decode, is an error of the whole text, as there.
//!
//! Answers for `json.loads` (with its error texts) and `kombu.utils.json.object_hook`.
//! Depth and number of values are bounded, so that a short text cannot take all memory.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Number, Value};

use super::{Limits, saferepr, time};

/// Reads one JSON text.
pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Value, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let position = error.valid_up_to();
        format!(
            "'utf-8' codec can't decode byte {:#04x} in position {position}: invalid start byte",
            bytes.get(position).copied().unwrap_or_default()
        )
    })?;
    let mut reader = Reader {
        bytes,
        text,
        position: 0,
        depth: 0,
        left: limits.values,
        limits,
    };
    reader.space();
    let value = reader.value()?;
    reader.space();
    if reader.position < bytes.len() {
        return Err(reader.error("Extra data", reader.position));
    }
    Ok(value)
}

/// A number that is not finite, in Python's spelling.
pub fn non_finite(value: f64) -> Number {
    let text = if value.is_nan() {
        "NaN"
    } else if value > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    };
    // Not in the documented interface of serde_json, which has no other way to hold a NaN.
    Number::from_string_unchecked(text.to_owned())
}

/// A float as a JSON number, whatever it is.
pub fn float(value: f64) -> Value {
    Value::Number(Number::from_f64(value).unwrap_or_else(|| non_finite(value)))
}

/// The tag and the value of one of kombu's tagged objects.
pub fn tagged(object: &Map<String, Value>) -> Option<(&Value, &Value)> {
    if object.len() != 2 {
        return None;
    }
    Some((object.get("__type__")?, object.get("__value__")?))
}

/// The bytes that a tagged object stands for, if it stands for bytes.
pub fn tagged_bytes(object: &Map<String, Value>) -> Option<Vec<u8>> {
    let (tag, value) = tagged(object)?;
    match tag.as_str()? {
        "bytes" => Some(value.as_str()?.as_bytes().to_vec()),
        "base64" => STANDARD.decode(value.as_str()?).ok(),
        _ => None,
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    text: &'a str,
    position: usize,
    depth: usize,
    left: usize,
    limits: &'a Limits,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
    }

    fn error(&self, what: &str, position: usize) -> String {
        let before = &self.bytes[..position.min(self.bytes.len())];
        let line = 1 + memchr::memchr_iter(b'\n', before).count();
        let start = memchr::memrchr(b'\n', before).map_or(0, |newline| newline + 1);
        let characters = |bytes: &[u8]| bytes.iter().filter(|byte| (**byte & 0xc0) != 0x80).count();
        let column = 1 + characters(&before[start..]);
        format!(
            "{what}: line {line} column {column} (char {})",
            characters(before)
        )
    }

    fn value(&mut self) -> Result<Value, String> {
        self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| format!("more than {} values in one message", self.limits.values))?;
        match self.peek() {
            Some(b'"') => self.string().map(Value::String),
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::array),
            Some(b'n') => self.literal("null", Value::Null),
            Some(b't') => self.literal("true", Value::Bool(true)),
            Some(b'f') => self.literal("false", Value::Bool(false)),
            Some(b'N') => self.literal("NaN", float(f64::NAN)),
            Some(b'I') => self.literal("Infinity", float(f64::INFINITY)),
            Some(b'-') if self.bytes.get(self.position + 1) == Some(&b'I') => {
                self.literal("-Infinity", float(f64::NEG_INFINITY))
            }
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err(self.error("Expecting value", self.position)),
        }
    }

    fn literal(&mut self, word: &str, value: Value) -> Result<Value, String> {
        if self.bytes[self.position..].starts_with(word.as_bytes()) {
            self.position += word.len();
            return Ok(value);
        }
        Err(self.error("Expecting value", self.position))
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Value, String>) -> Result<Value, String> {
        if self.depth >= self.limits.depth {
            return Err(format!("more than {} levels of nesting", self.limits.depth));
        }
        self.depth += 1;
        self.position += 1;
        self.space();
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn array(&mut self) -> Result<Value, String> {
        let mut items = Vec::new();
        if self.peek() == Some(b']') {
            self.position += 1;
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            self.space();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b']') => {
                    self.position += 1;
                    return Ok(Value::Array(items));
                }
                _ => return Err(self.error("Expecting ',' delimiter", self.position)),
            }
            self.space();
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut object = Map::new();
        if self.peek() == Some(b'}') {
            self.position += 1;
            return Ok(Value::Object(object));
        }
        loop {
            if self.peek() != Some(b'"') {
                let what = "Expecting property name enclosed in double quotes";
                return Err(self.error(what, self.position));
            }
            let key = self.string()?;
            self.space();
            if self.peek() != Some(b':') {
                return Err(self.error("Expecting ':' delimiter", self.position));
            }
            self.position += 1;
            self.space();
            let value = self.value()?;
            object.insert(key, value);
            self.space();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b'}') => {
                    self.position += 1;
                    check_tagged(&object)?;
                    return Ok(Value::Object(object));
                }
                _ => return Err(self.error("Expecting ',' delimiter", self.position)),
            }
            self.space();
        }
    }

    fn number(&mut self) -> Result<Value, String> {
        let start = self.position;
        let digits = |bytes: &[u8], from: usize| {
            bytes[from..]
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count()
        };
        let mut end = start + usize::from(self.bytes[start] == b'-');
        let whole = match self.bytes.get(end) {
            Some(b'0') => 1,
            _ => digits(self.bytes, end),
        };
        if whole == 0 {
            return Err(self.error("Expecting value", start));
        }
        end += whole;
        if self.bytes.get(end) == Some(&b'.') {
            let fraction = digits(self.bytes, end + 1);
            if fraction > 0 {
                end += 1 + fraction;
            }
        }
        if matches!(self.bytes.get(end), Some(b'e' | b'E')) {
            let signed = matches!(self.bytes.get(end + 1), Some(b'+' | b'-'));
            let exponent = digits(self.bytes, end + 1 + usize::from(signed));
            if exponent > 0 {
                end += 1 + usize::from(signed) + exponent;
            }
        }
        self.position = end;
        let text = &self.text[start..end];
        // Python refuses to convert longer ones, because that takes quadratic time.
        if text.len() > 4300 {
            return Err("Exceeds the limit (4300 digits) for integer string conversion".to_owned());
        }
        Ok(Value::Number(Number::from_string_unchecked(
            text.to_owned(),
        )))
    }

    fn string(&mut self) -> Result<String, String> {
        let begin = self.position;
        self.position += 1;
        let mut out = String::new();
        loop {
            let start = self.position;
            let rest = &self.bytes[start..];
            let plain = rest
                .iter()
                .position(|byte| matches!(byte, b'"' | b'\\' | 0..=0x1f))
                .ok_or_else(|| self.error("Unterminated string starting at", begin))?;
            let end = start + plain;
            if rest[plain] == b'"' && out.is_empty() {
                self.position = end + 1;
                return Ok(self.text[start..end].to_owned());
            }
            out.push_str(&self.text[start..end]);
            self.position = end + 1;
            match rest[plain] {
                b'"' => return Ok(out),
                b'\\' => self.escape(&mut out, begin)?,
                _ => return Err(self.error("Invalid control character at", end)),
            }
        }
    }

    fn escape(&mut self, out: &mut String, begin: usize) -> Result<(), String> {
        let at = self.position - 1;
        let Some(byte) = self.peek() else {
            return Err(self.error("Unterminated string starting at", begin));
        };
        self.position += 1;
        out.push(match byte {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex4()?;
                self.character(first)?
            }
            _ => return Err(self.error("Invalid \\escape", at)),
        });
        Ok(())
    }

    /// The character whose first UTF-16 unit was read; takes the second unit of a pair.
    fn character(&mut self, first: u16) -> Result<char, String> {
        let is_high = (0xd800..0xdc00).contains(&first);
        if is_high && self.bytes[self.position..].starts_with(b"\\u") {
            let back = self.position;
            self.position += 2;
            let second = self.hex4()?;
            if let Some(Ok(pair)) = char::decode_utf16([first, second]).next() {
                return Ok(pair);
            }
            self.position = back;
        }
        Ok(char::from_u32(u32::from(first)).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn hex4(&mut self) -> Result<u16, String> {
        let digits = self
            .bytes
            .get(self.position..self.position + 4)
            .unwrap_or_default();
        let unit = digits
            .iter()
            .try_fold(0u32, |sum, byte| {
                Some(sum * 16 + char::from(*byte).to_digit(16)?)
            })
            .filter(|_| digits.len() == 4)
            .and_then(|unit| u16::try_from(unit).ok())
            .ok_or_else(|| self.error("Invalid \\uXXXX escape", self.position - 1))?;
        self.position += 4;
        Ok(unit)
    }
}

/// Refuses a tagged object that kombu could not turn into a Python value.
fn check_tagged(object: &Map<String, Value>) -> Result<(), String> {
    let Some((tag, value)) = tagged(object) else {
        return Ok(());
    };
    let bad = |what: &str| Err(format!("invalid value for the type {what:?}"));
    match (tag.as_str(), value) {
        (Some("datetime" | "date"), Value::String(text)) => match time::parse_iso(text) {
            Ok(_) => Ok(()),
            Err(_) => bad("datetime"),
        },
        (Some("time"), Value::String(text)) => {
            match time::parse_iso(&format!("2000-01-01T{text}")) {
                Ok(_) => Ok(()),
                Err(_) => bad("time"),
            }
        }
        (Some("decimal"), Value::String(_) | Value::Number(_)) => Ok(()),
        (Some("uuid"), Value::Object(fields)) => match fields.get("hex").and_then(Value::as_str) {
            Some(hex) if uuid::Uuid::parse_str(hex).is_ok() => Ok(()),
            _ => bad("uuid"),
        },
        (Some("bytes"), Value::String(_)) => Ok(()),
        (Some("base64"), Value::String(text)) => match STANDARD.decode(text) {
            Ok(_) => Ok(()),
            Err(_) => bad("base64"),
        },
        (
            Some(known @ ("datetime" | "date" | "time" | "decimal" | "uuid" | "bytes" | "base64")),
            _,
        ) => bad(known),
        _ => Err(format!(
            "Unsupported type {}",
            saferepr::saferepr(tag, 80, 1)
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse;
    use crate::protocol::Limits;

    fn read(text: &str) -> Result<serde_json::Value, String> {
        parse(text.as_bytes(), &Limits::default())
    }

    #[test]
    fn texts_are_read_as_serde_json_reads_them() {
        for text in [
            r#"null"#,
            r#" [1, -2.5, 1e+3, 0, 123456789012345678901234567890, true, false] "#,
            r#"{"a": {"b": []}, "c": {}, "é": "\u00e9\ud83d\ude00\n\"\\\/"}"#,
            r#""""#,
            r#"[[],{}]"#,
        ] {
            let expected: serde_json::Value = serde_json::from_str(text).expect("valid");
            assert_eq!(read(text).expect(text), expected, "{text}");
        }
    }

    #[test]
    fn what_python_accepts_beyond_the_standard_is_accepted_and_written_back() {
        let value = read("[NaN, Infinity, -Infinity]").expect("accepted");
        assert_eq!(
            serde_json::to_string(&value).expect("written"),
            "[NaN,Infinity,-Infinity]"
        );
        assert_eq!(read(r#""\ud800x""#).expect("accepted"), json!("\u{fffd}x"));
        assert_eq!(
            read(r#""\ud800\u0041""#).expect("accepted"),
            json!("\u{fffd}A")
        );
        assert_eq!(read(r#"{"a":1,"a":2}"#).expect("accepted"), json!({"a": 2}));
    }

    #[test]
    fn errors_have_pythons_words_and_positions() {
        for (text, expected) in [
            ("", "Expecting value: line 1 column 1 (char 0)"),
            ("not json", "Expecting value: line 1 column 1 (char 0)"),
            ("[1,\n é", "Expecting value: line 2 column 2 (char 5)"),
            ("[1 2]", "Expecting ',' delimiter: line 1 column 4 (char 3)"),
            (
                "{1}",
                "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
            ),
            (
                "{\"a\" 1}",
                "Expecting ':' delimiter: line 1 column 6 (char 5)",
            ),
            (
                "\"abc",
                "Unterminated string starting at: line 1 column 1 (char 0)",
            ),
            ("[1] x", "Extra data: line 1 column 5 (char 4)"),
            (
                "\"a\nb\"",
                "Invalid control character at: line 1 column 3 (char 2)",
            ),
            ("-", "Expecting value: line 1 column 1 (char 0)"),
            ("01", "Extra data: line 1 column 2 (char 1)"),
        ] {
            assert_eq!(read(text).expect_err(text), expected, "{text}");
        }
    }

    #[test]
    fn tagged_values_stay_but_unknown_tags_are_refused() {
        let text = r#"[{"__type__": "datetime", "__value__": "2024-01-02T03:04:05+00:00"},
            {"__type__": "uuid", "__value__": {"hex": "02fbfa3da3024e33815ec58fbf8e6878"}},
            {"__type__": "decimal", "__value__": "1.5"}, {"__type__": "x", "b": 1},
            {"__type__": "base64", "__value__": "/w=="}]"#;
        assert_eq!(read(text).expect("known")[2]["__value__"], "1.5");
        for text in [
            r#"{"__type__": "set", "__value__": []}"#,
            r#"{"__type__": 1, "__value__": []}"#,
            r#"{"__type__": "datetime", "__value__": "tomorrow"}"#,
            r#"{"__type__": "bytes", "__value__": 1}"#,
            r#"{"__type__": "uuid", "__value__": {"hex": "zz"}}"#,
        ] {
            read(text).expect_err(text);
        }
    }

    #[test]
    fn depth_and_number_of_values_are_bounded() {
        let limits = Limits {
            body: 1 << 20,
            depth: 10,
            values: 100,
        };
        assert!(
            parse(&[b'['; 100_000], &limits)
                .expect_err("deep")
                .contains("levels")
        );
        let many = format!("[{}1]", "1,".repeat(200));
        assert!(
            parse(many.as_bytes(), &limits)
                .expect_err("many")
                .contains("values")
        );
    }
}
