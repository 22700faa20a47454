//! TLS: whom the fetch believes, and that nothing is said to whom it does not.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use celeriac::git::fetch::{self, Error, Limits, Request};
use celeriac::git::http::Lookup;
use celeriac::git::url::{Policy, RepoUrl};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use secrecy::SecretString;

/// An authority nobody trusts, and a certificate for git.example.com that it signed.
const AUTHORITY: &[u8] = include_bytes!("../fixtures/tls/ca.der");
const CERTIFICATE: &[u8] = include_bytes!("../fixtures/tls/server.der");
const KEY: &[u8] = include_bytes!("../fixtures/tls/server.key.der");
const TOKEN: &str = "ghp_marker_over_tls";

type Seen = Arc<Mutex<Vec<String>>>;

/// An https server that answers everything with `head`.
fn secure_server(head: &'static str) -> (u16, Seen) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(KEY));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(CERTIFICATE)], key)
        .unwrap();
    let config = Arc::new(config);
    serve(move |stream, seen| {
        let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        answer(rustls::StreamOwned::new(connection, stream), head, seen);
    })
}

fn serve(work: impl Fn(TcpStream, &Seen) + Send + Sync + 'static) -> (u16, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            work(stream, &noted);
        }
    });
    (port, seen)
}

fn answer(stream: impl Read + Write, head: &str, seen: &Seen) {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        match reader.read_line(&mut request) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    seen.lock().unwrap().push(request);
    let text = format!("HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let _ = reader.get_mut().write_all(text.as_bytes());
    let _ = reader.get_mut().flush();
}

/// Every name leads to this machine.
fn policy(roots: &[&[u8]]) -> Policy {
    Policy {
        allow_local: true,
        roots: roots.iter().map(|der| der.to_vec()).collect(),
        lookup: Lookup::new(|_| Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST)])),
        ..Policy::default()
    }
}

fn error_of(url: &str, policy: &Policy, interrupt: &AtomicBool) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let url = RepoUrl::parse(url, policy).unwrap();
    let token = SecretString::from(TOKEN);
    let request = Request {
        url: &url,
        token: Some(&token),
        branch: None,
        depth: None,
        directory: directory.path(),
        limits: Limits::default(),
        policy,
    };
    let error = fetch::fetch(&request, &|_| {}, interrupt).unwrap_err();
    assert!(!format!("{error} {error:?}").contains(TOKEN), "{error:?}");
    error
}

#[test]
fn token_is_told_to_a_trusted_server_only() {
    let (port, seen) = secure_server("404 -");
    let go = AtomicBool::new(false);
    let url = format!("https://git.example.com:{port}/r.git");

    let error = error_of(&url, &policy(&[]), &go);
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    let other = format!("https://other.example.com:{port}/r.git");
    let error = error_of(&other, &policy(&[AUTHORITY]), &go);
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    assert!(!error.is_transient());
    assert_eq!(
        seen.lock().unwrap().len(),
        0,
        "something was said before trust"
    );

    let error = error_of(&url, &policy(&[AUTHORITY]), &go);
    assert!(
        matches!(error, Error::NotFound { status: 404, .. }),
        "{error:?}"
    );
    let head = seen.lock().unwrap()[0].to_ascii_lowercase();
    assert!(head.contains("authorization: basic"), "{head}");
}

#[test]
fn step_from_https_to_http_is_refused() {
    let (port, _) = secure_server(
        "301 -\r\nLocation: http://git.example.com:9/r.git/info/refs?service=git-upload-pack",
    );
    let url = format!("https://git.example.com:{port}/r.git");
    let error = error_of(&url, &policy(&[AUTHORITY]), &AtomicBool::new(false));
    assert!(matches!(error, Error::Redirect { .. }), "{error:?}");
}

#[test]
fn server_without_tls_is_told_nothing() {
    let (port, seen) = serve(|mut stream, _| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    let url = format!("https://git.example.com:{port}/r.git");
    let error = error_of(&url, &policy(&[AUTHORITY]), &AtomicBool::new(false));
    let expected = matches!(error, Error::Tls { .. } | Error::CutOff { .. });
    assert!(expected, "{error:?}");
    assert!(seen.lock().unwrap().is_empty());
}

#[test]
fn interrupt_ends_a_stalled_handshake() {
    let (port, _) = serve(|stream, _| {
        // Held open without a word until the test is over.
        std::mem::forget(stream);
    });
    let url = format!("https://git.example.com:{port}/r.git");
    let best = (0..5)
        .map(|_| {
            let interrupt = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let fetching = scope.spawn(|| error_of(&url, &policy(&[]), &interrupt));
                let start = Instant::now();
                interrupt.store(true, Ordering::SeqCst);
                assert!(matches!(fetching.join().unwrap(), Error::Interrupted));
                start.elapsed()
            })
        })
        .min();
    assert!(best < Some(Duration::from_secs(1)), "{best:?}");
}
