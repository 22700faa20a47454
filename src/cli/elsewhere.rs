//! What `celery` offers and a worker in Rust does not: the error says where to find it.

use clap::error::{ContextKind, ContextValue, ErrorKind};

const SCHEDULER: &str =
    "celeriac has no scheduler; run `celery beat` from Python on the same broker";
const SUPERVISOR: &str = "celeriac stays in the foreground; systemd, Docker or another supervisor \
     starts it, as the user it shall be";
const PYTHON: &str = "it works on an application's Python code; run it from Python";

/// By the word that was typed.
const ELSEWHERE: &[(&str, &str)] = &[
    ("beat", SCHEDULER),
    ("-B", SCHEDULER),
    ("--beat", SCHEDULER),
    ("-s", SCHEDULER),
    ("--schedule", SCHEDULER),
    ("--schedule-filename", SCHEDULER),
    ("--scheduler", SCHEDULER),
    ("-D", SUPERVISOR),
    ("--detach", SUPERVISOR),
    ("--uid", SUPERVISOR),
    ("--gid", SUPERVISOR),
    ("--umask", SUPERVISOR),
    ("--executable", SUPERVISOR),
    (
        "multi",
        "start each worker by itself, as in `celeriac worker -n one@%h`",
    ),
    (
        "flower",
        "Flower is a program of its own and watches celeriac as it is; run it from Python",
    ),
    ("amqp", "use rabbitmqctl or RabbitMQ's management plugin"),
    ("graph", PYTHON),
    ("logtool", PYTHON),
    ("shell", PYTHON),
    ("upgrade", PYTHON),
];

/// The remedy for a word that Celery knows.
pub(super) fn remedy(error: &clap::Error) -> Option<String> {
    let word = match error.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return None,
    };
    let Some(ContextValue::String(word)) = error.get(word) else {
        return None;
    };
    let (word, text) = ELSEWHERE.iter().find(|(known, _)| known == word)?;
    Some(format!("{word}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::super::args::Cli;
    use super::*;
    use clap::Parser;

    #[test]
    fn what_celery_offers_elsewhere_is_known() {
        for (word, text) in ELSEWHERE {
            let line: &[&str] = if word.starts_with('-') {
                &["celery", "-A", "app", "worker", word, "1"]
            } else {
                &["celery", "-A", "app", word, "--help"]
            };
            let error = Cli::try_parse_from(line).unwrap_err();
            assert_eq!(remedy(&error), Some(format!("{word}: {text}")));
        }
        let error = Cli::try_parse_from(["celery", "worker", "--nonsense"]).unwrap_err();
        assert_eq!(remedy(&error), None);
    }
}
