//! `celeriac status`: which workers are there.

use serde_json::Map;

use super::args::{Global, Target};
use super::output::print;
use super::paint::Paint;
use super::{python, remote};

/// Pings and lists who answers; returns the exit code.
pub(super) fn run(global: &Global, target: &Target) -> anyhow::Result<i32> {
    let paint = Paint::stdout(global);
    let asked = remote::ask(global, target, ("status", "ping"), Map::new(), |reply| {
        if !target.json {
            remote::say(global, paint, reply, false);
        }
    })?;
    let replies = match asked {
        Ok(replies) => replies,
        Err(code) => return Ok(code),
    };
    if target.json {
        print(&format!(
            "{}\n",
            python::dumps(&remote::merged(&replies), false)
        ));
    }
    // Celery counts in JSON mode and with --quiet, too.
    print(&remote::online(&replies));
    Ok(0)
}
