//! Every setting of Celery 5.7 and what this worker makes of it.
//!
//! The names and defaults are those of `celery/app/defaults.py`. What is honoured has its entry
//! in [`SETTINGS`](super::SETTINGS); of the others it is said why not, here, in docs/settings.md
//! (which is made from this table) and in the log of a worker that finds one set.

/// What this worker makes of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has the effect it has in Celery.
    Honoured,
    /// No worker of any kind reads it.
    NotAWorkers,
    /// It could have an effect, and has none so far.
    NotYet,
    /// It has no meaning outside of Python, or another setting serves.
    Never,
}

/// A setting of Celery.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its name.
    pub name: &'static str,
    /// Celery's default; empty for none.
    pub default: &'static str,
    /// What becomes of it.
    pub status: Status,
    /// Why, in a few words.
    pub note: &'static str,
}

const fn known(
    name: &'static str,
    default: &'static str,
    status: Status,
    note: &'static str,
) -> Known {
    Known {
        name,
        default,
        status,
        note,
    }
}

use Status::{Honoured, Never, NotAWorkers, NotYet};

/// All of them, by name.
pub const CATALOGUE: &[Known] = &[
    known("accept_content", "json", Honoured, ""),
    known(
        "arangodb_backend_settings",
        "",
        Never,
        "there is no result backend for ArangoDB",
    ),
    known(
        "azureblockblob_base_path",
        "",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_connection_timeout",
        "20",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_container_name",
        "celery",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_read_timeout",
        "120",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_retry_increment_base",
        "2",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_retry_initial_backoff_sec",
        "2",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "azureblockblob_retry_max_attempts",
        "3",
        Never,
        "there is no result backend for Azure",
    ),
    known(
        "beat_cron_starting_deadline",
        "",
        NotAWorkers,
        "celery beat reads it",
    ),
    known(
        "beat_enable_remote_control",
        "False",
        NotAWorkers,
        "celery beat reads it",
    ),
    known(
        "beat_max_loop_interval",
        "0",
        NotAWorkers,
        "celery beat reads it",
    ),
    known(
        "beat_remote_control_max_tick_age",
        "",
        NotAWorkers,
        "celery beat reads it",
    ),
    known("beat_schedule", "{}", NotAWorkers, "celery beat reads it"),
    known(
        "beat_schedule_filename",
        "celerybeat-schedule",
        NotAWorkers,
        "celery beat reads it",
    ),
    known(
        "beat_scheduler",
        "celery.beat:PersistentScheduler",
        NotAWorkers,
        "celery beat reads it",
    ),
    known("beat_sync_every", "0", NotAWorkers, "celery beat reads it"),
    known(
        "broker_channel_error_retry",
        "False",
        NotYet,
        "a fault of a channel is one of its connection, and that is retried",
    ),
    known("broker_connection_max_retries", "100", Honoured, ""),
    known("broker_connection_retry", "True", Honoured, ""),
    known("broker_connection_retry_on_startup", "", Honoured, ""),
    known("broker_connection_timeout", "4", Honoured, ""),
    known("broker_failover_strategy", "", Honoured, ""),
    known("broker_heartbeat", "120", Honoured, ""),
    known(
        "broker_heartbeat_checkrate",
        "3.0",
        Never,
        "the AMQP library checks heartbeats by itself",
    ),
    known("broker_host", "", Never, "use broker_url"),
    known("broker_login_method", "", Honoured, ""),
    known(
        "broker_native_delayed_delivery_queue_type",
        "quorum",
        Honoured,
        "",
    ),
    known("broker_password", "", Never, "use broker_url"),
    known(
        "broker_pool_acquire_timeout",
        "",
        Never,
        "one connection carries everything that is published",
    ),
    known(
        "broker_pool_limit",
        "10",
        Never,
        "one connection carries everything that is published",
    ),
    known("broker_port", "", Never, "use broker_url"),
    known("broker_read_url", "", NotYet, "one broker serves both ways"),
    known("broker_transport", "", Never, "use broker_url"),
    known("broker_transport_options", "{}", Honoured, ""),
    known("broker_url", "", Honoured, ""),
    known(
        "broker_use_ssl",
        "False",
        NotYet,
        "use rediss:// or amqps:// and the parameters of the URL",
    ),
    known("broker_user", "", Never, "use broker_url"),
    known("broker_vhost", "", Never, "use broker_url"),
    known(
        "broker_write_url",
        "",
        NotYet,
        "one broker serves both ways",
    ),
    known(
        "cache_backend",
        "",
        Never,
        "there is no result backend for a cache server",
    ),
    known(
        "cache_backend_options",
        "{}",
        Never,
        "there is no result backend for a cache server",
    ),
    known(
        "cassandra_auth_kwargs",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_auth_provider",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_bundle_path",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_entry_ttl",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_keyspace",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_options",
        "{}",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_port",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_read_consistency",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_servers",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_table",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known(
        "cassandra_write_consistency",
        "",
        Never,
        "there is no result backend for Cassandra",
    ),
    known("control_exchange", "celery", Honoured, ""),
    known("control_queue_durable", "False", Honoured, ""),
    known("control_queue_exclusive", "True", Honoured, ""),
    known("control_queue_expires", "10.0", Honoured, ""),
    known("control_queue_ttl", "300.0", Honoured, ""),
    known(
        "cosmosdbsql_collection_name",
        "celerycol",
        Never,
        "there is no result backend for Cosmos DB",
    ),
    known(
        "cosmosdbsql_consistency_level",
        "Session",
        Never,
        "there is no result backend for Cosmos DB",
    ),
    known(
        "cosmosdbsql_database_name",
        "celerydb",
        Never,
        "there is no result backend for Cosmos DB",
    ),
    known(
        "cosmosdbsql_max_retry_attempts",
        "9",
        Never,
        "there is no result backend for Cosmos DB",
    ),
    known(
        "cosmosdbsql_max_retry_wait_time",
        "30",
        Never,
        "there is no result backend for Cosmos DB",
    ),
    known(
        "couchbase_backend_settings",
        "",
        Never,
        "there is no result backend for Couchbase",
    ),
    known("database_create_tables_at_setup", "True", Honoured, ""),
    known("database_engine_callback", "", Never, "a Python function"),
    known(
        "database_engine_options",
        "{'pool_pre_ping': True, 'pool_recycle': 3600}",
        NotYet,
        "the pool is one connection that is made again when lost",
    ),
    known(
        "database_short_lived_sessions",
        "False",
        NotYet,
        "one connection serves all",
    ),
    known("database_table_names", "", Honoured, ""),
    known("database_table_schemas", "", Honoured, ""),
    known(
        "database_url",
        "",
        Honoured,
        "names PostgreSQL for analyses; results in a database are result_backend=db+postgresql://…",
    ),
    known(
        "elasticsearch_max_retries",
        "",
        Never,
        "there is no result backend for Elasticsearch",
    ),
    known(
        "elasticsearch_retry_on_timeout",
        "",
        Never,
        "there is no result backend for Elasticsearch",
    ),
    known(
        "elasticsearch_save_meta_as_text",
        "True",
        Never,
        "there is no result backend for Elasticsearch",
    ),
    known(
        "elasticsearch_timeout",
        "",
        Never,
        "there is no result backend for Elasticsearch",
    ),
    known("enable_utc", "True", Honoured, ""),
    known("event_exchange", "celeryev", Honoured, ""),
    known("event_queue_durable", "False", Honoured, ""),
    known("event_queue_exclusive", "True", Honoured, ""),
    known("event_queue_expires", "60.0", Honoured, ""),
    known("event_queue_prefix", "celeryev", Honoured, ""),
    known("event_queue_ttl", "5.0", Honoured, ""),
    known("event_serializer", "json", NotYet, "events are JSON"),
    known(
        "gcs_base_path",
        "",
        Never,
        "there is no result backend for Google Cloud Storage",
    ),
    known(
        "gcs_bucket",
        "",
        Never,
        "there is no result backend for Google Cloud Storage",
    ),
    known(
        "gcs_project",
        "",
        Never,
        "there is no result backend for Google Cloud Storage",
    ),
    known(
        "gcs_ttl",
        "0",
        Never,
        "there is no result backend for Google Cloud Storage",
    ),
    known("imports", "", Never, "tasks are part of this binary"),
    known("include", "", Never, "tasks are part of this binary"),
    known(
        "mongodb_backend_settings",
        "",
        Never,
        "there is no result backend for MongoDB",
    ),
    known(
        "redis_backend_use_ssl",
        "",
        NotYet,
        "use rediss:// and the parameters of the URL",
    ),
    known("redis_db", "", NotYet, "use result_backend"),
    known("redis_host", "", NotYet, "use result_backend"),
    known(
        "redis_max_connections",
        "",
        NotYet,
        "one connection serves all",
    ),
    known("redis_password", "", NotYet, "use result_backend"),
    known("redis_port", "", NotYet, "use result_backend"),
    known(
        "redis_retry_on_timeout",
        "False",
        NotYet,
        "every fault of a connection is retried",
    ),
    known("redis_socket_connect_timeout", "", Honoured, ""),
    known("redis_socket_keepalive", "False", NotYet, "always on"),
    known("redis_socket_timeout", "120.0", Honoured, ""),
    known("redis_username", "", NotYet, "use result_backend"),
    known(
        "result_accept_content",
        "",
        NotYet,
        "accept_content decides",
    ),
    known("result_backend", "", Honoured, ""),
    known("result_backend_always_retry", "False", Honoured, ""),
    known(
        "result_backend_base_sleep_between_retries_ms",
        "10",
        NotYet,
        "retry_policy in result_backend_transport_options decides",
    ),
    known("result_backend_max_retries", "without limit", Honoured, ""),
    known(
        "result_backend_max_sleep_between_retries_ms",
        "10000",
        NotYet,
        "retry_policy in result_backend_transport_options decides",
    ),
    known("result_backend_transport_options", "{}", Honoured, ""),
    known("result_cache_max", "-1", NotAWorkers, "a client's cache"),
    known("result_chord_expires", "", Honoured, ""),
    known("result_chord_join_timeout", "3.0", Honoured, ""),
    known("result_chord_retry_interval", "1.0", Honoured, ""),
    known("result_compression", "", Honoured, ""),
    known(
        "result_exchange",
        "celeryresults",
        NotYet,
        "replies go to the queue of the caller",
    ),
    known(
        "result_exchange_type",
        "direct",
        NotYet,
        "replies go to the queue of the caller",
    ),
    known("result_expires", "1 day", Honoured, ""),
    known("result_extended", "False", Honoured, ""),
    known("result_failure_expires", "", Honoured, ""),
    known("result_persistent", "", Honoured, ""),
    known("result_serializer", "json", Honoured, ""),
    known(
        "s3_access_key_id",
        "",
        Never,
        "there is no result backend for S3",
    ),
    known(
        "s3_base_path",
        "",
        Never,
        "there is no result backend for S3",
    ),
    known("s3_bucket", "", Never, "there is no result backend for S3"),
    known(
        "s3_endpoint_url",
        "",
        Never,
        "there is no result backend for S3",
    ),
    known("s3_region", "", Never, "there is no result backend for S3"),
    known(
        "s3_secret_access_key",
        "",
        Never,
        "there is no result backend for S3",
    ),
    known(
        "security_cert_store",
        "",
        Never,
        "needs the serializer auth",
    ),
    known(
        "security_certificate",
        "",
        Never,
        "needs the serializer auth",
    ),
    known(
        "security_digest",
        "sha256",
        Never,
        "needs the serializer auth",
    ),
    known("security_key", "", Never, "needs the serializer auth"),
    known(
        "security_key_password",
        "",
        Never,
        "needs the serializer auth",
    ),
    known("task_acks_late", "False", Honoured, ""),
    known("task_acks_on_failure", "", Honoured, ""),
    known("task_acks_on_failure_or_timeout", "True", Honoured, ""),
    known("task_acks_on_timeout", "", Honoured, ""),
    known(
        "task_allow_error_cb_on_chord_header",
        "False",
        NotYet,
        "errbacks of a chord go to its body, as by default",
    ),
    known(
        "task_always_eager",
        "False",
        Never,
        "runs tasks in the caller",
    ),
    known("task_annotations", "", Honoured, ""),
    known("task_compression", "", Honoured, ""),
    known(
        "task_create_missing_queue_exchange_type",
        "",
        NotYet,
        "missing queues are direct ones",
    ),
    known("task_create_missing_queue_type", "classic", Honoured, ""),
    known("task_create_missing_queues", "True", Honoured, ""),
    known(
        "task_default_delivery_mode",
        "2",
        NotYet,
        "messages are persistent",
    ),
    known("task_default_exchange", "", Honoured, ""),
    known("task_default_exchange_type", "direct", Honoured, ""),
    known("task_default_priority", "", Honoured, ""),
    known("task_default_queue", "celery", Honoured, ""),
    known("task_default_queue_type", "classic", Honoured, ""),
    known("task_default_rate_limit", "", Honoured, ""),
    known("task_default_routing_key", "", Honoured, ""),
    known(
        "task_eager_propagates",
        "False",
        Never,
        "runs tasks in the caller",
    ),
    known("task_ignore_result", "False", Honoured, ""),
    known("task_inherit_parent_priority", "False", Honoured, ""),
    known(
        "task_protocol",
        "2",
        Never,
        "version 2 is written, both are read",
    ),
    known("task_publish_retry", "True", Honoured, ""),
    known(
        "task_publish_retry_policy",
        "{'max_retries': 3, 'interval_start': 0, 'interval_max': 1, 'interval_step': 0.2}",
        Honoured,
        "",
    ),
    known("task_queue_max_priority", "", Honoured, ""),
    known("task_queues", "", Honoured, ""),
    known("task_reject_on_worker_lost", "", Honoured, ""),
    known(
        "task_remote_tracebacks",
        "False",
        Never,
        "needs Python's pickle",
    ),
    known(
        "task_repr_maxlevels",
        "3",
        NotYet,
        "three levels, as by default",
    ),
    known("task_retry_on_worker_lost", "False", Honoured, ""),
    known("task_routes", "", Honoured, ""),
    known("task_send_sent_event", "False", Honoured, ""),
    known("task_serializer", "json", Honoured, ""),
    known("task_soft_time_limit", "", Honoured, ""),
    known(
        "task_store_eager_result",
        "False",
        Never,
        "runs tasks in the caller",
    ),
    known("task_store_errors_even_if_ignored", "False", Honoured, ""),
    known("task_time_limit", "", Honoured, ""),
    known("task_track_started", "False", Honoured, ""),
    known("timezone", "", Honoured, ""),
    known("worker_agent", "", Never, "a Python class"),
    known(
        "worker_autoscaler",
        "celery.worker.autoscale:Autoscaler",
        Never,
        "a Python class",
    ),
    known(
        "worker_cancel_long_running_tasks_on_connection_loss",
        "False",
        Honoured,
        "",
    ),
    known("worker_concurrency", "", Honoured, ""),
    known(
        "worker_consumer",
        "celery.worker.consumer:Consumer",
        Never,
        "a Python class",
    ),
    known("worker_deduplicate_successful_tasks", "False", Honoured, ""),
    known("worker_detect_quorum_queues", "True", Honoured, ""),
    known(
        "worker_direct",
        "False",
        NotYet,
        "a queue of the worker's own; name it with -Q instead",
    ),
    known("worker_disable_prefetch", "False", Honoured, ""),
    known("worker_disable_rate_limits", "False", Honoured, ""),
    known(
        "worker_enable_prefetch_count_reduction",
        "True",
        Honoured,
        "on RabbitMQ without quorum queues; elsewhere left out, as in Celery",
    ),
    known("worker_enable_remote_control", "True", Honoured, ""),
    known("worker_enable_soft_shutdown_on_idle", "False", Honoured, ""),
    known("worker_eta_task_limit", "", Honoured, ""),
    known(
        "worker_hijack_root_logger",
        "True",
        Honoured,
        "shown by `conf`; nothing else logs here",
    ),
    known("worker_log_color", "", Honoured, ""),
    known(
        "worker_log_datefmt",
        "",
        NotYet,
        "the log has Celery's line",
    ),
    known(
        "worker_log_format",
        "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s",
        NotYet,
        "the log has Celery's line",
    ),
    known(
        "worker_lost_wait",
        "10.0",
        NotYet,
        "a lost child is noticed at once",
    ),
    known("worker_max_memory_per_child", "", Honoured, ""),
    known("worker_max_tasks_per_child", "", Honoured, ""),
    known(
        "worker_pool",
        "prefork",
        Never,
        "children are processes of this binary",
    ),
    known(
        "worker_pool_putlocks",
        "True",
        Never,
        "a slot is always free before it is given work",
    ),
    known("worker_pool_restarts", "False", Honoured, ""),
    known(
        "worker_pool_start_method",
        "fork",
        Never,
        "children are started, never forked",
    ),
    known("worker_prefetch_multiplier", "4", Honoured, ""),
    known(
        "worker_proc_alive_timeout",
        "4.0",
        Never,
        "a child is of use when it says so",
    ),
    known(
        "worker_redirect_stdouts",
        "True",
        Never,
        "tasks print nothing",
    ),
    known(
        "worker_redirect_stdouts_level",
        "WARNING",
        Never,
        "tasks print nothing",
    ),
    known("worker_send_task_events", "False", Honoured, ""),
    known("worker_soft_shutdown_timeout", "0.0", Honoured, ""),
    known("worker_state_db", "", Honoured, ""),
    known(
        "worker_task_log_datefmt",
        "",
        NotYet,
        "the log has Celery's line",
    ),
    known(
        "worker_task_log_format",
        "[%(asctime)s: %(levelname)s/%(processName)s] %(task_name)s[%(task_id)s]: %(message)s",
        NotYet,
        "the log has Celery's line",
    ),
    known("worker_timer", "", Never, "a Python class"),
    known(
        "worker_timer_precision",
        "1.0",
        Never,
        "the timer sleeps until the first is due",
    ),
];

impl Status {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Honoured => "honoured",
            NotAWorkers => "not a worker's",
            NotYet => "not yet",
            Never => "never",
        }
    }
}

/// The variables that are set although they have no effect, with the reason.
pub fn without_effect(is_set: impl Fn(&str) -> bool) -> Vec<(String, &'static Known)> {
    let idle = CATALOGUE.iter().filter(|known| known.status != Honoured);
    let variables =
        idle.map(|known| (format!("CELERY_{}", known.name.to_ascii_uppercase()), known));
    variables.filter(|(variable, _)| is_set(variable)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SETTINGS;

    #[test]
    fn what_is_honoured_has_an_entry_among_the_settings_and_the_rest_a_reason() {
        for known in CATALOGUE {
            let has_entry = SETTINGS.iter().any(|setting| setting.name == known.name);
            let fits = has_entry || known.status != Honoured;
            assert!(
                fits && !(has_entry && known.status != Honoured),
                "{}",
                known.name
            );
            assert!(
                known.status == Honoured || !known.note.is_empty(),
                "{}",
                known.name
            );
        }
        assert_eq!(CATALOGUE.len(), 207);
    }

    #[test]
    fn only_settings_without_effect_are_reported() {
        let set = [
            "CELERY_WORKER_POOL",
            "CELERY_TASK_TIME_LIMIT",
            "CELERY_UNKNOWN",
        ];
        let found = without_effect(|name| set.contains(&name));
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["CELERY_WORKER_POOL"]);
    }

    /// What a test sets it names; that it shows the effect is for who reads it.
    #[test]
    fn each_honoured_setting_is_named_by_a_test() {
        let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the project is");
        let mut open = vec![std::path::PathBuf::from(root).join("tests/it")];
        let mut words = std::collections::HashSet::new();
        while let Some(path) = open.pop() {
            if path.is_dir() {
                let entries = std::fs::read_dir(path).unwrap();
                open.extend(entries.map(|entry| entry.unwrap().path()));
                continue;
            }
            let bytes = std::fs::read(path).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            let parts = text.split(|sign: char| !sign.is_alphanumeric() && sign != '_');
            words.extend(parts.map(str::to_owned));
        }
        for known in CATALOGUE.iter().filter(|known| known.status == Honoured) {
            let setting = SETTINGS.iter().find(|setting| setting.name == known.name);
            let short = setting.expect("it has an entry").variables.iter();
            let variable = format!("CELERY_{}", known.name.to_ascii_uppercase());
            let mut names = [known.name, &variable].into_iter().chain(short.copied());
            assert!(names.any(|name| words.contains(name)), "{}", known.name);
        }
    }

    /// The document, as it has to be.
    fn document() -> String {
        let mut text = String::from(
            "# Settings\n\nMade from the tables in src/config; `UPDATE_DOCS=1 cargo test --lib \
             config::catalogue` writes it anew.\n\nEach setting is the variable `CELERY_` and its \
             name in capitals, or `name=value` on the command line of the worker; short variables \
             are named.\n\n## Honoured\n\n| setting | default | variable | meaning |\n| --- | --- | --- | --- |\n",
        );
        let defaults = crate::config::Settings::default().all();
        let idle = |name: &str| {
            let known = CATALOGUE.iter().find(|known| known.name == name);
            known.is_some_and(|known| known.status != Honoured)
        };
        for setting in SETTINGS.iter().filter(|setting| !idle(setting.name)) {
            let default = match &defaults[setting.name] {
                serde_json::Value::Null => String::new(),
                other if setting.secret && other != "" => "*".to_owned(),
                other => format!("`{other}`"),
            };
            let variables = setting.variables.join(", ");
            let meaning = setting.doc.trim().replace('|', "\\|");
            text.push_str(&format!(
                "| `{}` | {default} | {variables} | {meaning} |\n",
                setting.name
            ));
        }
        text.push_str("\n## Settings of Celery 5.7\n\n| setting | Celery's default | here | why |\n| --- | --- | --- | --- |\n");
        for known in CATALOGUE {
            let default = match known.default {
                "" => String::new(),
                some => format!("`{}`", some.replace('|', "\\|")),
            };
            let (status, note) = (known.status.text(), known.note);
            text.push_str(&format!(
                "| `{}` | {default} | {status} | {note} |\n",
                known.name
            ));
        }
        text
    }

    #[test]
    fn the_document_tells_what_the_tables_say() {
        let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the project is");
        let path = format!("{root}/docs/settings.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, document()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(
            written == document(),
            "docs/settings.md is old: UPDATE_DOCS=1 writes it anew"
        );
    }
}
