//! `celeriac migrate`: brings the database to the current schema.

use anyhow::Context;

use super::args::Global;
use super::{connect, global_overrides, output};

/// Runs the migrations; says which.
pub(super) fn run(global: &Global) -> anyhow::Result<i32> {
    let settings = crate::config::load(&global_overrides(global))?.settings;
    let database = connect::database(&settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let done = runtime
        .block_on(database.migrate())
        .with_context(|| format!("cannot migrate {}", database.url()))?;
    if done.is_empty() {
        output::print(&format!("{}: nothing to do\n", database.url()));
    }
    for name in done {
        output::print(&format!("{}: {name}\n", database.url()));
    }
    Ok(0)
}
