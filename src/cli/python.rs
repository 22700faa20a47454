//! Values in Python's spelling where the `celery` command prints them: `json.dumps`, and the
//! texts it makes of replies.

use serde_json::Value;

/// `json.dumps(value)`, or with `sort_keys` and an indent of four when `pretty`. Characters
/// beyond ASCII are escaped.
pub(super) fn dumps(value: &Value, pretty: bool) -> String {
    let mut out = String::new();
    write(&mut out, value, pretty.then_some(0));
    out
}

fn write(out: &mut String, value: &Value, level: Option<usize>) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&number.to_string()),
        Value::String(text) => write_text(out, text),
        Value::Array(items) => block(out, "[]", level, items.iter(), |out, item, level| {
            write(out, item, level);
        }),
        Value::Object(object) => {
            let mut entries: Vec<(&String, &Value)> = object.iter().collect();
            if level.is_some() {
                entries.sort_by_key(|(key, _)| *key);
            }
            block(
                out,
                "{}",
                level,
                entries.into_iter(),
                |out, (key, item), level| {
                    write_text(out, key);
                    out.push_str(": ");
                    write(out, item, level);
                },
            );
        }
    }
}

fn block<T>(
    out: &mut String,
    brackets: &str,
    level: Option<usize>,
    items: impl ExactSizeIterator<Item = T>,
    mut each: impl FnMut(&mut String, T, Option<usize>),
) {
    if items.len() == 0 {
        out.push_str(brackets);
        return;
    }
    let inner = level.map(|level| level + 1);
    let line = |out: &mut String, level: Option<usize>| {
        if let Some(level) = level {
            out.push('\n');
            out.push_str(&"    ".repeat(level));
        }
    };
    out.push_str(&brackets[..1]);
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.push_str(if level.is_some() { "," } else { ", " });
        }
        line(out, inner);
        each(out, item, inner);
    }
    line(out, level);
    out.push_str(&brackets[1..]);
}

fn write_text(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(character),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

/// Puts four spaces before every line.
pub(super) fn indent(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(|line| format!("    {line}")).collect();
    lines.join("\n")
}

/// `1 node`, `2 nodes`.
pub(super) fn plural(count: u64, word: &str) -> String {
    format!("{word}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_is_written_as_python_writes_it() {
        let value = json!({"b": [1, 2.5, null], "a": {}, "c": "한\u{1f600}\"\u{7f}", "d": []});
        assert_eq!(
            dumps(&value, false),
            r#"{"b": [1, 2.5, null], "a": {}, "c": "\ud55c\ud83d\ude00\"\u007f", "d": []}"#
        );
        assert_eq!(
            dumps(&json!({"b": [1, {"x": true}], "a": {}}), true),
            "{\n    \"a\": {},\n    \"b\": [\n        1,\n        {\n            \"x\": true\n        }\n    ]\n}"
        );
    }
}
