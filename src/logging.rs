//! Celery's log line, or JSON on request, with secrets masked.
//!
//! ```text
//! [2026-11-22 23:35:38,229: INFO/MainProcess] Connected to redis://:**@queue:6379/0
//! [2026-11-22 23:35:39,010: WARNING/ForkPoolWorker-2] the clone is shallow
//! ```
//!
//! People grep these lines, so their form is Celery's (`celery/app/log.py`): local time with
//! milliseconds, level name, process name, text; on a terminal the whole line in the level's
//! colour. A record says which process it is about with the field `process`, else it is about
//! `MainProcess`; Celery's CRITICAL, which the `log` crate lacks, is an error with the target
//! [`CRITICAL`]:
//!
//! ```ignore
//! log::info!(process = slot.name(); "Task {name}[{id}] succeeded in {seconds}s");
//! log::error!(target: logging::CRITICAL, "Unrecoverable error: {error}");
//! ```
//!
//! Everything that is written passes through [`mask`]. The targets of the `celery` crate are
//! dropped for good, because it logs arguments and results. Knows no settings file: the caller
//! turns settings into [`Options`].

use std::any::Any;
use std::backtrace::BacktraceStatus;
use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::LazyLock;

use chrono::{DateTime, Local};
use env_logger::fmt::Target;
use log::kv::{self, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};
use regex::Regex;
use serde_json::{Map, Value};

/// The target of records that Celery would call CRITICAL.
pub const CRITICAL: &str = "celeriac::critical";

/// The environment variable with filters that override the level, as env_logger reads them:
/// `celeriac=debug,lapin=info`.
pub const FILTER_VARIABLE: &str = "CELERIAC_LOG";

/// What may go wrong with logging.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is none of Celery's.
    #[error("read the log level {0:?}: use DEBUG, INFO, WARNING, ERROR, CRITICAL or FATAL")]
    Level(String),
    /// The log file cannot be written.
    #[error("open the log file {path}: {source} (does its directory exist, is it writable?)")]
    File {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a logger already.
    #[error("start logging: it has been started before")]
    Started,
}

/// How loud the log is, in Celery's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Everything, libraries included.
    Debug,
    /// The life of tasks and worker.
    Info,
    /// What recovered by itself.
    Warning,
    /// What needs a person.
    Error,
    /// What ends the worker.
    Critical,
}

impl std::str::FromStr for Level {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name.trim().to_ascii_uppercase().as_str() {
            "DEBUG" => Ok(Level::Debug),
            "INFO" => Ok(Level::Info),
            "WARNING" | "WARN" => Ok(Level::Warning),
            "ERROR" => Ok(Level::Error),
            "CRITICAL" | "FATAL" => Ok(Level::Critical),
            _ => Err(Error::Level(name.to_owned())),
        }
    }
}

impl Level {
    /// The level of our own records; the pool's children are given the same.
    pub fn filter(self) -> LevelFilter {
        match self {
            Level::Debug => LevelFilter::Debug,
            Level::Info => LevelFilter::Info,
            Level::Warning => LevelFilter::Warn,
            // Which errors are critical is seen at the target.
            Level::Error | Level::Critical => LevelFilter::Error,
        }
    }
}

/// How to log.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--loglevel`.
    pub level: Level,
    /// `--logfile`, already expanded; `None` is standard error.
    pub file: Option<PathBuf>,
    /// `None` lets the terminal decide; `-C` is `Some(false)`.
    pub colour: Option<bool>,
    /// One JSON object per line instead of Celery's line.
    pub json: bool,
    /// What [`FILTER_VARIABLE`] says.
    pub filters: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            level: Level::Warning,
            file: None,
            colour: None,
            json: false,
            filters: std::env::var(FILTER_VARIABLE).ok(),
        }
    }
}

/// Starts logging for the rest of the process.
pub fn start(options: &Options) -> Result<(), Error> {
    let logger = Logger::new(options)?;
    let most = logger.inner.filter();
    log::set_boxed_logger(Box::new(logger)).map_err(|_| Error::Started)?;
    log::set_max_level(most);
    Ok(())
}

/// From now on a panic is a line of the log. Text that was made of values is left out, for they
/// may be a token: whoever catches the panic knows what to mask.
pub fn tell_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        let trace = std::backtrace::Backtrace::capture();
        let trace = match trace.status() {
            BacktraceStatus::Captured => format!("\n{trace}"),
            _ => String::new(),
        };
        let text = constant(panic.payload());
        log::error!(target: CRITICAL, "Panic at {place}: {text}{trace}");
    }));
}

/// The text of a panic if it stands in the program just so.
fn constant(payload: &(dyn Any + Send)) -> &'static str {
    let text = payload.downcast_ref::<&'static str>();
    text.copied().unwrap_or("its text is not shown here")
}

struct Logger {
    inner: env_logger::Logger,
    critical_only: bool,
}

impl Logger {
    fn new(options: &Options) -> Result<Logger, Error> {
        let mut builder = env_logger::Builder::new();
        let level = options.level.filter();
        // Libraries speak of their own affairs at INFO; whoever wants that asks for DEBUG.
        let libraries = match options.level {
            Level::Debug => LevelFilter::Debug,
            _ => level.min(LevelFilter::Warn),
        };
        builder
            .filter_level(libraries)
            .filter_module("celeriac", level)
            // It would write down every value that is stored, byte by byte.
            .filter_module("tokio_postgres", libraries.min(LevelFilter::Info));
        if let Some(filters) = &options.filters {
            builder.parse_filters(filters);
        }
        let terminal = match &options.file {
            None => {
                builder.target(Target::Stderr);
                io::stderr().is_terminal()
            }
            Some(path) => {
                let file = std::fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path);
                let file = file.map_err(|source| Error::File {
                    path: path.clone(),
                    source,
                })?;
                builder.target(Target::Pipe(Box::new(file)));
                false
            }
        };
        let colour = options.colour.unwrap_or(terminal);
        let json = options.json;
        builder.format(move |out, record| {
            let line = if json {
                json_line(record, Local::now())
            } else {
                celery_line(record, Local::now(), colour)
            };
            out.write_all(line.as_bytes())
        });
        Ok(Logger {
            inner: builder.build(),
            critical_only: options.level == Level::Critical,
        })
    }

    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        let celery_crate = target == "celery" || target.starts_with("celery::");
        !celery_crate && (!self.critical_only || target == CRITICAL)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.wants(metadata) && self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.wants(record.metadata()) {
            self.inner.log(record);
        }
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

fn level_name(record: &Record<'_>) -> &'static str {
    match record.level() {
        log::Level::Error if record.target() == CRITICAL => "CRITICAL",
        log::Level::Error => "ERROR",
        log::Level::Warn => "WARNING",
        log::Level::Info => "INFO",
        log::Level::Debug | log::Level::Trace => "DEBUG",
    }
}

fn process_name(record: &Record<'_>) -> String {
    let name = record.key_values().get(kv::Key::from("process"));
    name.map_or_else(|| String::from("MainProcess"), |name| name.to_string())
}

fn celery_line(record: &Record<'_>, now: DateTime<Local>, colour: bool) -> String {
    let level = level_name(record);
    let mut line = format!(
        "[{}: {level}/{}] {}",
        now.format("%Y-%m-%d %H:%M:%S,%3f"),
        process_name(record),
        printable(&mask(&record.args().to_string())),
    );
    let code = match level {
        "DEBUG" => Some(34),
        "WARNING" => Some(33),
        "ERROR" => Some(31),
        "CRITICAL" => Some(35),
        _ => None,
    };
    if let (true, Some(code)) = (colour, code) {
        line = format!("\x1b[1;{code}m{line}\x1b[0m");
    }
    line.push('\n');
    line
}

/// Texts may quote what strangers wrote; nothing in them may steer the terminal. Line ends stay,
/// tracebacks have many.
fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |letter: char| !letter.is_control() || letter == '\n' || letter == '\t';
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len() + 8);
    for letter in text.chars() {
        if harmless(letter) {
            clean.push(letter);
        } else {
            let _ = write!(clean, "\\x{:02x}", u32::from(letter));
        }
    }
    Cow::Owned(clean)
}

fn json_line(record: &Record<'_>, now: DateTime<Local>) -> String {
    let mut members = Map::new();
    let mut add = |name: &str, text: &str| {
        members.insert(name.to_owned(), Value::from(mask(text).into_owned()));
    };
    add(
        "time",
        &now.to_rfc3339_opts(chrono::SecondsFormat::Millis, false),
    );
    add("level", level_name(record));
    add("process", &process_name(record));
    add("logger", record.target());
    add("message", &record.args().to_string());
    let mut fields = Fields(members);
    // The visitor below never fails.
    let _ = record.key_values().visit(&mut fields);
    let mut line = Value::Object(fields.0).to_string();
    line.push('\n');
    line
}

/// Collects a record's fields; those that the line has anyway stay as they are.
struct Fields(Map<String, Value>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        let json = value
            .to_bool()
            .map(Value::from)
            .or_else(|| value.to_i64().map(Value::from))
            .or_else(|| value.to_u64().map(Value::from))
            .or_else(|| value.to_f64().map(Value::from))
            .unwrap_or_else(|| Value::from(mask(&value.to_string()).into_owned()));
        self.0.entry(key.as_str()).or_insert(json);
        Ok(())
    }
}

// ---- secrets ----------------------------------------------------------------------------------

/// Masks passwords in URLs, tokens of the well-known forms and authorization headers. What only
/// its task knows to be secret is masked there, not here: whoever chose such a text could blot
/// out everybody's lines with it.
pub fn mask(text: &str) -> Cow<'_, str> {
    static URL: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/:@?#]*):[^\s/?#]*@")
            .expect("because the pattern is a constant")
    });
    static NAMELESS: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(https?://)[^\s/:@?#]+@").expect("because the pattern is a constant")
    });
    static TOKEN: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\b(gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{6,}")
            .expect("because the pattern is a constant")
    });
    static HEADER: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?-u:([Aa][Uu][Tt][Hh][Oo][Rr][Ii][Zz][Aa][Tt][Ii][Oo][Nn]:\s*\w+\s+|[Bb]earer\s+))[A-Za-z0-9+/=._~-]{6,}")
            .expect("because the pattern is a constant")
    });
    let mut text = Cow::Borrowed(text);
    let patterns: [(&Regex, &str); 4] = [
        (&URL, "$1:**@"),
        (&NAMELESS, "$1**@"),
        (&TOKEN, "$1**"),
        (&HEADER, "$1**"),
    ];
    for (pattern, replacement) in patterns {
        if let Cow::Owned(masked) = pattern.replace_all(&text, replacement) {
            text = Cow::Owned(masked);
        }
    }
    text
}

/// Says something to the person at the terminal, whatever the log level: the lines with which
/// Celery announces a shutdown.
pub fn announce(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody may be listening any more.
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeZone;
    use log::Level as LogLevel;
    use serde_json::json;

    fn noon() -> DateTime<Local> {
        Local
            .with_ymd_and_hms(2026, 11, 22, 23, 35, 38)
            .single()
            .expect("because clocks do not change in November evenings")
            + chrono::Duration::milliseconds(229)
    }

    fn with_record<T>(
        level: LogLevel,
        target: &str,
        text: &str,
        fields: &[(&str, i64)],
        look: impl Fn(&Record<'_>) -> T,
    ) -> T {
        let process = [("process", "ForkPoolWorker-2")];
        let both = (&process[..usize::from(!fields.is_empty())], fields);
        struct Both<'a>(&'a [(&'a str, &'a str)], &'a [(&'a str, i64)]);
        impl kv::Source for Both<'_> {
            fn visit<'kvs>(
                &'kvs self,
                visitor: &mut dyn VisitSource<'kvs>,
            ) -> Result<(), kv::Error> {
                for (key, value) in self.0 {
                    visitor.visit_pair(kv::Key::from(*key), kv::Value::from(*value))?;
                }
                for (key, value) in self.1 {
                    visitor.visit_pair(kv::Key::from(*key), kv::Value::from(*value))?;
                }
                Ok(())
            }
        }
        let both = Both(both.0, both.1);
        look(
            &Record::builder()
                .level(level)
                .target(target)
                .key_values(&both)
                .args(format_args!("{text}"))
                .build(),
        )
    }

    #[test]
    fn a_line_has_celerys_form() {
        let line = |level, target, fields: &[_], colour| {
            with_record(level, target, "ready.", fields, |record| {
                celery_line(record, noon(), colour)
            })
        };
        assert_eq!(
            line(LogLevel::Info, "celeriac", &[], true),
            "[2026-11-22 23:35:38,229: INFO/MainProcess] ready.\n"
        );
        assert_eq!(
            line(LogLevel::Warn, "celeriac", &[("n", 1)], false),
            "[2026-11-22 23:35:38,229: WARNING/ForkPoolWorker-2] ready.\n"
        );
        assert_eq!(
            line(LogLevel::Error, CRITICAL, &[], true),
            "\x1b[1;35m[2026-11-22 23:35:38,229: CRITICAL/MainProcess] ready.\x1b[0m\n"
        );
    }

    #[test]
    fn a_json_line_has_the_fields_and_no_secret() {
        let text = "from redis://:hunter2@queue/0";
        let fields = [("attempts", 3), ("level", 9)];
        let line = with_record(LogLevel::Info, "celeriac::a", text, &fields, |record| {
            json_line(record, noon())
        });
        let value: Value = serde_json::from_str(&line).expect("because it is JSON");
        assert_eq!(value["message"], json!("from redis://:**@queue/0"));
        assert_eq!(value["attempts"], json!(3));
        assert_eq!(
            value["level"],
            json!("INFO"),
            "a field cannot replace the line's own"
        );
        assert_eq!(value["process"], json!("ForkPoolWorker-2"));
    }

    #[test]
    fn secrets_are_masked_in_all_their_forms() {
        for (text, expected) in [
            ("amqp://guest:gu:e@st@host//", "amqp://guest:**@host//"),
            (
                "at https://tok3n@github.com/a/b.git",
                "at https://**@github.com/a/b.git",
            ),
            ("ghp_0123456789abcdef here", "ghp_** here"),
            (
                "Authorization: Basic eDpzZWNyZXQ=",
                "Authorization: Basic **",
            ),
            ("mail a@b.c at http://h/x@y", "mail a@b.c at http://h/x@y"),
            ("redis://queue:6379/0", "redis://queue:6379/0"),
            ("분석 중... (45%)", "분석 중... (45%)"),
        ] {
            assert_eq!(mask(text), expected, "{text}");
        }
    }

    #[test]
    fn a_panics_text_is_shown_only_if_it_was_not_made_of_values() {
        let caught = |what: fn(&str)| {
            let token = "zqé0123456789";
            let panic = std::panic::catch_unwind(|| what(token)).expect_err("because it panics");
            constant(&*panic)
        };
        assert_eq!(caught(|_| panic!("just so")), "just so");
        assert_eq!(
            caught(|token| drop(token[..3].to_owned())),
            "its text is not shown here"
        );
    }

    #[test]
    fn level_names_are_celerys_in_any_case() {
        for (name, level) in [
            ("debug", Level::Debug),
            ("Info", Level::Info),
            ("WARNING", Level::Warning),
            ("error", Level::Error),
            ("critical", Level::Critical),
            ("FATAL", Level::Critical),
        ] {
            assert_eq!(name.parse::<Level>().ok(), Some(level));
        }
        let error = "LOUD"
            .parse::<Level>()
            .map(|_| ())
            .map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("\"LOUD\"") && text.contains("WARNING")));
    }

    #[test]
    fn libraries_are_quiet_and_the_celery_crate_is_silent() {
        let enabled = |options: &Options, target: &str, level| {
            let logger = Logger::new(options).expect("because no file is opened");
            logger.enabled(&Metadata::builder().target(target).level(level).build())
        };
        let mut options = Options {
            level: Level::Info,
            filters: None,
            ..Options::default()
        };
        assert!(enabled(&options, "celeriac::worker", LogLevel::Info));
        assert!(!enabled(&options, "lapin::channel", LogLevel::Info));
        assert!(enabled(&options, "lapin::channel", LogLevel::Warn));
        assert!(!enabled(&options, "celery::app", LogLevel::Error));
        options.filters = Some(String::from("celery=trace,lapin=debug"));
        assert!(!enabled(&options, "celery", LogLevel::Error));
        assert!(enabled(&options, "lapin", LogLevel::Debug));
        options.level = Level::Critical;
        assert!(enabled(&options, CRITICAL, LogLevel::Error));
        assert!(!enabled(&options, "celeriac::worker", LogLevel::Error));
    }

    #[test]
    fn what_strangers_wrote_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\r\u{9b}\n"), "a\\x1b[2Jb\\x0d\\x9b\n");
        assert!(matches!(printable("plain\ttext\n"), Cow::Borrowed(_)));
    }
}
