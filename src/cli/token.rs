//! `celeriac token`: the tokens that users entrusted to the worker, encrypted in the database.
//!
//! A token comes from standard input only: what stands in argv is seen by every process of the
//! machine. None is ever printed.

use std::io::{BufRead, IsTerminal};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};

use super::args::{Global, TokenCommand};
use super::{connect, global_overrides, output, worker};
use crate::analysis::{self, Policy};

/// No token of a git host is longer.
const LONGEST: usize = 4096;

/// Carries out one of the subcommands.
pub(super) fn run(global: &Global, command: &TokenCommand) -> anyhow::Result<i32> {
    let settings = crate::config::load(&global_overrides(global))?.settings;
    let keys = worker::token_keys(&settings)?;
    let needs_keys = matches!(command, TokenCommand::Set { .. } | TokenCommand::Rotate);
    if needs_keys && keys.is_empty() {
        bail!(
            "TOKEN_ENCRYPTION_KEYS is not set; make a key with: python -c \"from \
             cryptography.fernet import Fernet; print(Fernet.generate_key().decode())\" and give \
             it to the workers too"
        );
    }
    if let TokenCommand::Set { user, host } | TokenCommand::Rm { user, host } = command {
        check(user, host)?;
    }
    let token = match command {
        TokenCommand::Set { .. } => Some(read()?),
        _ => None,
    };
    let database = connect::database(&settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        database
            .migrate()
            .await
            .with_context(|| format!("cannot prepare {}", database.url()))?;
        match command {
            TokenCommand::Set { user, host } => {
                let token = token.unwrap_or_default();
                database.put_token(&keys, user, host, &token).await?;
                output::print(&format!("stored for user {user} and {host}\n"));
            }
            TokenCommand::Rm { user, host } => {
                if !database.delete_token(user, host).await? {
                    output::print_error(&format!("Error: user {user} has none for {host}\n"));
                    return Ok(1);
                }
                output::print(&format!("removed for user {user} and {host}\n"));
            }
            TokenCommand::List => {
                for entry in database.list_tokens().await? {
                    output::print(&format!(
                        "{}\t{}\t{}\n",
                        entry.user_id.escape_debug(),
                        entry.host.escape_debug(),
                        entry.updated_at.format("%Y-%m-%d %H:%M:%S UTC"),
                    ));
                }
            }
            TokenCommand::Rotate => {
                let count = database.rotate_tokens(&keys).await?;
                output::print(&format!("{count} encrypted anew with the first key\n"));
            }
        }
        Ok(0)
    })
}

/// What would be stored and never found again.
fn check(user: &str, host: &str) -> anyhow::Result<()> {
    if user.trim().is_empty() {
        bail!("the user is empty; it is the user_id that tasks come with");
    }
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || "-._:[]".contains(letter);
    // Nobody could ask for one elsewhere.
    let anywhere = Policy {
        allow_local: true,
        allow_http: true,
        ..Policy::default()
    };
    let is_found = || analysis::token_host(&format!("https://{host}/o/r"), &anywhere).is_some();
    let spelled = !host.ends_with(':') && host.chars().all(is_name);
    if host.is_empty() || !spelled || !is_found() {
        bail!(
            "{host:?} is no host; give its name alone, and the port unless it is 443: \
             git.example.com or git.example.com:8443"
        );
    }
    Ok(())
}

/// The first line of standard input; a terminal does not show it.
fn read() -> anyhow::Result<SecretString> {
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        output::print_error("Token (not shown): ");
        echo(false);
    }
    let mut line = Zeroizing::new(String::with_capacity(LONGEST));
    let result = stdin.lock().read_line(&mut line);
    if terminal {
        echo(true);
        output::print_error("\n");
    }
    result.context("cannot read the token from standard input")?;
    let token = SecretString::from(line.trim());
    match token.expose_secret().len() {
        0 => bail!("no token on standard input; example: celeriac token set 7 < token.txt"),
        1..=LONGEST => Ok(token),
        _ => bail!("the first line of standard input is too long for a token"),
    }
}

/// Without `stty` the token shows; nobody is kept from entering one because of that.
fn echo(on: bool) {
    let word = if on { "echo" } else { "-echo" };
    drop(
        Command::new("stty")
            .arg(word)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status(),
    );
}
