//! The HTTP client underneath a fetch, and its policy.
//!
//! Owns what a stranger's server must not be able to do: lead us to a private address (by name, by
//! literal, by redirect), receive a token that is not for it, hold a connection for ever, or send without
//! end. Knows nothing of git. One [`Client`] serves one fetch, because the pinned addresses, the counters
//! and the token belong to it. HTTP/1.1 with keep-alive, TLS by rustls with Mozilla's roots; no proxy, no
//! cookies, no compression, no environment variable.
//!
//! * [`address`]: which addresses are public
//! * `connect`: name → judged and pinned addresses → watched socket
//! * [`watch`]: time, speed and size of the whole fetch

pub mod address;
mod connect;
pub mod watch;

use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret as _, SecretString};
use ureq::unversioned::transport::{Connector as _, RustlsConnector};

pub use connect::Lookup;
use watch::{Cause, Watch};

use crate::git::url::{self, Policy, RepoUrl};

/// Redirects that are followed before giving up.
const MAX_REDIRECTS: usize = 5;

/// What the servers are told about us. GitHub and others serve smart HTTP to agents that begin so.
const USER_AGENT: &str = concat!("git/2.45.0 celeriac/", env!("CARGO_PKG_VERSION"));

/// What can go wrong between us and a server. No text holds a token or a byte a server chose, but for
/// host names.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Stopped from our side.
    #[error("stopped: {0:?}")]
    Stopped(Cause),
    /// A name leads to an address that is not fetched from.
    #[error("{host} leads to {address}, a {class} address; only public servers are fetched from")]
    NotPublic {
        /// The name.
        host: String,
        /// One of its addresses.
        address: IpAddr,
        /// What kind it is.
        class: &'static str,
    },
    /// A public server over plain http while only private ones may be asked so.
    #[error("plain http is not allowed for {0}; use https://")]
    PlainHttp(String),
    /// The name server knows no such name, or gave no answer.
    #[error("the host {host} cannot be found ({detail}); check the spelling and the network")]
    HostNotFound {
        /// The name.
        host: String,
        /// The system's words.
        detail: String,
    },
    /// No address of the host accepted a connection.
    #[error("{host} cannot be reached ({detail}); check the address and the network")]
    Connect {
        /// The name.
        host: String,
        /// The system's words.
        detail: String,
    },
    /// Time ran out before there was a connection.
    #[error("no answer while {0} for {1:?}")]
    Timeout(&'static str, Duration),
    /// The certificate or the TLS handshake.
    #[error(
        "no secure connection: {0}; check the server's certificate, or name its authority in REPO_CA_FILE"
    )]
    Tls(String),
    /// The connection ended too early.
    #[error("the connection was cut ({0})")]
    CutOff(String),
    /// Not HTTP, or broken HTTP.
    #[error("the answer is not proper HTTP: {0}")]
    Protocol(String),
    /// A redirect that is not followed.
    #[error("the server redirects {0}")]
    Redirect(String),
    /// A redirect to where nothing is fetched from.
    #[error("the server redirects to an address that is not allowed: {0}")]
    RedirectRefused(url::Error),
    /// The system gave no thread.
    #[error("no thread could be started: {0}")]
    Thread(String),
}

/// An answer whose body has not been read.
pub struct Response {
    /// The status code.
    pub status: u16,
    /// `Content-Type`, or empty.
    pub content_type: String,
    /// `Retry-After` in seconds, where the server names it so.
    pub retry_after: Option<u64>,
    location: Option<String>,
    body: ureq::BodyReader<'static>,
}

impl Read for Response {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.body.read(buffer)
    }
}

/// The client of one fetch.
pub struct Client {
    agent: ureq::Agent,
    policy: Policy,
    watch: Arc<Watch>,
    credentials: Option<Credentials>,
}

/// A token and the one origin it is for.
struct Credentials {
    origin: ::url::Url,
    header: SecretString,
}

impl Client {
    /// A client that sends `token` to the origin of `url` and to nobody else.
    pub fn new(
        url: &RepoUrl,
        token: Option<&SecretString>,
        policy: &Policy,
        watch: &Arc<Watch>,
        connect_timeout: Duration,
    ) -> Client {
        let config = ureq::config::Config::builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls(policy))
            .user_agent(USER_AGENT)
            .accept("*/*")
            .max_response_header_size(32 * 1024)
            .input_buffer_size(256 * 1024)
            .output_buffer_size(16 * 1024)
            .max_idle_connections(4)
            .build();
        let connector = connect::WatchedConnector {
            watch: Arc::clone(watch),
            timeout: connect_timeout,
        }
        .chain(RustlsConnector::default());
        let resolver =
            connect::PinnedResolver::new(policy.clone(), Arc::clone(watch), connect_timeout);
        let credentials = url.http().zip(token).and_then(|(url, token)| {
            let token = token.expose_secret();
            (!token.is_empty()).then(|| Credentials {
                origin: url.clone(),
                header: basic(token),
            })
        });
        Client {
            agent: ureq::Agent::with_parts(config, connector, resolver),
            policy: policy.clone(),
            watch: Arc::clone(watch),
            credentials,
        }
    }

    /// Whether a request to this address carries the token.
    pub fn sends_token_to(&self, url: &::url::Url) -> bool {
        self.credentials
            .as_ref()
            .is_some_and(|credentials| may_carry(&credentials.origin, url))
    }

    /// Asks for `base` + `tail` and follows redirects that keep the tail, each judged as if the user had
    /// sent it. Returns the base that answered.
    pub fn get(
        &self,
        base: &::url::Url,
        tail: &str,
        headers: &[(&str, &str)],
    ) -> Result<(::url::Url, Response), Error> {
        let mut base = base.clone();
        for _ in 0..=MAX_REDIRECTS {
            let target = joined(&base, tail);
            let mut request = self.agent.get(target.as_str());
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(header) = self.authorization(&target) {
                request = request.header("Authorization", header.expose_secret());
            }
            let response = self.answered(request.call())?;
            if !(300..400).contains(&response.status) {
                return Ok((base, response));
            }
            base = self.redirected(&target, tail, &response)?;
        }
        Err(Error::Redirect(format!("more than {MAX_REDIRECTS} times")))
    }

    /// Sends `body` to `base` + `tail`. A redirect is an error: git servers redirect the first request.
    pub fn post(
        &self,
        base: &::url::Url,
        tail: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Response, Error> {
        let target = joined(base, tail);
        let mut request = self.agent.post(target.as_str());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(header) = self.authorization(&target) {
            request = request.header("Authorization", header.expose_secret());
        }
        let response = self.answered(request.send(body))?;
        if (300..400).contains(&response.status) {
            return Err(Error::Redirect(
                "in the middle of the conversation".to_owned(),
            ));
        }
        Ok(response)
    }

    /// The reason why a read of a body failed.
    pub fn read_error(&self, source: &io::Error) -> Error {
        if let Some(cause) = self.watch.cause() {
            return Error::Stopped(cause.clone());
        }
        match source
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<ureq::Error>())
        {
            Some(ureq::Error::Protocol(detail)) => Error::Protocol(detail.to_string()),
            Some(other) => Error::CutOff(other.to_string()),
            None => Error::CutOff(source.to_string()),
        }
    }

    fn authorization(&self, target: &::url::Url) -> Option<&SecretString> {
        self.credentials
            .as_ref()
            .filter(|credentials| may_carry(&credentials.origin, target))
            .map(|credentials| &credentials.header)
    }

    fn answered(
        &self,
        result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Response, Error> {
        let response = result.map_err(|error| self.incoming(error))?;
        let (head, body) = response.into_parts();
        let header = |name: &str| {
            let value = head.headers.get(name)?.to_str().ok()?;
            Some(value.trim().to_owned())
        };
        Ok(Response {
            status: head.status.as_u16(),
            content_type: header("content-type").unwrap_or_default(),
            retry_after: header("retry-after").and_then(|value| value.parse().ok()),
            location: header("location"),
            body: body.into_reader(),
        })
    }

    /// What ureq says, in our words.
    fn incoming(&self, error: ureq::Error) -> Error {
        if let Some(cause) = self.watch.cause() {
            return Error::Stopped(cause.clone());
        }
        match error {
            ureq::Error::Other(inner) => match inner.downcast::<Error>() {
                Ok(ours) => *ours,
                Err(other) => Error::CutOff(other.to_string()),
            },
            ureq::Error::Rustls(detail) => Error::Tls(detail.to_string()),
            ureq::Error::Tls(detail) => Error::Tls(detail.to_owned()),
            ureq::Error::Io(source) => {
                match source
                    .get_ref()
                    .and_then(|inner| inner.downcast_ref::<rustls::Error>())
                {
                    Some(detail) => Error::Tls(detail.to_string()),
                    None => Error::CutOff(source.to_string()),
                }
            }
            ureq::Error::LargeResponseHeader(..) => {
                Error::Protocol("its header is too large".to_owned())
            }
            ureq::Error::Protocol(detail) => Error::Protocol(detail.to_string()),
            ureq::Error::Http(detail) => Error::Protocol(detail.to_string()),
            other => Error::CutOff(other.to_string()),
        }
    }

    /// The base a redirect leads to.
    fn redirected(
        &self,
        from: &::url::Url,
        tail: &str,
        response: &Response,
    ) -> Result<::url::Url, Error> {
        if !matches!(response.status, 301 | 302 | 303 | 307 | 308) {
            return Err(Error::Redirect(format!("with status {}", response.status)));
        }
        let location = response
            .location
            .as_deref()
            .ok_or_else(|| Error::Redirect("without saying where to".to_owned()))?;
        let target = from
            .join(location)
            .map_err(|_| Error::Redirect("to something that is no address".to_owned()))?;
        if from.scheme() == "https" && target.scheme() != "https" {
            return Err(Error::Redirect(
                "from https to an unprotected address".to_owned(),
            ));
        }
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        let base_path = target
            .path()
            .strip_suffix(path)
            .filter(|_| target.query().unwrap_or_default() == query)
            .and_then(|path| path.strip_suffix('/'))
            .ok_or_else(|| {
                Error::Redirect("to a page that is not the same part of a repository".to_owned())
            })?;
        let mut base = target.clone();
        base.set_path(base_path);
        base.set_query(None);
        if target.scheme() != "http" && target.scheme() != "https" {
            return Err(Error::RedirectRefused(url::Error::Scheme("…".to_owned())));
        }
        let judged = RepoUrl::parse(base.as_str(), &self.policy).map_err(Error::RedirectRefused)?;
        match judged.http() {
            // The address as the server spelled it: a forge's own redirect is never ours to improve.
            Some(_) => Ok(base),
            None => Err(Error::RedirectRefused(url::Error::Local)),
        }
    }
}

/// Mozilla's authorities, or those of the policy.
fn tls(policy: &Policy) -> ureq::tls::TlsConfig {
    let config = ureq::tls::TlsConfig::builder();
    if policy.roots.is_empty() {
        return config.build();
    }
    let roots: Vec<_> = policy
        .roots
        .iter()
        .map(|der| ureq::tls::Certificate::from_der(der).to_owned())
        .collect();
    config
        .root_certs(ureq::tls::RootCerts::new_with_certs(&roots))
        .build()
}

/// The certificates of a PEM file in the form of [`Policy::roots`]; nothing when it is broken.
pub fn certificates(pem: &[u8]) -> Option<Vec<Vec<u8>>> {
    ureq::tls::parse_pem(pem)
        .map(|item| match item.ok()? {
            ureq::tls::PemItem::Certificate(certificate) => Some(certificate.der().to_vec()),
            _ => None,
        })
        .collect()
}

/// `base` with the tail appended; the tail's `?` begins the query.
fn joined(base: &::url::Url, tail: &str) -> ::url::Url {
    let (path, query) = match tail.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (tail, None),
    };
    let mut target = base.clone();
    target.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
    target.set_query(query);
    target
}

/// A token goes to its own host only: same port too, but for the step from http to https.
fn may_carry(origin: &::url::Url, target: &::url::Url) -> bool {
    let same_host = origin.host() == target.host();
    match (origin.scheme(), target.scheme()) {
        (a, b) if a == b => {
            same_host && origin.port_or_known_default() == target.port_or_known_default()
        }
        ("http", "https") => same_host && origin.port().is_none() && target.port().is_none(),
        _ => false,
    }
}

/// Basic authorization as GitHub, GitLab and others take a token: any user name, token as password.
fn basic(token: &str) -> SecretString {
    let pair = Zeroizing::new(format!("x-access-token:{token}"));
    let encoded = base64::engine::general_purpose::STANDARD.encode(pair.as_bytes());
    let encoded = Zeroizing::new(encoded);
    SecretString::from(format!("Basic {}", *encoded))
}
