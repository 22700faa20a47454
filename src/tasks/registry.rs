//! The registered tasks with their options, some of which remote control changes at run time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};

use super::{Accumulate, AnalyzeRepo, BackendCleanup, ChordUnlock, Definition, Test};
use super::{analyze_repo, builtin, test};
use crate::config::Settings;
use crate::protocol::arguments::Parameters;

/// How a task is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`analyze_repo`]: in a child.
    AnalyzeRepo,
    /// [`test`]: in the parent, for it computes nothing.
    Test,
    /// [`builtin`]: in the parent, which alone knows the result backend.
    ChordUnlock,
    /// The same.
    BackendCleanup,
    /// In the parent.
    Accumulate,
}

impl Kind {
    /// Whose call it is, where the task has users.
    pub fn user(self, args: &[Value], kwargs: &Map<String, Value>) -> Option<String> {
        let Self::AnalyzeRepo = self else {
            return None;
        };
        let (position, name) = analyze_repo::USER;
        let found = args.get(position).or_else(|| kwargs.get(name));
        found.and_then(analyze_repo::user)
    }

    /// The secrets among the arguments of a call, wherever the caller put them.
    pub fn secrets(self, args: &[Value], kwargs: &Map<String, Value>) -> Vec<String> {
        let Self::AnalyzeRepo = self else {
            return Vec::new();
        };
        let (position, name) = analyze_repo::SECRET;
        let mut secrets = Vec::new();
        for value in [args.get(position), kwargs.get(name)].into_iter().flatten() {
            texts(value, &mut secrets);
        }
        secrets
    }
}

/// Every text in a value, so that a token in a list is hidden as well.
fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        // It is used without the white space around it, and may be shown in both forms.
        Value::String(text) => {
            let forms = [text.as_str(), text.trim()].into_iter();
            found.extend(forms.filter(|form| !form.is_empty()).map(str::to_owned));
        }
        Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
        Value::Object(map) => map.values().for_each(|item| texts(item, found)),
        _ => {}
    }
}

/// Options of a task type, with Celery's meaning.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Acknowledge when the task is done instead of when it starts.
    pub acks_late: bool,
    /// Store no result.
    pub ignore_result: bool,
    /// Store STARTED.
    pub track_started: bool,
    /// Store failures although results are ignored.
    pub store_errors_even_if_ignored: bool,
    /// Send task events.
    pub send_events: bool,
    /// Requests per second; `None` is without limit.
    pub rate_limit: Option<String>,
    /// Hard time limit.
    pub time_limit: Option<Duration>,
    /// Soft time limit.
    pub soft_time_limit: Option<Duration>,
    /// How often a failure that may heal is tried again.
    pub max_retries: u32,
    /// How long it is given to heal.
    pub backoff: Backoff,
}

/// How long a task waits before it is tried again: twice as long each time.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    /// Seconds before the first retry.
    pub first: f64,
    /// Most seconds before any.
    pub max: f64,
    /// Takes off up to a half at random, so that a crowd does not come back as one.
    pub jitter: bool,
}

impl Backoff {
    /// How long to wait after so many retries.
    pub fn after(&self, retries: i64) -> Duration {
        let doubled = 2_f64.powi(i32::try_from(retries.clamp(0, 30)).unwrap_or(30));
        let ceiling = (self.first * doubled).min(self.max);
        let share = if self.jitter {
            let [low, high, ..] = uuid::Uuid::new_v4().into_bytes();
            0.5 + f64::from(u16::from_le_bytes([low, high])) / f64::from(u16::MAX) / 2.0
        } else {
            1.0
        };
        Duration::try_from_secs_f64(ceiling * share).unwrap_or(Duration::ZERO)
    }
}

/// One registered task.
#[derive(Debug)]
pub struct Entry {
    /// Name on the wire.
    pub name: &'static str,
    /// How it is carried out.
    pub kind: Kind,
    /// What it may be called with; `None`: with anything.
    pub parameters: Option<Parameters>,
    options: Mutex<Options>,
}

impl Entry {
    /// The options as they are now.
    pub fn options(&self) -> Options {
        self.options
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes options: remote control's `rate_limit` and `time_limit`.
    pub fn change(&self, change: impl FnOnce(&mut Options)) {
        change(&mut self.options.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Every registered task by name.
#[derive(Debug, Clone)]
pub struct Registry {
    entries: Arc<BTreeMap<&'static str, Entry>>,
}

impl Registry {
    /// The tasks with the options that the settings and `task_annotations` give them.
    pub fn new(settings: &Settings) -> Self {
        let entry = |name, kind, parameters, acks_late, max_retries| Entry {
            name,
            kind,
            parameters,
            options: Mutex::new(options(settings, name, acks_late, max_retries)),
        };
        // Late acknowledgement where a second run does no harm: an analysis is stored by task
        // id, so a worker that dies in the middle loses nothing.
        let retries = u32::try_from(settings.analysis_max_retries).unwrap_or(u32::MAX);
        let (analysis, check) = (Some(analyze_repo::PARAMETERS), Some(test::PARAMETERS));
        let entries = [
            entry(
                AnalyzeRepo::NAME,
                Kind::AnalyzeRepo,
                analysis,
                true,
                retries,
            ),
            entry(Test::NAME, Kind::Test, check, false, 0),
            // A worker that dies while it looks after a chord must not leave it to nobody.
            entry(ChordUnlock::NAME, Kind::ChordUnlock, None, true, u32::MAX),
            entry(BackendCleanup::NAME, Kind::BackendCleanup, None, false, 0),
            entry(Accumulate::NAME, Kind::Accumulate, None, false, 0),
        ];
        entries[2].change(|options| options.ignore_result = true);
        let entries = entries
            .into_iter()
            .map(|entry| (entry.name, entry))
            .collect();
        Self {
            entries: Arc::new(entries),
        }
    }

    /// The task of this name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// All tasks in the order of their names.
    pub fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Those that are the application's own, which is what people are shown.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.all()
            .filter(|entry| !entry.name.starts_with(builtin::PREFIX))
    }
}

fn options(settings: &Settings, name: &str, acks_late: bool, max_retries: u32) -> Options {
    let mut options = Options {
        acks_late: settings.task_acks_late.unwrap_or(acks_late),
        ignore_result: settings.task_ignore_result,
        track_started: settings.task_track_started,
        store_errors_even_if_ignored: settings.task_store_errors_even_if_ignored,
        send_events: true,
        rate_limit: settings.task_default_rate_limit.clone(),
        time_limit: settings.task_time_limit.and_then(seconds),
        soft_time_limit: settings.task_soft_time_limit.and_then(seconds),
        max_retries,
        backoff: Backoff {
            first: settings.analysis_retry_backoff,
            max: settings.analysis_retry_backoff_max,
            jitter: settings.analysis_retry_jitter,
        },
    };
    for pattern in ["*", name] {
        if let Some(annotation) = settings.task_annotations.get(pattern) {
            annotate(&mut options, annotation);
        }
    }
    options
}

/// A number of seconds as a limit; 0 is none, as in Celery.
pub fn seconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number)
        .ok()
        .filter(|limit| !limit.is_zero())
}

fn annotate(options: &mut Options, annotation: &Value) {
    let flag = |key: &str, default| {
        annotation
            .get(key)
            .and_then(Value::as_bool)
            .unwrap_or(default)
    };
    options.acks_late = flag("acks_late", options.acks_late);
    options.ignore_result = flag("ignore_result", options.ignore_result);
    options.track_started = flag("track_started", options.track_started);
    options.send_events = flag("send_events", options.send_events);
    options.store_errors_even_if_ignored = flag(
        "store_errors_even_if_ignored",
        options.store_errors_even_if_ignored,
    );
    match annotation.get("rate_limit") {
        Some(Value::String(text)) => options.rate_limit = Some(text.clone()),
        Some(Value::Number(number)) => options.rate_limit = Some(number.to_string()),
        Some(Value::Null) => options.rate_limit = None,
        _ => {}
    }
    if let Some(value) = annotation.get("time_limit") {
        options.time_limit = value.as_f64().and_then(seconds);
    }
    if let Some(value) = annotation.get("soft_time_limit") {
        options.soft_time_limit = value.as_f64().and_then(seconds);
    }
    if let Some(retries) = annotation.get("max_retries").and_then(Value::as_u64) {
        options.max_retries = u32::try_from(retries).unwrap_or(u32::MAX);
    }
    let seconds = |key: &str, default| {
        let given = annotation.get(key).and_then(Value::as_f64);
        given.unwrap_or(default)
    };
    let backoff = &mut options.backoff;
    backoff.first = match annotation.get("retry_backoff") {
        // As Celery: switched on is a second.
        Some(Value::Bool(on)) => f64::from(u8::from(*on)),
        _ => seconds("retry_backoff", backoff.first),
    };
    backoff.max = seconds("retry_backoff_max", backoff.max);
    backoff.jitter = flag("retry_jitter", backoff.jitter);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_win_over_settings_and_settings_over_the_tasks_own_choice() {
        let mut settings = Settings::default();
        assert!(
            Registry::new(&settings)
                .get("analyze_repo_task")
                .unwrap()
                .options()
                .acks_late
        );
        settings.task_acks_late = Some(false);
        settings.task_annotations =
            serde_json::json!({"*": {"time_limit": 5}, "test_task": {"rate_limit": "3/m"}});
        let registry = Registry::new(&settings);
        let analysis = registry.get("analyze_repo_task").unwrap().options();
        assert!(!analysis.acks_late);
        assert_eq!(analysis.time_limit, Some(Duration::from_secs(5)));
        assert_eq!(analysis.rate_limit, None);
        let test = registry.get("test_task").unwrap().options();
        assert_eq!(test.rate_limit.as_deref(), Some("3/m"));
    }

    #[test]
    fn a_retry_waits_twice_as_long_each_time_up_to_the_most() {
        let mut settings = Settings::default();
        let of = |settings: &Settings| {
            let registry = Registry::new(settings);
            registry.get("analyze_repo_task").unwrap().options().backoff
        };
        let usual = of(&settings);
        for (retries, most) in [(0, 2), (1, 4), (3, 16), (9, 600), (i64::MAX, 600)] {
            let most = Duration::from_secs(most);
            let after = usual.after(retries);
            assert!(after <= most && after >= most / 2, "{retries}: {after:?}");
        }
        settings.analysis_retry_backoff = 0.5;
        settings.analysis_retry_jitter = false;
        let waits =
            |backoff: Backoff| [0, 1, 30].map(|retries| backoff.after(retries).as_secs_f64());
        assert_eq!(waits(of(&settings)), [0.5, 1.0, 600.0]);
        settings.task_annotations = serde_json::json!({"analyze_repo_task":
            {"retry_backoff": true, "retry_backoff_max": 20, "max_retries": 9}});
        assert_eq!(waits(of(&settings)), [1.0, 2.0, 20.0]);
    }
}
