//! `celeriac worker`: from options and settings to a checked blueprint, then a running worker.

use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use secrecy::SecretString;
use tokio::sync::mpsc;

use super::args::{Global, Worker};
use super::{banner, connect};
use crate::analysis;
use crate::config::{self, Loaded, Settings};
use crate::database::Keys;
use crate::git::url::Policy;
use crate::logging;
use crate::pool::{self, Sandbox};
use crate::protocol::nodename::{self, Nodename};
use crate::protocol::serialization::Accept;
use crate::protocol::zone::Zones;
use crate::tasks::analyze_repo;
use crate::transport::Queue;
use crate::transport::url::{BrokerUrl, Scheme};
use crate::worker::autoscale::Range;
use crate::worker::controller::{self, Blueprint, Neighbours};
use crate::worker::scratch::Scratch;
use crate::worker::statedb::StateDb;
use crate::worker::{rate_limit, shutdown};

/// Runs a worker; returns the exit code.
pub(super) fn run(global: &Global, options: &Worker) -> anyhow::Result<i32> {
    shutdown::block().context("cannot block signals")?;
    let Loaded { settings, idle, .. } = config::load(&overrides(global, options)?)?;
    check(&settings)?;
    let host = nix::unistd::gethostname().context("cannot read the host name")?;
    let host = host.to_string_lossy().into_owned();
    let node = Nodename::parse(options.hostname.as_deref(), &host)?;
    let expand = |template: &Option<String>| -> anyhow::Result<Option<PathBuf>> {
        let path = template
            .as_ref()
            .map(|text| nodename::expand(text, &node, None))
            .transpose()?;
        Ok(path.map(PathBuf::from))
    };
    let level: logging::Level = options
        .loglevel
        .parse()
        .map_err(|error| anyhow!("--loglevel: {error}"))?;
    logging::start(&logging::Options {
        level,
        file: expand(&options.logfile)?,
        colour: if global.no_color {
            Some(false)
        } else {
            settings.worker_log_color
        },
        ..logging::Options::default()
    })?;
    logging::tell_panics();
    // A core dump of the worker would hold every token it works with.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        log::warn!("Core dumps of this worker cannot be switched off: {error}");
    }
    for (variable, known) in idle {
        log::warn!("{variable} has no effect here: {}", known.note);
    }
    let pidfile = expand(&options.pidfile)?
        .map(super::pidfile::PidFile::create)
        .transpose()?;

    let (sender, wishes) = mpsc::unbounded_channel();
    shutdown::listen(sender.clone()).context("cannot start the thread that waits for signals")?;
    // The children compute. One thread speaks: with several, each step of a message would wake
    // another thread, which costs more than the step.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let code = runtime.block_on(async {
        let blueprint = blueprint(settings, options, &node, level)?;
        if !global.quiet {
            super::output::print(&banner::text(
                &blueprint,
                level.filter(),
                options.task_events,
            ));
        }
        Ok::<_, anyhow::Error>(controller::run(blueprint, wishes, sender).await?)
    });
    // Whatever still waits for a broker that is away must not hold up the end.
    runtime.shutdown_background();
    drop(pidfile);
    code
}

fn blueprint(
    settings: Settings,
    options: &Worker,
    node: &Nodename,
    level: logging::Level,
) -> anyhow::Result<Blueprint> {
    let transport = connect::transport(&settings, &node.to_string())?;
    let backend = connect::backend(&settings, &transport)?;
    let database = connect::database(&settings)?;
    let token_keys = token_keys(&settings)?;
    warn_of_open_redis(&settings);
    let zones = Zones::new(settings.timezone.as_deref(), settings.enable_utc)
        .map_err(|reason| anyhow::anyhow!("CELERY_TIMEZONE: {reason}"))?;
    let accept = Accept::from_names(settings.accept_content.iter().map(String::as_str))
        .map_err(|error| anyhow!("CELERY_ACCEPT_CONTENT: {error}"))?;
    let queues = queues(&settings, options)?;
    if let Some(path) = analyze_repo::authorities(&settings) {
        // A file that nobody can use would fail every single analysis.
        analysis::authorities(&path)?;
    }
    let scratch = Scratch::create(&std::env::temp_dir())?;
    let autoscale = options
        .autoscale
        .as_deref()
        .map(str::parse::<Range>)
        .transpose();
    let autoscale = autoscale.map_err(|error| anyhow!("--autoscale: {error}"))?;
    let state_db = settings
        .worker_state_db
        .as_deref()
        .filter(|template| !template.is_empty());
    let state_db = state_db
        .map(|template| nodename::expand(template, node, None))
        .transpose()?;
    let size = match (autoscale, settings.worker_concurrency) {
        (Some(range), _) => range.min,
        (None, Some(size)) => usize::try_from(size.max(1)).unwrap_or(usize::MAX),
        (None, None) => pool::limits::available_cpus(),
    };
    let sandbox = if settings.sandbox {
        Sandbox {
            allow_local: settings.allow_local_repos,
            connect_ports: ports(&settings),
            read: analyze_repo::authorities(&settings).into_iter().collect(),
            // A child that was taken over is bounded too; small files are its own business.
            max_file_size: Some(settings.clone_disk_quota.max(1 << 20))
                .filter(|_| settings.clone_disk_quota > 0),
            ..Sandbox::default()
        }
    } else {
        Sandbox::off()
    };
    Ok(Blueprint {
        node: node.to_string(),
        transport,
        backend,
        database,
        token_keys,
        accept,
        zones,
        queues,
        pool: pool::Options {
            size,
            max_tasks_per_child: settings.worker_max_tasks_per_child.filter(|most| *most > 0),
            max_memory_per_child: settings
                .worker_max_memory_per_child
                .filter(|most| *most > 0),
            sandbox,
            root: Some(scratch.clones()),
            log_level: level.filter(),
            ..pool::Options::default()
        },
        autoscale,
        state_db: state_db.map(|path| StateDb::new(PathBuf::from(path))),
        scratch,
        purge: options.purge,
        neighbours: Neighbours {
            heartbeat: (!options.without_heartbeat).then_some(options.heartbeat_interval),
            gossip: !options.without_gossip,
            mingle: !options.without_mingle,
        },
        settings,
    })
}

/// The keys of encrypted tokens.
pub(super) fn token_keys(settings: &Settings) -> anyhow::Result<Keys> {
    let text = SecretString::from(settings.token_encryption_keys.join(","));
    Ok(Keys::parse(&text)?)
}

/// Whoever reaches a broker can read every task and send any: one that asks for no password and
/// listens to more than this machine is worth a word.
fn warn_of_open_redis(settings: &Settings) {
    let backend = settings.result_backend.as_deref().unwrap_or_default();
    let mut told = Vec::new();
    for text in [settings.broker_url.as_str(), backend] {
        for url in BrokerUrl::parse_list(text).unwrap_or_default() {
            let guarded = url.password().is_some() || !matches!(url.scheme, Scheme::Redis);
            if guarded || is_this_machine(&url.host) || told.contains(&url.host) {
                continue;
            }
            log::warn!(
                "Redis at {} takes commands without a password, so everybody who reaches it can read \
                 tasks and their tokens, send tasks, and stop workers: set requirepass there and put \
                 the password into the URL, or close the port to all but your own services",
                url.host
            );
            told.push(url.host);
        }
    }
}

fn is_this_machine(host: &str) -> bool {
    host.is_empty()
        || host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The ports a child may connect to; none listed is every port. Brokers and databases are
/// seldom on those of the web.
fn ports(settings: &Settings) -> Vec<u16> {
    if settings.allow_local_repos {
        return Vec::new();
    }
    let named = settings
        .repo_hosts
        .iter()
        .filter_map(|host| host.rsplit_once(':')?.1.parse().ok());
    let http = settings.allow_http_repos.then_some(80);
    [443].into_iter().chain(http).chain(named).collect()
}

/// What the command line says as settings: (name, value, the option as typed).
fn overrides(global: &Global, options: &Worker) -> anyhow::Result<Vec<(String, String, String)>> {
    let mut list = super::global_overrides(global);
    let mut push = |name: &str, value: Option<String>, option: &str| {
        list.extend(value.map(|value| (name.to_owned(), value, option.to_owned())));
    };
    let concurrency = match options.pool.as_deref() {
        Some("solo") => Some("1".to_owned()),
        _ => options
            .concurrency
            .clone()
            .filter(|text| !text.eq_ignore_ascii_case("auto")),
    };
    // Celery takes 0 for "as many as there are processors".
    let concurrency = concurrency.filter(|text| text.trim() != "0");
    push("worker_concurrency", concurrency, "--concurrency");
    push(
        "worker_max_tasks_per_child",
        options.max_tasks_per_child.map(|n| n.to_string()),
        "--max-tasks-per-child",
    );
    push(
        "worker_max_memory_per_child",
        options.max_memory_per_child.map(|n| n.to_string()),
        "--max-memory-per-child",
    );
    push(
        "task_time_limit",
        options.time_limit.map(|n| n.to_string()),
        "--time-limit",
    );
    push(
        "task_soft_time_limit",
        options.soft_time_limit.map(|n| n.to_string()),
        "--soft-time-limit",
    );
    push(
        "worker_prefetch_multiplier",
        options.prefetch_multiplier.map(|n| n.to_string()),
        "--prefetch-multiplier",
    );
    push(
        "worker_disable_prefetch",
        options.disable_prefetch.then(|| "true".to_owned()),
        "--disable-prefetch",
    );
    push(
        "worker_send_task_events",
        options.task_events.then(|| "true".to_owned()),
        "--task-events",
    );
    push("worker_state_db", options.statedb.clone(), "--statedb");
    for setting in &options.settings {
        let Some((name, value)) = setting.split_once('=') else {
            bail!(
                "'{setting}' is neither an option nor a setting; settings are given as name=value, such as task_time_limit=600"
            );
        };
        list.push((
            name.trim_start_matches("--").to_owned(),
            value.to_owned(),
            name.to_owned(),
        ));
    }
    Ok(list)
}

/// What a type cannot say: values that only make sense together or in a certain form.
fn check(settings: &Settings) -> anyhow::Result<()> {
    if let Some(text) = &settings.task_default_rate_limit {
        rate_limit::parse(text)
            .map_err(|_| anyhow!("CELERY_TASK_DEFAULT_RATE_LIMIT: '{text}' is no rate; example: CELERY_TASK_DEFAULT_RATE_LIMIT=10/m"))?;
    }
    let mut hosts = settings.repo_hosts.iter();
    if let Some(entry) = hosts.find(|entry| !Policy::is_usable_host(entry)) {
        // It would match nothing, and every single analysis would be refused.
        return Err(anyhow!(
            "REPO_HOSTS: '{entry}' is no host; example: REPO_HOSTS=github.com,.example.com,git.example.com:8443"
        ));
    }
    if let Some(text) = &settings.user_rate_limit {
        rate_limit::parse(text).map_err(|_| {
            anyhow!("USER_RATE_LIMIT: '{text}' is no rate; example: USER_RATE_LIMIT=10/m")
        })?;
    }
    Ok(())
}

/// The queues to consume: `-Q`, else `task_queues`, else the default queue; without `-X`.
fn queues(settings: &Settings, options: &Worker) -> anyhow::Result<Vec<Queue>> {
    let known = configured_queues(settings)?;
    let names = |text: &Option<String>| -> Vec<String> {
        let text = text.clone().unwrap_or_default();
        text.split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let mut chosen: Vec<Queue> = Vec::new();
    let wanted = names(&options.queues);
    for name in &wanted {
        if chosen.iter().any(|queue| &queue.name == name) {
            continue;
        }
        match known.iter().find(|queue| &queue.name == name) {
            Some(queue) => chosen.push(queue.clone()),
            None if settings.task_create_missing_queues => {
                chosen.push(connect::missing_queue(settings, name))
            }
            None => bail!(
                "-Q: the queue '{name}' is not in task_queues, and task_create_missing_queues is off"
            ),
        }
    }
    if wanted.is_empty() {
        chosen = known;
    }
    let excluded = names(&options.exclude_queues);
    chosen.retain(|queue| !excluded.contains(&queue.name));
    if chosen.is_empty() {
        bail!("no queue is left to consume: -X takes away all of them");
    }
    Ok(chosen)
}

/// `task_queues`, else the default queue.
pub(super) fn configured_queues(settings: &Settings) -> anyhow::Result<Vec<Queue>> {
    use crate::transport::{Exchange, ExchangeKind};
    let text = |entry: &serde_json::Value, key: &str| {
        entry
            .get(key)
            .and_then(|value| value.as_str())
            .map(str::to_owned)
    };
    let kind = |word: &str| match word {
        "direct" => Ok(ExchangeKind::Direct),
        "topic" => Ok(ExchangeKind::Topic),
        "fanout" => Ok(ExchangeKind::Fanout),
        other => Err(anyhow!(
            "exchange type '{other}' is none of direct, topic, fanout"
        )),
    };
    match &settings.task_queues {
        serde_json::Value::Array(entries) if !entries.is_empty() => entries
            .iter()
            .map(|entry| {
                if let Some(name) = entry.as_str() {
                    return Ok(connect::missing_queue(settings, name));
                }
                let name = text(entry, "name")
                    .ok_or_else(|| anyhow!("CELERY_TASK_QUEUES: an entry has no name: {entry}"))?;
                let mut queue = connect::missing_queue(settings, &name);
                attributes(&mut queue, entry)?;
                let exchange = text(entry, "exchange").unwrap_or_else(|| name.clone());
                let word = text(entry, "exchange_type").unwrap_or_else(|| "direct".to_owned());
                queue.exchange = Exchange::new(exchange, kind(&word)?);
                queue.routing_key = text(entry, "routing_key").unwrap_or(name);
                Ok(queue)
            })
            .collect(),
        _ => {
            let name = &settings.task_default_queue;
            let mut queue = connect::missing_queue(settings, name);
            queue.arguments.clear();
            if settings.task_default_queue_type == "quorum" {
                let quorum = "quorum".into();
                queue.arguments.insert("x-queue-type".to_owned(), quorum);
            }
            let exchange = settings
                .task_default_exchange
                .clone()
                .unwrap_or_else(|| name.clone());
            queue.exchange = Exchange::new(exchange, kind(&settings.task_default_exchange_type)?);
            queue.routing_key = settings
                .task_default_routing_key
                .clone()
                .unwrap_or_else(|| name.clone());
            Ok(vec![queue])
        }
    }
}

/// What an entry of `task_queues` says beside names, with kombu's words for it.
fn attributes(queue: &mut Queue, entry: &serde_json::Value) -> anyhow::Result<()> {
    use serde_json::Value;
    let wrong = |key: &str, wanted: &str| {
        anyhow!(
            "CELERY_TASK_QUEUES: `{key}` of queue {} must be {wanted}",
            entry
                .get("name")
                .and_then(Value::as_str)
                .unwrap_or_default()
        )
    };
    let given = |key: &str| entry.get(key).filter(|value| !value.is_null());
    let flag = |key: &str| {
        given(key)
            .map(|value| value.as_bool().ok_or_else(|| wrong(key, "true or false")))
            .transpose()
    };
    let seconds = |key: &str| {
        given(key)
            .map(|value| {
                let number = value.as_f64().filter(|number| *number > 0.0);
                number.ok_or_else(|| wrong(key, "a number of seconds"))
            })
            .transpose()
    };
    queue.durable = flag("durable")?.unwrap_or(queue.durable);
    queue.auto_delete = flag("auto_delete")?.unwrap_or(queue.auto_delete);
    queue.expires = seconds("expires")?;
    queue.message_ttl = seconds("message_ttl")?;
    if let Some(arguments) = given("queue_arguments") {
        let arguments = arguments
            .as_object()
            .ok_or_else(|| wrong("queue_arguments", "an object"))?;
        // What the entry says takes the place of what queues have by default.
        queue.arguments = arguments.clone();
        if arguments.contains_key("x-max-priority") {
            queue.max_priority = None;
        }
    }
    if let Some(most) = given("max_priority") {
        let most = most.as_u64().and_then(|most| u8::try_from(most).ok());
        queue.max_priority = Some(most.ok_or_else(|| wrong("max_priority", "0 to 255"))?);
    }
    Ok(())
}
