//! Secrets do not appear in texts: tokens, passwords in URLs, and strings known to be secret.
//!
//! Cheap when there is nothing to hide: one pass over the text, no allocation. Knows nothing of
//! which argument of which task is secret; callers name those strings.

use std::borrow::Cow;

use serde_json::Value;

/// What stands where a secret stood.
pub const MASK: &str = "********";

/// Prefixes that a token of a forge, or an encrypted one (Fernet), starts with, and how many
/// characters of a token follow at least.
const PREFIXES: &[(&str, usize)] = &[
    ("ghp_", 1),
    ("gho_", 1),
    ("ghs_", 1),
    ("ghu_", 1),
    ("ghr_", 1),
    ("github_pat_", 1),
    ("glpat-", 1),
    ("gAAAAA", 20),
];

/// What the name of an argument or setting contains when its value is nobody's business.
const NAMES: &[&str] = &[
    "token",
    "secret",
    "passw",
    "api_key",
    "apikey",
    "private_key",
    "credential",
    "authorization",
];

/// Whether a name says that its value is a secret.
pub fn is_secret_name(name: &str) -> bool {
    // Longer ones are text, not names.
    if name.len() > 64 {
        return false;
    }
    let name = name.to_ascii_lowercase();
    NAMES.iter().any(|part| name.contains(part))
}

/// Replaces every given secret, everything that looks like a token, the password of every URL,
/// and in reprs and JSON the text that belongs to a name such as `user_github_token`.
pub fn mask_secrets<'a>(text: &'a str, secrets: &[&str]) -> Cow<'a, str> {
    let mut masked = Cow::Borrowed(text);
    for secret in secrets {
        // Shorter ones would blot out half of a log and are no secrets anyway.
        if secret.len() >= 4 && masked.contains(secret) {
            masked = Cow::Owned(masked.replace(secret, MASK));
        }
    }
    let mut spans = tokens(&masked);
    spans.extend(passwords(&masked));
    spans.extend(named(&masked));
    if spans.is_empty() {
        return masked;
    }
    spans.sort_unstable();
    let mut out = String::with_capacity(masked.len());
    let mut copied = 0;
    for (start, end) in spans {
        if start < copied {
            continue;
        }
        out.push_str(&masked[copied..start]);
        out.push_str(MASK);
        copied = end;
    }
    out.push_str(&masked[copied..]);
    Cow::Owned(out)
}

/// Masks every string inside of a value, keys included.
pub fn mask_value(value: &Value, secrets: &[&str]) -> Value {
    match value {
        Value::String(text) => Value::String(mask_secrets(text, secrets).into_owned()),
        Value::Array(items) => {
            Value::Array(items.iter().map(|item| mask_value(item, secrets)).collect())
        }
        Value::Object(object) => Value::Object(
            object
                .iter()
                .map(|(key, item)| {
                    let shown = match item {
                        Value::String(text) if !text.is_empty() && is_secret_name(key) => {
                            MASK.into()
                        }
                        other => mask_value(other, secrets),
                    };
                    (mask_secrets(key, secrets).into_owned(), shown)
                })
                .collect(),
        ),
        other => other.clone(),
    }
}

fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'=')
}

/// Where tokens stand, by their prefix.
fn tokens(text: &str) -> Vec<(usize, usize)> {
    let bytes = text.as_bytes();
    let mut spans = Vec::new();
    let mut from = 0;
    // All prefixes start with a g.
    while let Some(found) = memchr::memchr(b'g', &bytes[from..]) {
        let start = from + found;
        from = start + 1;
        let Some((prefix, least)) = PREFIXES
            .iter()
            .find(|(prefix, _)| bytes[start..].starts_with(prefix.as_bytes()))
        else {
            continue;
        };
        // Base64 of zeros looks like Fernet's first bytes; a token of that kind stands alone.
        if *least > 1 && start > 0 && is_token_byte(bytes[start - 1]) {
            continue;
        }
        let rest = &bytes[start + prefix.len()..];
        let length = rest.iter().take_while(|byte| is_token_byte(**byte)).count();
        if length >= *least {
            from = start + prefix.len() + length;
            spans.push((start, from));
        }
    }
    spans
}

/// Where the passwords of URLs stand: between the first colon and the last `@` of what follows
/// `://`. A user name alone is masked too, for it may be a token.
fn passwords(text: &str) -> Vec<(usize, usize)> {
    let bytes = text.as_bytes();
    let mut spans = Vec::new();
    for found in memchr::memmem::find_iter(bytes, b"://") {
        let start = found + 3;
        let length = bytes[start..]
            .iter()
            .position(|byte| {
                byte.is_ascii_whitespace()
                    || matches!(
                        byte,
                        b'/' | b'?' | b'#' | b'\'' | b'"' | b'<' | b'>' | b'\\'
                    )
            })
            .unwrap_or(bytes.len() - start);
        let authority = &bytes[start..start + length];
        let Some(at) = memchr::memrchr(b'@', authority) else {
            continue;
        };
        match memchr::memchr(b':', &authority[..at]) {
            Some(colon) if colon + 1 < at => spans.push((start + colon + 1, start + at)),
            Some(_) => {}
            None if at > 0 => spans.push((start, start + at)),
            None => {}
        }
    }
    spans
}

/// Where the quoted text stands that follows a quoted secret name and a colon, as in
/// `{'token': 'x'}`.
fn named(text: &str) -> Vec<(usize, usize)> {
    let bytes = text.as_bytes();
    let mut spans = Vec::new();
    for colon in memchr::memchr_iter(b':', bytes) {
        let Some(quote @ (b'\'' | b'"')) = colon.checked_sub(1).map(|before| bytes[before]) else {
            continue;
        };
        let key_end = colon - 1;
        let Some(key_start) = memchr::memrchr(quote, &bytes[..key_end]) else {
            continue;
        };
        if !is_secret_name(&text[key_start + 1..key_end]) {
            continue;
        }
        let spaces = bytes[colon + 1..]
            .iter()
            .take_while(|byte| **byte == b' ')
            .count();
        let start = colon + 1 + spaces;
        let Some(quote @ (b'\'' | b'"')) = bytes.get(start) else {
            continue;
        };
        let (mut end, mut is_escaped) = (start + 1, false);
        // A text that was cut short has no end.
        while let Some(byte) = bytes.get(end) {
            if byte == quote && !is_escaped {
                break;
            }
            is_escaped = *byte == b'\\' && !is_escaped;
            end += 1;
        }
        if end > start + 1 {
            spans.push((start + 1, end));
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use serde_json::json;

    use super::{mask_secrets, mask_value};

    #[test]
    fn tokens_passwords_and_named_secrets_are_masked() {
        for (text, expected) in [
            ("{'t': 'ghp_abcDEF123'}", "{'t': '********'}"),
            ("github_pat_11A_b, glpat-x-y_z.", "********, ********."),
            (
                "fetch https://me:pa:ss@host/x?y=a@b",
                "fetch https://me:********@host/x?y=a@b",
            ),
            (
                "https://ghp_abc@github.com/o/r",
                "https://********@github.com/o/r",
            ),
            (
                "https://tok@github.com/o/r",
                "https://********@github.com/o/r",
            ),
            ("amqp://u:p@h//", "amqp://u:********@h//"),
            (
                "redis://:s3cret@q:6379/0 redis://q",
                "redis://:********@q:6379/0 redis://q",
            ),
            ("the word is hunter2!", "the word is ********!"),
            ("분석 ghp_x 중", "분석 ******** 중"),
            (
                r"{'user_github_token': 'it\'s', 'n': 'x'}",
                "{'user_github_token': '********', 'n': 'x'}",
            ),
            (
                r#"{"PASSWORD":"abc", "token": null}"#,
                r#"{"PASSWORD":"********", "token": null}"#,
            ),
            (
                "{'k': 1, 'api_key': 'cut...",
                "{'k': 1, 'api_key': '********",
            ),
            ("{'token': ''}", "{'token': ''}"),
        ] {
            assert_eq!(mask_secrets(text, &["hunter2"]), expected);
        }
    }

    #[test]
    fn innocent_text_is_borrowed() {
        for text in [
            "",
            "gg ghp gh_ ghp_",
            "https://git.example/o/r.git user@host",
            "gAAAAAb",
            "AgAAAAABBBBBBBBBBBBBBBBBBBBBBBB",
        ] {
            assert!(
                matches!(mask_secrets(text, &["", "abc"]), Cow::Borrowed(same) if same == text),
                "{text}"
            );
        }
    }

    #[test]
    fn values_are_masked_inside_out() {
        let value = json!({"token": "x", "max_tokens": 5, "secrets": ["y", "ghp_1"]});
        assert_eq!(
            mask_value(&value, &[]),
            json!({"token": "********", "max_tokens": 5, "secrets": ["y", "********"]})
        );
        let value = json!([1, {"ghp_k": ["ghp_v", null]}]);
        assert_eq!(
            mask_value(&value, &[]),
            json!([1, {"********": ["********", null]}])
        );
    }
}
