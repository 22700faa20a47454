//! TLS in front of a plain server: one request for each connection, as the git server answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::project;

/// The front; it ends with the test's process.
pub struct TlsFront {
    port: u16,
    requests: Arc<Mutex<usize>>,
}

impl TlsFront {
    /// Serves `plain` (an URL with `http`) with the certificate for 127.0.0.1 that only tests
    /// trust; see [`TlsFront::authority`].
    pub fn before(plain: &str) -> TlsFront {
        let target = url::Url::parse(plain).expect("a URL");
        let target = target.socket_addrs(|| None).expect("an address")[0];
        let fixtures = project().join("tests/fixtures/tls");
        let chain = CertificateDer::pem_file_iter(fixtures.join("loopback.pem"))
            .expect("the certificate")
            .collect::<Result<Vec<_>, _>>()
            .expect("the certificate");
        let key = PrivateKeyDer::from_pem_file(fixtures.join("loopback.key.pem")).expect("its key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("the key fits");
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let port = listener.local_addr().expect("its address").port();
        let requests = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, counted) = (Arc::clone(&config), Arc::clone(&counted));
                std::thread::spawn(move || {
                    // A client that does not trust us is what some tests want.
                    let connection = ServerConnection::new(config).expect("a connection");
                    let _ = pass(StreamOwned::new(connection, stream), target, &counted);
                });
            }
        });
        TlsFront { port, requests }
    }

    /// The same address behind TLS.
    pub fn url(&self, plain: &str) -> String {
        let mut url = url::Url::parse(plain).expect("a URL");
        url.set_scheme("https").expect("http can become https");
        url.set_port(Some(self.port)).expect("it has a host");
        url.to_string()
    }

    /// How many requests came through, that is, from clients that trusted the certificate.
    pub fn requests(&self) -> usize {
        *self.requests.lock().expect("the count")
    }

    /// The PEM file of the authority that signed the certificate.
    pub fn authority() -> std::path::PathBuf {
        project().join("tests/fixtures/tls/loopback-ca.pem")
    }
}

fn pass(
    stream: StreamOwned<ServerConnection, TcpStream>,
    target: std::net::SocketAddr,
    counted: &Mutex<usize>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if reader.read_until(b'\n', &mut head)? == 0 {
            return Ok(());
        }
    }
    *counted.lock().expect("the count") += 1;
    let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = text
        .split("content-length: ")
        .nth(1)
        .and_then(|rest| rest.split("\r\n").next()?.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut plain = TcpStream::connect(target)?;
    plain.write_all(&head)?;
    plain.write_all(&body)?;
    let secure = reader.get_mut();
    std::io::copy(&mut plain, secure)?;
    secure.conn.send_close_notify();
    secure.flush()
}
