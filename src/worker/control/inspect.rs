//! The commands that look.

use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Map, Value, json};

use super::{Arguments, Control, Outcome, is_truthy, ok, type_name};
use crate::config::Settings;
use crate::events::{Event, Software};
use crate::pidbox::CommandError;
use crate::protocol::exception::Exception;
use crate::protocol::mask::mask_secrets;
use crate::protocol::saferepr;
use crate::transport::Queue;
use crate::worker::mingle::revoked_ids;
use crate::worker::request::{Phase, Request};
use crate::worker::{autoscale, strategy};

/// Settings whose names say that their values are not for everybody.
const HIDDEN: [&str; 8] = [
    "API",
    "TOKEN",
    "KEY",
    "SECRET",
    "PASS",
    "PROFANITIES_LIST",
    "SIGNATURE",
    "DATABASE",
];

impl Control {
    pub(super) fn active(&self, mut arguments: Arguments<'_>) -> Outcome {
        let safe = arguments.truthy("safe");
        Ok(self.infos(Phase::Active, safe))
    }

    pub(super) fn reserved(&self) -> Value {
        self.infos(Phase::Reserved, false)
    }

    fn infos(&self, phase: Phase, safe: bool) -> Value {
        let requests = self.worker.state.in_phase(phase);
        requests
            .iter()
            .map(|request| request.info(&self.worker.node, safe))
            .collect()
    }

    pub(super) fn scheduled(&self) -> Value {
        let serials = self.worker.state.scheduled.serials();
        serials
            .into_iter()
            .filter_map(|serial| self.reread(serial))
            .map(|request| request.schedule_info(&self.worker.node))
            .collect()
    }

    fn reread(&self, serial: u64) -> Option<Request> {
        let delivery = self.worker.state.scheduled.show(serial)?;
        strategy::reread(&self.worker, serial, &delivery)
    }

    /// The request of this id among those that wait for their ETA.
    pub(super) fn find_scheduled(&self, id: &str) -> Option<Request> {
        let serials = self.worker.state.scheduled.candidates(id);
        let mut found = serials.into_iter().filter_map(|serial| self.reread(serial));
        found.find(|request| request.id() == id)
    }

    pub(super) fn registered(&self, mut arguments: Arguments<'_>) -> Outcome {
        // Clients send an empty list when they ask for nothing in particular.
        let items = match arguments.take("taskinfoitems").filter(is_truthy) {
            Some(Value::Array(items)) => items
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            Some(Value::String(item)) => vec![item],
            Some(Value::Object(items)) => items.into_iter().map(|(item, _)| item).collect(),
            Some(other @ (Value::Number(_) | Value::Bool(_))) => return Err(no_list(&other)),
            _ => ["exchange", "routing_key", "rate_limit"]
                .map(str::to_owned)
                .to_vec(),
        };
        let builtins = arguments.truthy("builtins");
        let describe = |entry: &crate::tasks::Entry| {
            let options = entry.options();
            let shown = |item: &String| {
                let value = match item.as_str() {
                    "rate_limit" => Value::from(options.rate_limit.clone()),
                    "acks_late" => Value::from(options.acks_late),
                    "ignore_result" => Value::from(options.ignore_result),
                    "track_started" => Value::from(options.track_started),
                    "send_events" => Value::from(options.send_events),
                    "max_retries" => Value::from(options.max_retries),
                    "name" => Value::from(entry.name),
                    "time_limit" => seconds(options.time_limit),
                    "soft_time_limit" => seconds(options.soft_time_limit),
                    _ => Value::Null,
                };
                (!value.is_null()).then(|| format!("{item}={}", saferepr::str(&value)))
            };
            let fields: Vec<String> = items.iter().filter_map(shown).collect();
            if fields.is_empty() {
                entry.name.to_owned()
            } else {
                format!("{} [{}]", entry.name, fields.join(" "))
            }
        };
        let registry = &self.worker.registry;
        Ok(if builtins {
            registry.all().map(describe).collect()
        } else {
            registry.iter().map(describe).collect()
        })
    }

    pub(super) fn active_queues(&self, arguments: &Arguments<'_>) -> Outcome {
        arguments.none_left()?;
        Ok(self.queues.borrow().iter().map(queue_info).collect())
    }

    pub(super) fn query_task(&self, mut arguments: Arguments<'_>) -> Outcome {
        let ids = match arguments.required(["ids"])? {
            [Value::Array(ids)] => ids,
            [Value::Null] => return Err(no_list(&Value::Null)),
            [Value::Object(_)] => {
                return Err(CommandError::type_error("unhashable type: 'dict'"));
            }
            [one] => vec![one],
        };
        let mut found = Map::new();
        for id in ids.iter().filter_map(Value::as_str) {
            let Some(request) = self.worker.state.get(id) else {
                if let Some(request) = self.find_scheduled(id) {
                    let info = request.info(&self.worker.node, false);
                    found.insert(id.to_owned(), json!(["scheduled", info]));
                }
                continue;
            };
            let state = match request.phase() {
                Phase::Active => "active",
                Phase::Reserved => "reserved",
                Phase::Settled => "ready",
            };
            found.insert(
                id.to_owned(),
                json!([state, request.info(&self.worker.node, false)]),
            );
        }
        Ok(Value::Object(found))
    }

    pub(super) fn hello(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [from] = arguments.required(["from_node"])?;
        if from.as_str() == Some(&self.worker.node) {
            return Ok(Value::Null);
        }
        log::info!("sync with {}", saferepr::str(&from));
        self.worker
            .revoked
            .add(revoked_ids(arguments.take("revoked").as_ref()));
        Ok(json!({"revoked": self.worker.revoked.ids(), "clock": self.worker.clock.forward()}))
    }

    /// Pictures of Python's objects: there are none here.
    pub(super) fn objgraph(&self, mut arguments: Arguments<'_>) -> Outcome {
        drop(["num", "max_depth", "type"].map(|name| arguments.take(name)));
        arguments.none_left()?;
        Err(CommandError(Exception::builtin(
            "ImportError",
            "Requires the objgraph library",
        )))
    }

    pub(super) fn heartbeat(&self, arguments: &Arguments<'_>) -> Outcome {
        arguments.none_left()?;
        self.worker
            .events
            .send(&Event::requested_heartbeat(&Software::default()));
        Ok(Value::Null)
    }

    /// Which worker is to do something; those without gossip do not take part.
    pub(super) fn election(&self, mut arguments: Arguments<'_>) -> Outcome {
        let [id, topic] = arguments.required(["id", "topic"])?;
        let action = arguments.take("action").unwrap_or_default();
        if self.worker.listens {
            let (id, topic) = (saferepr::str(&id), saferepr::str(&topic));
            self.worker
                .elections
                .call(&self.worker, &id, &topic, action);
        }
        Ok(Value::Null)
    }

    pub(super) fn stats(&self) -> Value {
        let worker = &self.worker;
        let pool = &worker.pool;
        let writes = pool.writes();
        #[expect(
            clippy::cast_precision_loss,
            reason = "shares of a count, shown with two digits"
        )]
        let share = |count: u64| format!("{:.2}", count as f64 / writes.total.max(1) as f64);
        // As Celery: only the processes that had something to do.
        let used: Vec<u64> = writes
            .each
            .iter()
            .copied()
            .filter(|count| *count > 0)
            .collect();
        let shares: Vec<String> = used.iter().map(|count| share(*count)).collect();
        let raw: Vec<String> = used.iter().map(u64::to_string).collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful of slots")]
        let average = if used.is_empty() {
            0.0
        } else {
            1.0 / used.len() as f64
        };
        let average = format!("{average:.2}");
        let limit = |seconds: Option<f64>| {
            seconds.map_or(Value::from(0), |value| {
                crate::config::SettingValue::to_value(&value)
            })
        };
        let settings = &worker.settings;
        let per_child = settings.worker_max_tasks_per_child.filter(|most| *most > 0);
        let mut stats = json!({
            "total": worker.state.totals(),
            "pid": std::process::id(),
            "clock": worker.clock.value().to_string(),
            "uptime": worker.state.started.elapsed().as_secs(),
            "pool": {
                "implementation": "celery.concurrency.prefork:TaskPool",
                "max-concurrency": pool.size(),
                "processes": pool.processes(),
                "max-tasks-per-child": per_child.map_or(Value::from("N/A"), Value::from),
                "put-guarded-by-semaphore": false,
                "timeouts": [limit(settings.task_soft_time_limit), limit(settings.task_time_limit)],
                "writes": {
                    "total": writes.total,
                    "avg": average,
                    "all": shares.join(", "),
                    "raw": raw.join(", "),
                    "strategy": "fair",
                    "inqueues": {"total": writes.each.len(), "active": writes.active},
                },
            },
        });
        // The order is Celery's; the autoscaler is there only where it is at work.
        if let Some(autoscaler) = &worker.autoscaler {
            stats["autoscaler"] = autoscaler.info(pool, autoscale::load(worker));
        }
        stats["broker"] = self.broker();
        stats["prefetch_count"] = worker.state.prefetch().into();
        stats["rusage"] = usage();
        stats
    }

    /// What the transport says of its broker, with what only the settings know.
    fn broker(&self) -> Value {
        let settings = &self.worker.settings;
        let mut broker = self.transport.info();
        let shown = crate::config::SettingValue::to_value;
        broker["connect_timeout"] = shown(&settings.broker_connection_timeout);
        broker["heartbeat"] = crate::protocol::json::float(settings.broker_heartbeat);
        broker["failover_strategy"] = settings.broker_failover_strategy.as_str().into();
        let options = Value::Object(settings.broker_transport_options.clone());
        broker["transport_options"] = crate::protocol::mask::mask_value(&options, &[]);
        broker
    }

    pub(super) fn conf(&self, mut arguments: Arguments<'_>) -> Outcome {
        let settings = &self.worker.settings;
        let shown = if arguments.truthy("with_defaults") {
            settings.all()
        } else {
            settings.changed()
        };
        let mut shown: Map<String, Value> = shown
            .into_iter()
            .map(|(name, value)| {
                let value = censored(&name, value);
                (name, value)
            })
            .collect();
        // Where results go is shown also when it follows from the broker, and so are the two
        // that every Python worker shows.
        let results = self.worker.backend.display_url();
        shown.insert("result_backend".to_owned(), results.into());
        shown.insert("deprecated_settings".to_owned(), Value::Null);
        shown.insert("include".to_owned(), Value::Array(Vec::new()));
        Ok(Value::Object(shown))
    }

    pub(super) fn report(&self, arguments: &Arguments<'_>) -> Outcome {
        arguments.none_left()?;
        let results = self.worker.backend.display_url();
        Ok(ok(report(
            &self.worker.settings,
            self.transport.driver(),
            &results,
        )))
    }
}

/// What is good to know about this program and its settings when something does not work;
/// secrets are hidden.
pub fn report(settings: &Settings, transport: &str, results: &str) -> String {
    let system = nix::sys::utsname::uname();
    let release = system.map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    );
    let mut text = format!(
        "\nsoftware -> celeriac:{} (rusty-celery 0.5.5)\nplatform -> system:Linux arch:{}\n            \
         kernel version:{release} imp:Rust\nsettings -> transport:{transport} results:{results}\n\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
    );
    for (name, value) in settings.changed() {
        text.push_str(&format!(
            "{name}: {}\n",
            saferepr::repr(&censored(&name, value))
        ));
    }
    text
}

/// Python's words for what should have been a list.
fn no_list(value: &Value) -> CommandError {
    CommandError::type_error(format!("'{}' object is not iterable", type_name(value)))
}

fn seconds(limit: Option<std::time::Duration>) -> Value {
    limit.map_or(Value::Null, |limit| {
        crate::config::SettingValue::to_value(&limit.as_secs_f64())
    })
}

/// Hides what Celery hides, and passwords in URLs.
fn censored(name: &str, value: Value) -> Value {
    let upper = name.to_ascii_uppercase();
    if HIDDEN.iter().any(|word| upper.contains(word)) && !value.is_null() {
        return Value::from("********");
    }
    match value {
        Value::String(text) => Value::from(mask_secrets(&text, &[]).into_owned()),
        other => crate::protocol::mask::mask_value(&other, &[]),
    }
}

fn queue_info(queue: &Queue) -> Value {
    let arguments = if queue.arguments.is_empty() {
        Value::Null
    } else {
        Value::Object(queue.arguments.clone())
    };
    json!({
        "name": queue.name,
        "exchange": {
            "name": queue.exchange.name,
            "type": queue.exchange.kind.as_str(),
            "arguments": null,
            "durable": queue.exchange.durable,
            "passive": false,
            "auto_delete": queue.exchange.auto_delete,
            "delivery_mode": null,
            "no_declare": false,
        },
        "routing_key": queue.routing_key,
        "queue_arguments": arguments,
        "binding_arguments": null,
        "consumer_arguments": null,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "no_ack": false,
        "alias": null,
        "bindings": [],
        "no_declare": null,
        "expires": queue.expires,
        "message_ttl": queue.message_ttl,
        "max_length": null,
        "max_length_bytes": null,
        "max_priority": queue.max_priority,
    })
}

/// `getrusage` of this process, in Python's names.
fn usage() -> Value {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return Value::from("N/A");
    };
    let seconds = |time: nix::sys::time::TimeVal| {
        #[expect(clippy::cast_precision_loss, reason = "seconds of CPU time")]
        let whole = time.tv_sec() as f64;
        #[expect(clippy::cast_precision_loss, reason = "below a million")]
        let part = time.tv_usec() as f64 / 1e6;
        whole + part
    };
    json!({
        "utime": seconds(usage.user_time()),
        "stime": seconds(usage.system_time()),
        "maxrss": usage.max_rss(),
        "ixrss": usage.shared_integral(),
        "idrss": usage.unshared_data_integral(),
        "isrss": usage.unshared_stack_integral(),
        "minflt": usage.minor_page_faults(),
        "majflt": usage.major_page_faults(),
        "nswap": usage.full_swaps(),
        "inblock": usage.block_reads(),
        "oublock": usage.block_writes(),
        "msgsnd": usage.ipc_sends(),
        "msgrcv": usage.ipc_receives(),
        "nsignals": usage.signals(),
        "nvcsw": usage.voluntary_context_switches(),
        "nivcsw": usage.involuntary_context_switches(),
    })
}

fn resident() -> Option<String> {
    let kib = crate::pool::limits::resident_kib(std::process::id())?;
    #[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
    let mib = kib as f64 / 1024.0;
    Some(format!("{mib:.2}MB"))
}

/// `memsample`: resident memory, as text.
pub(super) fn memory_sample() -> Value {
    resident().map_or(Value::Null, Value::from)
}

/// `memdump`: the same as a line.
pub(super) fn memory_dump() -> Value {
    Value::from(format!(
        "- rss: {}.\n",
        resident().unwrap_or_else(|| "unknown".to_owned())
    ))
}
