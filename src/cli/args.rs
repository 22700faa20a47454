//! What the user typed. Celery's options keep their names; `worker` turns them into settings.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::commands;
use crate::protocol::time::parse_iso;

/// An example in errors.
const A_TIME: &str = "2027-01-31T12:00:00+09:00";

/// celeriac: a Celery worker that tells who wrote a Git repository, line by line.
#[derive(Debug, Parser)]
#[command(
    name = "celeriac",
    version,
    about,
    long_about = "A Celery-compatible worker in one small binary. It takes the place of a Python \
        worker (same broker, tasks, results, Flower and inspect) and analyses who wrote a \
        repository: the same answer as git blame on every file, in one walk over history.",
    args_override_self = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Settings come from the environment and a .env file; the worker needs \
        QUEUE_BROKER_URL=redis://HOST:6379/0 and, to keep analyses, \
        DATABASE_URL=postgresql://USER:PASSWORD@HOST/NAME.\nTry it without any server: \
        celeriac analyze ."
)]
pub(super) struct Cli {
    /// Options that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of the `celery` program itself.
#[derive(Debug, Args)]
pub(super) struct Global {
    /// Accepted for compatibility: the tasks are built in
    #[arg(
        short = 'A',
        long = "app",
        global = true,
        env = "APP",
        hide_env = true,
        value_name = "APP"
    )]
    pub app: Option<String>,
    /// Broker URL [env: QUEUE_BROKER_URL, CELERY_BROKER_URL]
    #[arg(
        short = 'b',
        long,
        global = true,
        env = "BROKER_URL",
        hide_env = true,
        value_name = "URL"
    )]
    pub broker: Option<String>,
    /// Result backend URL [env: CELERY_RESULT_BACKEND]
    #[arg(
        long,
        global = true,
        env = "RESULT_BACKEND",
        hide_env = true,
        value_name = "URL"
    )]
    pub result_backend: Option<String>,
    /// Accepted for compatibility
    #[arg(long, global = true, env = "LOADER", hide = true)]
    pub loader: Option<String>,
    /// Accepted for compatibility; settings come from the environment
    #[arg(long, global = true, env = "CONFIG_MODULE", hide = true)]
    pub config: Option<String>,
    /// Directory to work in
    #[arg(long, global = true, value_name = "DIRECTORY")]
    pub workdir: Option<PathBuf>,
    /// No colours
    #[arg(short = 'C', long = "no-color", global = true, env = "NO_COLOR", hide_env = true,
          value_parser = clap::builder::FalseyValueParser::new())]
    pub no_color: bool,
    /// Print less
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Accepted for compatibility
    #[arg(long, global = true, hide = true)]
    pub skip_checks: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a worker
    Worker(Box<Worker>),
    /// Tell who wrote a repository, without any server
    Analyze(Analyze),
    /// Bring the database to the current schema
    Migrate,
    /// Keep users' tokens for git hosts, encrypted, in the database
    #[command(subcommand)]
    Token(TokenCommand),
    /// Ask the workers what they do
    #[command(after_help = commands::Kind::Inspect.help())]
    Inspect(Remote),
    /// Tell the workers to do something
    #[command(after_help = commands::Kind::Control.help())]
    Control(Remote),
    /// Show which workers are online
    #[command(after_help = "The exit code is 69 when no worker answers.")]
    Status(Target),
    /// Watch workers and tasks: a live table on a terminal, else lines
    #[command(
        after_help = "Workers send events of tasks when they were started with -E, or \
        after `celeriac control enable_events`."
    )]
    Events(Events),
    /// Print what is good to know in a bug report
    Report,
    /// Send a task to the workers
    #[command(
        after_help = "Examples:\n  celeriac call test_task --args '[\"hello\"]' --wait\n  \
        celeriac call analyze_repo_task --args '[1, \"https://github.com/user/repository\"]'\n  \
        celeriac call test_task -a '[\"later\"]' --countdown 60 --queue slow"
    )]
    Call(Box<Call>),
    /// Print the return value of a task; waits until there is one
    #[command(after_help = "A task that failed is told on standard error, with exit code 1.")]
    Result(TaskResult),
    /// Erase all messages from task queues
    #[command(
        after_help = "There is no undo for this operation. Tasks that a worker holds \
        already are not erased: revoke those."
    )]
    Purge(Purge),
    /// Get info from the broker
    #[command(subcommand)]
    List(List),
}

/// Whom to ask, and how long to wait.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// Timeout in seconds waiting for reply
    #[arg(
        short,
        long,
        default_value_t = 1.0,
        value_name = "SECONDS",
        help_heading = "Remote Control Options"
    )]
    pub timeout: f64,
    /// Comma separated list of destination node names
    #[arg(
        short,
        long,
        value_name = "NODES",
        help_heading = "Remote Control Options"
    )]
    pub destination: Option<String>,
    /// Use json as output format
    #[arg(short, long, help_heading = "Remote Control Options")]
    pub json: bool,
}

/// Options of `inspect` and `control`.
#[derive(Debug, Args)]
pub(super) struct Remote {
    /// What to ask or to do
    pub command: Option<String>,
    /// What the command takes
    #[arg(value_name = "ARGUMENT", allow_negative_numbers = true)]
    pub arguments: Vec<String>,
    /// List the available commands and exit
    #[arg(long)]
    pub list: bool,
    /// Whom to ask.
    #[command(flatten)]
    pub target: Target,
}

/// Options of `events`.
#[derive(Debug, Args)]
pub(super) struct Events {
    /// Print every event as a line, as is done when standard output is no terminal
    #[arg(short, long)]
    pub dump: bool,
    /// Show the live table (the default on a terminal)
    #[arg(long, conflicts_with = "dump")]
    pub top: bool,
    /// Not supported: cameras are Python classes
    #[arg(short, long, hide = true, value_name = "CLASS")]
    pub camera: Option<String>,
    /// Accepted for compatibility
    #[arg(short = 'F', long, alias = "freq", hide = true)]
    pub frequency: Option<f64>,
    /// Accepted for compatibility
    #[arg(short = 'r', long, hide = true)]
    pub maxrate: Option<String>,
    /// Accepted for compatibility
    #[arg(short, long, hide = true)]
    pub loglevel: Option<String>,
}

/// Options of `call`.
#[derive(Debug, Args)]
pub(super) struct Call {
    /// Name of the task
    pub name: String,
    /// Positional arguments, a JSON array
    #[arg(
        short,
        long,
        default_value = "[]",
        value_name = "JSON",
        help_heading = "Calling Options"
    )]
    pub args: String,
    /// Keyword arguments, a JSON object
    #[arg(
        short,
        long,
        default_value = "{}",
        value_name = "JSON",
        help_heading = "Calling Options"
    )]
    pub kwargs: String,
    /// Not before this time, such as 2027-01-31T12:00:00
    #[arg(
        long,
        value_name = "ISO8601",
        value_parser = time,
        help_heading = "Calling Options",
        conflicts_with = "countdown"
    )]
    pub eta: Option<String>,
    /// Not before so many seconds from now
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Calling Options")]
    pub countdown: Option<f64>,
    /// Not after this time, or so many seconds from now
    #[arg(
        long,
        value_name = "ISO8601|SECONDS",
        value_parser = time_or_seconds,
        help_heading = "Calling Options"
    )]
    pub expires: Option<String>,
    /// How the message is written: json, msgpack or yaml
    #[arg(
        long,
        default_value = "json",
        value_name = "NAME",
        help_heading = "Calling Options"
    )]
    pub serializer: String,
    /// Priority, from 0 to 9 on Redis, where 0 is the most urgent
    #[arg(long, value_name = "N", help_heading = "Calling Options")]
    pub priority: Option<u8>,
    /// Id of the task, instead of a random one
    #[arg(long, value_name = "ID", help_heading = "Calling Options")]
    pub task_id: Option<String>,
    /// Wait for the result and print it instead of the id
    #[arg(long, help_heading = "Calling Options")]
    pub wait: bool,
    /// Wait at most so long
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = seconds,
        requires = "wait",
        help_heading = "Calling Options"
    )]
    pub timeout: Option<f64>,
    /// Queue to send it to
    #[arg(long, value_name = "NAME", help_heading = "Routing Options")]
    pub queue: Option<String>,
    /// Exchange to send it to
    #[arg(long, value_name = "NAME", help_heading = "Routing Options")]
    pub exchange: Option<String>,
    /// Routing key
    #[arg(long, value_name = "KEY", help_heading = "Routing Options")]
    pub routing_key: Option<String>,
}

/// Options of `result`.
#[derive(Debug, Args)]
pub(super) struct TaskResult {
    /// Id of the task, as `call` prints it
    pub task_id: String,
    /// Accepted for compatibility: all tasks have the same backend
    #[arg(short, long, hide = true)]
    pub task: Option<String>,
    /// Show the traceback instead, without waiting
    #[arg(long)]
    pub traceback: bool,
    /// Wait at most so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<f64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text
        .trim()
        .parse()
        .ok()
        .filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| "not a number of seconds, such as 90 or 1.5".to_owned())
}

fn time(text: &str) -> Result<String, String> {
    match parse_iso(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("not a time in ISO 8601, such as {A_TIME}")),
    }
}

fn time_or_seconds(text: &str) -> Result<String, String> {
    match seconds(text).is_ok() || parse_iso(text).is_ok() {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "neither a time in ISO 8601, such as {A_TIME}, nor a number of seconds, such as 90"
        )),
    }
}

/// Options of `purge`.
#[derive(Debug, Args)]
pub(super) struct Purge {
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Comma separated list of queues to purge [default: the configured ones]
    #[arg(short = 'Q', long, value_name = "QUEUES")]
    pub queues: Option<String>,
    /// Comma separated list of queues not to purge
    #[arg(short = 'X', long, value_name = "QUEUES")]
    pub exclude_queues: Option<String>,
}

/// What `list` lists.
#[derive(Debug, Subcommand)]
pub(super) enum List {
    /// Show which queues are bound to the exchanges of tasks
    Bindings,
}

/// Options of `celery worker`.
#[derive(Debug, Args)]
pub(super) struct Worker {
    /// Node name; %h is the host, %n the name before the first dot, %d the rest
    #[arg(
        short = 'n',
        long,
        env = "CELERY_WORKER_HOSTNAME",
        hide_env = true,
        value_name = "NAME"
    )]
    pub hostname: Option<String>,
    /// Tasks that run at once, or `auto` [default: the CPUs this container may use]
    #[arg(
        short,
        long,
        env = "CELERY_WORKER_CONCURRENCY",
        hide_env = true,
        value_name = "N"
    )]
    pub concurrency: Option<String>,
    /// prefork; threads, processes and solo are accepted and run as prefork (solo with one slot)
    #[arg(short = 'P', long, env = "CELERY_WORKER_POOL", hide_env = true, value_name = "POOL",
          value_parser = ["prefork", "processes", "threads", "solo"])]
    pub pool: Option<String>,
    /// DEBUG, INFO, WARNING, ERROR, CRITICAL or FATAL
    #[arg(
        short,
        long,
        env = "CELERY_WORKER_LOGLEVEL",
        hide_env = true,
        value_name = "LEVEL",
        default_value = "WARNING"
    )]
    pub loglevel: String,
    /// Log to a file instead of standard error
    #[arg(
        short = 'f',
        long,
        env = "CELERY_WORKER_LOGFILE",
        hide_env = true,
        value_name = "FILE"
    )]
    pub logfile: Option<String>,
    /// Write the process id to a file
    #[arg(
        long,
        env = "CELERY_WORKER_PIDFILE",
        hide_env = true,
        value_name = "FILE"
    )]
    pub pidfile: Option<String>,
    /// Queues to consume, separated by commas
    #[arg(
        short = 'Q',
        long,
        env = "CELERY_WORKER_QUEUES",
        hide_env = true,
        value_name = "QUEUES"
    )]
    pub queues: Option<String>,
    /// Queues of task_queues to leave out
    #[arg(
        short = 'X',
        long,
        env = "CELERY_WORKER_EXCLUDE_QUEUES",
        hide_env = true,
        value_name = "QUEUES"
    )]
    pub exclude_queues: Option<String>,
    /// Send task events
    #[arg(short = 'E', long, env = "CELERY_WORKER_TASK_EVENTS", hide_env = true)]
    pub task_events: bool,
    /// Keep revoked ids and the clock in this file over restarts
    #[arg(
        short = 'S',
        long,
        env = "CELERY_WORKER_STATEDB",
        hide_env = true,
        value_name = "FILE"
    )]
    pub statedb: Option<String>,
    /// Grow and shrink the pool with the load
    #[arg(
        long,
        env = "CELERY_WORKER_AUTOSCALE",
        hide_env = true,
        value_name = "MAX[,MIN]"
    )]
    pub autoscale: Option<String>,
    /// Replace a child after so many tasks; 0 is never
    #[arg(
        long,
        env = "CELERY_WORKER_MAX_TASKS_PER_CHILD",
        hide_env = true,
        value_name = "N"
    )]
    pub max_tasks_per_child: Option<u64>,
    /// Replace a child that uses more KiB of memory
    #[arg(
        long,
        env = "CELERY_WORKER_MAX_MEMORY_PER_CHILD",
        hide_env = true,
        value_name = "KIB"
    )]
    pub max_memory_per_child: Option<u64>,
    /// Hard time limit in seconds; 0 is none
    #[arg(
        long,
        env = "CELERY_WORKER_TIME_LIMIT",
        hide_env = true,
        value_name = "SECONDS"
    )]
    pub time_limit: Option<f64>,
    /// Soft time limit in seconds; 0 is none
    #[arg(
        long,
        env = "CELERY_WORKER_SOFT_TIME_LIMIT",
        hide_env = true,
        value_name = "SECONDS"
    )]
    pub soft_time_limit: Option<f64>,
    /// Messages fetched ahead for each slot; 0 is without limit
    #[arg(
        long,
        env = "CELERY_WORKER_PREFETCH_MULTIPLIER",
        hide_env = true,
        value_name = "N"
    )]
    pub prefetch_multiplier: Option<u64>,
    /// Fetch no message before a slot is free
    #[arg(long, env = "CELERY_WORKER_DISABLE_PREFETCH", hide_env = true)]
    pub disable_prefetch: bool,
    /// Do not listen to other workers' events
    #[arg(long, env = "CELERY_WORKER_WITHOUT_GOSSIP", hide_env = true)]
    pub without_gossip: bool,
    /// Do not look for other workers at start
    #[arg(long, env = "CELERY_WORKER_WITHOUT_MINGLE", hide_env = true)]
    pub without_mingle: bool,
    /// Send no heartbeats
    #[arg(long, env = "CELERY_WORKER_WITHOUT_HEARTBEAT", hide_env = true)]
    pub without_heartbeat: bool,
    /// Seconds between heartbeats
    #[arg(
        long,
        env = "CELERY_WORKER_HEARTBEAT_INTERVAL",
        hide_env = true,
        value_name = "SECONDS",
        default_value = "2"
    )]
    pub heartbeat_interval: f64,
    /// Empty the queues first
    #[arg(long, visible_alias = "discard")]
    pub purge: bool,
    /// default or fair: both are fair
    #[arg(short = 'O', value_name = "PROFILE", value_parser = ["default", "fair"])]
    pub optimization: Option<String>,
    /// Accepted for compatibility: the tasks are built in
    #[arg(short = 'I', long, hide = true, value_name = "MODULES")]
    pub include: Option<String>,
    /// Accepted for compatibility: children are always started anew
    #[arg(long, hide = true, value_parser = ["fork", "spawn"])]
    pub pool_start_method: Option<String>,
    /// Settings of Celery as name=value
    #[arg(value_name = "SETTING=VALUE")]
    pub settings: Vec<String>,
}

/// Options of `celeriac analyze`.
#[derive(Debug, Args)]
pub(super) struct Analyze {
    /// A path, or the URL of a repository
    #[arg(value_name = "PATH|URL")]
    pub repository: String,
    /// Branch, tag or commit instead of HEAD
    #[arg(long, value_name = "REVISION")]
    pub branch: Option<String>,
    /// Print JSON
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
    /// Lines per file and author (with --json)
    #[arg(long, requires = "json")]
    pub files: bool,
    /// Lines per file and commit (with --json)
    #[arg(long, requires = "json", conflicts_with = "files")]
    pub commits: bool,
    /// Print at most so many contributors; 0 is all
    #[arg(short = 'n', long, default_value_t = 20, value_name = "N")]
    pub limit: usize,
    /// Threads
    #[arg(long, env = "BLAME_THREADS", hide_env = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Environment variable that holds a token for a private repository
    #[arg(long, value_name = "VARIABLE", default_value = "GITHUB_TOKEN")]
    pub token_variable: String,
    /// Ignore white space, as git blame -w does
    #[arg(short = 'w')]
    pub ignore_whitespace: bool,
    /// Follow first parents only, as git blame --first-parent does
    #[arg(long)]
    pub first_parent: bool,
    /// Look through this commit, as git blame --ignore-rev does; may be repeated
    #[arg(long, value_name = "REVISION")]
    pub ignore_rev: Vec<String>,
    /// Look through the commits that this file lists, as git blame --ignore-revs-file does: a
    /// file here or, if there is none, in the commit (.git-blame-ignore-revs); may be repeated
    #[arg(long, value_name = "FILE")]
    pub ignore_revs_file: Vec<String>,
    /// Only files that match this glob; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// No files that match this glob; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Where the result is kept: a database URL, or `none` [default: DATABASE_URL, else an
    /// embedded SQLite file]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// Print statistics of the work
    #[arg(long)]
    pub statistics: bool,
}

/// What can be done with stored tokens.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Store or replace a token, read from standard input
    Set {
        /// The user_id of that user's tasks
        #[arg(value_name = "USER")]
        user: String,
        /// The host it is for, with the port unless it is https on 443
        #[arg(long, value_name = "HOST[:PORT]", default_value = "github.com")]
        host: String,
    },
    /// Remove a token
    Rm {
        /// The user_id of that user's tasks
        #[arg(value_name = "USER")]
        user: String,
        /// The host it is for
        #[arg(long, value_name = "HOST[:PORT]", default_value = "github.com")]
        host: String,
    },
    /// Users and hosts with a token, and when it was stored; never the token
    List,
    /// Encrypt all tokens anew with the first key of TOKEN_ENCRYPTION_KEYS
    Rotate,
}
