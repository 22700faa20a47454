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
    /// Whether the allow-list names this host and port.
    pub fn allows_host(&self, host: &str, port: u16) -> bool {
        self.hosts.is_empty()
            || self.hosts.iter().any(|entry| {
                let entry = entry.trim().to_ascii_lowercase();
                let (name, wanted_port) = match entry.rsplit_once(':') {
                    // A port that is no number is 0, which no URL has.
                    Some((name, digits)) if !name.contains(':') => {
                        (name, Some(digits.parse::<u16>().unwrap_or(0)))
                    }
                    _ => (entry.as_str(), None),
                };
                let name = name.strip_prefix('*').unwrap_or(name);
                let named = match name.strip_prefix('.') {
                    Some(parent) => host
                        .strip_suffix(parent)
                        .is_some_and(|start| start.ends_with('.')),
                    None => host == name,
                };
                named && wanted_port.is_none_or(|wanted| wanted == port)
            })
    }

    /// Whether an entry of the allow-list can name anything at all: a host, with or without a
    /// leading `.` or `*.` and a port, and nothing else, so no scheme, path or address in brackets.
    pub fn is_usable_host(entry: &str) -> bool {
        let entry = entry.trim();
        let bare = entry.trim_start_matches('[').trim_end_matches(']');
        if bare.parse::<std::net::Ipv6Addr>().is_ok() {
            return true;
        }
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (entry, None),
        };
        let name = name.strip_prefix("*.").unwrap_or(name);
        let name = name.strip_prefix('.').unwrap_or(name);
        let is_label = |label: &str| {
            !label.is_empty()
                && label
                    .chars()
                    .all(|it| it.is_alphanumeric() || it == '-' || it == '_')
        };
        name.split('.').all(is_label)
            && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
