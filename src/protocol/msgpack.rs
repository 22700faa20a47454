//! msgpack, bounded while it is read.
//!
//! A byte can stand for a value, so a body of 64 MB could become gigabytes of them: depth and
//! number of values are counted as they are read, and nothing is allocated on the word of a
//! length alone. Bytes become kombu's tagged objects; extension types are refused.
//!
//! Answers for `msgpack.packb(use_bin_type=True)` and `msgpack.unpackb(raw=False)`.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Number, Value};

use super::{Error, Limits, json};

/// Reads one value that takes all of the bytes.
pub(super) fn parse(bytes: &[u8], limits: &Limits) -> Result<Value, String> {
    let mut reader = Reader {
        rest: bytes,
        left: limits.values,
        limits,
    };
    let value = reader.value(0)?;
    if reader.rest.is_empty() {
        Ok(value)
    } else {
        Err("unpack(b) received extra data.".to_owned())
    }
}

/// Writes a value.
pub(super) fn write(value: &Value) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    rmpv::encode::write_value(&mut body, &to_rmpv(value)?)
        .map_err(|error| Error::Encode(error.to_string()))?;
    Ok(body)
}

/// kombu's tagged object for bytes.
pub(super) fn bytes_value(bytes: &[u8]) -> Value {
    let (tag, text) = match std::str::from_utf8(bytes) {
        Ok(text) => ("bytes", text.to_owned()),
        Err(_) => ("base64", STANDARD.encode(bytes)),
    };
    let mut object = Map::new();
    object.insert("__type__".to_owned(), tag.into());
    object.insert("__value__".to_owned(), text.into());
    Value::Object(object)
}

/// The float that a number is, `NaN` and infinities included.
pub(super) fn number_float(number: &Number) -> f64 {
    match number.as_str() {
        "NaN" => f64::NAN,
        "Infinity" => f64::INFINITY,
        "-Infinity" => f64::NEG_INFINITY,
        text => text.parse().unwrap_or(f64::NAN),
    }
}

/// Whether a number is an int in Python.
pub(super) fn is_whole(number: &Number) -> bool {
    !number.as_str().contains(['.', 'e', 'E', 'N', 'I'])
}

struct Reader<'a> {
    rest: &'a [u8],
    left: usize,
    limits: &'a Limits,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| "Unpack failed: incomplete input".to_owned())?;
        self.rest = rest;
        Ok(head)
    }

    /// A big-endian number of `length` bytes.
    fn unsigned(&mut self, length: usize) -> Result<u64, String> {
        Ok(self
            .take(length)?
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    fn signed(&mut self, length: usize) -> Result<i64, String> {
        let shift = 64 - 8 * length;
        Ok((self.unsigned(length)? << shift).cast_signed() >> shift)
    }

    fn length(&mut self, length: usize) -> Result<usize, String> {
        usize::try_from(self.unsigned(length)?).map_err(|error| error.to_string())
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| format!("more than {} values in one message", self.limits.values))?;
        let marker = self.take(1)?[0];
        let low = |mask: u8| usize::from(marker & mask);
        Ok(match marker {
            0x00..=0x7f => marker.into(),
            0x80..=0x8f => self.map(low(0x0f), depth)?,
            0x90..=0x9f => self.array(low(0x0f), depth)?,
            0xa0..=0xbf => self.text(low(0x1f))?,
            0xc0 => Value::Null,
            0xc2 => Value::Bool(false),
            0xc3 => Value::Bool(true),
            0xc4..=0xc6 => {
                let length = self.length(1 << (marker - 0xc4))?;
                bytes_value(self.take(length)?)
            }
            0xca => {
                let bits = u32::try_from(self.unsigned(4)?).map_err(|error| error.to_string())?;
                json::float(f64::from(f32::from_bits(bits)))
            }
            0xcb => json::float(f64::from_bits(self.unsigned(8)?)),
            0xcc..=0xcf => self.unsigned(1 << (marker - 0xcc))?.into(),
            0xd0..=0xd3 => self.signed(1 << (marker - 0xd0))?.into(),
            0xd9..=0xdb => {
                let length = self.length(1 << (marker - 0xd9))?;
                self.text(length)?
            }
            0xdc | 0xdd => {
                let length = self.length(2 << (marker - 0xdc))?;
                self.array(length, depth)?
            }
            0xde | 0xdf => {
                let length = self.length(2 << (marker - 0xde))?;
                self.map(length, depth)?
            }
            0xe0..=0xff => i64::from(marker.cast_signed()).into(),
            0xc1 => return Err("Unpack failed: invalid format".to_owned()),
            0xc7..=0xc9 | 0xd4..=0xd8 => {
                return Err("extension types of msgpack are not supported".to_owned());
            }
        })
    }

    fn text(&mut self, length: usize) -> Result<Value, String> {
        std::str::from_utf8(self.take(length)?)
            .map(Value::from)
            .map_err(|error| format!("'utf-8' codec can't decode a text: {error}"))
    }

    fn deeper(&self, depth: usize) -> Result<usize, String> {
        if depth >= self.limits.depth {
            return Err(format!("more than {} levels of nesting", self.limits.depth));
        }
        Ok(depth + 1)
    }

    fn array(&mut self, length: usize, depth: usize) -> Result<Value, String> {
        let depth = self.deeper(depth)?;
        // An item takes at least a byte, so what is reserved is never more than was sent.
        let mut items = Vec::with_capacity(length.min(self.rest.len()).min(1024));
        for _ in 0..length {
            items.push(self.value(depth)?);
        }
        Ok(Value::Array(items))
    }

    fn map(&mut self, length: usize, depth: usize) -> Result<Value, String> {
        let depth = self.deeper(depth)?;
        let mut object = Map::new();
        for _ in 0..length {
            let key = match self.value(depth)? {
                Value::String(key) => key,
                Value::Object(tagged) => match json::tagged(&tagged) {
                    Some((tag, Value::String(key))) if tag == "bytes" => key.clone(),
                    _ => return Err("a key of a map is not a text".to_owned()),
                },
                _ => return Err("a key of a map is not a text".to_owned()),
            };
            let value = self.value(depth)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

fn to_rmpv(value: &Value) -> Result<rmpv::Value, Error> {
    Ok(match value {
        Value::Null => rmpv::Value::Nil,
        Value::Bool(flag) => rmpv::Value::Boolean(*flag),
        Value::Number(number) if is_whole(number) => match (number.as_i64(), number.as_u64()) {
            (Some(signed), _) => signed.into(),
            (_, Some(unsigned)) => unsigned.into(),
            _ => return Err(Error::Encode("Integer value out of range".to_owned())),
        },
        Value::Number(number) => rmpv::Value::F64(number_float(number)),
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => {
            rmpv::Value::Array(items.iter().map(to_rmpv).collect::<Result<_, _>>()?)
        }
        Value::Object(object) => match json::tagged_bytes(object) {
            Some(bytes) => rmpv::Value::Binary(bytes),
            None => rmpv::Value::Map(
                object
                    .iter()
                    .map(|(key, item)| Ok((key.as_str().into(), to_rmpv(item)?)))
                    .collect::<Result<_, Error>>()?,
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{parse, write};
    use crate::protocol::Limits;

    #[test]
    fn every_width_is_read_back() {
        let mut values: Vec<Value> = Vec::new();
        for bits in 0..63 {
            values.extend([
                json!(1i64 << bits),
                json!(-(1i64 << bits)),
                json!((1i64 << bits) - 1),
            ]);
        }
        values.extend([
            json!(u64::MAX),
            json!(i64::MIN),
            json!(1.5),
            json!("x".repeat(70_000)),
            json!("y".repeat(200)),
        ]);
        let many: Value = (0..70_000).collect();
        let object: Value =
            Value::Object((0..20).map(|key| (key.to_string(), json!(key))).collect());
        for value in values.into_iter().chain([many, object]) {
            assert_eq!(
                parse(&write(&value).expect("writes"), &Limits::default()),
                Ok(value)
            );
        }
        assert_eq!(
            parse(&[0xca, 0x3f, 0xc0, 0, 0], &Limits::default()),
            Ok(json!(1.5))
        );
        assert_eq!(
            parse(&[0x81, 0xc4, 1, b'k', 1], &Limits::default()),
            Ok(json!({"k": 1}))
        );
    }

    #[test]
    fn damaged_or_hostile_input_is_an_error() {
        let limits = Limits {
            depth: 50,
            values: 1000,
            ..Limits::default()
        };
        for bytes in [
            &[0xdd, 0xff, 0xff, 0xff, 0xff][..],
            &[0x91; 1000],
            &[0xc1],
            &[0x01, 0x02],
            &[0xd6, 0xff, 0, 0, 0, 0],
            &[0x81, 0x01, 0x01],
            &[0xa1, 0xff],
            &[],
            &[0xc6, 0xff, 0xff, 0xff, 0xff],
        ] {
            parse(bytes, &limits).expect_err("damaged");
        }
        let mut many = vec![0xdc, 0x07, 0xd0];
        many.extend([0xc0; 2000]);
        assert!(
            parse(&many, &limits)
                .expect_err("too many")
                .contains("1000 values")
        );
    }

    #[test]
    fn an_integer_beyond_64_bits_cannot_be_written() {
        let huge = crate::protocol::json::parse(b"123456789012345678901", &Limits::default())
            .expect("valid");
        write(&huge).expect_err("out of range");
    }
}
