//! Node names: `name@host`, and the `%` keys that may stand in them.
//!
//! Answers for `celery.utils.nodenames`. Does not ask the system for its host name: callers
//! give it.

use std::fmt;

use super::Error;

/// The name of a node, always with both halves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Nodename {
    name: String,
    host: String,
}

impl Nodename {
    /// The name for the option `-n` on this host. Text without `@` is the host half; an
    /// absent half is `celery`, or the host.
    pub fn parse(option: Option<&str>, host: &str) -> Result<Self, Error> {
        let template = option.unwrap_or_default();
        let (short, domain) = host.split_once('.').unwrap_or((host, ""));
        let text = substitute(template, |key| match key {
            'h' => Some(host.to_owned()),
            'n' => Some(short.to_owned()),
            'd' => Some(domain.to_owned()),
            'i' => Some("0".to_owned()),
            'I' => Some(String::new()),
            _ => None,
        })?;
        let (name, node_host) = text.split_once('@').unwrap_or(("", &text));
        let or = |half: &str, default: &str| {
            if half.is_empty() {
                default.to_owned()
            } else {
                half.to_owned()
            }
        };
        Ok(Self {
            name: or(name, "celery"),
            host: or(node_host, host),
        })
    }

    /// The half before the `@`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The half after the `@`.
    pub fn host(&self) -> &str {
        &self.host
    }
}

impl fmt::Display for Nodename {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}@{}", self.name, self.host)
    }
}

/// Fills in the keys of a file name such as `--logfile=%n%I.log`: `%h` host, `%n` name, `%d`
/// domain, `%p` full node name, `%i` and `%I` the index of a pool child (`None` in the main
/// process).
pub fn expand(template: &str, node: &Nodename, index: Option<u32>) -> Result<String, Error> {
    substitute(template, |key| match key {
        'h' => Some(node.host.clone()),
        'n' => Some(node.name.clone()),
        'd' => Some(
            node.host
                .split_once('.')
                .map_or("", |(_, domain)| domain)
                .to_owned(),
        ),
        'p' => Some(node.to_string()),
        'i' => Some(index.map_or_else(|| "0".to_owned(), |index| index.to_string())),
        'I' => Some(index.map_or_else(String::new, |index| format!("-{index}"))),
        _ => None,
    })
}

fn substitute(template: &str, resolve: impl Fn(char) -> Option<String>) -> Result<String, Error> {
    let mut out = String::with_capacity(template.len());
    let mut chars = template.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        match chars.next() {
            Some('%') => out.push('%'),
            // A lone % at the end is text, as in Celery's pattern.
            None => out.push('%'),
            Some(key) => out.push_str(&resolve(key).ok_or_else(|| Error::Format {
                key: key.to_string(),
                template: template.to_owned(),
            })?),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::{Nodename, expand};

    #[test]
    fn the_option_becomes_a_node_name_as_celery_makes_it() {
        for (option, expected) in [
            (None, "celery@client.example"),
            (Some(""), "celery@client.example"),
            (Some("w1"), "celery@w1"),
            (Some("w1@%h"), "w1@client.example"),
            (Some("w1@%n"), "w1@client"),
            (Some("w1@%d"), "w1@example"),
            (Some("%n@%h"), "client@client.example"),
            (Some("@bar"), "celery@bar"),
            (Some("a%%b@x"), "a%b@x"),
        ] {
            let node = Nodename::parse(option, "client.example").expect("valid");
            assert_eq!(node.to_string(), expected, "{option:?}");
        }
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = Nodename::parse(Some("w%z@h"), "h").expect_err("unknown key");
        assert!(error.to_string().contains("%z"), "{error}");
    }

    #[test]
    fn file_names_know_the_child_index() {
        let node = Nodename::parse(Some("w1@%h"), "client.example").expect("valid");
        assert_eq!(expand("%n%I.log", &node, None).expect("valid"), "w1.log");
        assert_eq!(
            expand("%n%I.log", &node, Some(2)).expect("valid"),
            "w1-2.log"
        );
        assert_eq!(
            expand("%p-%i-%d-%h", &node, Some(2)).expect("valid"),
            "w1@client.example-2-example-client.example"
        );
        assert_eq!(expand("100%", &node, None).expect("valid"), "100%");
    }
}
