//! A smart HTTP server on loopback: `git http-backend` behind a small front that can hold an
//! answer until the test opens it, ask for a token, refuse, or break off.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;

use super::repository::{self, Repository};
use super::unique;

/// The server; it ends with the test's process.
pub struct GitServer {
    address: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    routes: Mutex<HashMap<String, Route>>,
    requests: Mutex<Vec<Request>>,
}

#[derive(Clone)]
struct Route {
    work_tree: PathBuf,
    manner: Manner,
}

#[derive(Clone)]
enum Manner {
    Open,
    Gated(Gate, Option<String>),
    Token(String),
    Status(u16),
    CutAfter(usize),
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET` or `POST`.
    pub method: String,
    /// With the query.
    pub target: String,
    /// The headers, names in lower case.
    pub headers: HashMap<String, String>,
    /// What was sent with it.
    pub body: Vec<u8>,
}

impl Request {
    /// Whether the text stands in what was sent.
    pub fn body_has(&self, text: &str) -> bool {
        self.body
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }
}

/// Holds every answer of one URL until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    open: bool,
    arrived: usize,
}

impl Gate {
    /// Waits until `count` requests in all have arrived.
    #[track_caller]
    pub fn wait_arrivals(&self, count: usize) {
        let (state, changed) = &*self.0;
        let state = state.lock().expect("the gate");
        let (state, _) = changed
            .wait_timeout_while(state, Duration::from_secs(60), |state| {
                state.arrived < count
            })
            .expect("the gate");
        assert!(
            state.arrived >= count,
            "{} of {count} requests reached the git server within a minute",
            state.arrived
        );
    }

    /// How many requests have arrived so far.
    pub fn arrivals(&self) -> usize {
        self.0.0.lock().expect("the gate").arrived
    }

    /// Lets all requests through, those that wait and those to come.
    pub fn open(&self) {
        let (state, changed) = &*self.0;
        state.lock().expect("the gate").open = true;
        changed.notify_all();
    }

    fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().expect("the gate");
        state.arrived += 1;
        changed.notify_all();
        drop(
            changed
                .wait_timeout_while(state, Duration::from_secs(120), |state| !state.open)
                .expect("the gate"),
        );
    }
}

impl GitServer {
    /// Listens on a free loopback port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("its address").to_string();
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&served);
                // A client that goes away in the middle is what some tests do.
                std::thread::spawn(move || drop(serve(&stream, &shared)));
            }
        });
        Self { address, shared }
    }

    /// A URL without conditions.
    pub fn open(&self, repository: &Repository) -> String {
        self.route(repository, Manner::Open)
    }

    /// A URL whose answers wait until the gate is opened.
    pub fn gated(&self, repository: &Repository) -> (String, Gate) {
        let gate = Gate::default();
        (
            self.route(repository, Manner::Gated(gate.clone(), None)),
            gate,
        )
    }

    /// A URL whose answers wait until the gate is opened, and then want the token.
    pub fn gated_with_token(&self, repository: &Repository, token: &str) -> (String, Gate) {
        let gate = Gate::default();
        let manner = Manner::Gated(gate.clone(), Some(token.to_owned()));
        (self.route(repository, manner), gate)
    }

    /// A URL that wants the token by Basic authentication, as user or as password.
    pub fn with_token(&self, repository: &Repository, token: &str) -> String {
        self.route(repository, Manner::Token(token.to_owned()))
    }

    /// A URL that answers everything with this status.
    pub fn refusing(&self, repository: &Repository, status: u16) -> String {
        self.route(repository, Manner::Status(status))
    }

    /// A URL that breaks the connection after so many bytes of the pack's answer.
    pub fn cutting(&self, repository: &Repository, bytes: usize) -> String {
        self.route(repository, Manner::CutAfter(bytes))
    }

    /// Everything asked so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().expect("the requests").clone()
    }

    fn route(&self, repository: &Repository, manner: Manner) -> String {
        let name = unique("r");
        let route = Route {
            work_tree: repository.path().to_owned(),
            manner,
        };
        self.shared
            .routes
            .lock()
            .expect("the routes")
            .insert(name.clone(), route);
        format!("http://{}/{name}.git", self.address)
    }
}

fn serve(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if reader.read_until(b'\n', &mut head)? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let mut request = Request {
        method: words.next().unwrap_or_default().to_owned(),
        target: words.next().unwrap_or_default().to_owned(),
        headers: lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect(),
        body: Vec::new(),
    };
    if request.headers.contains_key("expect") {
        (&*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let body = read_body(&mut reader, &request.headers)?;
    request.body.clone_from(&body);
    shared
        .requests
        .lock()
        .expect("the requests")
        .push(request.clone());

    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let mut parts = path.trim_start_matches('/').splitn(2, ".git/");
    let name = parts.next().unwrap_or_default();
    let rest = parts.next().unwrap_or_default();
    let route = shared.routes.lock().expect("the routes").get(name).cloned();
    let Some(route) = route else {
        return reply(stream, 404, "", &[], usize::MAX);
    };
    let mut limit = usize::MAX;
    match &route.manner {
        Manner::Open => {}
        Manner::Gated(gate, _) => gate.pass(),
        Manner::Token(_) => {}
        Manner::Status(status) => return reply(stream, *status, "", &[], limit),
        Manner::CutAfter(bytes) if request.method == "POST" => limit = *bytes,
        Manner::CutAfter(_) => {}
    }
    if let Manner::Token(token) | Manner::Gated(_, Some(token)) = &route.manner
        && !offers(&request, token)
    {
        let asks = "WWW-Authenticate: Basic realm=\"git\"\r\n";
        return reply(stream, 401, asks, &[], limit);
    }

    let header = |name: &str| request.headers.get(name).map_or("", String::as_str);
    let mut backend = repository::command(&route.work_tree)
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", &route.work_tree)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("PATH_INFO", format!("/.git/{rest}"))
        .env("QUERY_STRING", query)
        .env("REQUEST_METHOD", &request.method)
        .env("REMOTE_ADDR", "127.0.0.1")
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("GIT_PROTOCOL", header("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = backend.stdin.take().expect("stdin is piped");
    let writer = std::thread::spawn(move || input.write_all(&body));
    let output = backend.wait_with_output()?.stdout;
    let _ = writer.join();
    let split = output
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap_or(output.len());
    let (head, content) = output.split_at(split);
    let mut status = 200;
    let mut headers = String::new();
    for line in String::from_utf8_lossy(head).split("\r\n") {
        match line.strip_prefix("Status: ") {
            Some(value) => status = value[..3].parse().unwrap_or(500),
            None => headers.push_str(&format!("{line}\r\n")),
        }
    }
    reply(
        stream,
        status,
        &headers,
        content.get(4..).unwrap_or_default(),
        limit,
    )
}

fn reply(
    mut stream: &TcpStream,
    status: u16,
    headers: &str,
    content: &[u8],
    limit: usize,
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status} -\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        content.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(&content[..content.len().min(limit)])
}

fn read_body(
    reader: &mut impl BufRead,
    headers: &HashMap<String, String>,
) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if headers
        .get("transfer-encoding")
        .is_some_and(|value| value == "chunked")
    {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let size = line.trim().split(';').next().unwrap_or_default();
            let size = u64::from_str_radix(size, 16).map_err(std::io::Error::other)?;
            reader.take(size).read_to_end(&mut body)?;
            reader.read_line(&mut line)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    let length = headers
        .get("content-length")
        .and_then(|value| value.parse().ok());
    reader.take(length.unwrap_or(0)).read_to_end(&mut body)?;
    Ok(body)
}

fn offers(request: &Request, token: &str) -> bool {
    let Some(credentials) = request
        .headers
        .get("authorization")
        .and_then(|value| value.strip_prefix("Basic "))
        .and_then(|value| base64::engine::general_purpose::STANDARD.decode(value).ok())
    else {
        return false;
    };
    let credentials = String::from_utf8_lossy(&credentials);
    credentials.split(':').any(|part| part == token)
}

/// Waits until the server has seen a request the test looks for.
#[track_caller]
pub fn wait_request(server: &GitServer, what: &str, wanted: impl Fn(&Request) -> bool) -> Request {
    let start = Instant::now();
    super::wait_for(
        what,
        Duration::from_secs(30).saturating_sub(start.elapsed()),
        || {
            server
                .requests()
                .into_iter()
                .find(|request| wanted(request))
        },
    )
}
