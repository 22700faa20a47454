//! The command line: what the user typed becomes one of the commands.
//!
//! The binary answers to the name `celery` as well, and `-A` is accepted, so that scripts and
//! compose files written for the Python worker go on working.

mod analyze;
mod args;
mod banner;
mod call;
mod commands;
mod connect;
mod control;
mod dumper;
mod elsewhere;
mod events;
mod inspect;
mod list;
mod migrate;
pub mod output;
mod paint;
mod pidfile;
mod purge;
mod python;
mod refused;
mod remote;
mod report;
mod result;
mod status;
mod table;
mod terminal;
mod token;
mod worker;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, Global, List};

/// Exit code for what the user got wrong, as Celery has it.
const USAGE: i32 = 2;

/// Runs the program; returns its exit code.
pub fn run() -> i32 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let mut command = Cli::command();
            // Otherwise an argument cannot be named yet.
            command.build();
            let text = refused::of_environment(&error, &command);
            if let Some(text) = text.or_else(|| elsewhere::remedy(&error)) {
                output::print_error(&format!("Error: {text}\n"));
                return USAGE;
            }
            error.exit()
        }
    };
    if let Some(directory) = &cli.global.workdir
        && let Err(error) = std::env::set_current_dir(directory)
    {
        output::print_error(&format!(
            "Error: --workdir: {}: {error}\n",
            directory.display()
        ));
        return USAGE;
    }
    let outcome = match &cli.command {
        Command::Worker(options) => worker::run(&cli.global, options),
        Command::Analyze(options) => analyze::run(&cli.global, options),
        Command::Migrate => migrate::run(&cli.global),
        Command::Token(command) => token::run(&cli.global, command),
        Command::Inspect(options) => inspect::run(&cli.global, options),
        Command::Control(options) => control::run(&cli.global, options),
        Command::Status(target) => status::run(&cli.global, target),
        Command::Events(options) => events::run(&cli.global, options),
        Command::Report => report::run(&cli.global),
        Command::Call(options) => call::run(&cli.global, options),
        Command::Result(options) => result::run(&cli.global, options),
        Command::Purge(options) => purge::run(&cli.global, options),
        Command::List(List::Bindings) => list::bindings(&cli.global),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::print_error(&format!("Error: {}\n", told(&error)));
            1
        }
    }
}

/// An error and its causes, without those that its text tells already.
fn told(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

/// What the global options say as settings.
fn global_overrides(global: &Global) -> Vec<(String, String, String)> {
    let broker = global
        .broker
        .clone()
        .map(|url| ("broker_url".to_owned(), url, "--broker".to_owned()));
    let backend = global.result_backend.clone().map(|url| {
        (
            "result_backend".to_owned(),
            url,
            "--result-backend".to_owned(),
        )
    });
    broker.into_iter().chain(backend).collect()
}
