//! Documents to bytes and back: `result_serializer` and `result_compression`.
//!
//! A compressed document says so itself: a marker, the method's content type and a zero byte
//! stand before it, so that it can be read whatever the reader's setting is (Celery 5.7).
//! Answers for `encode` and `decode` of `celery/backends/base.py`.

use serde_json::Value;

use super::error::Error;
use crate::protocol::Limits;
use crate::protocol::compression::{Method, compress, decompress};
use crate::protocol::serialization::{Encoded, Serializer};

/// What a compressed document begins with.
const MARKER: &[u8] = b"\0celery-compressed\0";

/// Results come from our own tasks and from peers that share the backend: the bounds only
/// keep one record from taking all memory.
const LIMITS: Limits = Limits {
    body: 512 << 20,
    depth: 1000,
    values: 16_000_000,
};

/// How documents are written.
#[derive(Debug, Clone)]
pub struct Codec {
    serializer: Serializer,
    compression: Option<String>,
}

impl Codec {
    /// The codec for `result_serializer` and `result_compression`.
    pub fn new(serializer: &str, compression: Option<&str>) -> Result<Self, Error> {
        let serializer = Serializer::parse(serializer)
            .map_err(|error| Error::Url(format!("result_serializer: {error}")))?;
        let compression = compression.filter(|method| !method.is_empty());
        if let Some(method) = compression {
            compress(method, b"")
                .map_err(|error| Error::Url(format!("result_compression: {error}")))?;
        }
        Ok(Self {
            serializer,
            compression: compression.map(str::to_owned),
        })
    }

    /// The bytes to be stored.
    pub fn encode(&self, document: &Value) -> Result<Vec<u8>, Error> {
        let body = self.encode_message(document)?.body;
        let Some(method) = &self.compression else {
            return Ok(body);
        };
        let (body, content_type) =
            compress(method, &body).map_err(|error| Error::Encode(error.to_string()))?;
        let mut bytes = Vec::with_capacity(MARKER.len() + content_type.len() + 1 + body.len());
        bytes.extend_from_slice(MARKER);
        bytes.extend_from_slice(content_type.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// The same without compression, and what it is, for a message.
    pub fn encode_message(&self, document: &Value) -> Result<Encoded, Error> {
        self.serializer
            .encode(document)
            .map_err(|error| Error::Encode(error.to_string()))
    }

    /// Reads stored bytes; `what` is named in the error.
    pub fn decode(&self, what: &str, bytes: &[u8]) -> Result<Value, Error> {
        let failed = |reason: String| Error::Decode {
            what: what.to_owned(),
            reason,
        };
        let Some(rest) = bytes.strip_prefix(MARKER) else {
            return self
                .serializer
                .decode(bytes, &LIMITS)
                .map_err(|error| failed(error.to_string()));
        };
        let end = rest.iter().position(|byte| *byte == 0);
        let end = end.ok_or_else(|| failed("the compression has no name".to_owned()))?;
        let method = std::str::from_utf8(&rest[..end])
            .ok()
            .filter(|method| Method::parse(method).is_some())
            .ok_or_else(|| failed("its compression is not known".to_owned()))?;
        let body = decompress(Some(method), &rest[end + 1..], LIMITS.body)
            .map_err(|error| failed(error.to_string()))?;
        self.serializer
            .decode(&body, &LIMITS)
            .map_err(|error| failed(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::json;

    /// Written by Celery 5.7 with `result_compression='gzip'`.
    const GZIP: &str = "AGNlbGVyeS1jb21wcmVzc2VkAGFwcGxpY2F0aW9uL3gtZ3ppcAB4nL2OQQqDMBBFryLZtimTGFPNVjyB7aoUiZMBxaBgIhRK796kh+gwm3l85v03C9HGIzBTsP7etl3fs3PBdgqHjxkSTpspXn+Y7I27RRotLkm9Ht4nhNPs3U5rIo9nup2NNLhtpdxOgtRcCC7lTZZGpRUXXV3LBk4ABuD304ZlmF2O1+gIBVVcgEaurJa8QW25G0GRatyoZc0+X222X5I=";

    #[test]
    fn a_document_that_celery_compressed_is_read() {
        let bytes = STANDARD.decode(GZIP).unwrap();
        let document = Codec::new("json", None)
            .unwrap()
            .decode("t", &bytes)
            .unwrap();
        assert_eq!(document["status"], "SUCCESS");
    }

    #[test]
    fn every_serializer_and_compression_reads_what_it_wrote() {
        let document = json!({"status": "SUCCESS", "result": {"é": [1, 2.5, null, "x"]}});
        for serializer in ["json", "msgpack", "yaml"] {
            for method in [
                None,
                Some("gzip"),
                Some("bzip2"),
                Some("zstd"),
                Some("lzma"),
            ] {
                let codec = Codec::new(serializer, method).unwrap();
                let bytes = codec.encode(&document).unwrap();
                assert_eq!(bytes.starts_with(MARKER), method.is_some());
                assert_eq!(
                    codec.decode("t", &bytes).unwrap(),
                    document,
                    "{serializer} {method:?}"
                );
            }
        }
    }

    #[test]
    fn a_setting_that_cannot_be_honoured_is_an_error_that_names_it() {
        let error = Codec::new("pickle", None).unwrap_err().to_string();
        assert!(error.contains("result_serializer"), "{error}");
        let error = Codec::new("json", Some("brotli")).unwrap_err().to_string();
        assert!(error.contains("result_compression"), "{error}");
    }

    #[test]
    fn damaged_bytes_are_an_error_and_never_a_panic() {
        let codec = Codec::new("json", None).unwrap();
        let good = STANDARD.decode(GZIP).unwrap();
        for end in 0..good.len() {
            assert!(codec.decode("t", &good[..end]).is_err());
        }
    }
}
