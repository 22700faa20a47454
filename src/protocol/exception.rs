//! Exceptions as results carry them, so that a Python client raises the right class.
//!
//! Only classes of `builtins`, `celery.exceptions`, `kombu.exceptions` and
//! `billiard.exceptions` are made here: any other name would make the client invent a class,
//! or refuse. Answers for `celery.utils.serialization` (`get_pickleable_exception` and the
//! JSON form of `Backend.prepare_exception`) and for `repr` and `str` of exceptions.

use serde_json::{Map, Value};

use super::{mask, saferepr};

/// An exception: its class, the arguments of its constructor, and where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Exception {
    /// Name of the class.
    pub exc_type: String,
    /// Module of the class; the client imports it only if it has it loaded.
    pub exc_module: Option<String>,
    /// Arguments of the constructor.
    pub exc_message: Vec<Value>,
    /// What is stored beside it as `traceback`.
    pub traceback: Option<String>,
}

impl Exception {
    /// An exception of `module`.
    pub fn new(module: &str, class: &str, args: Vec<Value>) -> Self {
        Self {
            exc_type: class.to_owned(),
            exc_module: Some(module.to_owned()),
            exc_message: args,
            traceback: None,
        }
    }

    /// A Python builtin such as `ValueError` with one text.
    pub fn builtin(class: &str, text: impl Into<String>) -> Self {
        Self::new("builtins", class, vec![Value::String(text.into())])
    }

    /// The task's name is not registered here.
    pub fn not_registered(name: &str) -> Self {
        Self::new("celery.exceptions", "NotRegistered", vec![name.into()])
    }

    /// Arguments that do not fit the task.
    pub fn type_error(text: impl Into<String>) -> Self {
        Self::builtin("TypeError", text)
    }

    /// The soft time limit, not caught by the task.
    pub fn soft_time_limit() -> Self {
        Self::new("billiard.exceptions", "SoftTimeLimitExceeded", Vec::new())
    }

    /// The hard time limit, in seconds.
    pub fn time_limit(seconds: f64) -> Self {
        let limit = if seconds.fract() == 0.0 && seconds.abs() < 9e15 {
            Value::from(seconds as i64)
        } else {
            super::json::float(seconds)
        };
        Self::new("billiard.exceptions", "TimeLimitExceeded", vec![limit])
    }

    /// The pool child died: `signal 9 (SIGKILL) Job: 19.`, `exitcode 3.`
    pub fn worker_lost(how: &str) -> Self {
        let text = format!("Worker exited prematurely: {how}");
        Self::new("billiard.exceptions", "WorkerLostError", vec![text.into()])
    }

    /// `revoked`, `expired` or `terminated`.
    pub fn task_revoked(why: &str) -> Self {
        Self::new("celery.exceptions", "TaskRevokedError", vec![why.into()])
    }

    /// A task asked to be retried `in 1s`, or `at` a time; shown in tracebacks and logs only,
    /// results store the cause.
    pub fn retry(when: &str, cause: Option<&Exception>) -> Self {
        let text = match cause {
            Some(cause) => format!("Retry {when}: {}", cause.repr()),
            None => format!("Retry {when}"),
        };
        Self::new("celery.exceptions", "Retry", vec![text.into()])
    }

    /// What Celery stores for a running, early acknowledged task when it shuts down cold.
    pub fn cancelled() -> Self {
        let text = "Retry(Retry(...), None, None)";
        Self::new(
            "celery.exceptions",
            "Retry",
            vec![text.into(), Value::Null, Value::Null],
        )
    }

    /// No retry is left and the task gave no exception of its own.
    pub fn max_retries(name: &str, id: &str, argsrepr: &str, kwargsrepr: &str) -> Self {
        let text = format!("Can't retry {name}[{id}] args:{argsrepr} kwargs:{kwargsrepr}");
        Self::new(
            "celery.exceptions",
            "MaxRetriesExceededError",
            vec![text.into()],
        )
    }

    /// A chord cannot call its body.
    pub fn chord_error(text: impl Into<String>) -> Self {
        Self::new(
            "celery.exceptions",
            "ChordError",
            vec![Value::String(text.into())],
        )
    }

    /// A part of a chord failed: `Dependency <id> raised <repr>`.
    pub fn chord_dependency(id: &str, cause: &Exception) -> Self {
        Self::chord_error(format!("Dependency {id} raised {}", cause.repr()))
    }

    /// A task rejected its message without requeueing.
    pub fn reject(reason: &str, requeue: bool) -> Self {
        Self::new(
            "celery.exceptions",
            "Reject",
            vec![reason.into(), requeue.into()],
        )
    }

    /// A follow-up could not be published.
    pub fn operational(text: impl Into<String>) -> Self {
        Self::new(
            "kombu.exceptions",
            "OperationalError",
            vec![Value::String(text.into())],
        )
    }

    /// A result the serializer has no form for.
    pub fn encode(text: &str) -> Self {
        let inner = format!("TypeError({})", saferepr::repr_str(text));
        Self::new("kombu.exceptions", "EncodeError", vec![inner.into()])
    }

    /// The same with a traceback.
    pub fn with_traceback(mut self, traceback: impl Into<String>) -> Self {
        self.traceback = Some(traceback.into());
        self
    }

    /// The same without secrets, see [`mask::mask_secrets`].
    pub fn masked(&self, secrets: &[&str]) -> Self {
        Self {
            exc_message: self
                .exc_message
                .iter()
                .map(|arg| mask::mask_value(arg, secrets))
                .collect(),
            traceback: self
                .traceback
                .as_ref()
                .map(|text| mask::mask_secrets(text, secrets).into_owned()),
            ..self.clone()
        }
    }

    /// The object stored as `result`.
    pub fn to_value(&self) -> Value {
        let mut object = Map::new();
        object.insert("exc_type".to_owned(), self.exc_type.clone().into());
        object.insert(
            "exc_message".to_owned(),
            Value::Array(self.exc_message.clone()),
        );
        object.insert("exc_module".to_owned(), self.exc_module.clone().into());
        Value::Object(object)
    }

    /// Reads a stored `result` back; `None` when it is no exception object.
    pub fn from_value(value: &Value) -> Option<Self> {
        let object = value.as_object()?;
        let exc_message = match object.get("exc_message") {
            Some(Value::Array(args)) => args.clone(),
            Some(Value::Null) | None => Vec::new(),
            Some(other) => vec![other.clone()],
        };
        Some(Self {
            exc_type: object.get("exc_type")?.as_str()?.to_owned(),
            exc_module: object
                .get("exc_module")
                .and_then(Value::as_str)
                .map(str::to_owned),
            exc_message,
            traceback: None,
        })
    }

    /// Python's `repr`: `ValueError('boom', 42)`.
    pub fn repr(&self) -> String {
        let args: Vec<String> = self.exc_message.iter().map(saferepr::repr).collect();
        format!("{}({})", self.exc_type, args.join(", "))
    }

    /// The name Python prints in a traceback: with its module unless that is `builtins`.
    pub fn qualified_name(&self) -> String {
        match self.exc_module.as_deref() {
            None | Some("builtins") => self.exc_type.clone(),
            Some(module) => format!("{module}.{}", self.exc_type),
        }
    }

    /// The last line of a traceback, without line break.
    pub fn last_line(&self) -> String {
        let name = self.qualified_name();
        match self.to_string() {
            text if text.is_empty() => name,
            text => format!("{name}: {text}"),
        }
    }
}

impl std::fmt::Display for Exception {
    /// Python's `str`: the only argument, or all of them as a tuple.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Two classes of billiard show their arguments as the tuple they are.
        if matches!(
            self.exc_type.as_str(),
            "SoftTimeLimitExceeded" | "TimeLimitExceeded"
        ) {
            return write!(
                formatter,
                "{}{}",
                self.exc_type,
                saferepr::repr_tuple(&self.exc_message)
            );
        }
        match self.exc_message.as_slice() {
            [] => Ok(()),
            [key] if self.exc_type == "KeyError" => formatter.write_str(&saferepr::repr(key)),
            [only] => formatter.write_str(&saferepr::str(only)),
            // Its first argument is the text of a retry, whatever else it carries.
            [text, ..] if self.exc_type == "Retry" => formatter.write_str(&saferepr::str(text)),
            many => formatter.write_str(&saferepr::repr_tuple(many)),
        }
    }
}

impl std::error::Error for Exception {}

/// Builds the text stored as `traceback`: which steps were under way and what caused what,
/// outermost first, with the exception itself as the last line, where Python has it.
#[derive(Debug, Clone, Default)]
pub struct Traceback {
    lines: Vec<String>,
}

impl Traceback {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A step that was under way, such as `fetch` with `https://github.com/o/r`.
    pub fn step(mut self, name: &str, detail: &str) -> Self {
        self.lines.push(match indented(detail) {
            detail if detail.is_empty() => format!("  In step {name}"),
            detail => format!("  In step {name}: {detail}"),
        });
        self
    }

    /// What caused the failure, one call for each link of the chain, outermost first.
    pub fn cause(mut self, text: &str) -> Self {
        self.lines
            .push(format!("    caused by: {}", indented(text)));
        self
    }

    /// The text, ending with the exception and a line break.
    pub fn build(&self, exception: &Exception) -> String {
        let mut text = String::from("Traceback (celeriac, outermost step first):\n");
        for line in &self.lines {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(&exception.last_line());
        text.push('\n');
        text
    }
}

/// Keeps a text of several lines inside of its entry.
fn indented(text: &str) -> String {
    text.trim_end().replace('\n', "\n      ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Exception, Traceback};

    #[test]
    fn an_exception_is_shown_as_python_shows_it() {
        let two = Exception::new("builtins", "ValueError", vec![json!("boom"), json!(42)]);
        assert_eq!(two.repr(), "ValueError('boom', 42)");
        assert_eq!(two.last_line(), "ValueError: ('boom', 42)");
        assert_eq!(
            Exception::builtin("KeyError", "later").last_line(),
            "KeyError: 'later'"
        );
        assert_eq!(
            Exception::builtin("ValueError", "x").repr(),
            "ValueError('x')"
        );
        assert_eq!(
            Exception::soft_time_limit().last_line(),
            "billiard.exceptions.SoftTimeLimitExceeded: SoftTimeLimitExceeded()"
        );
        assert_eq!(Exception::time_limit(1.0).repr(), "TimeLimitExceeded(1)");
        assert_eq!(Exception::time_limit(1.5).repr(), "TimeLimitExceeded(1.5)");
        assert_eq!(
            Exception::not_registered("celery_app.unknown").repr(),
            "NotRegistered('celery_app.unknown')"
        );
        let retry = Exception::retry("in 1s", Some(&Exception::builtin("KeyError", "later")));
        assert_eq!(
            retry.last_line(),
            "celery.exceptions.Retry: Retry in 1s: KeyError('later')"
        );
    }

    #[test]
    fn stored_objects_have_celerys_form_and_are_read_back() {
        let lost = Exception::worker_lost("signal 9 (SIGKILL) Job: 19.");
        let stored = lost.to_value();
        assert_eq!(
            stored.to_string(),
            r#"{"exc_type":"WorkerLostError","exc_message":["Worker exited prematurely: signal 9 (SIGKILL) Job: 19."],"exc_module":"billiard.exceptions"}"#
        );
        assert_eq!(Exception::from_value(&stored), Some(lost));
        let plain = Exception::from_value(&json!({"exc_type": "E", "exc_message": "text"}))
            .expect("an exception");
        assert_eq!(
            (plain.exc_module, plain.exc_message),
            (None, vec![json!("text")])
        );
        assert_eq!(Exception::from_value(&json!({"a": 1})), None);
        assert_eq!(Exception::from_value(&json!("text")), None);
    }

    #[test]
    fn a_traceback_ends_with_the_exception() {
        let error = Exception::builtin("ConnectionError", "host is unknown");
        let text = Traceback::new()
            .step("fetch", "https://x.example/o/r")
            .cause("dns\nno answer\n")
            .build(&error);
        assert_eq!(
            text,
            "Traceback (celeriac, outermost step first):\n  In step fetch: https://x.example/o/r\n    \
             caused by: dns\n      no answer\nConnectionError: host is unknown\n"
        );
    }
}
