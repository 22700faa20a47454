//! The cases. Each starts a pool of its own and shows one promise of the pool's module docs.

use std::collections::HashSet;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use celeriac::pool::{Error, Event, Job, Options, Outcome, Pool, Sandbox};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Case;

mod ends;
mod fences;
mod jobs;
mod places;

pub(crate) use ends::be_a_doomed_parent;
use ends::*;
use fences::*;
use jobs::*;
use places::*;

/// The first argument of the process that is killed to see what becomes of its children.
pub(crate) const DOOMED_PARENT: &str = "__doomed_parent";

/// No case waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(20);

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// Every case by name.
        pub(crate) const ALL: &[Case] = &[$((stringify!($name), || block_on($name()))),*];
    };
}

cases![
    a_job_comes_back_as_it_was_sent,
    progress_arrives_in_order_and_before_the_outcome,
    a_failure_keeps_its_parts,
    the_soft_limit_interrupts_and_the_child_lives_on,
    the_hard_limit_kills_within_a_tenth_of_a_second,
    a_child_that_never_stops_talking_is_killed_at_its_limit_too,
    terminate_kills_the_running_job_and_frees_the_place,
    a_signal_that_is_survived_is_followed_by_one_that_is_not,
    a_terminate_that_comes_too_late_does_not_hit_the_next_job,
    a_killed_child_is_a_lost_job_at_once_and_others_go_on,
    a_crash_is_told_by_its_exit_code_or_signal,
    a_panic_is_a_failure_without_secrets_and_the_child_is_replaced,
    an_abandoned_job_does_not_spoil_its_place,
    an_idle_child_that_dies_is_replaced,
    children_are_replaced_after_n_jobs_and_no_job_is_lost,
    two_thousand_jobs_with_a_fresh_child_for_each,
    a_child_that_became_large_is_replaced,
    the_pool_grows_and_shrinks_but_not_below_its_busy_places,
    restart_replaces_every_child,
    acquire_waits_for_a_free_place,
    a_large_result_arrives_and_a_larger_one_is_a_failure,
    a_child_sees_only_the_listed_environment,
    a_child_has_only_its_own_descriptors,
    a_hijacked_child_reaches_nothing_that_is_not_its_own,
    the_sandbox_can_be_switched_off,
    stop_waits_for_running_jobs_and_leaves_nobody,
    kill_ends_running_jobs_and_leaves_nobody,
    dropping_the_pool_leaves_nobody,
    a_parent_that_is_killed_leaves_nobody,
    a_program_that_cannot_be_started_is_an_error_of_the_start,
    four_children_start_quickly,
];

fn block_on(case: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(4 * DEADLINE, case)
            .await
            .expect("the case takes too long");
    });
}

fn options(size: usize) -> Options {
    Options {
        size,
        ..Options::default()
    }
}

async fn pool(options: Options) -> Arc<Pool> {
    let pool = Pool::start(options).unwrap();
    in_time(pool.ready()).await;
    pool
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("nothing came in time")
}

fn job(name: &str, payload: Value) -> Job {
    Job {
        id: format!("id-of-{name}"),
        name: name.to_owned(),
        payload,
        soft_limit: None,
        hard_limit: None,
        directory: None,
    }
}

fn channel() -> (UnboundedSender<Event>, UnboundedReceiver<Event>) {
    unbounded_channel()
}

/// Runs one job in a place of its own and gives the outcome and what was heard.
async fn run(pool: &Pool, job: Job) -> (Outcome, Vec<Event>) {
    let (sender, mut receiver) = channel();
    let mut slot = in_time(pool.acquire()).await;
    let outcome = in_time(slot.run(job, sender)).await;
    drop(slot);
    let mut events = Vec::new();
    while let Some(event) = receiver.recv().await {
        events.push(event);
    }
    (outcome, events)
}

/// Starts a job in a task of its own; comes back when the handler says that it is waiting.
async fn start(pool: &Arc<Pool>, job: Job) -> (tokio::task::JoinHandle<Outcome>, u32) {
    let (sender, mut receiver) = channel();
    let mut slot = in_time(pool.acquire()).await;
    let pid = slot.pid();
    let task = tokio::spawn(async move { slot.run(job, sender).await });
    while let Some(event) = in_time(receiver.recv()).await {
        if event == Event::Progress(json!("waiting")) {
            return (task, pid);
        }
    }
    panic!("the job ended before it waited: {:?}", task.await);
}

fn exists(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Polls a condition that no signal tells of, with a deadline.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// All children of this process, ours and the zombies among them.
fn children_of(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        if after_name.split_ascii_whitespace().nth(1) == Some(&parent.to_string()) {
            found.push(pid);
        }
    }
    found
}
