//! `celeriac inspect`: asks workers what they do.

use super::args::{Global, Remote};
use super::commands::Kind;
use super::remote;

/// Asks and prints; returns the exit code.
pub(super) fn run(global: &Global, options: &Remote) -> anyhow::Result<i32> {
    remote::run(global, Kind::Inspect, options)
}
