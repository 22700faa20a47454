//! Values as Python shows them: `repr()`, `str()`, and Celery's bounded `saferepr()`.
//!
//! These texts stand in `argsrepr`, `kwargsrepr`, logs and events. kombu's tagged objects are
//! shown as the Python values they stand for. Masking of secrets is the caller's business, see
//! [`super::mask`].
//!
//! Answers for `celery.utils.saferepr` and CPython's `repr` of the types JSON has.

use serde_json::{Map, Number, Value};

use super::json;

mod tagged;

/// Longest repr of arguments and results in headers, logs and events.
pub const MAX_LENGTH: usize = 1024;

/// Levels of containers that are shown, unless `task_repr_maxlevels` says otherwise.
pub const MAX_LEVELS: usize = 3;

/// Python's `repr(value)`, unbounded.
pub fn repr(value: &Value) -> String {
    let mut out = String::new();
    write_repr(&mut out, value);
    out
}

/// Python's `str(value)`.
pub fn str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(object) => tagged::str(object).unwrap_or_else(|| repr(value)),
        _ => repr(value),
    }
}

/// Python's `repr` of a string: single quotes unless only single ones are inside.
pub fn repr_str(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    write_str(&mut out, text);
    out
}

/// What a stranger chose, for a sentence in a log: on one line and not endless.
pub fn one_line(text: &str) -> String {
    const MOST: usize = 200;
    let shown = text.chars().take(MOST);
    shown
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Python's `repr` of a tuple.
pub fn repr_tuple(items: &[Value]) -> String {
    let mut out = String::from("(");
    write_items(&mut out, items);
    out.push_str(if items.len() == 1 { ",)" } else { ")" });
    out
}

/// Python's `repr` of a float.
pub fn repr_float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let mut shortest = format!("{value:e}");
    // Of two texts of that length that are equally near Python takes the even one.
    let digits = shortest
        .bytes()
        .take_while(|byte| *byte != b'e')
        .filter(u8::is_ascii_digit)
        .count();
    let even = format!("{value:.*e}", digits.saturating_sub(1));
    if even.parse() == Ok(value) {
        shortest = even;
    }
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let digits = mantissa.bytes().filter(u8::is_ascii_digit).count();
        let places = usize::try_from(digits as i64 - 1 - i64::from(exponent)).unwrap_or(0);
        let plain = format!("{value:.places$}");
        return if plain.contains('.') {
            plain
        } else {
            format!("{plain}.0")
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

/// Celery's `saferepr` of a value, at most `max_length` characters and some dots, with
/// `max_levels` levels of containers (0 is without limit).
pub fn saferepr(value: &Value, max_length: usize, max_levels: usize) -> String {
    let mut writer = Writer::new(max_length, max_levels);
    writer.value(value);
    writer.out
}

/// Celery's `saferepr` of a positional argument list, which Python holds in a tuple.
pub fn saferepr_args(args: &[Value], max_length: usize, max_levels: usize) -> String {
    let mut writer = Writer::new(max_length, max_levels);
    writer.sequence("(", if args.len() == 1 { ",)" } else { ")" }, args);
    writer.out
}

/// Celery's `saferepr` of keyword arguments.
pub fn saferepr_kwargs(
    kwargs: &Map<String, Value>,
    max_length: usize,
    max_levels: usize,
) -> String {
    let mut writer = Writer::new(max_length, max_levels);
    writer.mapping(kwargs);
    writer.out
}

/// Writes tokens until the length is used up, then closes what is open.
struct Writer {
    out: String,
    /// Characters left; closing brackets are written even below zero.
    left: isize,
    max_levels: usize,
    level: usize,
    cut: bool,
}

impl Writer {
    fn new(max_length: usize, max_levels: usize) -> Self {
        let left = isize::try_from(max_length).unwrap_or(isize::MAX);
        Self {
            out: String::new(),
            left,
            max_levels,
            level: 0,
            cut: false,
        }
    }

    /// Whether another token may be written; says that something is left out when not.
    fn room(&mut self) -> bool {
        if self.cut {
            return false;
        }
        if self.left <= 0 {
            self.out.push_str(", ...");
            self.cut = true;
            return false;
        }
        true
    }

    fn write(&mut self, text: &str) {
        self.out.push_str(text);
        self.left -= isize::try_from(text.chars().count()).unwrap_or(isize::MAX);
    }

    fn token(&mut self, text: &str) {
        if self.room() {
            self.write(text);
        }
    }

    /// A token that may be shortened to what is left.
    fn text(&mut self, text: &str) {
        if self.room() {
            let short = self.truncated(text);
            self.write(&short);
        }
    }

    fn quoted(&mut self, text: &str) {
        if self.room() {
            let short = self.truncated(text).replace('\'', "\\'");
            self.write(&format!("'{short}'"));
        }
    }

    /// Celery's `truncate`: cut at the last space before the limit, if there is one.
    fn truncated(&self, text: &str) -> String {
        let left = usize::try_from(self.left).unwrap_or(0);
        match text.char_indices().nth(left.saturating_sub(1)) {
            None => text.to_owned(),
            Some((start, last)) => {
                let head = &text[..start + last.len_utf8()];
                let kept = head.rsplit_once(' ').map_or(head, |(before, _)| before);
                format!("{kept}...")
            }
        }
    }

    fn close(&mut self, text: &str) {
        self.level -= 1;
        if self.cut || self.left <= 0 {
            self.out.push_str(text);
        } else {
            self.write(text);
        }
    }

    /// Opens a container, or writes it as dots when it lies too deep.
    fn open(&mut self, start: &str, end: &str) -> bool {
        if self.max_levels > 0 && self.level >= self.max_levels {
            self.token(&format!("{start}...{end}"));
            return false;
        }
        if !self.room() {
            return false;
        }
        self.write(start);
        self.level += 1;
        true
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.text("None"),
            Value::Bool(flag) => self.text(if *flag { "True" } else { "False" }),
            Value::Number(number) => self.text(&repr_number(number)),
            Value::String(text) => self.quoted(text),
            Value::Array(items) => self.sequence("[", "]", items),
            Value::Object(object) => match (json::tagged_bytes(object), tagged::repr(object)) {
                (Some(bytes), _) => self.bytes(&bytes),
                (None, Some(text)) => self.text(&text),
                (None, None) => self.mapping(object),
            },
        }
    }

    /// Bytes as Celery shows them: the text they are, or hexadecimal.
    fn bytes(&mut self, bytes: &[u8]) {
        if self.room() {
            let left = usize::try_from(self.left).unwrap_or(0);
            let (head, dots) = match bytes.get(..left) {
                Some(head) if bytes.len() > left => (head, "..."),
                _ => (bytes, ""),
            };
            let shown = match std::str::from_utf8(head) {
                Ok(text) => text.to_owned(),
                Err(_) => head.iter().map(|byte| format!("{byte:02x}")).collect(),
            };
            self.write(&format!("b'{shown}{dots}'"));
        }
    }

    fn sequence(&mut self, start: &str, end: &str, items: &[Value]) {
        if !self.open(start, end) {
            return;
        }
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.token(", ");
            }
            if self.cut {
                break;
            }
            self.value(item);
        }
        self.close(end);
    }

    fn mapping(&mut self, object: &Map<String, Value>) {
        if !self.open("{", "}") {
            return;
        }
        for (index, (key, item)) in object.iter().enumerate() {
            if index > 0 {
                self.token(", ");
            }
            self.quoted(key);
            self.token(": ");
            if self.cut {
                break;
            }
            self.value(item);
        }
        self.close("}");
    }
}

fn write_repr(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(number) => out.push_str(&repr_number(number)),
        Value::String(text) => write_str(out, text),
        Value::Array(items) => {
            out.push('[');
            write_items(out, items);
            out.push(']');
        }
        Value::Object(object) => {
            if let Some(text) = tagged::repr(object) {
                out.push_str(&text);
                return;
            }
            out.push('{');
            for (index, (key, item)) in object.iter().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_str(out, key);
                out.push_str(": ");
                write_repr(out, item);
            }
            out.push('}');
        }
    }
}

fn write_items(out: &mut String, items: &[Value]) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write_repr(out, item);
    }
}

fn write_str(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for char in text.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            char if char == quote => {
                out.push('\\');
                out.push(char);
            }
            ' '..='~' => out.push(char),
            char if char.is_alphanumeric() || is_printable(char) => out.push(char),
            char => {
                let code = u32::from(char);
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` of one character.
fn is_printable(char: char) -> bool {
    // The standard library escapes exactly the categories Python calls unprintable, and, at
    // the start of a text only, combining marks.
    let text: String = ['a', char].into_iter().collect();
    text.escape_debug().nth(1) == Some(char)
}

/// A JSON number as Python shows the int or float it becomes.
fn repr_number(number: &Number) -> String {
    let text = number.as_str();
    match text {
        "NaN" => return "nan".to_owned(),
        "Infinity" => return "inf".to_owned(),
        "-Infinity" => return "-inf".to_owned(),
        "-0" => return "0".to_owned(),
        _ => {}
    }
    if text.bytes().any(|byte| matches!(byte, b'.' | b'e' | b'E')) {
        return text.parse().map_or_else(|_| text.to_owned(), repr_float);
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{repr, repr_float, repr_tuple, saferepr, saferepr_args, saferepr_kwargs, str};
    use crate::protocol::{Limits, json::parse};

    fn value(text: &str) -> Value {
        parse(text.as_bytes(), &Limits::default()).expect("valid")
    }

    #[test]
    fn values_look_as_in_python() {
        for (text, expected) in [
            (
                r#"[null, true, false, 1, -0, 1.50, 1E5, 1e-7, 1e16, 123456789012345678901]"#,
                "[None, True, False, 1, 0, 1.5, 100000.0, 1e-07, 1e+16, 123456789012345678901]",
            ),
            (r#"[NaN, Infinity, -Infinity]"#, "[nan, inf, -inf]"),
            (r#"{"a": [], "b'": {}}"#, r#"{'a': [], "b'": {}}"#),
            (r#""it's""#, r#""it's""#),
            (r#""both ' and \"""#, r#"'both \' and "'"#),
            (
                r#""\n\t\r\\\u0000\u007f\u00ad\u200b\u3000\ue000\ud83d\ude00é분e\u0301""#,
                "'\\n\\t\\r\\\\\\x00\\x7f\\xad\\u200b\\u3000\\ue000😀é분e\u{301}'",
            ),
            (
                r#"{"__type__": "datetime", "__value__": "2024-01-02T03:04:05+00:00"}"#,
                "datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)",
            ),
            (
                r#"{"__type__": "datetime", "__value__": "2024-01-02T03:04:00.000005-02:00"}"#,
                "datetime.datetime(2024, 1, 2, 3, 4, 0, 5, tzinfo=datetime.timezone(datetime.timedelta(days=-1, seconds=79200)))",
            ),
            (
                r#"{"__type__": "datetime", "__value__": "2024-01-02T00:00:00"}"#,
                "datetime.datetime(2024, 1, 2, 0, 0)",
            ),
            (
                r#"{"__type__": "date", "__value__": "2024-01-02"}"#,
                "datetime.date(2024, 1, 2)",
            ),
            (
                r#"{"__type__": "time", "__value__": "03:04:05"}"#,
                "datetime.time(3, 4, 5)",
            ),
            (
                r#"{"__type__": "decimal", "__value__": "1.50"}"#,
                "Decimal('1.50')",
            ),
            (
                r#"{"__type__": "uuid", "__value__": {"hex": "02fbfa3da3024e33815ec58fbf8e6878"}}"#,
                "UUID('02fbfa3d-a302-4e33-815e-c58fbf8e6878')",
            ),
            (
                r#"{"__type__": "bytes", "__value__": "it's\n"}"#,
                r#"b"it's\n""#,
            ),
            (
                r#"{"__type__": "base64", "__value__": "/wA="}"#,
                r"b'\xff\x00'",
            ),
        ] {
            assert_eq!(repr(&value(text)), expected);
        }
        assert_eq!(str(&json!("a'b")), "a'b");
        assert_eq!(str(&json!(null)), "None");
        assert_eq!(str(&json!(["a"])), "['a']");
        assert_eq!(repr_tuple(&[json!("a")]), "('a',)");
        assert_eq!(repr_tuple(&[json!("boom"), json!(42)]), "('boom', 42)");
        assert_eq!(repr_tuple(&[]), "()");
        assert_eq!(repr_float(0.0001), "0.0001");
        assert_eq!(repr_float(1.25e-5), "1.25e-05");
        assert_eq!(repr_float(-0.0), "-0.0");
        assert_eq!(
            repr_float("685865816098971.25".parse().expect("a float")),
            "685865816098971.2"
        );
        assert_eq!(repr_float(1234567.0), "1234567.0");
    }

    #[test]
    fn arguments_are_shown_as_celery_shows_them() {
        assert_eq!(
            saferepr_args(&[json!(17), json!("https://git.example/o/r.git")], 1024, 3),
            "(17, 'https://git.example/o/r.git')"
        );
        assert_eq!(
            saferepr_args(&[json!("a'b\n\"é")], 1024, 3),
            "('a\\'b\n\"é',)"
        );
        let kwargs = value(r#"{"user_github_token": "t", "n": [1, [2, [3, [4]]]]}"#);
        let kwargs = kwargs.as_object().expect("object");
        assert_eq!(
            saferepr_kwargs(kwargs, 1024, 3),
            "{'user_github_token': 't', 'n': [1, [2, [...]]]}"
        );
        assert_eq!(
            saferepr(&json!({"a": {"b": {"c": {"d": 1}}}}), 1024, 3),
            "{'a': {'b': {'c': {...}}}}"
        );
    }

    #[test]
    fn long_values_are_cut_and_closed() {
        let long = saferepr_args(&[json!("x".repeat(2000))], 1024, 3);
        assert_eq!(long, format!("('{}...',)", "x".repeat(1023)));
        let many: Vec<Value> = (0..1000).map(Value::from).collect();
        let text = saferepr_args(&many, 20, 3);
        assert_eq!(text, "(0, 1, 2, 3, 4, 5, 6..., ...)");
    }
}
