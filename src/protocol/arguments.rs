//! Arguments bound to parameters as a Python call binds them, with its error texts.
//!
//! Answers for the calling convention of CPython 3.11 for functions with plain parameters
//! (no `*args`, no keyword-only ones). Does not know types: any value fits any parameter.

use serde_json::{Map, Value};

/// What a task can be called with.
#[derive(Debug, Clone, Copy)]
pub struct Parameters {
    /// Name of the Python function, which stands in error texts.
    pub function: &'static str,
    /// In the order of the definition; those with a default come last.
    pub names: &'static [Parameter],
}

/// One parameter.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// The value when the caller gives none.
    pub default: Option<Constant>,
}

/// A value that can be written down in a definition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Constant {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A text.
    Str(&'static str),
}

impl Parameter {
    /// A parameter that must be given.
    pub const fn required(name: &'static str) -> Self {
        Self {
            name,
            default: None,
        }
    }

    /// A parameter that may be left out.
    pub const fn optional(name: &'static str, default: Constant) -> Self {
        Self {
            name,
            default: Some(default),
        }
    }
}

impl From<Constant> for Value {
    fn from(constant: Constant) -> Self {
        match constant {
            Constant::None => Self::Null,
            Constant::Bool(flag) => flag.into(),
            Constant::Int(number) => number.into(),
            Constant::Str(text) => text.into(),
        }
    }
}

/// Binds a call; the values come in the order of the parameters. The error is the text of
/// Python's `TypeError`.
pub fn bind(
    parameters: &Parameters,
    args: &[Value],
    kwargs: &Map<String, Value>,
) -> Result<Vec<Value>, String> {
    let Parameters { function, names } = parameters;
    let mut bound: Vec<Option<Value>> = (0..names.len())
        .map(|index| args.get(index).cloned())
        .collect();
    // Python looks at keywords first, then at too many positional ones, then at missing ones.
    for (keyword, value) in kwargs {
        let Some(index) = names.iter().position(|parameter| parameter.name == keyword) else {
            return Err(format!(
                "{function}() got an unexpected keyword argument '{keyword}'"
            ));
        };
        if bound[index].is_some() {
            return Err(format!(
                "{function}() got multiple values for argument '{keyword}'"
            ));
        }
        bound[index] = Some(value.clone());
    }
    if args.len() > names.len() {
        return Err(too_many(parameters, args.len()));
    }
    let mut missing = Vec::new();
    let mut values = Vec::with_capacity(names.len());
    for (parameter, value) in names.iter().zip(bound) {
        match value.or_else(|| parameter.default.map(Value::from)) {
            Some(value) => values.push(value),
            None => missing.push(parameter.name),
        }
    }
    if missing.is_empty() {
        Ok(values)
    } else {
        Err(missing_text(function, &missing))
    }
}

fn too_many(parameters: &Parameters, given: usize) -> String {
    let most = parameters.names.len();
    let least = parameters
        .names
        .iter()
        .filter(|parameter| parameter.default.is_none())
        .count();
    let (takes, plural) = if least == most {
        (most.to_string(), most != 1)
    } else {
        (format!("from {least} to {most}"), true)
    };
    format!(
        "{}() takes {takes} positional argument{} but {given} {} given",
        parameters.function,
        if plural { "s" } else { "" },
        if given == 1 { "was" } else { "were" },
    )
}

fn missing_text(function: &str, names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    let list = match quoted.as_slice() {
        [only] => only.clone(),
        [first, second] => format!("{first} and {second}"),
        [head @ .., last] => format!("{}, and {last}", head.join(", ")),
        [] => String::new(),
    };
    format!(
        "{function}() missing {} required positional argument{}: {list}",
        names.len(),
        if names.len() == 1 { "" } else { "s" },
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Constant, Parameter, Parameters, bind};

    const NONE: Parameters = Parameters {
        function: "f0",
        names: &[],
    };
    const ONE: Parameters = Parameters {
        function: "f1",
        names: &[Parameter::required("a")],
    };
    const THREE: Parameters = Parameters {
        function: "f3",
        names: &[
            Parameter::required("a"),
            Parameter::required("b"),
            Parameter::required("c"),
        ],
    };
    const MIXED: Parameters = Parameters {
        function: "fm",
        names: &[
            Parameter::required("a"),
            Parameter::required("b"),
            Parameter::optional("c", Constant::None),
        ],
    };

    fn call(parameters: &Parameters, args: Value, kwargs: Value) -> Result<Vec<Value>, String> {
        bind(
            parameters,
            args.as_array().expect("array"),
            kwargs.as_object().expect("object"),
        )
    }

    #[test]
    fn positions_names_and_defaults_are_bound_in_order() {
        assert_eq!(
            call(&MIXED, json!([1]), json!({"b": 2})),
            Ok(vec![json!(1), json!(2), json!(null)])
        );
        assert_eq!(
            call(&MIXED, json!([]), json!({"c": 3, "b": 2, "a": 1})),
            Ok(vec![json!(1), json!(2), json!(3)])
        );
        assert_eq!(call(&NONE, json!([]), json!({})), Ok(vec![]));
    }

    /// The texts were taken from Python 3.11.7 by making the same calls there.
    #[test]
    fn wrong_calls_fail_in_pythons_words_and_order() {
        for (parameters, args, kwargs, expected) in [
            (
                &ONE,
                json!([]),
                json!({}),
                "f1() missing 1 required positional argument: 'a'",
            ),
            (
                &MIXED,
                json!([]),
                json!({}),
                "fm() missing 2 required positional arguments: 'a' and 'b'",
            ),
            (
                &THREE,
                json!([]),
                json!({}),
                "f3() missing 3 required positional arguments: 'a', 'b', and 'c'",
            ),
            (
                &THREE,
                json!([1]),
                json!({"c": 1}),
                "f3() missing 1 required positional argument: 'b'",
            ),
            (
                &NONE,
                json!([1]),
                json!({}),
                "f0() takes 0 positional arguments but 1 was given",
            ),
            (
                &ONE,
                json!([1, 2, 3]),
                json!({}),
                "f1() takes 1 positional argument but 3 were given",
            ),
            (
                &MIXED,
                json!([1, 2, 3, 4]),
                json!({}),
                "fm() takes from 2 to 3 positional arguments but 4 were given",
            ),
            (
                &ONE,
                json!([1, 2]),
                json!({"x": 1}),
                "f1() got an unexpected keyword argument 'x'",
            ),
            (
                &ONE,
                json!([1, 2]),
                json!({"a": 1}),
                "f1() got multiple values for argument 'a'",
            ),
            (
                &ONE,
                json!([]),
                json!({"x": 1}),
                "f1() got an unexpected keyword argument 'x'",
            ),
            (
                &ONE,
                json!([1]),
                json!({"a": 1, "x": 2}),
                "f1() got multiple values for argument 'a'",
            ),
            (
                &ONE,
                json!([1]),
                json!({"x": 2, "a": 1}),
                "f1() got an unexpected keyword argument 'x'",
            ),
        ] {
            assert_eq!(
                call(parameters, args, kwargs).expect_err(expected),
                expected
            );
        }
    }
}
