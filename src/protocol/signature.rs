//! Signatures: calls that are to be made later, as they travel inside of messages.
//!
//! A callback, an errback, a step of a chain, the body of a chord. Kept as the object it came
//! as, so that unknown keys and their order survive; what has a meaning is read by methods.
//!
//! Answers for `celery.canvas.Signature` as data; applying one is `worker/canvas.rs`.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// A call to be made later.
#[derive(Clone, PartialEq)]
pub struct Signature {
    object: Map<String, Value>,
}

impl Signature {
    /// A plain signature with Celery's keys in their order.
    pub fn new(task: &str, args: Vec<Value>, kwargs: Map<String, Value>) -> Self {
        let mut object = Map::new();
        object.insert("task".to_owned(), task.into());
        object.insert("args".to_owned(), Value::Array(args));
        object.insert("kwargs".to_owned(), Value::Object(kwargs));
        object.insert("options".to_owned(), Value::Object(Map::new()));
        object.insert("subtask_type".to_owned(), Value::Null);
        object.insert("immutable".to_owned(), Value::Bool(false));
        Self { object }
    }

    /// Takes the object of a message. The error says what it lacks.
    pub fn from_value(value: Value) -> Result<Self, String> {
        let object = match value {
            Value::Object(object) => object,
            other => return Err(format!("a signature is an object, not {}", kind(&other))),
        };
        match object.get("task") {
            Some(Value::String(_)) => {}
            _ => return Err("a signature has no task name".to_owned()),
        }
        for (key, is_right) in [
            ("args", Value::is_array as fn(&Value) -> bool),
            ("kwargs", Value::is_object),
            ("options", Value::is_object),
        ] {
            if let Some(found) = object.get(key)
                && !found.is_null()
                && !is_right(found)
            {
                return Err(format!("{key} of a signature cannot be {}", kind(found)));
            }
        }
        Ok(Self { object })
    }

    /// Reads a list of them; a single one stands for a list of one, null for none.
    pub fn list(value: Value) -> Result<Option<Vec<Self>>, String> {
        match value {
            Value::Null => Ok(None),
            Value::Array(items) => items
                .into_iter()
                .map(Self::from_value)
                .collect::<Result<_, _>>()
                .map(Some),
            single => Self::from_value(single).map(|signature| Some(vec![signature])),
        }
    }

    /// The object as it came, or as it was changed.
    pub fn to_value(&self) -> Value {
        Value::Object(self.object.clone())
    }

    /// The same without a copy.
    pub fn into_value(self) -> Value {
        Value::Object(self.object)
    }

    /// Name of the task; `celery.chain` and the like for compound ones.
    pub fn task(&self) -> &str {
        self.object
            .get("task")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// Stored positional arguments.
    pub fn args(&self) -> &[Value] {
        self.object
            .get("args")
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    /// One stored keyword argument.
    pub fn kwarg(&self, name: &str) -> Option<&Value> {
        self.object.get("kwargs")?.get(name)
    }

    /// Stored keyword arguments.
    pub fn kwargs(&self) -> Map<String, Value> {
        match self.object.get("kwargs") {
            Some(Value::Object(kwargs)) => kwargs.clone(),
            _ => Map::new(),
        }
    }

    /// `chain`, `group`, `chord` and the like; plain tasks have none.
    pub fn subtask_type(&self) -> Option<&str> {
        self.object.get("subtask_type").and_then(Value::as_str)
    }

    /// Whether it takes no arguments beside its own.
    pub fn is_immutable(&self) -> bool {
        self.object
            .get("immutable")
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }

    /// Number of parts of a chord, where its sender counted them.
    pub fn chord_size(&self) -> Option<i64> {
        self.object.get("chord_size").and_then(Value::as_i64)
    }

    /// Another key at the top level.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key)
    }

    /// Sets a key at the top level.
    pub fn set(&mut self, key: &str, value: Value) {
        self.object.insert(key.to_owned(), value);
    }

    /// All options.
    pub fn options(&self) -> Option<&Map<String, Value>> {
        self.object.get("options").and_then(Value::as_object)
    }

    /// An option that is set; null counts as absent, as Celery has it.
    pub fn option(&self, name: &str) -> Option<&Value> {
        self.options()?.get(name).filter(|value| !value.is_null())
    }

    /// An option that is a text.
    pub fn option_str(&self, name: &str) -> Option<&str> {
        self.option(name).and_then(Value::as_str)
    }

    /// An option that is a whole number.
    pub fn option_i64(&self, name: &str) -> Option<i64> {
        self.option(name).and_then(Value::as_i64)
    }

    /// Sets an option.
    pub fn set_option(&mut self, name: &str, value: impl Into<Value>) {
        let options = self
            .object
            .entry("options")
            .or_insert_with(|| Value::Object(Map::new()));
        if !options.is_object() {
            *options = Value::Object(Map::new());
        }
        if let Value::Object(options) = options {
            options.insert(name.to_owned(), value.into());
        }
    }

    /// Removes an option and returns it.
    pub fn take_option(&mut self, name: &str) -> Option<Value> {
        self.object
            .get_mut("options")?
            .as_object_mut()?
            .shift_remove(name)
    }

    /// The id its task will have, if it is fixed already.
    pub fn task_id(&self) -> Option<&str> {
        self.option_str("task_id")
    }

    /// The signatures of `options.link` or `options.link_error`.
    pub fn links(&self, option: &str) -> Result<Vec<Self>, String> {
        let value = self.option(option).cloned().unwrap_or(Value::Null);
        Ok(Self::list(value)?.unwrap_or_default())
    }

    /// The arguments of a call with `extra` ones before its own, unless it is immutable.
    pub fn args_with(&self, extra: &[Value]) -> Vec<Value> {
        let extra = if self.is_immutable() { &[] } else { extra };
        extra.iter().chain(self.args()).cloned().collect()
    }

    /// A copy that has those arguments.
    pub fn with_prepended(&self, extra: &[Value]) -> Self {
        let mut copy = self.clone();
        copy.set("args", Value::Array(self.args_with(extra)));
        copy
    }

    /// The tasks inside of a group or chain, in their stored order.
    pub fn tasks(&self) -> Result<Vec<Self>, String> {
        let value = self.kwarg("tasks").cloned().unwrap_or(Value::Null);
        Ok(Self::list(value)?.unwrap_or_default())
    }

    /// The header tasks of a chord: a list, or the tasks of a group.
    pub fn header(&self) -> Result<Vec<Self>, String> {
        match self.kwarg("header") {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => items.iter().cloned().map(Self::from_value).collect(),
            Some(single) => {
                let signature = Self::from_value(single.clone())?;
                if signature.subtask_type() == Some("group") {
                    signature.tasks()
                } else {
                    Ok(vec![signature])
                }
            }
        }
    }

    /// The body of a chord.
    pub fn body(&self) -> Result<Option<Self>, String> {
        match self.kwarg("body") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => Self::from_value(value.clone()).map(Some),
        }
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.object.serialize(serializer)
    }
}

impl fmt::Debug for Signature {
    /// The name only: arguments may be secret.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Signature({})", self.task())
    }
}

/// What a value is, without showing it: arguments may be secret.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Signature;

    #[test]
    fn an_object_survives_with_all_its_keys_in_order() {
        let value = json!({"task": "a.b", "zz": 1, "args": [10], "kwargs": {}, "options": {"task_id": "t", "queue": null},
            "subtask_type": null, "immutable": false, "chord_size": 3});
        let signature = Signature::from_value(value.clone()).expect("valid");
        assert_eq!(signature.to_value().to_string(), value.to_string());
        assert_eq!(
            (
                signature.task(),
                signature.task_id(),
                signature.chord_size()
            ),
            ("a.b", Some("t"), Some(3))
        );
        assert_eq!(signature.option("queue"), None);
        assert_eq!(signature.args_with(&[json!(1)]), [json!(1), json!(10)]);
    }

    #[test]
    fn an_immutable_one_takes_no_further_arguments() {
        let mut signature = Signature::new("a", vec![json!(1)], serde_json::Map::new());
        signature.set("immutable", json!(true));
        assert_eq!(signature.with_prepended(&[json!(0)]).args(), [json!(1)]);
        signature.set_option("link", json!({"task": "b"}));
        assert_eq!(signature.links("link").expect("valid")[0].task(), "b");
        assert_eq!(signature.take_option("link"), Some(json!({"task": "b"})));
        assert_eq!(signature.links("link").expect("valid"), []);
    }

    #[test]
    fn what_is_no_signature_is_refused() {
        for value in [
            json!(1),
            json!({}),
            json!({"task": 1}),
            json!({"task": "a", "args": 1}),
            json!({"task": "a", "kwargs": []}),
            json!({"task": "a", "options": "x"}),
        ] {
            Signature::from_value(value.clone()).expect_err(&value.to_string());
        }
        assert_eq!(Signature::list(json!(null)), Ok(None));
        assert_eq!(
            Signature::list(json!({"task": "a"}))
                .expect("one")
                .expect("some")
                .len(),
            1
        );
    }

    #[test]
    fn compound_ones_give_their_parts() {
        let plain = json!({"task": "a"});
        let group = json!({"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [plain, plain]}});
        assert_eq!(
            Signature::from_value(group.clone())
                .expect("valid")
                .tasks()
                .expect("valid")
                .len(),
            2
        );
        for header in [group, json!([plain, plain])] {
            let chord = json!({"task": "celery.chord", "subtask_type": "chord", "kwargs": {"header": header, "body": plain}});
            let chord = Signature::from_value(chord).expect("valid");
            assert_eq!(chord.header().expect("valid").len(), 2);
            assert_eq!(chord.body().expect("valid").expect("some").task(), "a");
        }
    }
}
