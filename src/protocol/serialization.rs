//! Bodies to values and back: JSON, msgpack and YAML, and which of them are accepted.
//!
//! Values of types JSON lacks are kombu's tagged objects (`{"__type__": "bytes", …}`), also
//! where msgpack has a type of its own. Pickle is refused by name: its decoder runs code.
//!
//! Answers for `kombu.serialization`, with its error texts where clients or logs show them.

use serde_json::Value;

use super::{Error, Limits, json, msgpack, yaml};

/// A way to write values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Serializer {
    /// `application/json`.
    Json,
    /// `application/x-msgpack`.
    Msgpack,
    /// `application/x-yaml`.
    Yaml,
}

/// A value that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The bytes.
    pub body: Vec<u8>,
    /// MIME type for the envelope.
    pub content_type: &'static str,
    /// Encoding for the envelope.
    pub content_encoding: &'static str,
}

/// The content types that are decoded; all others are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept(Vec<Serializer>);

impl Default for Accept {
    /// JSON alone, as Celery has it.
    fn default() -> Self {
        Self(vec![Serializer::Json])
    }
}

impl Accept {
    /// Reads a list such as `json,msgpack`; MIME types are names too.
    pub fn parse(list: &str) -> Result<Self, Error> {
        Self::from_names(list.split([',', ' ']).filter(|name| !name.is_empty()))
    }

    /// The same from separate names.
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let accepted = names
            .into_iter()
            .map(Serializer::parse)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self(accepted))
    }

    /// Whether a content type may be decoded.
    pub fn allows(&self, serializer: Serializer) -> bool {
        self.0.contains(&serializer)
    }

    /// The names, for reports.
    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|serializer| serializer.name()).collect()
    }
}

impl Serializer {
    /// The serializer of a name or MIME type, with or without surrounding quotes or spaces.
    pub fn parse(name: &str) -> Result<Self, Error> {
        match name.trim() {
            "json" | "application/json" => Ok(Self::Json),
            "msgpack" | "application/x-msgpack" => Ok(Self::Msgpack),
            "yaml" | "application/x-yaml" => Ok(Self::Yaml),
            other => Err(Error::Serializer {
                name: other.to_owned(),
                reason: match other {
                    "pickle" | "application/x-python-serialize" | "application/x-python" => {
                        "runs code of whoever sends a message and is not supported"
                    }
                    _ => "is not known",
                },
            }),
        }
    }

    /// The short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Msgpack => "msgpack",
            Self::Yaml => "yaml",
        }
    }

    /// The MIME type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Msgpack => "application/x-msgpack",
            Self::Yaml => "application/x-yaml",
        }
    }

    /// `utf-8` or `binary`.
    pub fn content_encoding(self) -> &'static str {
        match self {
            Self::Json | Self::Yaml => "utf-8",
            Self::Msgpack => "binary",
        }
    }

    /// Writes a value.
    pub fn encode(self, value: &Value) -> Result<Encoded, Error> {
        let body = match self {
            Self::Json => serde_json::to_vec(value).map_err(|e| Error::Encode(e.to_string()))?,
            Self::Msgpack => msgpack::write(value)?,
            Self::Yaml => yaml::write(value),
        };
        Ok(Encoded {
            body,
            content_type: self.content_type(),
            content_encoding: self.content_encoding(),
        })
    }

    /// Reads a value.
    pub fn decode(self, body: &[u8], limits: &Limits) -> Result<Value, Error> {
        if body.len() > limits.body {
            return Err(Error::Decode(format!(
                "body of {} bytes is larger than the limit of {}",
                body.len(),
                limits.body
            )));
        }
        match self {
            Self::Json => json::parse(body, limits),
            Self::Msgpack => msgpack::parse(body, limits),
            Self::Yaml => yaml::parse(body, limits),
        }
        .map_err(Error::Decode)
    }
}

/// Decodes a body as its content type says, if that is accepted.
///
/// A body without content type, or of one that is raw by name, is no value: an error.
pub fn decode(
    content_type: Option<&str>,
    body: &[u8],
    accept: &Accept,
    limits: &Limits,
) -> Result<Value, Error> {
    let name = content_type
        .filter(|name| !name.is_empty())
        .unwrap_or("application/data");
    let known = [Serializer::Json, Serializer::Msgpack, Serializer::Yaml]
        .into_iter()
        .find(|serializer| serializer.content_type() == name);
    match known {
        Some(serializer) if accept.allows(serializer) => {
            if body.is_empty() {
                return Err(Error::Decode("the body is empty".to_owned()));
            }
            serializer.decode(body, limits)
        }
        None if matches!(name, "application/data" | "application/text") => Err(Error::Decode(
            format!("content of type {name} is raw data, not a message"),
        )),
        _ => Err(Error::Refused(name.to_owned())),
    }
}

/// A content type as kombu names it in errors: alias first, then the type in parentheses.
pub(super) fn parenthesize(content_type: &str) -> String {
    let alias = match content_type {
        "application/json" => "json",
        "application/x-msgpack" => "msgpack",
        "application/x-yaml" => "yaml",
        "application/x-python-serialize" => "pickle",
        other => other,
    };
    format!("{alias} ({content_type})")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Accept, Serializer, decode};
    use crate::protocol::Limits;

    const ALL: [Serializer; 3] = [Serializer::Json, Serializer::Msgpack, Serializer::Yaml];

    fn all() -> Accept {
        Accept::parse("json, application/x-msgpack,yaml").expect("known names")
    }

    #[test]
    fn every_serializer_reads_what_it_wrote() {
        let value = json!([["hi é", 1, -2, 1.5, null, true, "yes", "1", ""], {"a": {"b": []}}, u64::MAX,
            {"__type__": "bytes", "__value__": "raw"}, {"__type__": "base64", "__value__": "/wA="}]);
        for serializer in ALL {
            // The YAML reader does not look at tags, so bytes come back as base64 text there.
            let mut value = value.clone();
            if serializer == Serializer::Yaml {
                value.as_array_mut().expect("array").truncate(3);
            }
            let encoded = serializer.encode(&value).expect("encodes");
            let read = decode(
                Some(encoded.content_type),
                &encoded.body,
                &all(),
                &Limits::default(),
            );
            assert_eq!(read, Ok(value), "{}", serializer.name());
        }
    }

    #[test]
    fn numbers_that_are_not_finite_survive() {
        let value = crate::protocol::json::parse(b"[NaN, Infinity, -Infinity]", &Limits::default())
            .expect("valid");
        for serializer in ALL {
            let encoded = serializer.encode(&value).expect("encodes");
            let read = serializer
                .decode(&encoded.body, &Limits::default())
                .expect("reads");
            assert_eq!(
                read.to_string(),
                "[NaN,Infinity,-Infinity]",
                "{}",
                serializer.name()
            );
        }
    }

    #[test]
    fn only_accepted_content_is_decoded() {
        let limits = Limits::default();
        for (content_type, expected) in [
            (
                "application/x-python-serialize",
                "pickle (application/x-python-serialize)",
            ),
            ("application/x-foo", "application/x-foo (application/x-foo)"),
            ("text/plain", "text/plain (text/plain)"),
            ("application/x-yaml", "yaml (application/x-yaml)"),
        ] {
            let error =
                decode(Some(content_type), b"[]", &Accept::default(), &limits).expect_err(expected);
            assert_eq!(
                error.to_string(),
                format!("Refusing to deserialize untrusted content of type {expected}")
            );
        }
        decode(None, b"[]", &all(), &limits).expect_err("raw data");
        decode(Some("application/json"), b"", &all(), &limits).expect_err("empty");
    }

    #[test]
    fn the_accept_list_refuses_pickle_and_unknown_names() {
        let error = Accept::parse("json,pickle")
            .expect_err("pickle")
            .to_string();
        assert!(
            error.contains("runs code") && error.contains("json, msgpack or yaml"),
            "{error}"
        );
        Accept::parse("xml").expect_err("unknown");
        assert_eq!(all().names(), ["json", "msgpack", "yaml"]);
        assert!(
            !Accept::parse("")
                .expect("an empty list accepts nothing")
                .allows(Serializer::Json)
        );
    }
}
