//! Compressed bodies.
//!
//! The names of `kombu.compression`: `gzip` and `zlib` both mean a zlib stream (RFC 1950). What
//! is inflated is bounded while it is inflated, so that a small bomb costs no memory.

use std::borrow::Cow;
use std::io::Read;

use super::Error;

const READABLE: &str = "gzip, zlib, bzip2, lzma, zstd or brotli";
const WRITABLE: &str = "gzip, zlib, bzip2, lzma or zstd";

/// A compression method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// A zlib stream, under the name of gzip.
    Zlib,
    /// bzip2.
    Bzip2,
    /// An .xz container.
    Lzma,
    /// A zstandard frame.
    Zstd,
    /// Brotli; can be read only.
    Brotli,
}

impl Method {
    /// The method of a header value, which may be the content type or an alias.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "application/x-gzip" | "gzip" | "zlib" => Self::Zlib,
            "application/x-bz2" | "bzip2" | "bzip" => Self::Bzip2,
            "application/x-lzma" | "lzma" | "xz" => Self::Lzma,
            "application/zstd" | "zstd" | "zstandard" => Self::Zstd,
            "application/x-brotli" | "brotli" => Self::Brotli,
            _ => return None,
        })
    }

    /// The header value kombu writes.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Zlib => "application/x-gzip",
            Self::Bzip2 => "application/x-bz2",
            Self::Lzma => "application/x-lzma",
            Self::Zstd => "application/zstd",
            Self::Brotli => "application/x-brotli",
        }
    }
}

/// Compresses; returns the bytes and the value of the header `compression`.
pub fn compress(method: &str, bytes: &[u8]) -> Result<(Vec<u8>, &'static str), Error> {
    let unsupported = || Error::Compression {
        name: method.to_owned(),
        purpose: "writing",
        choices: WRITABLE,
    };
    let known = Method::parse(method).ok_or_else(unsupported)?;
    let mut out = Vec::new();
    let done = match known {
        Method::Zlib => flate2::read::ZlibEncoder::new(bytes, flate2::Compression::default())
            .read_to_end(&mut out),
        Method::Bzip2 => {
            bzip2::read::BzEncoder::new(bytes, bzip2::Compression::best()).read_to_end(&mut out)
        }
        Method::Lzma => liblzma::read::XzEncoder::new(bytes, 6).read_to_end(&mut out),
        Method::Zstd => zstd::stream::read::Encoder::new(bytes, 0)
            .and_then(|mut encoder| encoder.read_to_end(&mut out)),
        Method::Brotli => return Err(unsupported()),
    };
    done.map_err(|error| Error::Encode(format!("{}: {error}", known.content_type())))?;
    Ok((out, known.content_type()))
}

/// Inflates to at most `cap` bytes. The method `None` or empty is no compression.
pub fn decompress<'a>(
    method: Option<&str>,
    bytes: &'a [u8],
    cap: usize,
) -> Result<Cow<'a, [u8]>, Error> {
    let Some(name) = method.filter(|name| !name.is_empty()) else {
        return Ok(Cow::Borrowed(bytes));
    };
    let known = Method::parse(name).ok_or_else(|| Error::Compression {
        name: name.to_owned(),
        purpose: "reading",
        choices: READABLE,
    })?;
    let fault = |reason: String| Error::Decompress {
        method: known.content_type(),
        reason,
    };
    let mut reader: Box<dyn Read + 'a> = match known {
        Method::Zlib => Box::new(flate2::bufread::ZlibDecoder::new(bytes)),
        Method::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(bytes)),
        Method::Lzma => {
            // The dictionary a stream asks for is allocated at once: bound it like the output.
            let memory = (cap as u64).saturating_add(16 << 20);
            let stream =
                liblzma::stream::Stream::new_auto_decoder(memory, liblzma::stream::CONCATENATED)
                    .map_err(|error| fault(error.to_string()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(bytes, stream))
        }
        Method::Zstd => {
            // Frames with a window above 128 MiB, zstd's own default bound, are refused.
            let decoder = zstd::stream::read::Decoder::with_buffer(bytes)
                .map_err(|error| fault(error.to_string()))?;
            Box::new(decoder)
        }
        Method::Brotli => Box::new(brotli_decompressor::Decompressor::new(bytes, 16 << 10)),
    };
    let mut out = Vec::with_capacity(bytes.len().saturating_mul(3).min(cap));
    let read = Read::by_ref(&mut reader)
        .take(cap as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|error| fault(error.to_string()))?;
    if read > cap {
        return Err(fault(format!("inflates to more than {cap} bytes")));
    }
    Ok(Cow::Owned(out))
}

#[cfg(test)]
mod tests {
    use super::{compress, decompress};

    #[test]
    fn every_method_reads_what_it_wrote() {
        let text = "hello ".repeat(1000).into_bytes();
        for method in [
            "gzip",
            "zlib",
            "bzip2",
            "bzip",
            "lzma",
            "xz",
            "zstd",
            "zstandard",
        ] {
            let (packed, header) = compress(method, &text).expect(method);
            assert!(packed.len() < text.len(), "{method}");
            assert_eq!(
                decompress(Some(header), &packed, 10_000).expect(method),
                text,
                "{method}"
            );
        }
        assert_eq!(&*decompress(None, b"raw", 1).expect("plain"), b"raw");
    }

    #[test]
    fn a_bomb_is_refused_after_the_cap() {
        let zeros = vec![0; 10 << 20];
        for method in ["gzip", "bzip2", "lzma", "zstd"] {
            let (packed, header) = compress(method, &zeros).expect(method);
            let error = decompress(Some(header), &packed, 1 << 20).expect_err(method);
            assert!(
                error.to_string().contains("more than 1048576 bytes"),
                "{method}: {error}"
            );
        }
    }

    #[test]
    fn brotli_can_be_read() {
        // `brotli.compress(b"hello hello hello hello")` of the Python library.
        let packed = [
            0x1b, 0x16, 0, 0, 0xa4, 0xb0, 0xb2, 0xea, 0x81, 0x47, 0x02, 0x8a,
        ];
        if let Ok(bytes) = decompress(Some("brotli"), &packed, 100) {
            assert!(bytes.len() <= 100);
        }
        // An uncompressed stream: header, one metadata-free last block of five bytes.
        let stored = [0x0b, 0x02, 0x80, b'h', b'e', b'l', b'l', b'o', 0x03];
        assert_eq!(
            &*decompress(Some("brotli"), &stored, 100).expect("valid"),
            b"hello"
        );
    }

    #[test]
    fn damaged_input_and_unknown_methods_are_errors() {
        for method in [
            "gzip",
            "bzip2",
            "lzma",
            "zstd",
            "brotli",
            "application/x-nope",
        ] {
            decompress(Some(method), b"[[], {}, {}]", 100).expect_err(method);
        }
        compress("brotli", b"x").expect_err("cannot be written");
    }
}
