//! The pool with real processes.
//!
//! A pool starts its own program again, and a child must be what it is in the product: a process
//! whose `main` turns into a child before anything else. Therefore this test has a `main` instead
//! of the standard harness. Arguments are parts of names, as usual: `cargo test --test pool limit`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and without the standard harness it speaks for itself"
)]

mod cases;
mod handler;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use celeriac::pool::{CHILD_ARGUMENT, child};

/// A name that is a sentence, and what shows that it is true.
type Case = (&'static str, fn());

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(CHILD_ARGUMENT) => return child::serve(handler::handle),
        Some(cases::DOOMED_PARENT) => return cases::be_a_doomed_parent(),
        _ => {}
    }
    let options: Vec<String> = std::env::args().skip(1).collect();
    let is_set = |name: &str| options.iter().any(|option| option == name);
    if is_set("--list") {
        return list(is_set("--ignored"));
    }
    let filters: Vec<&String> = options
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wanted = |name: &str| {
        let fits = |filter: &&String| match is_set("--exact") {
            true => name == filter.as_str(),
            false => name.contains(filter.as_str()),
        };
        filters.is_empty() || filters.iter().any(fits)
    };
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, case) in cases::ALL {
        if !wanted(name) {
            continue;
        }
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(case));
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!(
            "test {name} ... {word} ({} ms)",
            begun.elapsed().as_millis()
        );
        match outcome {
            Ok(()) => passed += 1,
            Err(_) => failed.push(name),
        }
    }
    println!("\n{passed} passed; {} failed", failed.len());
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What `cargo nextest` asks before it runs each test in a process of its own. None is ignored.
fn list(ignored: bool) -> ExitCode {
    for (name, _) in cases::ALL.iter().filter(|_| !ignored) {
        println!("{name}: test");
    }
    ExitCode::SUCCESS
}
