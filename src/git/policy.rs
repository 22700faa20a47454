//! Who may be asked for a repository.
//!
//! One value for the whole worker; [`super::url`] judges spellings by it, [`super::http`] addresses and
//! redirects. Knows nothing of where its settings come from.

use crate::git::http::Lookup;

/// Who may be asked for a repository. The default is any public server over https.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Plain `http` to public servers, and a token over it.
    pub allow_http: bool,
    /// `file://`, absolute paths, and `http` or `https` to loopback and private addresses.
    pub allow_local: bool,
    /// Hosts that may be asked; empty means any. `example.com` is that host only, `.example.com` or
    /// `*.example.com` everything below it; `host:port` pins the port. Being listed does not make a
    /// private address allowed.
    pub hosts: Vec<String>,
    /// Certificates (DER) of the authorities that are trusted instead of Mozilla's; empty means those.
    /// [`crate::git::http::certificates`] reads them from a PEM file.
    pub roots: Vec<Vec<u8>>,
    /// Who answers which addresses a host name has; the system's resolver unless a test says otherwise.
    pub lookup: Lookup,
}

impl Policy {
    /// Whether the allow-list names this host, an address without brackets, and port.
    pub fn allows_host(&self, host: &str, port: u16) -> bool {
        let mut entries = self.hosts.iter().filter_map(|entry| Entry::parse(entry));
        self.hosts.is_empty() || entries.any(|entry| entry.names(host, port))
    }

    /// Whether an entry of the allow-list can name anything at all: a host, with or without a leading `.` or
    /// `*.` and a port, and nothing else, so no scheme and no path.
    pub fn is_usable_host(entry: &str) -> bool {
        Entry::parse(entry).is_some()
    }
}

/// An entry of the allow-list.
struct Entry {
    name: String,
    /// Everything below the name, not the name itself.
    below: bool,
    port: Option<u16>,
}

impl Entry {
    fn parse(text: &str) -> Option<Entry> {
        let text = text.trim().to_ascii_lowercase();
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        if bare.parse::<std::net::Ipv6Addr>().is_ok() {
            let name = bare.to_owned();
            return Some(Entry {
                name,
                below: false,
                port: None,
            });
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok().filter(|&port| port > 0)?)),
            None => (&*text, None),
        };
        let parent = name.strip_prefix('*').unwrap_or(name).strip_prefix('.');
        let is_label = |label: &str| {
            let letter = |it: char| it.is_alphanumeric() || it == '-' || it == '_';
            !label.is_empty() && label.chars().all(letter)
        };
        let below = parent.is_some();
        let name = parent.unwrap_or(name).to_owned();
        name.split('.')
            .all(is_label)
            .then_some(Entry { name, below, port })
    }

    fn names(&self, host: &str, port: u16) -> bool {
        let named = if self.below {
            host.strip_suffix(&*self.name)
                .is_some_and(|start| start.ends_with('.'))
        } else {
            host == self.name
        };
        named && self.port.is_none_or(|wanted| wanted == port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_brackets_are_the_same_as_without() {
        for entry in ["[2001:db8::7]", "2001:db8::7"] {
            let policy = Policy {
                hosts: vec![entry.to_owned()],
                ..Policy::default()
            };
            assert!(policy.allows_host("2001:db8::7", 443));
            assert!(!policy.allows_host("2001:db8::8", 443));
        }
    }

    #[test]
    fn an_entry_of_the_allow_list_is_a_host_and_nothing_else() {
        for entry in [
            "github.com",
            ".example.com",
            "*.example.com",
            "localhost",
            "git.example.com:8443",
            "192.0.2.7",
            "[2001:db8::7]",
        ] {
            assert!(Policy::is_usable_host(entry), "{entry}");
        }
        for entry in [
            "",
            "a b",
            "https://github.com",
            "github.com/owner",
            "github.com:",
            "github.com:https",
            "github.com:0",
            "*",
            "git*.example.com",
            "a..b",
            "user@github.com",
        ] {
            assert!(!Policy::is_usable_host(entry), "{entry}");
        }
    }
}
