//! How the text of a setting becomes a value, and a value what `inspect conf` shows.

use serde_json::{Map, Value};

/// A type that a setting may have.
pub trait SettingValue: Sized + Clone {
    /// A correct value, for error messages.
    const EXAMPLE: &'static str;

    /// Understands the text of a variable or option; the error says what is wrong.
    fn parse(text: &str) -> Result<Self, String>;

    /// As Python's `app.conf` would show it.
    fn to_value(&self) -> Value;
}

/// A number of seconds; `None`, `null` and the empty text mean that there is no limit.
pub type Seconds = f64;

/// A count that may be absent.
pub type Limit = Option<u64>;

fn is_none(text: &str) -> bool {
    matches!(text.trim(), "" | "None" | "none" | "null")
}

impl SettingValue for bool {
    const EXAMPLE: &'static str = "true";

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Ok(true),
            "0" | "false" | "no" | "off" | "" | "none" | "null" => Ok(false),
            _ => Err(format!("'{text}' is neither true nor false")),
        }
    }

    fn to_value(&self) -> Value {
        Value::Bool(*self)
    }
}

impl SettingValue for u64 {
    const EXAMPLE: &'static str = "4";

    fn parse(text: &str) -> Result<Self, String> {
        text.trim()
            .parse()
            .map_err(|_| format!("'{text}' is not a whole number of 0 or more"))
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }
}

impl SettingValue for Seconds {
    const EXAMPLE: &'static str = "30";

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim().parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
            _ => Err(format!("'{text}' is not a number of 0 or more")),
        }
    }

    fn to_value(&self) -> Value {
        if self.fract() == 0.0 && self.abs() < 1e15 {
            // Python shows what the user wrote, and users write whole numbers.
            Value::from(*self as i64)
        } else {
            Value::from(*self)
        }
    }
}

impl SettingValue for String {
    const EXAMPLE: &'static str = "celery";

    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn to_value(&self) -> Value {
        Value::from(self.as_str())
    }
}

impl SettingValue for Vec<String> {
    const EXAMPLE: &'static str = "json,yaml";

    /// `a,b`, `a b`, or a JSON array of strings.
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with('[') {
            return serde_json::from_str(text)
                .map_err(|error| format!("not a list of strings: {error}"));
        }
        Ok(text
            .split([',', ' '])
            .map(str::trim)
            .filter(|item| !item.is_empty())
            .map(str::to_owned)
            .collect())
    }

    fn to_value(&self) -> Value {
        Value::from(self.clone())
    }
}

impl SettingValue for Map<String, Value> {
    const EXAMPLE: &'static str = r#"{"visibility_timeout": 7200}"#;

    fn parse(text: &str) -> Result<Self, String> {
        if is_none(text) {
            return Ok(Self::new());
        }
        serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
    }

    fn to_value(&self) -> Value {
        Value::Object(self.clone())
    }
}

impl SettingValue for Value {
    const EXAMPLE: &'static str = r#"{"test_task": {"rate_limit": "10/m"}}"#;

    fn parse(text: &str) -> Result<Self, String> {
        if is_none(text) {
            return Ok(Self::Null);
        }
        serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
    }

    fn to_value(&self) -> Value {
        self.clone()
    }
}

impl<T: SettingValue> SettingValue for Option<T> {
    const EXAMPLE: &'static str = T::EXAMPLE;

    fn parse(text: &str) -> Result<Self, String> {
        if is_none(text) {
            Ok(None)
        } else {
            T::parse(text).map(Some)
        }
    }

    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::to_value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_values_are_written_as_python_or_json_users_write_them() {
        for text in ["", "None", "null", " none "] {
            assert_eq!(Option::<f64>::parse(text), Ok(None), "{text:?}");
        }
        assert_eq!(Option::<f64>::parse("1.5"), Ok(Some(1.5)));
    }

    #[test]
    fn lists_are_comma_separated_or_json() {
        let expected = vec!["json".to_owned(), "yaml".to_owned()];
        assert_eq!(Vec::<String>::parse("json, yaml"), Ok(expected.clone()));
        assert_eq!(Vec::<String>::parse(r#"["json","yaml"]"#), Ok(expected));
        assert!(Vec::<String>::parse("[1").is_err());
    }

    #[test]
    fn whole_seconds_are_shown_without_a_fraction() {
        assert_eq!(Seconds::to_value(&1800.0).to_string(), "1800");
        assert_eq!(Seconds::to_value(&0.5).to_string(), "0.5");
        assert!(Seconds::parse("-1").is_err() && Seconds::parse("NaN").is_err());
    }
}
