//! `celeriac result`: what a task came to.
//!
//! Answers for `celery.bin.result`: a value is printed as Python's `str` shows it, and whoever
//! asks too early waits. A failure goes to standard error, and the exit code is 1.

use std::time::Duration;

use anyhow::bail;
use tokio::time::Instant;

use super::args::{Global, TaskResult};
use super::{connect, output, remote};
use crate::backend::{Backend, Meta};
use crate::protocol::exception::Exception;
use crate::protocol::saferepr;
use crate::protocol::state::State;

/// Between two looks: soon at first, later often enough for a person.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Waits for the result and prints it; returns the exit code.
pub(super) fn run(global: &Global, options: &TaskResult) -> anyhow::Result<i32> {
    let settings = remote::settings(global)?;
    let transport = connect::transport(&settings, "celeriac")?;
    let backend = connect::backend_for_client(&settings, &transport)?;
    check_kept(backend.as_ref(), false)?;
    let runtime = remote::runtime()?;
    let id = &options.task_id;
    if options.traceback {
        let meta = runtime.block_on(backend.get(id))?;
        let traceback = meta.and_then(|meta| meta.traceback).unwrap_or_default();
        output::print(&format!("{traceback}\n"));
        return Ok(0);
    }
    let deadline = options.timeout.map(|seconds| {
        // Inside of the runtime's clock, but before it runs.
        Instant::now() + Duration::from_secs_f64(seconds.clamp(0.0, remote::A_YEAR))
    });
    match runtime.block_on(wait(backend.as_ref(), id, deadline))? {
        Some(meta) => Ok(show(&meta)),
        None => bail!("the result of {id} was not there in time"),
    }
}

/// Refuses a backend that has nothing to be asked for; `rpc://` answers who waits.
pub(super) fn check_kept(backend: &dyn Backend, waiting: bool) -> anyhow::Result<()> {
    match backend.driver() {
        "disabled" => bail!(
            "results are disabled; set CELERY_RESULT_BACKEND, such as redis://localhost:6379/0"
        ),
        "rpc" if !waiting => bail!(
            "the rpc:// backend sends a result to its caller and keeps none; use `celeriac call \
             --wait`, or set CELERY_RESULT_BACKEND, such as redis://localhost:6379/0"
        ),
        _ => Ok(()),
    }
}

/// The document of a task that has ended; none when the deadline passes.
pub(super) async fn wait(
    backend: &dyn Backend,
    id: &str,
    deadline: Option<Instant>,
) -> anyhow::Result<Option<Meta>> {
    let mut pause = FIRST_PAUSE;
    loop {
        let meta = backend.get(id).await?;
        if let Some(meta) = meta.filter(|meta| State::parse(&meta.status).is_ready()) {
            return Ok(Some(meta));
        }
        let next = Instant::now() + pause;
        match deadline {
            Some(deadline) if deadline < next => return Ok(None),
            _ => tokio::time::sleep_until(next).await,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Prints a value, or says what was raised; returns the exit code.
pub(super) fn show(meta: &Meta) -> i32 {
    if meta.is_success() {
        let text = match &meta.result {
            // Nothing is printed as nothing.
            serde_json::Value::Null => String::new(),
            value => saferepr::str(value),
        };
        output::print(&format!("{text}\n"));
        return 0;
    }
    let mut text = String::new();
    if let Some(traceback) = &meta.traceback {
        text.push_str(traceback.trim_end());
        text.push('\n');
    }
    let last = match Exception::from_value(&meta.result) {
        Some(exception) => exception.last_line(),
        None => saferepr::str(&meta.result),
    };
    if !text.trim_end().ends_with(&last) {
        text.push_str(&last);
        text.push('\n');
    }
    output::print_error(&text);
    1
}
