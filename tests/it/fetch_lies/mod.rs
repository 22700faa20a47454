//! Servers that lie, stall, redirect and bomb: each gets its own error, in time, and learns nothing.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use celeriac::git::fetch::{self, Error, Limit, Limits, Request};
use celeriac::git::http::Lookup;
use celeriac::git::url::{Policy, RepoUrl};
use secrecy::SecretString;

use crate::fetch_clone::fetch_with;

const TOKEN: &str = "ghp_marker_9f8e7d6c5b4a";
const ADVERTISEMENT: &str = "application/x-git-upload-pack-advertisement";
const RESULT: &str = "application/x-git-upload-pack-result";
const ID: &str = "1111111111111111111111111111111111111111";

/// A listener on loopback that answers every request with what the script makes of its head.
struct Liar {
    address: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Liar {
    fn start(script: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        let script = Arc::new(script);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (noted, script) = (Arc::clone(&noted), Arc::clone(&script));
                std::thread::spawn(move || {
                    while let Some(head) = request(&mut stream) {
                        noted.lock().unwrap().push(head.clone());
                        script(&head, &mut stream);
                    }
                });
            }
        });
        Liar { address, seen }
    }

    fn url(&self) -> String {
        format!("http://{}/r.git", self.address)
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// Head and body of the next request.
fn request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        bytes.push(byte[0]);
    }
    let mut head = String::from_utf8_lossy(&bytes).into_owned();
    let length = head
        .to_ascii_lowercase()
        .split("content-length: ")
        .nth(1)
        .and_then(|rest| rest.split("\r\n").next()?.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    head.push_str(&String::from_utf8_lossy(&body));
    Some(head)
}

fn reply(stream: &mut TcpStream, head: &str, body: &[u8]) {
    let text = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", body.len());
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.write_all(body);
}

fn ok(stream: &mut TcpStream, kind: &str, body: &[u8]) {
    reply(stream, &format!("200 OK\r\nContent-Type: {kind}"), body);
}

fn line(content: &[u8]) -> Vec<u8> {
    let mut out = format!("{:04x}", content.len() + 4).into_bytes();
    out.extend_from_slice(content);
    out
}

fn lines(contents: &[&str]) -> Vec<u8> {
    contents
        .iter()
        .flat_map(|content| match *content {
            "0000" | "0001" | "0002" => content.as_bytes().to_vec(),
            text => line(text.as_bytes()),
        })
        .collect()
}

fn hello() -> Vec<u8> {
    lines(&[
        "# service=git-upload-pack\n",
        "0000",
        "version 2\n",
        "agent=x\n",
        "ls-refs=unborn\n",
        "fetch=shallow\n",
        "object-format=sha1\n",
        "0000",
    ])
}

fn refs() -> Vec<u8> {
    lines(&[
        &format!("{ID} HEAD symref-target:refs/heads/main\n"),
        "0000",
    ])
}

/// A server that is honest until the pack is asked for; then it sends `answer`.
fn honest_until_the_pack(answer: Vec<u8>) -> Liar {
    Liar::start(move |head, stream| {
        if head.starts_with("GET") {
            ok(stream, ADVERTISEMENT, &hello());
        } else if head.contains("command=ls-refs") {
            ok(stream, RESULT, &refs());
        } else {
            ok(stream, RESULT, &answer);
        }
    })
}

/// The answer that carries these bytes as pack.
fn as_pack(pack: &[u8]) -> Vec<u8> {
    let mut out = lines(&["packfile\n"]);
    for piece in pack.chunks(60_000) {
        out.extend(line(&[&[1], piece].concat()));
    }
    out.extend(b"0000");
    out
}

fn error_of(liar: &Liar) -> Error {
    error_with(liar, |_| {})
}

fn error_with(liar: &Liar, change: impl FnOnce(&mut Limits)) -> Error {
    let error = fetch_with(&liar.url(), Some(TOKEN), |request| {
        request.limits.read_timeout = Duration::from_secs(5);
        change(&mut request.limits);
    })
    .map(|_| ())
    .unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains(TOKEN), "{shown}");
    error
}

macro_rules! assert_error {
    ($error:expr, $pattern:pat) => {{
        let error = $error;
        assert!(matches!(error, $pattern), "{error:?}");
    }};
}

// Below the macro, which they use.
mod addresses;
mod packs;

use packs::{entry, pack};

#[test]
fn answers_that_are_no_git_servers_are_called_so() {
    for (kind, body) in [
        ("text/html; charset=utf-8", "<html>login</html>"),
        (
            "text/plain",
            "1111111111111111111111111111111111111111\trefs/heads/main\n",
        ),
        ("application/json", "{}"),
        ("", ""),
        (ADVERTISEMENT, "<html>"),
        (ADVERTISEMENT, "zzzz"),
    ] {
        let liar = Liar::start(move |_, stream| ok(stream, kind, body.as_bytes()));
        assert_error!(error_of(&liar), Error::NotGit { .. });
    }
    let liar = Liar::start(|_, stream| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n");
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    assert_error!(error_of(&liar), Error::NotGit { .. } | Error::CutOff { .. });
}

#[test]
fn broken_advertisements_are_protocol_errors() {
    for body in [
        lines(&["# service=git-receive-pack\n", "0000"]),
        lines(&["# service=git-upload-pack\n", "more\n", "0000"]),
        lines(&[
            "# service=git-upload-pack\n",
            "0000",
            "no id at all\n",
            "0000",
        ]),
        lines(&[
            "# service=git-upload-pack\n",
            "0000",
            &format!("{ID}\n"),
            "0000",
        ]),
        lines(&["version 2\n", "agent=x\n", "0000"]),
    ] {
        let liar = Liar::start(move |head, stream| match head.starts_with("GET") {
            true => ok(stream, ADVERTISEMENT, &body),
            false => ok(stream, RESULT, &lines(&["junk\n", "0000"])),
        });
        assert_error!(error_of(&liar), Error::Protocol { .. });
    }
    let liar = Liar::start(|_, stream| ok(stream, ADVERTISEMENT, &hello()[..60]));
    assert_error!(error_of(&liar), Error::CutOff { .. });
    let mut endless = lines(&["version 2\n"]);
    endless.extend((0..300).flat_map(|_| line(&[b'x'; 100])));
    let liar = Liar::start(move |_, stream| ok(stream, ADVERTISEMENT, &endless));
    assert_error!(error_of(&liar), Error::Protocol { .. });
}

#[test]
fn servers_own_words_are_cleaned_of_the_token_and_control_characters() {
    let liar = Liar::start(|head, stream| {
        let header = head
            .split("uthorization: Basic ")
            .nth(1)
            .or_else(|| head.split("uthorization: basic ").nth(1))
            .and_then(|rest| rest.split("\r\n").next())
            .unwrap_or("none");
        let text = format!("ERR go away {TOKEN} {header}\x1b[31m\n");
        ok(stream, ADVERTISEMENT, &lines(&[&text, "0000"]));
    });
    let error = error_of(&liar);
    let Error::Remote { message, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(message.starts_with("go away *** ***"), "{message}");
    assert!(!message.contains('\x1b'));
}

#[test]
fn sections_and_bands_nobody_asked_for_are_refused() {
    for answer in [
        lines(&["packfile-uris\n", "0001", "packfile\n"]),
        lines(&["bundle-uri\n", "0000"]),
        lines(&["0000"]),
        lines(&["shallow-info\n", "shallow nonsense\n", "0001", "packfile\n"]),
        lines(&["packfile\n", "\x07what\n", "0000"]),
        lines(&["packfile\n", "0001", "0000"]),
    ] {
        assert_error!(
            error_of(&honest_until_the_pack(answer)),
            Error::Protocol { .. }
        );
    }
    let fatal = lines(&["packfile\n", "\x03out of memory\n", "0000"]);
    let error = error_of(&honest_until_the_pack(fatal));
    assert!(
        error.to_string().contains("the server says: out of memory"),
        "{error}"
    );
}

#[test]
fn servers_that_stall_or_trickle_are_given_up() {
    let silent = Liar::start(|_, _| std::thread::park_timeout(Duration::from_secs(120)));
    let start = Instant::now();
    let error = error_with(&silent, |limits| {
        limits.read_timeout = Duration::from_millis(300)
    });
    assert!(error.is_transient());
    assert_error!(error, Error::Timeout { .. });
    assert!(start.elapsed() < Duration::from_secs(60));

    let trickle = Liar::start(|_, stream| {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {ADVERTISEMENT}\r\nContent-Length: 9999\r\n\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(b"0fff");
        while stream.write_all(b"x").is_ok() {
            std::thread::park_timeout(Duration::from_millis(40));
        }
    });
    let error = error_with(&trickle, |limits| {
        limits.speed_window = Duration::from_millis(500);
    });
    assert!(error.is_transient());
    assert_error!(error, Error::TooSlow { .. });

    let endless_header = Liar::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream
            .write_all(b"X-Filler: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n")
            .is_ok()
        {}
    });
    assert_error!(error_of(&endless_header), Error::NotGit { .. });

    let late = honest_until_the_pack(Vec::new());
    let error = error_with(&late, |limits| limits.total_time = Some(Duration::ZERO));
    assert_error!(error, Error::TotalTime { .. });
}

#[test]
fn lengths_that_lie_are_a_cut_connection() {
    let short = Liar::start(|_, stream| {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {ADVERTISEMENT}\r\nContent-Length: 99999\r\n\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&hello()[..50]);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    let error = error_of(&short);
    assert!(error.is_transient());
    assert_error!(error, Error::CutOff { .. });
    let chunked = Liar::start(|_, stream| {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {ADVERTISEMENT}\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    assert_error!(
        error_of(&chunked),
        Error::NotGit { .. } | Error::CutOff { .. }
    );
}

#[test]
fn endless_pack_stops_at_the_limit() {
    let endless = Liar::start(|head, stream| {
        if head.starts_with("GET") {
            return ok(stream, ADVERTISEMENT, &hello());
        }
        if head.contains("command=ls-refs") {
            return ok(stream, RESULT, &refs());
        }
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: {RESULT}\r\nConnection: close\r\n\r\n");
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&lines(&["packfile\n"]));
        // Keep-alives: a server that thinks for ever still cannot send for ever.
        let filler = line(&[2; 60_000]);
        while stream.write_all(&filler).is_ok() {}
    });
    let error = error_with(&endless, |limits| limits.max_bytes = 5_000_000);
    assert_eq!(error.limit(), Some(Limit::Bytes), "{error:?}");
}

#[test]
fn requests_carry_nothing_but_what_they_must() {
    let liar = Liar::start(|_, stream| reply(stream, "404 -", b""));
    error_of(&liar);
    let head = liar.seen()[0].to_ascii_lowercase();
    assert!(head.contains("user-agent: git/"), "{head}");
    assert!(head.contains("git-protocol: version=2"), "{head}");
    for unwanted in ["cookie", "accept-encoding: gzip", "proxy", "referer"] {
        assert!(!head.contains(unwanted), "{head}");
    }
}

#[test]
fn old_servers_that_speak_version_0_only_are_understood() {
    let error = error_of(&Liar::start(|head, stream| match head.starts_with("GET") {
        true => {
            let first =
                format!("{ID} HEAD\0side-band-64k ofs-delta symref=HEAD:refs/heads/main agent=x\n");
            ok(
                stream,
                ADVERTISEMENT,
                &lines(&[
                    "# service=git-upload-pack\n",
                    "0000",
                    &first,
                    &format!("{ID} refs/heads/main\n"),
                    "0000",
                ]),
            );
        }
        false => {
            assert!(
                head.contains(&format!("want {ID} side-band-64k ofs-delta")),
                "{head}"
            );
            let mut body = lines(&["NAK\n"]);
            let blob = entry(3, 5, b"", b"hello");
            body.extend(line(&[&[1], pack(1, &blob).as_slice()].concat()));
            body.extend(b"0000");
            ok(stream, RESULT, &body);
        }
    }));
    // The pack is read to its end; only the commit is missing from it.
    assert!(error.to_string().contains("is not in it"), "{error}");
}

#[test]
fn endless_list_of_branches_is_given_up() {
    let first = format!("{ID} HEAD\0side-band-64k\n");
    let name = format!("{ID} refs/heads/{}", "x".repeat(60_000));
    let block: Vec<u8> = line(name.as_bytes()).repeat(20);
    let liar = Liar::start(move |_, stream| {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {ADVERTISEMENT}\r\nConnection: close\r\n\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&line(first.as_bytes()));
        while stream.write_all(&block).is_ok() {}
    });
    assert_error!(error_of(&liar), Error::Protocol { .. });
}

#[test]
fn empty_repository_of_an_old_server_has_no_head() {
    let liar = Liar::start(|_, stream| {
        let null = "0".repeat(40);
        let first = format!("{null} capabilities^{{}}\0side-band-64k agent=x\n");
        let service = "# service=git-upload-pack\n";
        ok(
            stream,
            ADVERTISEMENT,
            &lines(&[service, "0000", &first, "0000"]),
        );
    });
    let (fetched, _directory) = fetch_with(&liar.url(), None, |_| {}).unwrap();
    assert_eq!(fetched.head, None);
}
