//! From settings to the broker, the result backend and the database, with errors that name
//! the variable and show a correct value. Nothing connects here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, bail};
use serde_json::Value;

use super::refused;
use crate::backend::{self, Backend};
use crate::config::Settings;
use crate::database::{Database, DatabaseUrl};
use crate::tasks::registry::seconds;
use crate::transport::amqp::{self, AmqpTransport};
use crate::transport::redis::{Options as RedisOptions, RedisTransport};
use crate::transport::url::BrokerUrl;
use crate::transport::{Queue, Transport};

/// A result is tried about once a second for five minutes while its backend is away.
const RESULT_TRIES: u32 = 300;
/// A person is told after a few seconds.
const CLIENT_TRIES: u32 = 3;
/// RabbitMQ's default consumer_timeout in seconds.
const CONSUMER_TIMEOUT: f64 = 1800.0;

/// The transport that the broker URL chooses.
pub(super) fn transport(settings: &Settings, node: &str) -> anyhow::Result<Arc<dyn Transport>> {
    own_queues(settings)?;
    let mut urls = BrokerUrl::parse_list(&settings.broker_url).map_err(|error| {
        let name = refused::address("QUEUE_BROKER_URL", &settings.broker_url);
        anyhow!("{name}: {error}")
    })?;
    let Some((first, others)) = urls.split_first_mut() else {
        bail!("QUEUE_BROKER_URL: no URL in it");
    };
    if first.scheme.is_redis() {
        // The first is the first with kombu, too.
        if settings.broker_failover_strategy == "shuffle" {
            others.sort_by_cached_key(|_| uuid::Uuid::new_v4());
        }
        redis_transport(settings, node, &urls)
    } else {
        amqp_transport(settings, node, &urls)
    }
}

/// A queue of one connection goes with it and cannot outlive the broker.
fn own_queues(settings: &Settings) -> anyhow::Result<()> {
    for (name, durable, exclusive) in [
        (
            "CONTROL",
            settings.control_queue_durable,
            settings.control_queue_exclusive,
        ),
        (
            "EVENT",
            settings.event_queue_durable,
            settings.event_queue_exclusive,
        ),
    ] {
        if durable && exclusive {
            bail!(
                "CELERY_{name}_QUEUE_DURABLE and CELERY_{name}_QUEUE_EXCLUSIVE cannot both be \
                 true: an exclusive queue goes with its connection. Set \
                 CELERY_{name}_QUEUE_EXCLUSIVE=false"
            );
        }
    }
    Ok(())
}

fn redis_transport(
    settings: &Settings,
    node: &str,
    urls: &[BrokerUrl],
) -> anyhow::Result<Arc<dyn Transport>> {
    let mut given = settings.broker_transport_options.clone();
    if let Some(timeout) = settings.visibility_timeout {
        given.insert("visibility_timeout".to_owned(), Value::from(timeout));
    }
    // kombu's option of the same meaning says it once more.
    if seconds(settings.broker_connection_timeout).is_some() {
        let timeout = given.entry("socket_connect_timeout");
        timeout.or_insert_with(|| settings.broker_connection_timeout.into());
    }
    let mut options = RedisOptions::from_json(&given)
        .map_err(|error| anyhow!("CELERY_BROKER_TRANSPORT_OPTIONS: {error}"))?;
    options.node = node.to_owned();
    warn_unknown(&options.unknown);
    let transport = RedisTransport::new(urls, options);
    Ok(Arc::new(
        transport.map_err(|error| anyhow!("QUEUE_BROKER_URL: {error}"))?,
    ))
}

fn amqp_transport(
    settings: &Settings,
    node: &str,
    urls: &[BrokerUrl],
) -> anyhow::Result<Arc<dyn Transport>> {
    // The settings first: an option of the same meaning says it once more.
    let defaults = amqp::Options {
        heartbeat: heartbeat(settings),
        shuffle: settings.broker_failover_strategy == "shuffle",
        connect_timeout: seconds(settings.broker_connection_timeout)
            .unwrap_or(amqp::Options::default().connect_timeout),
        connection_name: node.to_owned(),
        login_method: settings
            .broker_login_method
            .clone()
            .unwrap_or_else(|| "PLAIN".to_owned()),
        missing_queue: missing_queue(settings, &settings.task_default_queue),
        detect_quorum_queues: settings.worker_detect_quorum_queues,
        delayed_queue_type: delayed_queue_type(settings)?,
        ..amqp::Options::default()
    };
    let options = defaults
        .with_json(&settings.broker_transport_options)
        .map_err(|error| anyhow!("CELERY_BROKER_TRANSPORT_OPTIONS: {error}"))?;
    warn_unknown(&options.unknown);
    if settings.visibility_timeout.is_some() {
        log::warn!(
            "VISIBILITY_TIMEOUT has no effect on RabbitMQ, which gives messages back when a \
             connection ends, and by its consumer_timeout"
        );
    }
    if let Some(limit) = outlives_consumer_timeout(settings) {
        log::warn!(
            "{limit}, but RabbitMQ takes a message back that is not acknowledged within its \
             consumer_timeout, 30 minutes unless it was changed. A task that is acknowledged late \
             and takes longer goes on and is committed once, yet the connection is made again each \
             time. Set consumer_timeout in rabbitmq.conf (milliseconds) above the time limit, or the \
             time limit to at most {CONSUMER_TIMEOUT}"
        );
    }
    let transport = AmqpTransport::new(urls, options);
    Ok(Arc::new(
        transport.map_err(|error| anyhow!("QUEUE_BROKER_URL: {error}"))?,
    ))
}

/// What was set, unless it is Celery's default: then ours, which finds a dead connection sooner.
fn heartbeat(settings: &Settings) -> Duration {
    if settings.broker_heartbeat == Settings::default().broker_heartbeat {
        return amqp::Options::default().heartbeat;
    }
    seconds(settings.broker_heartbeat).unwrap_or_default()
}

fn delayed_queue_type(settings: &Settings) -> anyhow::Result<String> {
    let word = settings.broker_native_delayed_delivery_queue_type.clone();
    if !matches!(word.as_str(), "classic" | "quorum") {
        bail!(
            "CELERY_BROKER_NATIVE_DELAYED_DELIVERY_QUEUE_TYPE: '{word}' is none of classic and quorum"
        );
    }
    Ok(word)
}

/// Which limit lets a task run longer than a server waits for its acknowledgement.
/// A server does not tell its consumer_timeout, so the usual one is assumed.
fn outlives_consumer_timeout(settings: &Settings) -> Option<String> {
    if settings.task_acks_late == Some(false) {
        return None;
    }
    match settings.task_time_limit {
        Some(limit) if limit <= CONSUMER_TIMEOUT => None,
        Some(limit) => Some(format!("task_time_limit is {limit} seconds")),
        None => Some("there is no task_time_limit".to_owned()),
    }
}

fn warn_unknown(unknown: &[String]) {
    if !unknown.is_empty() {
        log::warn!(
            "CELERY_BROKER_TRANSPORT_OPTIONS: these have no effect here: {}",
            unknown.join(", ")
        );
    }
}

/// A queue as Celery makes it that is named somewhere and configured nowhere.
pub(super) fn missing_queue(settings: &Settings, name: &str) -> Queue {
    let mut queue = Queue::task(name);
    queue.max_priority = settings
        .task_queue_max_priority
        .and_then(|most| u8::try_from(most).ok());
    if settings.task_create_missing_queue_type.as_deref() == Some("quorum") {
        queue
            .arguments
            .insert("x-queue-type".to_owned(), "quorum".into());
    }
    queue
}

/// The result backend: as set, else the broker's Redis, else rpc://.
pub(super) fn backend(
    settings: &Settings,
    transport: &Arc<dyn Transport>,
) -> anyhow::Result<Arc<dyn Backend>> {
    let policy = settings
        .result_backend_transport_options
        .get("retry_policy");
    let given = policy.is_some_and(|policy| policy.get("max_retries").is_some());
    let usual = !given && !settings.result_backend_always_retry;
    backend_with(settings, transport, usual.then_some(RESULT_TRIES))
}

/// The same for a person who waits: what is away is said soon.
pub(super) fn backend_for_client(
    settings: &Settings,
    transport: &Arc<dyn Transport>,
) -> anyhow::Result<Arc<dyn Backend>> {
    backend_with(settings, transport, Some(CLIENT_TRIES))
}

fn backend_with(
    settings: &Settings,
    transport: &Arc<dyn Transport>,
    tries: Option<u32>,
) -> anyhow::Result<Arc<dyn Backend>> {
    let url = match &settings.result_backend {
        Some(url) => url.clone(),
        None if transport.driver() == "redis" => settings.broker_url.clone(),
        None => "rpc://".to_owned(),
    };
    let asked = settings.result_backend_max_retries;
    let asked = asked.and_then(|tries| u32::try_from(tries).ok());
    let options = backend::Options {
        max_retries: asked.or(tries),
        ..backend_options(settings)
    };
    backend::connect(&url, &options, Some(transport.clone())).map_err(|error| match error {
        // Names the variable itself.
        backend::Error::Url(text) => anyhow!(text),
        other => anyhow!("CELERY_RESULT_BACKEND: {other}"),
    })
}

fn backend_options(settings: &Settings) -> backend::Options {
    let defaults = backend::Options::default();
    backend::Options {
        expires: settings
            .result_expires
            .and_then(seconds)
            .unwrap_or_default(),
        failure_expires: settings.result_failure_expires.and_then(seconds),
        serializer: settings.result_serializer.clone(),
        compression: settings.result_compression.clone(),
        transport_options: settings.result_backend_transport_options.clone(),
        persistent: settings.result_persistent,
        chord_expires: settings.result_chord_expires.and_then(seconds),
        chord_join_timeout: seconds(settings.result_chord_join_timeout).unwrap_or_default(),
        extended: settings.result_extended,
        always_retry: settings.result_backend_always_retry,
        create_tables: settings.database_create_tables_at_setup,
        table_names: settings.database_table_names.clone(),
        table_schemas: settings.database_table_schemas.clone(),
        socket_timeout: settings
            .redis_socket_timeout
            .and_then(seconds)
            .unwrap_or(defaults.socket_timeout),
        connect_timeout: settings
            .redis_socket_connect_timeout
            .and_then(seconds)
            .unwrap_or(defaults.connect_timeout),
        ..defaults
    }
}

/// The database: as set, else an embedded file.
pub(super) fn database(settings: &Settings) -> anyhow::Result<Database> {
    let url = match &settings.database_url {
        Some(text) => DatabaseUrl::parse(text)?,
        None => DatabaseUrl::sqlite(embedded_path()),
    };
    Ok(Database::new(url))
}

/// Where the embedded database is: `$XDG_DATA_HOME/celeriac`, else `~/.local/share/celeriac`,
/// else the working directory.
fn embedded_path() -> PathBuf {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")));
    match base {
        Some(base) => base.join("celeriac").join("celeriac.sqlite"),
        None => PathBuf::from("celeriac.sqlite"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_beyond_consumer_timeout_is_pointed_out() {
        let outlives = |limit: Option<f64>, late: Option<bool>| {
            outlives_consumer_timeout(&Settings {
                task_time_limit: limit,
                task_acks_late: late,
                ..Settings::default()
            })
        };
        assert_eq!(outlives(Some(1800.0), None), None);
        let named =
            |text: Option<String>, words: &str| text.is_some_and(|text| text.contains(words));
        assert!(named(
            outlives(Some(1801.0), None),
            "task_time_limit is 1801 seconds"
        ));
        assert!(named(outlives(None, Some(true)), "no task_time_limit"));
        // Acknowledged before it runs, nothing waits for its end.
        assert_eq!(outlives(None, Some(false)), None);
    }
}
