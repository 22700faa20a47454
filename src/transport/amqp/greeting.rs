//! What a server says of itself before anybody logs in.
//!
//! Lapin keeps the server's properties to itself, but RabbitMQ 4 has to be told from 3: it takes
//! a prefetch limit for a whole channel without a word and makes it one for each consumer, where
//! its administrator, or its next release, no longer permits the old one. Celery asks the version
//! for the same reason. A connection of its own is opened once for each address, and closed after
//! the greeting.

use std::time::Duration;

use futures::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use lapin::tcp::{AMQPUriTcpExt, OwnedTLSConfig};
use lapin::uri::AMQPUri;

/// What a client says first: AMQP 0-9-1.
const HEADER: &[u8] = b"AMQP\0\0\x09\x01";
/// Type, channel and size of a frame.
const FRAME_HEAD: usize = 7;
/// A greeting is a few hundred bytes long.
const LONGEST: usize = 64 * 1024;

/// RabbitMQ's major version, where the server says that it is one.
pub(super) async fn major_version(
    uri: &AMQPUri,
    tls: &OwnedTLSConfig,
    patience: Duration,
) -> Option<u32> {
    let asked = async {
        let runtime = lapin::runtime::default_runtime().ok()?;
        let connecting = uri.connect_with_config_async(tls.as_ref(), &runtime);
        let mut stream = connecting.await.ok()?;
        stream.write_all(HEADER).await.ok()?;
        stream.flush().await.ok()?;
        let greeting = frame(&mut stream).await?;
        let _ = stream.close().await;
        major(&greeting)
    };
    tokio::time::timeout(patience, asked).await.ok()?
}

/// The payload of the first frame.
async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut head = [0; FRAME_HEAD];
    stream.read_exact(&mut head).await.ok()?;
    let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    let size = usize::try_from(size).ok().filter(|size| *size <= LONGEST)?;
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload).await.ok()?;
    Some(payload)
}

/// The major version in the properties of a `connection.start`.
fn major(greeting: &[u8]) -> Option<u32> {
    if property(greeting, "product")? != "RabbitMQ" {
        return None;
    }
    property(greeting, "version")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// A text among the properties. They are not taken apart: a name with its length in front and the
/// mark of a text behind stands nowhere else.
fn property<'a>(greeting: &'a [u8], name: &str) -> Option<&'a str> {
    let mut wanted = vec![u8::try_from(name.len()).ok()?];
    wanted.extend_from_slice(name.as_bytes());
    wanted.push(b'S');
    let at = greeting
        .windows(wanted.len())
        .position(|window| window == wanted)?;
    let rest = &greeting[at + wanted.len()..];
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    std::str::from_utf8(rest.get(..length)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting(product: &str, version: &str) -> Vec<u8> {
        let mut bytes = vec![0, 10, 0, 10, 0, 9, 0, 0, 1, 0];
        for (name, text) in [
            ("cluster_name", "a@b"),
            ("product", product),
            ("version", version),
        ] {
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(b'S');
            bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    #[test]
    fn the_version_of_rabbitmq_is_read_and_nothing_else_taken_for_it() {
        assert_eq!(major(&greeting("RabbitMQ", "4.0.5")), Some(4));
        assert_eq!(major(&greeting("RabbitMQ", "3.13.7")), Some(3));
        assert_eq!(major(&greeting("Qpid", "4.0")), None);
        assert_eq!(major(&greeting("RabbitMQ", "new")), None);
        let whole = greeting("RabbitMQ", "4.0.5");
        for end in 0..whole.len() {
            // Whatever is cut off, nothing breaks.
            assert_ne!(major(&whole[..end]), Some(3));
        }
    }
}
