//! celeriac: a pool child when its first argument says so, the command line otherwise.

use std::process::ExitCode;

use celeriac::{analysis, cli, pool};

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == pool::CHILD_ARGUMENT)
    {
        return pool::child::serve(analysis::perform);
    }
    // The one provider of TLS in the program; it can only be there already in a second call.
    drop(rustls::crypto::ring::default_provider().install_default());
    let code = cli::run();
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
