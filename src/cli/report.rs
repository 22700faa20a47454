//! `celeriac report`: what is good to know when something does not work.

use super::args::Global;
use super::{connect, output, remote};
use crate::worker::control;

/// Prints it; nothing connects, so that it can be asked for when the broker is away.
pub(super) fn run(global: &Global) -> anyhow::Result<i32> {
    let settings = remote::settings(global)?;
    let transport = connect::transport(&settings, "celeriac")?;
    let backend = connect::backend(&settings, &transport)?;
    let text = control::report(&settings, transport.driver(), &backend.display_url());
    output::print(&format!("{text}\n"));
    Ok(0)
}
