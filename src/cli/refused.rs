//! Values that cannot be used, told under the name by which they were given: a variable of the
//! environment is not blamed on the option that reads it, and no secret is shown.

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Command};

/// The error of a value that stands in the environment; `None`: it is the command line's.
pub(super) fn of_environment(error: &clap::Error, command: &Command) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (option, value) = (
        text(ContextKind::InvalidArg)?,
        text(ContextKind::InvalidValue)?,
    );
    let argument = arguments(command).find(|argument| argument.to_string() == option)?;
    let variable = argument.get_env()?.to_str()?;
    let typed = std::env::args().skip(1).any(|word| word.contains(value));
    if typed || std::env::var(variable).ok()? != value {
        return None;
    }
    let known: Vec<String> = argument
        .get_possible_values()
        .iter()
        .map(|known| known.get_name().to_owned())
        .collect();
    Some(if known.is_empty() {
        format!("{variable}: '{value}' is no number; example: {variable}=4")
    } else {
        format!("{variable}: '{value}' is none of {}", known.join(", "))
    })
}

fn arguments(command: &Command) -> impl Iterator<Item = &Arg> {
    std::iter::once(command)
        .chain(command.get_subcommands())
        .flat_map(Command::get_arguments)
}

/// `VARIABLE=address` with what may be a password left out, or `VARIABLE` alone where nothing
/// is sure to be none.
pub(super) fn address(variable: &str, text: &str) -> String {
    let shown = text.split_once("://").and_then(|(scheme, rest)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '+';
        let (login, place) = rest.rsplit_once('@').unwrap_or(("", rest));
        // A port that is no number may be a password whose host is missing.
        let host = place.split(['/', '?']).next().unwrap_or_default();
        let port = host.rsplit_once(':').map_or("", |(_, port)| port);
        let clear = scheme.chars().all(plain)
            && !text.contains(';')
            && !place.contains('?')
            && port.chars().all(|c| c.is_ascii_digit());
        let login = if login.is_empty() { "" } else { "**@" };
        clear.then(|| format!("{variable}={scheme}://{login}{place}"))
    });
    shown.unwrap_or_else(|| variable.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_what_may_be_a_password() {
        for (text, shown) in [
            ("http://user:geheim@host/0", "V=http://**@host/0"),
            ("redis://host/zero", "V=redis://host/zero"),
            ("redis://:ge@heim@host:x/0", "V"),
            ("redis://:geheim", "V"),
            ("redis://:ge;heim@host/0", "V"),
            ("redis://host/0?password=geheim", "V"),
            ("geheim", "V"),
        ] {
            assert_eq!(address("V", text), shown, "{text}");
        }
    }
}
