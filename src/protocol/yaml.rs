//! YAML, written so that PyYAML reads the same values, and read with bounds.
//!
//! PyYAML speaks YAML 1.1, where a plain `yes` is true and a plain `2020-01-01` a date. What is
//! written here is therefore the flow form with every text in double quotes. What is read is
//! YAML 1.2 with PyYAML's quoting, which differs in plain scalars only: dates stay text, a text
//! such as `1e3`, which PyYAML leaves plain, becomes a number, and tags like `!!binary` are not
//! looked at. Tags of other kinds are refused; nothing is ever executed.
//!
//! Answers for `yaml.safe_dump` and `yaml.safe_load` in `kombu.serialization`.

use std::cell::Cell;
use std::fmt::{self, Write};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::{DeserializeSeed, EnumAccess, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::msgpack::{bytes_value, is_whole, number_float};
use super::{Limits, json, saferepr};

/// Writes one document.
pub(super) fn write(value: &Value) -> Vec<u8> {
    let mut out = String::new();
    write_value(&mut out, value);
    out.push('\n');
    out.into_bytes()
}

fn write_value(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) if is_whole(number) => out.push_str(number.as_str()),
        Value::Number(number) => write_float(out, number_float(number)),
        Value::String(text) => write_text(out, text),
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_value(out, item);
            }
            out.push(']');
        }
        Value::Object(object) => match json::tagged_bytes(object) {
            Some(bytes) => {
                out.push_str("!!binary ");
                write_text(out, &STANDARD.encode(bytes));
            }
            None => {
                out.push('{');
                for (index, (key, item)) in object.iter().enumerate() {
                    out.push_str(if index > 0 { ", " } else { "" });
                    // A key of more than 1024 characters needs the mark of a complex one.
                    out.push_str(if key.len() > 1000 { "? " } else { "" });
                    write_text(out, key);
                    out.push_str(": ");
                    write_value(out, item);
                }
                out.push('}');
            }
        },
    }
}

fn write_float(out: &mut String, value: f64) {
    if value.is_finite() {
        // YAML 1.1 wants a point in the mantissa.
        let text = saferepr::repr_float(value);
        match text.split_once('e') {
            Some((mantissa, exponent)) if !mantissa.contains('.') => {
                out.push_str(&format!("{mantissa}.0e{exponent}"));
            }
            _ => out.push_str(&text),
        }
    } else if value.is_nan() {
        out.push_str(".nan");
    } else {
        out.push_str(if value > 0.0 { ".inf" } else { "-.inf" });
    }
}

fn write_text(out: &mut String, text: &str) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            ' '..='~' => out.push(char),
            char if char.is_alphanumeric() => out.push(char),
            char => {
                write!(out, "\\U{:08X}", u32::from(char))
                    .expect("because writing to memory cannot fail");
            }
        }
    }
    out.push('"');
}

fn too_many_values(limits: &Limits) -> String {
    format!("more than {} values in one message", limits.values)
}

/// Reads one document.
pub(super) fn parse(body: &[u8], limits: &Limits) -> Result<Value, String> {
    // The parser takes microseconds for a token: what is allowed must not stop the process.
    let most = limits.body / 20;
    if body.len() > most {
        return Err(format!(
            "YAML body of {} bytes is larger than the limit of {most}",
            body.len()
        ));
    }
    let left = Cell::new(limits.values);
    YamlSeed { left: &left }
        .deserialize(serde_yaml_ng::Deserializer::from_slice(body))
        .map_err(|error| {
            if left.get() == 0 {
                too_many_values(limits)
            } else {
                error.to_string()
            }
        })
}

/// Builds a value while counting, so that aliases of aliases cannot multiply without end.
#[derive(Clone, Copy)]
struct YamlSeed<'a> {
    left: &'a Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for YamlSeed<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        let left = self.left.get();
        if left == 0 {
            return Err(serde::de::Error::custom("too many values"));
        }
        self.left.set(left - 1);
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for YamlSeed<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a plain YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: serde::Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        input.deserialize_any(self)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_i128<E>(self, number: i128) -> Result<Value, E> {
        Ok(Value::Number(Number::from_string_unchecked(
            number.to_string(),
        )))
    }

    fn visit_u128<E>(self, number: u128) -> Result<Value, E> {
        Ok(Value::Number(Number::from_string_unchecked(
            number.to_string(),
        )))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(json::float(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Value, E> {
        Ok(bytes_value(bytes))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = access.next_key_seed(self)? {
            // JSON's rule for keys of other types, so that {1: x} survives.
            let key = match key {
                Value::String(text) => text,
                Value::Number(number) => number.to_string(),
                Value::Bool(flag) => flag.to_string(),
                Value::Null => "null".to_owned(),
                _ => return Err(serde::de::Error::custom("found unhashable key")),
            };
            object.insert(key, access.next_value_seed(self)?);
        }
        Ok(Value::Object(object))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<Value, A::Error> {
        let (tag, _) = access.variant::<String>()?;
        let text = format!("could not determine a constructor for the tag '{tag}'");
        Err(serde::de::Error::custom(text))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{parse, write};
    use crate::protocol::Limits;

    #[test]
    fn what_python_would_take_for_something_else_is_quoted() {
        let value = json!(["yes", "2020-01-01", "1e3", "é\u{85}\u{feff}", {"on": 1e20, "b": 1.0, "c": 1.5e-7}]);
        let text = String::from_utf8(write(&value)).expect("text");
        assert_eq!(
            text,
            "[\"yes\", \"2020-01-01\", \"1e3\", \"é\\U00000085\\U0000FEFF\", {\"on\": 1.0e+20, \"b\": 1.0, \"c\": 1.5e-07}]\n"
        );
        let read = parse(text.as_bytes(), &Limits::default()).expect("valid");
        assert_eq!(
            (&read[0], &read[3], read[4]["on"].as_f64()),
            (&value[0], &value[3], Some(1e20))
        );
        let bytes = json!({"__type__": "bytes", "__value__": "x"});
        assert_eq!(write(&bytes), b"!!binary \"eA==\"\n");
    }

    #[test]
    fn yaml_of_python_is_read_and_its_dangers_are_not() {
        let limits = Limits::default();
        let text = "- - \"hi \\xE9\"\n- {}\n- callbacks: null\n  chain: null\n";
        let value = parse(text.as_bytes(), &limits).expect("valid");
        assert_eq!(
            value,
            json!([["hi é"], {}, {"callbacks": null, "chain": null}])
        );
        parse(b"[!foo 1]", &limits).expect_err("an unknown tag");
        let harmless = parse(b"!!python/object/apply:os.system ['id']", &limits);
        assert_eq!(
            harmless.expect("a list, whatever its tag says"),
            json!(["id"])
        );
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for level in 1..12 {
            let alias = format!("*a{},", level - 1).repeat(9);
            bomb.push_str(&format!("a{level}: &a{level} [{alias}]\n"));
        }
        parse(bomb.as_bytes(), &limits).expect_err("bomb");
    }
}
