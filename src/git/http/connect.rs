//! From a host name to a connected socket: one resolution, every address judged, all of it stoppable.
//!
//! The name is looked up once per fetch and the answer pinned, so that a name server cannot show a public
//! address to the check and another to the connection. Lookup and connect block in the kernel for as long
//! as they like; both run on a thread of their own that is left behind when the fetch is stopped.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};

use super::watch::Watch;
use super::{Error, address};
use crate::git::url::Policy;

/// How often a wait that cannot be woken looks whether the fetch was stopped.
const TICK: Duration = Duration::from_millis(10);

/// No more addresses of one name are tried.
const MAX_ADDRESSES: usize = 16;

/// Looks a host name up; a test puts its own answers here.
#[derive(Clone)]
pub struct Lookup(Arc<Answer>);

/// All addresses of a name.
type Answer = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

impl Lookup {
    /// A lookup of one's own.
    pub fn new(answer: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Lookup {
        Lookup(Arc::new(answer))
    }
}

impl Default for Lookup {
    fn default() -> Lookup {
        Lookup::new(|host| {
            Ok((host, 0)
                .to_socket_addrs()?
                .map(|found| found.ip())
                .collect())
        })
    }
}

impl fmt::Debug for Lookup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Lookup")
    }
}

/// Resolves under the policy and remembers the answers of this fetch.
#[derive(Debug)]
pub(super) struct PinnedResolver {
    policy: Policy,
    watch: Arc<Watch>,
    timeout: Duration,
    pinned: Mutex<HashMap<String, Vec<IpAddr>>>,
}

impl PinnedResolver {
    pub(super) fn new(policy: Policy, watch: Arc<Watch>, timeout: Duration) -> PinnedResolver {
        PinnedResolver {
            policy,
            watch,
            timeout,
            pinned: Mutex::new(HashMap::new()),
        }
    }

    /// All addresses of the host, each of them allowed.
    fn addresses(&self, host: &str, secure: bool) -> Result<Vec<IpAddr>, Error> {
        let known = self
            .pinned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(host)
            .cloned();
        let found = match known {
            Some(found) => found,
            None => self.look_up(host)?,
        };
        for &address in &found {
            address::judge(address, self.policy.allow_local).map_err(|class| Error::NotPublic {
                host: host.to_owned(),
                address,
                class,
            })?;
            let local = self.policy.allow_local && address::class(address).is_some();
            if !secure && !self.policy.allow_http && !local {
                return Err(Error::PlainHttp(host.to_owned()));
            }
        }
        self.pinned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(host.to_owned())
            .or_insert_with(|| found.clone());
        Ok(found)
    }

    fn look_up(&self, host: &str) -> Result<Vec<IpAddr>, Error> {
        let literal = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = literal.parse() {
            return Ok(vec![address]);
        }
        let name = host.to_owned();
        let Lookup(lookup) = self.policy.lookup.clone();
        let answer = on_a_thread(&self.watch, self.timeout, move || lookup(&name))?;
        let not_found = |detail: String| Error::HostNotFound {
            host: host.to_owned(),
            detail,
        };
        match answer {
            None => Err(Error::Timeout("looking the host name up", self.timeout)),
            Some(Err(source)) => Err(not_found(source.to_string())),
            Some(Ok(found)) if found.is_empty() => Err(not_found("it has no address".to_owned())),
            Some(Ok(found)) => Ok(found),
        }
    }
}

impl Resolver for PinnedResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &ureq::config::Config,
        _timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default().to_ascii_lowercase();
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let found = self.addresses(&host, secure).map_err(outgoing)?;
        let mut result = self.empty();
        for address in found.into_iter().take(MAX_ADDRESSES) {
            result.push(SocketAddr::new(address, port));
        }
        Ok(result)
    }
}

/// Opens sockets that the watch can wake.
#[derive(Debug)]
pub(super) struct WatchedConnector {
    pub(super) watch: Arc<Watch>,
    /// For all addresses of the host together.
    pub(super) timeout: Duration,
}

impl Connector<()> for WatchedConnector {
    type Out = WatchedSocket;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _chained: Option<()>,
    ) -> Result<Option<WatchedSocket>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default();
        let deadline = Instant::now() + self.timeout;
        let count = details.addrs.len();
        let mut last = None;
        for (at, &address) in details.addrs.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / u32::try_from(count - at).unwrap_or(1).max(1);
            if share.is_zero() {
                break;
            }
            let connect = move || TcpStream::connect_timeout(&address, share);
            match on_a_thread(&self.watch, share + TICK, connect).map_err(outgoing)? {
                Some(Ok(stream)) => return Ok(Some(self.watched(stream, details)?)),
                Some(Err(source)) => last = Some(source.to_string()),
                None => last = None,
            }
        }
        Err(outgoing(match last {
            Some(detail) => Error::Connect {
                host: host.to_owned(),
                detail,
            },
            None => Error::Timeout("connecting", self.timeout),
        }))
    }
}

impl WatchedConnector {
    fn watched(
        &self,
        stream: TcpStream,
        details: &ConnectionDetails<'_>,
    ) -> Result<WatchedSocket, ureq::Error> {
        stream.set_nodelay(true)?;
        let stream = Arc::new(stream);
        self.watch.register(Arc::downgrade(&stream));
        Ok(WatchedSocket {
            stream,
            watch: Arc::clone(&self.watch),
            buffers: LazyBuffers::new(
                details.config.input_buffer_size(),
                details.config.output_buffer_size(),
            ),
        })
    }
}

/// A socket whose reads are counted and timed.
#[derive(Debug)]
pub(super) struct WatchedSocket {
    stream: Arc<TcpStream>,
    watch: Arc<Watch>,
    buffers: LazyBuffers,
}

impl Transport for WatchedSocket {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.watch.request_sent();
        let output = &self.buffers.output()[..amount];
        // A peer that takes nothing is silent as well.
        self.watch.read_begins();
        let result = (&*self.stream).write_all(output);
        self.watch.read_ended(0);
        Ok(result?)
    }

    fn await_input(&mut self, _timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let input = self.buffers.input_append_buf();
        self.watch.read_begins();
        let result = loop {
            match (&*self.stream).read(input) {
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.watch.read_ended(*result.as_ref().unwrap_or(&0));
        let amount = result?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        // An idle connection with something to read is at its end, or out of step.
        let mut byte = [0];
        self.stream.set_nonblocking(true).is_ok()
            && matches!(self.stream.peek(&mut byte), Err(source) if source.kind() == io::ErrorKind::WouldBlock)
            && self.stream.set_nonblocking(false).is_ok()
    }
}

/// Runs what cannot be woken on a thread and waits for it, unless the fetch is stopped or `timeout`
/// passes (`None`).
fn on_a_thread<T: Send + 'static>(
    watch: &Watch,
    timeout: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, Error> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("connect".to_owned())
        .spawn(move || {
            // Nobody listens any more when the fetch was stopped.
            let _ = sender.send(work());
        })
        .map_err(|source| Error::Thread(source.to_string()))?;
    let deadline = Instant::now() + timeout;
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(result) => return Ok(Some(result)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                if let Some(cause) = watch.cause() {
                    return Err(Error::Stopped(cause.clone()));
                }
                if Instant::now() > deadline {
                    return Ok(None);
                }
            }
        }
    }
}

/// Our error in the shape that travels through ureq unharmed.
fn outgoing(error: Error) -> ureq::Error {
    ureq::Error::Other(Box::new(error))
}
