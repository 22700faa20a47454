//! The table of settings that celeriac honours.

use serde_json::{Map, Value};

use super::value::SettingValue;

/// What is known of a setting without its value.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Celery's name, or ours.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// A correct value, for error messages.
    pub example: &'static str,
    /// Variables that set it beside `CELERY_<NAME>`; the first that is set wins over it.
    pub variables: &'static [&'static str],
    /// Whether its value may hold a password and is never shown.
    pub secret: bool,
}

macro_rules! settings {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident: $type:ty = $default:expr
        $(, celery = $celery:expr)?
        $(, variables = [$($variable:literal),*])?
        $(, secret = $secret:literal)?
        ;
    )*) => {
        /// The value of every setting.
        #[derive(Clone)]
        pub struct Settings {
            $( $(#[doc = $doc])+ pub $name: $type, )*
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $( $name: $default, )* }
            }
        }

        /// Every setting, in the order of the table.
        pub const SETTINGS: &[Setting] = &[
            $( Setting {
                name: stringify!($name),
                doc: concat!($($doc),+),
                example: <$type as SettingValue>::EXAMPLE,
                variables: &[$($($variable),*)?],
                secret: false $(|| $secret)?,
            }, )*
        ];

        impl Settings {
            /// Sets one setting from text. `None`: there is no setting of that name.
            pub fn set(&mut self, name: &str, text: &str) -> Option<Result<(), String>> {
                match name {
                    $( stringify!($name) => Some(
                        <$type as SettingValue>::parse(text).map(|value| self.$name = value)
                    ), )*
                    _ => None,
                }
            }

            /// One setting as Python would show it.
            pub fn get(&self, name: &str) -> Option<Value> {
                match name {
                    $( stringify!($name) => Some(self.$name.to_value()), )*
                    _ => None,
                }
            }

            /// The settings whose value is not Celery's default, unmasked.
            pub fn changed(&self) -> Map<String, Value> {
                let mut changed = Map::new();
                $(
                    let celery: $type = settings!(@celery $default $(, $celery)?);
                    let value = self.$name.to_value();
                    if value != celery.to_value() {
                        changed.insert(stringify!($name).to_owned(), value);
                    }
                )*
                changed
            }

            /// All settings with their values, unmasked.
            pub fn all(&self) -> Map<String, Value> {
                let mut all = Map::new();
                $( all.insert(stringify!($name).to_owned(), self.$name.to_value()); )*
                all
            }
        }
    };
    (@celery $default:expr) => { $default };
    (@celery $default:expr, $celery:expr) => { $celery };
}

fn words(items: &[&str]) -> Vec<String> {
    items.iter().map(|&item| item.to_owned()).collect()
}

fn text(value: &str) -> String {
    value.to_owned()
}

settings! {
    /// Broker: redis://, rediss://, redis+socket://, sentinel://, amqp:// or amqps://; several
    /// separated by `;` are tried in turn.
    broker_url: String = text("redis://localhost:6379/0"), celery = String::new(),
        variables = ["QUEUE_BROKER_URL"], secret = true;
    /// Options of the transport as a JSON object, with kombu's names.
    broker_transport_options: Map<String, Value> = Map::new();
    /// Seconds a connection attempt to the broker may take.
    broker_connection_timeout: f64 = 4.0;
    /// Whether a lost connection to the broker is made again.
    broker_connection_retry: bool = true;
    /// The same for the first connection; absent: as `broker_connection_retry`.
    broker_connection_retry_on_startup: Option<bool> = None;
    /// How often a connection is tried before the worker gives up; absent: for ever.
    broker_connection_max_retries: Option<u64> = Some(100);
    /// In which order the URLs after the first are tried: round-robin or shuffle.
    broker_failover_strategy: String = text("round-robin");
    /// AMQP heartbeat in seconds; Celery's 120 means 5 here, 0 leaves it to the server.
    broker_heartbeat: f64 = 120.0;
    /// How the worker logs in to RabbitMQ: PLAIN, AMQPLAIN or EXTERNAL; absent: PLAIN.
    broker_login_method: Option<String> = None;
    /// classic or quorum: the RabbitMQ queues that delay messages where quorum queues are used.
    broker_native_delayed_delivery_queue_type: String = text("quorum");
    /// Seconds after which Redis hands an unacknowledged message to somebody else.
    visibility_timeout: Option<f64> = None, variables = ["VISIBILITY_TIMEOUT"];
    /// Where results are kept; absent: the broker's Redis, else rpc://.
    result_backend: Option<String> = None, secret = true;
    /// Options of the result backend as a JSON object, with kombu's names.
    result_backend_transport_options: Map<String, Value> = Map::new();
    /// Seconds a result is kept; absent or 0: for ever.
    result_expires: Option<f64> = Some(86400.0);
    /// The same for failures only; absent: as `result_expires`.
    result_failure_expires: Option<f64> = None;
    /// Seconds the keys of a chord are kept; absent: as `result_expires`.
    result_chord_expires: Option<f64> = None;
    /// Seconds a chord may take to join its parts.
    result_chord_join_timeout: f64 = 3.0;
    /// Seconds between two looks at the parts of a chord, where the backend cannot count them.
    result_chord_retry_interval: f64 = 1.0;
    /// Stores name, arguments, worker, retries and queue with the result.
    result_extended: bool = false;
    /// json, msgpack or yaml.
    result_serializer: String = text("json");
    /// gzip, bzip2, lzma or zstd; absent: none.
    result_compression: Option<String> = None;
    /// Whether rpc:// results survive a restart of the broker.
    result_persistent: bool = false;
    /// Whether a result is tried for ever while its backend is away, unless
    /// `result_backend_max_retries` says how often.
    result_backend_always_retry: bool = false;
    /// How often a result is tried while its backend is away; absent: as the `retry_policy` of
    /// `result_backend_transport_options`, else for five minutes.
    result_backend_max_retries: Option<u64> = None;
    /// Seconds a command of the Redis backend may take before its connection is given up.
    redis_socket_timeout: Option<f64> = None;
    /// Seconds a connection attempt to the Redis backend may take.
    redis_socket_connect_timeout: Option<f64> = None;
    /// Whether the tables of a db+ backend are made where they are missing.
    database_create_tables_at_setup: bool = true;
    /// Names of those tables as a JSON object: task, group.
    database_table_names: Map<String, Value> = Map::new();
    /// Schemas of those tables as a JSON object: task, group.
    database_table_schemas: Map<String, Value> = Map::new();
    /// Serializers that are accepted in messages.
    accept_content: Vec<String> = words(&["json"]);
    /// Serializer of messages that the worker sends.
    task_serializer: String = text("json");
    /// Compression of messages that the worker sends.
    task_compression: Option<String> = None;
    /// Acknowledge after the task instead of before; absent: each task's own choice.
    task_acks_late: Option<bool> = None;
    /// Late acknowledgement: whether a failed or timed out task counts as done.
    task_acks_on_failure_or_timeout: bool = true;
    /// The same for failures only; absent: as above.
    task_acks_on_failure: Option<bool> = None;
    /// The same for time-outs only; absent: as above.
    task_acks_on_timeout: Option<bool> = None;
    /// Late acknowledgement: a task whose child died goes back to the queue, until three died.
    task_reject_on_worker_lost: bool = false;
    /// A task whose child died is retried.
    task_retry_on_worker_lost: bool = false;
    /// Stores STARTED when a task starts.
    task_track_started: bool = false;
    /// Hard time limit in seconds; absent: none.
    task_time_limit: Option<f64> = Some(1800.0), celery = None;
    /// Soft time limit in seconds; absent: none.
    task_soft_time_limit: Option<f64> = None;
    /// Stores no results.
    task_ignore_result: bool = false;
    /// Stores failures even of tasks whose results are ignored.
    task_store_errors_even_if_ignored: bool = false;
    /// Sends a task-sent event for every message the worker publishes.
    task_send_sent_event: bool = false;
    /// Queue of messages without another destination.
    task_default_queue: String = text("celery");
    /// Exchange of the default queue; absent: the queue's name.
    task_default_exchange: Option<String> = None;
    /// Exchange type of the default queue.
    task_default_exchange_type: String = text("direct");
    /// Routing key of the default queue; absent: the queue's name.
    task_default_routing_key: Option<String> = None;
    /// classic or quorum (RabbitMQ).
    task_default_queue_type: String = text("classic");
    /// classic or quorum: what a queue is made as that is configured nowhere; absent: classic.
    task_create_missing_queue_type: Option<String> = None;
    /// Priority of messages without one.
    task_default_priority: Option<u64> = None;
    /// `x-max-priority` of queues that name none (RabbitMQ).
    task_queue_max_priority: Option<u64> = None;
    /// Callbacks inherit the priority of their parent.
    task_inherit_parent_priority: bool = false;
    /// The queues to consume, as JSON: names, or objects with name, exchange, routing_key.
    task_queues: Value = Value::Null;
    /// Whether `-Q` may name a queue that `task_queues` does not know.
    task_create_missing_queues: bool = true;
    /// Where the tasks that the worker sends go, as JSON: {"name or pattern": {"queue": "…"}}.
    task_routes: Value = Value::Null;
    /// Options by task name, as JSON: {"test_task": {"rate_limit": "10/m"}}.
    task_annotations: Value = Value::Null;
    /// Rate limit of every task type without its own, such as 10/m.
    task_default_rate_limit: Option<String> = None;
    /// Tries a publish again when the broker is away.
    task_publish_retry: bool = true;
    /// How: max_retries, interval_start, interval_step, interval_max.
    task_publish_retry_policy: Map<String, Value> = default_retry_policy();
    /// Zone in which times are shown.
    timezone: Option<String> = None;
    /// Whether times are in UTC.
    enable_utc: bool = true;
    /// Tasks that run at once; absent: the CPUs this container may use.
    worker_concurrency: Option<u64> = None;
    /// Messages fetched ahead for each slot; 0: without limit.
    worker_prefetch_multiplier: u64 = 1, celery = 4;
    /// Fetches no message before a slot is free.
    worker_disable_prefetch: bool = false;
    /// Tasks after which a child is replaced; absent: never.
    worker_max_tasks_per_child: Option<u64> = Some(50), celery = None;
    /// KiB of resident memory after which a child is replaced; absent: never.
    worker_max_memory_per_child: Option<u64> = None;
    /// Sends task events from the start.
    worker_send_task_events: bool = false;
    /// Switches rate limits off.
    worker_disable_rate_limits: bool = false;
    /// File that keeps revoked ids and the clock over restarts.
    worker_state_db: Option<String> = None;
    /// Most revoked ids that are remembered.
    worker_revokes_max: u64 = 50_000;
    /// Seconds a revoked id is remembered.
    worker_revoke_expires: f64 = 10_800.0;
    /// Seconds without need after which --autoscale makes the pool smaller.
    autoscale_keepalive: f64 = 30.0, variables = ["AUTOSCALE_KEEPALIVE"];
    /// Ends running late-acknowledged tasks when the broker is lost.
    worker_cancel_long_running_tasks_on_connection_loss: bool = false;
    /// Lowers prefetch by the running tasks after a reconnect.
    worker_enable_prefetch_count_reduction: bool = true;
    /// Skips redelivered tasks that succeeded before.
    worker_deduplicate_successful_tasks: bool = false;
    /// How far ETA tasks, which are held in memory, may raise the prefetch count; absent: without limit.
    worker_eta_task_limit: Option<u64> = None;
    /// Limits prefetch for each consumer where quorum queues are used (RabbitMQ).
    worker_detect_quorum_queues: bool = true;
    /// Listens to remote control commands.
    worker_enable_remote_control: bool = true;
    /// Allows the pool_restart command.
    worker_pool_restarts: bool = false;
    /// Seconds that running tasks have at a cold shutdown before they are ended.
    worker_soft_shutdown_timeout: f64 = 0.0;
    /// Waits that time even without running tasks (for ETA tasks).
    worker_enable_soft_shutdown_on_idle: bool = false;
    /// Shown by `conf`; the log is the worker's own anyhow.
    worker_hijack_root_logger: bool = true;
    /// Colours in the log; absent: on a terminal.
    worker_log_color: Option<bool> = None;
    /// Remote-control commands that are refused, such as shutdown,pool_restart,terminate.
    worker_disabled_commands: Vec<String> = Vec::new();
    /// Exchange of remote control.
    control_exchange: String = text("celery");
    /// Seconds that remote-control messages wait for their reader (RabbitMQ).
    control_queue_ttl: Option<f64> = Some(300.0);
    /// Seconds after which a queue of remote control that nobody reads is removed.
    control_queue_expires: Option<f64> = Some(10.0);
    /// Lets a queue of remote control belong to one connection (RabbitMQ).
    control_queue_exclusive: bool = true;
    /// Makes the worker's queue of remote control outlive the broker (RabbitMQ).
    control_queue_durable: bool = false;
    /// Exchange of events.
    event_exchange: String = text("celeryev");
    /// First word in the names of queues that receive events.
    event_queue_prefix: String = text("celeryev");
    /// Seconds that events wait for their reader (RabbitMQ).
    event_queue_ttl: Option<f64> = Some(5.0);
    /// Seconds after which a queue of events that nobody reads is removed.
    event_queue_expires: Option<f64> = Some(60.0);
    /// Lets a queue of events belong to one connection (RabbitMQ).
    event_queue_exclusive: bool = true;
    /// Makes a queue of events outlive the broker (RabbitMQ).
    event_queue_durable: bool = false;
    /// PostgreSQL or SQLite; absent: an embedded SQLite file.
    database_url: Option<String> = None, variables = ["DATABASE_URL"], secret = true;
    /// Allows file:// and loopback repositories; for development.
    allow_local_repos: bool = false, variables = ["ALLOW_LOCAL_REPOS"];
    /// Allows http:// beside https://.
    allow_http_repos: bool = false, variables = ["ALLOW_HTTP_REPOS"];
    /// Hosts that repositories may be fetched from; empty: any public one.
    repo_hosts: Vec<String> = Vec::new(), variables = ["REPO_HOSTS"];
    /// PEM file of the authorities trusted for https repositories; absent: Mozilla's.
    repo_ca_file: Option<String> = None, variables = ["REPO_CA_FILE", "SSL_CERT_FILE"];
    /// Branch to analyse; absent: the repository's default branch.
    clone_branch: Option<String> = None, variables = ["CLONE_BRANCH"];
    /// Commits of history to fetch; absent: all. A shallow history falsifies blame.
    clone_depth: Option<u64> = None, variables = ["CLONE_DEPTH"];
    /// Largest repository in bytes on the wire.
    clone_max_bytes: u64 = 8 << 30, variables = ["CLONE_MAX_BYTES"];
    /// Most objects a repository may have.
    clone_max_objects: u64 = 30_000_000, variables = ["CLONE_MAX_OBJECTS"];
    /// Largest object of a repository in bytes.
    clone_max_object_size: u64 = 1 << 30, variables = ["CLONE_MAX_OBJECT_SIZE"];
    /// Most bytes of all objects of a repository together, unpacked.
    clone_max_inflated: u64 = 1 << 40, variables = ["CLONE_MAX_INFLATED"];
    /// Most bytes of disk that one clone may take.
    clone_disk_quota: u64 = 10 << 30, variables = ["CLONE_DISK_QUOTA"];
    /// Bytes that stay free on the disk of the clones; absent: 256 MiB, at most a twentieth of it.
    clone_disk_reserve: Option<u64> = None, variables = ["CLONE_DISK_RESERVE"];
    /// Threads of one analysis; absent: the slot's share of the CPUs, at least two where there are two.
    blame_threads: Option<u64> = None, variables = ["BLAME_THREADS"];
    /// MiB that the blame of one analysis keeps of unpacked objects.
    blame_cache: u64 = 256, variables = ["BLAME_CACHE"];
    /// How often an analysis is tried again after a failure that may heal.
    analysis_max_retries: u64 = 3, variables = ["ANALYSIS_MAX_RETRIES"];
    /// Seconds before it is tried again for the first time; twice as long each time.
    analysis_retry_backoff: f64 = 2.0, variables = ["ANALYSIS_RETRY_BACKOFF"];
    /// Most seconds between two tries.
    analysis_retry_backoff_max: f64 = 600.0, variables = ["ANALYSIS_RETRY_BACKOFF_MAX"];
    /// Takes off up to half of that time at random.
    analysis_retry_jitter: bool = true, variables = ["ANALYSIS_RETRY_JITTER"];
    /// Keys that encrypt stored tokens, the first for writing, all for reading.
    token_encryption_keys: Vec<String> = Vec::new(), variables = ["TOKEN_ENCRYPTION_KEYS"], secret = true;
    /// Seconds that a token encrypted by the backend stays valid in a task; 0: for ever.
    token_ttl: f64 = 0.0, variables = ["TOKEN_TTL"];
    /// Analyses of one user that may run at once over all workers; 0: without limit.
    user_max_running: u64 = 0, variables = ["USER_MAX_RUNNING"];
    /// Analyses one user may start, such as 10/m; absent: without limit.
    user_rate_limit: Option<String> = None, variables = ["USER_RATE_LIMIT"];
    /// Seconds in which a stored analysis of the same commit answers; 0: only one that was waited for.
    result_reuse_ttl: f64 = 0.0, variables = ["RESULT_REUSE_TTL"];
    /// Restricts what a child may do: system calls and files.
    sandbox: bool = true, variables = ["SANDBOX"];
}

fn default_retry_policy() -> Map<String, Value> {
    let mut policy = Map::new();
    policy.insert("max_retries".to_owned(), Value::from(3));
    policy.insert("interval_start".to_owned(), Value::from(0));
    policy.insert("interval_max".to_owned(), Value::from(1));
    policy.insert("interval_step".to_owned(), Value::from(0.2));
    policy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_workers_defaults_show_as_changed() {
        let changed = Settings::default().changed();
        assert_eq!(changed["task_time_limit"], 1800);
        assert_eq!(changed["worker_prefetch_multiplier"], 1);
        assert_eq!(changed["worker_max_tasks_per_child"], 50);
        assert!(!changed.contains_key("result_expires"));
    }

    #[test]
    fn every_setting_reads_its_own_example() {
        for setting in SETTINGS {
            let mut settings = Settings::default();
            let outcome = settings.set(setting.name, setting.example);
            assert_eq!(outcome, Some(Ok(())), "{}", setting.name);
            assert!(settings.get(setting.name).is_some());
        }
        assert_eq!(Settings::default().set("no_such_setting", "1"), None);
    }
}
