//! `celeriac control`: tells workers to do something.

use super::args::{Global, Remote};
use super::commands::Kind;
use super::remote;

/// Tells and prints what they answer; returns the exit code.
pub(super) fn run(global: &Global, options: &Remote) -> anyhow::Result<i32> {
    remote::run(global, Kind::Control, options)
}
