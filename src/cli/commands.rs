//! The commands of remote control as the command line knows them: their words, what each takes
//! and what it is for.
//!
//! Names, arguments and texts are those of `celery.worker.control.Panel`, so that a script or a
//! habit goes on working. Knows no worker: what a command does is the worker's.

use serde_json::{Map, Value};

use crate::protocol::json;
use crate::protocol::saferepr::repr_str;

/// Looks, or changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Inspect,
    Control,
}

/// How a word becomes an argument.
#[derive(Debug, Clone, Copy)]
enum Type {
    Text,
    Int,
    Float,
    Bool,
    /// A JSON value where it is one, else text.
    Json,
}

/// One command.
pub(super) struct Command {
    pub(super) name: &'static str,
    kind: Kind,
    /// Listed for people.
    visible: bool,
    signature: &'static str,
    help: &'static str,
    arguments: &'static [(&'static str, Type)],
    /// The argument that takes all words that are left.
    variadic: Option<&'static str>,
}

const PLAIN: Command = Command {
    name: "",
    kind: Kind::Inspect,
    visible: true,
    signature: "",
    help: "",
    arguments: &[],
    variadic: None,
};
const CONTROL: Command = Command {
    kind: Kind::Control,
    ..PLAIN
};

/// In the order of their names.
const COMMANDS: &[Command] = &[
    Command {
        name: "active",
        help: "List of tasks currently being executed.",
        ..PLAIN
    },
    Command {
        name: "active_queues",
        help: "List the task queues a worker is currently consuming from.",
        ..PLAIN
    },
    Command {
        name: "add_consumer",
        signature: "<queue> [exchange [type [routing_key]]]",
        help: "Tell worker(s) to consume from task queue by name.",
        arguments: &[
            ("queue", Type::Text),
            ("exchange", Type::Text),
            ("exchange_type", Type::Text),
            ("routing_key", Type::Text),
        ],
        ..CONTROL
    },
    Command {
        name: "autoscale",
        signature: "[max [min]]",
        help: "Modify autoscale settings.",
        arguments: &[("max", Type::Int), ("min", Type::Int)],
        ..CONTROL
    },
    Command {
        name: "cancel_consumer",
        signature: "<queue>",
        help: "Tell worker(s) to stop consuming from task queue by name.",
        arguments: &[("queue", Type::Text)],
        ..CONTROL
    },
    Command {
        name: "clock",
        help: "Get current logical clock value.",
        ..PLAIN
    },
    Command {
        name: "conf",
        signature: "[include_defaults=False]",
        help: "List configuration.",
        arguments: &[("with_defaults", Type::Bool)],
        ..PLAIN
    },
    Command {
        name: "disable_events",
        help: "Tell worker(s) to stop sending task-related events.",
        ..CONTROL
    },
    Command {
        name: "election",
        help: "Hold election.",
        arguments: &[
            ("id", Type::Text),
            ("topic", Type::Text),
            ("action", Type::Json),
        ],
        ..CONTROL
    },
    Command {
        name: "enable_events",
        help: "Tell worker(s) to send task-related events.",
        ..CONTROL
    },
    Command {
        name: "heartbeat",
        help: "Tell worker(s) to send event heartbeat immediately.",
        ..CONTROL
    },
    Command {
        name: "hello",
        visible: false,
        signature: "[from_node]",
        help: "Request mingle sync-data.",
        arguments: &[("from_node", Type::Text)],
        ..PLAIN
    },
    Command {
        name: "memdump",
        signature: "[n_samples=10]",
        help: "Dump statistics of previous memsample requests.",
        arguments: &[("samples", Type::Int)],
        ..PLAIN
    },
    Command {
        name: "memsample",
        help: "Sample current RSS memory usage.",
        ..PLAIN
    },
    Command {
        name: "objgraph",
        signature: "[object_type=Request] [num=200 [max_depth=10]]",
        help: "Create graph of uncollected objects (memory-leak debugging).",
        arguments: &[
            ("type", Type::Text),
            ("num", Type::Int),
            ("max_depth", Type::Int),
        ],
        ..PLAIN
    },
    Command {
        name: "ping",
        help: "Ping worker(s).",
        ..PLAIN
    },
    Command {
        name: "pool_grow",
        signature: "[N=1]",
        help: "Grow pool by n processes/threads.",
        arguments: &[("n", Type::Int)],
        ..CONTROL
    },
    Command {
        name: "pool_restart",
        help: "Restart execution pool.",
        ..CONTROL
    },
    Command {
        name: "pool_shrink",
        signature: "[N=1]",
        help: "Shrink pool by n processes/threads.",
        arguments: &[("n", Type::Int)],
        ..CONTROL
    },
    Command {
        name: "query_task",
        signature: "[id1 [id2 [... [idN]]]]",
        help: "Query for task information by id.",
        variadic: Some("ids"),
        ..PLAIN
    },
    Command {
        name: "rate_limit",
        signature: "<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
        help: "Tell worker(s) to modify the rate limit for a task by type.",
        arguments: &[("task_name", Type::Text), ("rate_limit", Type::Text)],
        ..CONTROL
    },
    Command {
        name: "registered",
        signature: "[attr1 [attr2 [... [attrN]]]]",
        help: "List of registered tasks.",
        variadic: Some("taskinfoitems"),
        ..PLAIN
    },
    Command {
        name: "report",
        help: "Information about Celery installation for bug reports.",
        ..PLAIN
    },
    Command {
        name: "reserved",
        help: "List of currently reserved tasks, not including scheduled/active.",
        ..PLAIN
    },
    Command {
        name: "revoke",
        signature: "[id1 [id2 [... [idN]]]]",
        help: "Revoke task by task id (or list of ids).",
        variadic: Some("task_id"),
        ..CONTROL
    },
    Command {
        name: "revoke_by_stamped_headers",
        signature: "[key1=value1 [key2=value2 [... [keyN=valueN]]]]",
        help: "Revoke task by header (or list of headers).",
        variadic: Some("headers"),
        ..CONTROL
    },
    Command {
        name: "revoked",
        help: "List of revoked task-ids.",
        ..PLAIN
    },
    Command {
        name: "scheduled",
        help: "List of currently scheduled ETA/countdown tasks.",
        ..PLAIN
    },
    Command {
        name: "shutdown",
        help: "Shutdown worker(s).",
        ..CONTROL
    },
    Command {
        name: "stats",
        help: "Request worker statistics/information.",
        ..PLAIN
    },
    Command {
        name: "terminate",
        signature: "<signal> [id1 [id2 [... [idN]]]]",
        help: "Terminate task by task id (or list of ids).",
        arguments: &[("signal", Type::Text)],
        variadic: Some("task_id"),
        ..CONTROL
    },
    Command {
        name: "time_limit",
        signature: "<task_name> <soft_secs> [hard_secs]",
        help: "Tell worker(s) to modify the time limit for task by type.",
        arguments: &[
            ("task_name", Type::Text),
            ("soft", Type::Float),
            ("hard", Type::Float),
        ],
        ..CONTROL
    },
];

impl Kind {
    /// The word of the command line.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Inspect => "inspect",
            Self::Control => "control",
        }
    }

    fn commands(self) -> impl Iterator<Item = &'static Command> {
        COMMANDS
            .iter()
            .filter(move |command| command.kind == self && command.visible)
    }

    /// The command of that name, else what to tell the user.
    pub(super) fn find(self, name: &str) -> Result<&'static Command, String> {
        let found = COMMANDS
            .iter()
            .find(|command| command.kind == self && command.name == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.commands().map(|command| command.name).collect();
            let word = self.word();
            format!(
                "Command {name} not recognized. Available {word} commands: {}",
                names.join(", ")
            )
        })
    }

    /// What stands below the options in the help.
    pub(super) fn help(self) -> String {
        let about = match self {
            Self::Inspect => {
                "On Redis it ends when everybody has answered. Elsewhere name the workers by \
                 --destination,\nor it waits until the timeout. The exit code is 69 when nobody \
                 answers: a health check for a\ncontainer is `celeriac inspect ping -d \
                 celery@$HOSTNAME`."
            }
            Self::Control => "The exit code is 69 when nobody answers.",
        };
        format!("{}\n{about}", self.listing())
    }

    /// What `--list` prints.
    pub(super) fn listing(self) -> String {
        let title = match self {
            Self::Inspect => "Inspect Commands:\n",
            Self::Control => "Control Commands:\n",
        };
        let mut text = title.to_owned();
        for command in self.commands() {
            let call = match command.signature {
                "" => command.name.to_owned(),
                signature => format!("{} {signature}", command.name),
            };
            let mut lines = wrap(command.help, 44).into_iter();
            let first = lines.next().unwrap_or_default();
            if call.len() <= 30 {
                text.push_str(&format!("  {call:<30}  {first}\n"));
            } else {
                text.push_str(&format!("  {call}\n{:34}{first}\n", ""));
            }
            for line in lines {
                text.push_str(&format!("{:34}{line}\n", ""));
            }
        }
        text
    }
}

impl Command {
    /// The keyword arguments that the words mean, else what to tell the user. Words that a
    /// command has no use for are passed over, as Celery does, unless it takes some.
    pub(super) fn compile(&self, words: &[String]) -> Result<Map<String, Value>, String> {
        let mut arguments = Map::new();
        let mut words = words.iter();
        for ((name, kind), word) in self.arguments.iter().zip(words.by_ref()) {
            arguments.insert((*name).to_owned(), kind.read(name, word)?);
        }
        let left: Vec<Value> = words.map(|word| Value::from(word.as_str())).collect();
        match self.variadic {
            Some(name) => {
                arguments.insert(name.to_owned(), Value::Array(left));
            }
            None if !left.is_empty() && !self.arguments.is_empty() => {
                return Err(format!(
                    "Command '{}' takes arguments: {}",
                    self.name, self.signature
                ));
            }
            None => {}
        }
        Ok(arguments)
    }
}

impl Type {
    fn read(self, name: &str, word: &str) -> Result<Value, String> {
        let wrong = |what: &str| format!("Invalid value for {name}: {} is {what}", repr_str(word));
        match self {
            Self::Text => Ok(Value::from(word)),
            Self::Int => word
                .trim()
                .parse::<i64>()
                .map(Value::from)
                .map_err(|_| wrong("not a whole number")),
            Self::Float => word
                .trim()
                .parse::<f64>()
                .map(json::float)
                .map_err(|_| wrong("not a number")),
            Self::Bool => match word.to_ascii_lowercase().as_str() {
                "true" | "yes" | "1" | "on" => Ok(Value::from(true)),
                "false" | "no" | "0" | "off" => Ok(Value::from(false)),
                _ => Err(wrong("neither true nor false")),
            },
            Self::Json => Ok(
                json::parse(word.as_bytes(), &crate::protocol::Limits::default())
                    .unwrap_or_else(|_| Value::from(word)),
            ),
        }
    }
}

/// Lines of at most `width` characters, broken at spaces and after hyphens.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_inclusive([' ', '-']) {
        let line = lines.last_mut().expect("because there is a first line");
        if line.len() + word.trim_end().len() > width {
            line.truncate(line.trim_end().len());
            lines.push(word.to_owned());
        } else {
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compiled(kind: Kind, line: &str) -> Result<Value, String> {
        let mut words = line.split(' ').map(str::to_owned);
        let command = kind.find(&words.next().unwrap())?;
        command
            .compile(&words.collect::<Vec<_>>())
            .map(Value::Object)
    }

    #[test]
    fn words_become_the_keyword_arguments_of_the_command() {
        let control = |line| compiled(Kind::Control, line);
        assert_eq!(control("pool_grow").unwrap(), json!({}));
        assert_eq!(control("pool_grow 3").unwrap(), json!({"n": 3}));
        assert_eq!(control("revoke").unwrap(), json!({"task_id": []}));
        let expected = json!({"signal": "KILL", "task_id": ["a", "b"]});
        assert_eq!(control("terminate KILL a b").unwrap(), expected);
        let expected = json!({"task_name": "t", "soft": 1.0, "hard": 2.5});
        assert_eq!(control("time_limit t 1 2.5").unwrap(), expected);
        assert_eq!(control("enable_events a").unwrap(), json!({}));
        let conf = compiled(Kind::Inspect, "conf yes").unwrap();
        assert_eq!(conf, json!({"with_defaults": true}));
    }

    #[test]
    fn words_that_do_not_fit_are_explained() {
        let error = compiled(Kind::Control, "rate_limit a b c").unwrap_err();
        assert_eq!(
            error,
            "Command 'rate_limit' takes arguments: <task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>"
        );
        assert!(
            compiled(Kind::Control, "pool_grow x")
                .unwrap_err()
                .contains("'x'")
        );
        assert!(
            compiled(Kind::Inspect, "conf maybe")
                .unwrap_err()
                .contains("'maybe'")
        );
        let error = compiled(Kind::Inspect, "revoke a").unwrap_err();
        assert!(
            error
                .starts_with("Command revoke not recognized. Available inspect commands: active, ")
        );
        assert!(!error.contains("hello"), "{error}");
    }

    #[test]
    fn the_table_is_in_order_and_the_list_is_as_wide_as_celerys() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        for kind in [Kind::Inspect, Kind::Control] {
            assert!(kind.listing().lines().all(|line| line.len() <= 78));
        }
        let listing = Kind::Inspect.listing();
        assert!(listing.contains("(memory-\n                                  leak debugging).\n"));
    }
}
