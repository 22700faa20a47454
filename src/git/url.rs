//! What may be fetched: the URL a user sends, judged before anything is asked of a network.
//!
//! Owns [`RepoUrl`]; the rules are those of a [`Policy`]. A `RepoUrl` that exists has passed every check that needs no name
//! server: scheme, spelling, host, port, allow-list and literal addresses. The addresses a name leads to
//! are judged by [`crate::git::http`], with the same policy, at the moment of connecting.
//!
//! Everything unusual is refused rather than repaired: a URL comes from a stranger, and two readers that
//! repair it differently are how checks are walked around. The two repairs made are the ones people
//! need when they copy an address from GitHub's page: a trailing slash and a missing `.git`.
//! User information never appears in an error, because it may be a token.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::git::http::address;
pub use crate::git::policy::Policy;

/// The longest URL that is looked at.
pub const MAX_LENGTH: usize = 2048;

/// Why a URL is not fetched. No text repeats what may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing but white space.
    #[error("the repository URL is empty; give one like https://github.com/owner/name")]
    Empty,
    /// Longer than [`MAX_LENGTH`].
    #[error("the repository URL is {0} characters long; at most {MAX_LENGTH} are accepted")]
    TooLong(usize),
    /// A control character, line break, white space, NUL or back slash, plain or percent-encoded.
    #[error("the repository URL contains {0}; give one like https://github.com/owner/name")]
    Character(&'static str),
    /// It starts like a command line option.
    #[error(
        "the repository URL starts with '-' or has a part that does; it looks like an option, not an address"
    )]
    LeadingDash,
    /// A scheme or transport this worker does not speak.
    #[error(
        "'{0}' addresses are not fetched; use https:// (and the token argument for a private repository)"
    )]
    Scheme(String),
    /// `host:path`, the short form of ssh.
    #[error("'host:path' means ssh, which is not supported; use https:// and the token argument")]
    ScpLike,
    /// A path of this machine while those are not allowed.
    #[error(
        "local repositories are not allowed here; use https:// (ALLOW_LOCAL_REPOS=1 is for development)"
    )]
    Local,
    /// A relative path or text without a scheme.
    #[error("the repository URL has no scheme; give one like https://github.com/owner/name")]
    NoScheme,
    /// Plain http while it is not allowed.
    #[error("plain http is not allowed for {0}; use https://")]
    Http(String),
    /// A user name or password in the URL.
    #[error(
        "the repository URL contains a user name or password; remove it and pass the token as its own argument"
    )]
    UserInfo,
    /// `?` or `#`.
    #[error(
        "the repository URL contains a query or a fragment; give the address of the repository alone"
    )]
    Query,
    /// No host, or one that is not spelled as a host name is.
    #[error("the repository URL has no usable host name ({0})")]
    Host(&'static str),
    /// A number in place of a host that is not four plain decimal parts.
    #[error(
        "the host of the repository URL is an address in an unusual spelling; use the server's name"
    )]
    AddressSpelling,
    /// A literal address that is not public.
    #[error("{address} is a {class} address; only public servers are fetched from")]
    NotPublic {
        /// The address as a machine reads it.
        address: IpAddr,
        /// What kind it is.
        class: &'static str,
    },
    /// `localhost`, a name without a dot, or a name of a local zone.
    #[error("{0} is a name of the local network; only public servers are fetched from")]
    LocalName(String),
    /// A port where no git server listens.
    #[error("port {0} is not one a git server uses; 80, 443 and those from 1024 are accepted")]
    Port(u16),
    /// Not on the allow-list.
    #[error("{0} is not among the allowed hosts (REPO_HOSTS)")]
    HostNotAllowed(String),
    /// No repository can be there.
    #[error("the repository URL names no repository; give one like https://github.com/owner/name")]
    NoPath,
    /// The URL parser's own complaint.
    #[error("the repository URL cannot be read: {0}")]
    Syntax(String),
}

/// An address that may be fetched from. `Display` shows all of it: it holds no user information.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoUrl {
    place: Place,
}

/// Where the repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// A directory of this machine.
    Local(PathBuf),
    /// A smart HTTP server; the URL has no trailing slash, user information, query or fragment.
    Http(::url::Url),
}

impl RepoUrl {
    /// Judges `text` by `policy`.
    pub fn parse(text: &str, policy: &Policy) -> Result<RepoUrl, Error> {
        let text = text.trim_matches(' ');
        if text.is_empty() {
            return Err(Error::Empty);
        }
        if text.len() > MAX_LENGTH {
            return Err(Error::TooLong(text.len()));
        }
        let of_this_machine = text.starts_with('/') || text.starts_with("file:");
        refuse_characters(text, of_this_machine)?;
        if text.starts_with('-') {
            return Err(Error::LeadingDash);
        }
        if text.starts_with('/') {
            return local(text, policy);
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(Error::NoScheme);
        };
        // A bracket opens an address of ssh's short form, whose colons are no transport's.
        if rest.starts_with(':') && !scheme.contains('[') {
            return Err(Error::Scheme(shown_scheme(scheme, "::")));
        }
        if !is_scheme(scheme) {
            return Err(not_a_scheme(scheme));
        }
        let scheme = scheme.to_ascii_lowercase();
        match scheme.as_str() {
            "http" | "https" if rest.starts_with("//") => http(text, policy),
            "file" => match rest.strip_prefix("//") {
                Some(path) => local(path.strip_prefix("localhost").unwrap_or(path), policy),
                None => Err(Error::Scheme(shown_scheme("file", ":"))),
            },
            _ if rest.starts_with("//") => Err(Error::Scheme(shown_scheme(&scheme, "://"))),
            "http" | "https" => Err(Error::Host("two slashes must follow the scheme")),
            _ => Err(Error::ScpLike),
        }
    }

    /// The same judgement for an address a server redirects to.
    pub fn parse_redirect(target: &::url::Url, policy: &Policy) -> Result<RepoUrl, Error> {
        let mut target = target.clone();
        target.set_query(None);
        RepoUrl::parse(target.as_str(), policy)
    }

    /// The directory, where the repository is one of this machine.
    pub fn local_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            Place::Http(_) => None,
        }
    }

    /// The address, where the repository is on a server.
    pub fn http(&self) -> Option<&::url::Url> {
        match &self.place {
            Place::Local(_) => None,
            Place::Http(url) => Some(url),
        }
    }
}

impl fmt::Display for RepoUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Local(path) => write!(formatter, "{}", path.display()),
            Place::Http(url) => write!(formatter, "{url}"),
        }
    }
}

/// Refuses what no address of a repository holds, in the plain text and behind percent signs.
/// The name of a directory may hold a percent sign that encodes nothing.
fn refuse_characters(text: &str, of_this_machine: bool) -> Result<(), Error> {
    for character in text.chars() {
        match character {
            '\0' => return Err(Error::Character("a NUL")),
            '\n' | '\r' => return Err(Error::Character("a line break")),
            ' ' => return Err(Error::Character("white space")),
            '\\' => return Err(Error::Character("a back slash")),
            _ if character.is_control() => return Err(Error::Character("a control character")),
            _ if character.is_whitespace() => return Err(Error::Character("white space")),
            '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => {
                return Err(Error::Character("an invisible character"));
            }
            _ => {}
        }
    }
    let bytes = text.as_bytes();
    for at in memchr::memchr_iter(b'%', bytes) {
        let code = bytes
            .get(at + 1..at + 3)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(0) => return Err(Error::Character("a NUL")),
            Some(b'\n' | b'\r') => return Err(Error::Character("a line break")),
            Some(code) if code < 0x20 || code == 0x7f => {
                return Err(Error::Character("a control character"));
            }
            Some(b'\\') => return Err(Error::Character("a back slash")),
            Some(_) => {}
            None if of_this_machine => {}
            None => return Err(Error::Character("a '%' that encodes nothing")),
        }
    }
    Ok(())
}

/// Whether `text` is spelled as RFC 3986 spells a scheme.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
        // `example.com:path` is ssh's short form, though RFC 3986 would take it for a scheme.
        && !text.contains('.')
}

/// What text before a colon is that is no scheme: ssh's short form, or nothing known.
fn not_a_scheme(before: &str) -> Error {
    if before.contains('/') {
        Error::NoScheme
    } else {
        Error::ScpLike
    }
}

/// A scheme for an error text: short, and only when it cannot be anything else.
fn shown_scheme(scheme: &str, after: &str) -> String {
    if is_scheme(scheme) && scheme.len() <= 16 {
        format!("{scheme}{after}")
    } else {
        format!("…{after}")
    }
}

/// A directory of this machine, absolute, where the policy allows those.
fn local(path: &str, policy: &Policy) -> Result<RepoUrl, Error> {
    if !policy.allow_local {
        return Err(Error::Local);
    }
    if !path.starts_with('/') {
        return Err(Error::Host(
            "file:// takes an absolute path of this machine",
        ));
    }
    let decoded = percent_decoded(path);
    if decoded.trim_matches('/').is_empty() {
        return Err(Error::NoPath);
    }
    Ok(RepoUrl {
        place: Place::Local(PathBuf::from(decoded)),
    })
}

/// The path with percent codes replaced, unless they do not make text.
fn percent_decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'%')
            .then(|| tail.get(..2))
            .flatten()
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| path.to_owned())
}

/// A smart HTTP server.
fn http(text: &str, policy: &Policy) -> Result<RepoUrl, Error> {
    let after_scheme = text.split_once("://").map_or("", |(_, rest)| rest);
    let authority = after_scheme
        .split(['/', '?', '#'])
        .next()
        .unwrap_or_default();
    if authority.contains('@') {
        return Err(Error::UserInfo);
    }
    if after_scheme.contains(['?', '#']) {
        return Err(Error::Query);
    }
    if authority.contains('%') {
        return Err(Error::Host("it contains a '%'"));
    }
    if !authority.is_ascii() {
        return Err(Error::Host("it is not spelled in ASCII; use its xn-- form"));
    }
    let mut url = ::url::Url::parse(text).map_err(|source| match source {
        ::url::ParseError::InvalidIpv4Address => Error::AddressSpelling,
        ::url::ParseError::EmptyHost => Error::Host("it is empty"),
        ::url::ParseError::InvalidPort => Error::Host("the port is not a number up to 65535"),
        other => Error::Syntax(other.to_string()),
    })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::UserInfo);
    }
    let secure = url.scheme() == "https";
    let port = url.port_or_known_default().unwrap_or_default();
    if port != 80 && port != 443 && port < 1024 {
        return Err(Error::Port(port));
    }

    let written = host_as_written(authority);
    let host = match url.host() {
        None => return Err(Error::Host("it is empty")),
        Some(::url::Host::Ipv4(address)) => {
            if written != address.to_string() {
                return Err(Error::AddressSpelling);
            }
            judge_literal(IpAddr::V4(address), secure, policy)?;
            address.to_string()
        }
        Some(::url::Host::Ipv6(address)) => {
            judge_literal(IpAddr::V6(address), secure, policy)?;
            address.to_string()
        }
        Some(::url::Host::Domain(name)) => {
            judge_name(name, secure, policy)?;
            name.to_owned()
        }
    };
    let host = host.to_ascii_lowercase();

    let first = url.path().trim_start_matches('/');
    if first.trim_matches('/').is_empty() {
        return Err(Error::NoPath);
    }
    if first
        .split('/')
        .next()
        .is_some_and(|part| part.starts_with('-'))
    {
        return Err(Error::LeadingDash);
    }

    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    if matches!(host.as_str(), "github.com" | "www.github.com") {
        normalise_github(&mut url)?;
    }
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    if !policy.allows_host(host, port) {
        return Err(Error::HostNotAllowed(host.to_owned()));
    }
    Ok(RepoUrl {
        place: Place::Http(url),
    })
}

/// The host part of an authority without its port.
fn host_as_written(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|byte| byte.is_ascii_digit()) && !authority.ends_with(']') =>
        {
            host
        }
        _ => authority,
    }
}

/// A literal address must be public, or local where the policy allows that.
fn judge_literal(address: IpAddr, secure: bool, policy: &Policy) -> Result<(), Error> {
    address::judge(address, policy.allow_local)
        .map_err(|class| Error::NotPublic { address, class })?;
    let is_local = address::class(address).is_some();
    let may_be_plain = policy.allow_http || (policy.allow_local && is_local);
    if !secure && !may_be_plain {
        return Err(Error::Http(address.to_string()));
    }
    Ok(())
}

/// A name must be spelled as one and not belong to the local network.
fn judge_name(name: &str, secure: bool, policy: &Policy) -> Result<(), Error> {
    if name.starts_with('-') || name.split('.').any(|label| label.starts_with('-')) {
        return Err(Error::LeadingDash);
    }
    let bare = name.strip_suffix('.').unwrap_or(name);
    if bare.is_empty() || bare.split('.').any(str::is_empty) {
        return Err(Error::Host("it has an empty part"));
    }
    if bare.len() > 253 || bare.split('.').any(|label| label.len() > 63) {
        return Err(Error::Host("it is longer than a host name can be"));
    }
    if !bare
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
    {
        return Err(Error::Host("it contains a character no host name has"));
    }
    const LOCAL_ZONES: &[&str] = &[
        "localhost",
        "localdomain",
        "local",
        "internal",
        "intranet",
        "lan",
        "home",
        "corp",
        "arpa",
        "onion",
        "invalid",
        "test",
    ];
    let last = bare.rsplit('.').next().unwrap_or(bare);
    let is_local = !bare.contains('.') || LOCAL_ZONES.contains(&last);
    if is_local && !policy.allow_local {
        return Err(Error::LocalName(bare.to_owned()));
    }
    // With local repositories allowed, plain http to a name is decided by the address it leads to.
    if !secure && !policy.allow_http && !policy.allow_local {
        return Err(Error::Http(bare.to_owned()));
    }
    Ok(())
}

/// `owner/name` of a GitHub page becomes the repository's own address.
fn normalise_github(url: &mut ::url::Url) -> Result<(), Error> {
    let parts: Vec<&str> = url
        .path()
        .split('/')
        .filter(|part| !part.is_empty())
        .collect();
    let [owner, name, ..] = parts[..] else {
        return Err(Error::NoPath);
    };
    // Pages below the repository (tree, blob, pulls …) belong to it; GitHub has no deeper repositories.
    let name = name.strip_suffix(".git").unwrap_or(name);
    if name.is_empty() {
        return Err(Error::NoPath);
    }
    let path = format!("/{owner}/{name}.git");
    url.set_path(&path);
    url.set_host(Some("github.com"))
        .map_err(|source| Error::Syntax(source.to_string()))
}
