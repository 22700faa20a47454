//! Fetching a repository: what `git clone --bare --single-branch --no-tags` would do, for strangers' URLs.
//!
//! [`fetch`] blocks until the repository lies in the directory the caller gave, or there is an error that
//! says which of the many things went wrong. One watcher thread enforces time, speed and size and passes
//! the caller's interrupt on; one thread receives; the calling thread parses the objects as they come;
//! then all threads resolve deltas. No git binary, no configuration of the machine, no checkout, no
//! hooks, nothing negotiated, no address but the user's.
//!
//! ```text
//! server ─▶ http::Client ─▶ conversation ─▶ receive ──▶ file
//!                 ▲                            └─▶ chunks ─▶ pack (entries, limits) ─▶ index
//!             http::watch ◀─ interrupt
//! ```
//!
//! Repositories of this machine (where the policy allows them) are read in place. Knows nothing of tasks,
//! settings or where the directory comes from; the caller removes it.

mod conversation;
mod error;
mod pack;
mod pktline;
mod progress;
mod receive;
mod repository;
mod space;
mod want;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use gix::ObjectId;
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};

pub use error::{Error, Limit};
pub use progress::Progress;

use super::Oid;
use super::http::Client;
use super::http::watch::{Demands, Watch, Watcher};
use super::url::{Policy, RepoUrl};
use conversation::{Conversation, Wanted};
use pack::{Fault, Indexed, PackLimits};
use progress::Steps;
use repository::Layout;
use space::Space;
use want::PackAnswer;

/// How often the watcher looks.
const TICK: Duration = Duration::from_millis(20);
/// How often progress is told at most.
const REPORT: Duration = Duration::from_millis(200);

/// How much a server may send, and how slowly.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes received in all.
    pub max_bytes: u64,
    /// Objects in the pack.
    pub max_objects: u64,
    /// Bytes of one object, inflated and with its deltas applied.
    pub max_object_size: u64,
    /// Bytes of all objects together, inflated and with their deltas applied.
    pub max_inflated: u64,
    /// Deltas on top of each other; git itself never makes more than 4095.
    pub max_delta_depth: u16,
    /// Bytes of disk, pack and index together.
    pub max_disk: u64,
    /// Bytes that are to stay free on the disk of the directory; 0 for none, `None` for 256 MiB
    /// and never more than a twentieth of the disk.
    pub keep_free: Option<u64>,
    /// For a name lookup, and for connecting to a host with all its addresses.
    pub connect_timeout: Duration,
    /// For one wait without a byte.
    pub read_timeout: Duration,
    /// Bytes per second while data streams, measured over `speed_window` of waiting for the network.
    pub min_speed: u64,
    /// Over which time the speed is measured.
    pub speed_window: Duration,
    /// For the whole fetch; `None` leaves it to the caller's interrupt.
    pub total_time: Option<Duration>,
    /// Threads that resolve deltas; `None` takes all of the machine's.
    pub threads: Option<usize>,
}

impl Default for Limits {
    /// Room for the largest public repositories.
    fn default() -> Limits {
        Limits {
            max_bytes: 20 << 30,
            max_objects: 100_000_000,
            max_object_size: 1 << 30,
            max_inflated: 1 << 40,
            max_delta_depth: 4096,
            max_disk: 30 << 30,
            keep_free: None,
            connect_timeout: Duration::from_secs(20),
            read_timeout: Duration::from_secs(150),
            min_speed: 1000,
            speed_window: Duration::from_secs(60),
            total_time: None,
            threads: None,
        }
    }
}

/// What to fetch, and under which rules.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The repository.
    pub url: &'a RepoUrl,
    /// Sent by Basic authorization to the URL's own host; an empty one is none.
    pub token: Option<&'a SecretString>,
    /// A branch or tag instead of HEAD.
    pub branch: Option<&'a str>,
    /// So many commits of history only. A blame over it is wrong by nature.
    pub depth: Option<u32>,
    /// An existing empty directory, which becomes the bare repository.
    pub directory: &'a Path,
    /// What is demanded of the server.
    pub limits: Limits,
    /// The same policy the URL was parsed with; it judges addresses and redirects.
    pub policy: &'a Policy,
}

/// A repository that can be opened.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Where it is: the request's directory, or the local repository itself.
    pub repository: PathBuf,
    /// The commit of HEAD or of the branch; `None` for an empty repository.
    pub head: Option<Oid>,
    /// Whether history is cut.
    pub shallow: bool,
    /// Bytes received from the network.
    pub received_bytes: u64,
    /// Objects in the pack.
    pub objects: u64,
    /// The server still has the commit that the caller knows, so nothing was received; see
    /// [`fetch_unless`].
    pub unchanged: bool,
}

/// Fetches. `progress` is called from another thread, a few times a second; `interrupt` is obeyed within
/// a fraction of a second wherever the fetch stands.
pub fn fetch(
    request: &Request<'_>,
    progress: &(dyn Fn(Progress) + Sync),
    interrupt: &AtomicBool,
) -> Result<Fetched, Error> {
    fetch_unless(request, None, progress, interrupt)
}

/// Fetches, unless HEAD or the branch is still at the commit `known`. The server is asked with the
/// request's own token, so the answer *unchanged* also proves that whoever asks may read the
/// repository now; it costs what listing the branches costs.
pub fn fetch_unless(
    request: &Request<'_>,
    known: Option<Oid>,
    progress: &(dyn Fn(Progress) + Sync),
    interrupt: &AtomicBool,
) -> Result<Fetched, Error> {
    if let Some(branch) = request.branch
        && !repository::is_branch_name(branch)
    {
        let shown = branch
            .chars()
            .filter(|letter| !letter.is_control())
            .take(80);
        return Err(Error::BranchName(shown.collect()));
    }
    if let Some(path) = request.url.local_path() {
        let local = repository::inspect(path, request.branch)?;
        return Ok(Fetched {
            repository: path.to_owned(),
            head: local.head.and_then(named),
            shallow: local.shallow,
            received_bytes: 0,
            objects: 0,
            unchanged: known.is_some() && known == local.head.and_then(named),
        });
    }
    let watch = Arc::new(Watch::new(Demands {
        total: request.limits.total_time,
        silence: request.limits.read_timeout,
        speed: request.limits.min_speed,
        window: request.limits.speed_window,
        bytes: request.limits.max_bytes,
    }));
    let steps = Steps::default();
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        let watched = Arc::clone(&watch);
        let counters = &steps;
        std::thread::Builder::new()
            .name("fetch-watch".to_owned())
            .spawn_scoped(scope, move || {
                let mut watcher = Watcher::new(&watched, interrupt);
                let mut reporter = Reporter::new(progress);
                while let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(TICK) {
                    watcher.look();
                    reporter.look(counters.report(watched.received()));
                }
                reporter.last(counters.report(watched.received()));
            })
            .map_err(|source| Error::Thread(source.to_string()))?;
        let result = over_http(request, known, &watch, &steps);
        drop(done);
        // Whatever layer an interrupt or a limit came up through, this is what it was.
        match (result, watch.cause()) {
            (Err(error), Some(cause)) if !matches!(error, Error::TooLarge { .. }) => Err(
                error::from_cause(&request.url.to_string(), doing(&error), cause),
            ),
            (result, _) => result,
        }
    })
}

/// Tells progress when it changed, not too often.
struct Reporter<'a> {
    tell: &'a (dyn Fn(Progress) + Sync),
    told: Option<(Progress, Instant)>,
}

impl<'a> Reporter<'a> {
    fn new(tell: &'a (dyn Fn(Progress) + Sync)) -> Reporter<'a> {
        Reporter { tell, told: None }
    }

    fn look(&mut self, now: Progress) {
        match self.told {
            Some((told, _)) if told == now => {}
            Some((_, at)) if at.elapsed() < REPORT => {}
            _ => self.last(now),
        }
    }

    fn last(&mut self, now: Progress) {
        if self.told.is_none_or(|(told, _)| told != now) {
            self.told = Some((now, Instant::now()));
            (self.tell)(now);
        }
    }
}

/// The step an error was at.
fn doing(error: &Error) -> &'static str {
    match error {
        Error::Timeout { doing, .. }
        | Error::TooSlow { doing, .. }
        | Error::CutOff { doing, .. }
        | Error::Protocol { doing, .. } => doing,
        Error::Pack { .. } => "receiving the pack",
        _ => "talking to the server",
    }
}

fn over_http(
    request: &Request<'_>,
    known: Option<Oid>,
    watch: &Arc<Watch>,
    steps: &Steps,
) -> Result<Fetched, Error> {
    let url = request.url.http().ok_or_else(|| Error::Local {
        path: request.directory.to_owned(),
        detail: "it has no address".to_owned(),
    })?;
    let client = Client::new(
        request.url,
        request.token,
        request.policy,
        watch,
        request.limits.connect_timeout,
    );
    let (conversation, greeting) = Conversation::open(&client, url, secrets(request.token))?;
    let wanted = conversation.wanted(&greeting, request.branch)?;
    let head = wanted.peeled.and_then(named);
    if known.is_some() && head == known {
        return Ok(Fetched {
            repository: request.directory.to_owned(),
            head,
            shallow: false,
            received_bytes: watch.received(),
            objects: 0,
            unchanged: true,
        });
    }
    let lacks = |lack| error::from_lack(&request.url.to_string(), request.directory, lack);
    let limits = &request.limits;
    let space = Space::open(request.directory, limits.max_disk, limits.keep_free).map_err(lacks)?;
    let layout = Layout::create(request.directory)?;
    let Some(id) = wanted.id else {
        layout.set_head(&wanted)?;
        return Ok(Fetched {
            repository: request.directory.to_owned(),
            head: None,
            shallow: false,
            received_bytes: watch.received(),
            objects: 0,
            unchanged: false,
        });
    };
    let depth = request.depth.filter(|depth| *depth > 0);
    watch.server_may_think();
    let answer = conversation.request_pack(&greeting, id, depth)?;
    let shallow = answer.shallow.clone();
    let indexed = store(
        request,
        &conversation,
        answer,
        (&layout, &space),
        watch,
        steps,
    )?;
    let index = layout.admit(indexed.checksum)?;
    require(&conversation, &index, &wanted)?;
    if !shallow.is_empty() {
        layout.set_shallow(&shallow)?;
    }
    layout.set_head(&wanted)?;
    Ok(Fetched {
        repository: request.directory.to_owned(),
        head,
        shallow: !shallow.is_empty(),
        received_bytes: watch.received(),
        objects: indexed.objects,
        unchanged: false,
    })
}

/// Receives and indexes the pack.
fn store(
    request: &Request<'_>,
    conversation: &Conversation<'_>,
    answer: PackAnswer,
    (layout, space): (&Layout, &Space),
    watch: &Arc<Watch>,
    steps: &Steps,
) -> Result<Indexed, Error> {
    let limits = PackLimits {
        objects: request.limits.max_objects,
        object_size: request.limits.max_object_size,
        inflated: request.limits.max_inflated,
        delta_depth: request.limits.max_delta_depth,
    };
    let (pack_path, index_path) = (layout.incoming_pack(), layout.incoming_index());
    let file =
        File::create_new(&pack_path).map_err(repository::disk("creating the pack", &pack_path))?;
    std::thread::scope(|scope| {
        let (sender, chunks) = mpsc::sync_channel(receive::CHUNKS);
        let receiver = {
            let (file, pack_path) = (&file, &pack_path);
            std::thread::Builder::new()
                .name("fetch-receive".to_owned())
                .spawn_scoped(scope, move || {
                    receive::receive(
                        conversation,
                        answer.packets,
                        watch,
                        (file, pack_path, space),
                        &sender,
                    )
                })
                .map_err(|source| Error::Thread(source.to_string()))?
        };
        let indexed = pack::index(
            chunks,
            &limits,
            space,
            (&pack_path, &index_path),
            request.limits.threads,
            steps,
            watch.stopped_flag(),
        );
        if indexed.is_err() {
            watch.close();
        }
        let received = receiver.join().unwrap_or_else(|_| {
            Err(conversation.broken("receiving the pack", "its answer crashed the reader"))
        });
        let url = || conversation.url().to_owned();
        match indexed {
            Ok(indexed) => received.map(|()| indexed),
            Err(Fault::Ended) => match received {
                // A checksum that does not match says less than this does.
                Ok(()) | Err(Error::Pack { .. }) => Err(Error::Pack {
                    url: url(),
                    doing: pack::PARSING,
                    detail: "it ends before its last object".to_owned(),
                }),
                Err(error) => Err(error),
            },
            Err(Fault::TooLarge(limit, allowed)) => Err(Error::TooLarge {
                url: url(),
                limit,
                allowed,
            }),
            Err(Fault::Space(lack)) => Err(error::from_lack(&url(), request.directory, lack)),
            Err(Fault::Damaged(doing, detail)) => Err(Error::Pack {
                url: url(),
                doing,
                detail,
            }),
            Err(Fault::Disk(doing, path, source)) => Err(Error::Disk {
                doing,
                path,
                source,
            }),
        }
    })
}

/// The pack must hold what was asked for.
fn require(conversation: &Conversation<'_>, index: &Path, wanted: &Wanted) -> Result<(), Error> {
    let damaged = |detail: String| Error::Pack {
        url: conversation.url().to_owned(),
        doing: "looking for the commit that was asked for",
        detail,
    };
    let index = gix::odb::pack::index::File::at(index, gix::hash::Kind::Sha1)
        .map_err(|error| damaged(error.to_string()))?;
    for id in wanted.id.iter().chain(&wanted.peeled) {
        if index.lookup(id).is_none() {
            return Err(damaged(format!("{id} is not in it")));
        }
    }
    Ok(())
}

/// The same name in this crate's type.
fn named(id: ObjectId) -> Option<Oid> {
    Oid::from_bytes(id.as_slice())
}

/// Every form in which a server could echo the token.
fn secrets(token: Option<&SecretString>) -> Vec<Zeroizing<String>> {
    let Some(token) = token
        .map(ExposeSecret::expose_secret)
        .filter(|token| !token.is_empty())
    else {
        return Vec::new();
    };
    let engine = base64::engine::general_purpose::STANDARD;
    vec![
        engine.encode(Zeroizing::new(format!("x-access-token:{token}")).as_bytes()),
        engine.encode(token),
        token.to_owned(),
    ]
    .into_iter()
    .map(Zeroizing::new)
    .collect()
}
