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
    /// Whether an entry of `hosts` can mean anything: a name or an address, perhaps with a port, no URL.
    pub fn is_host(entry: &str) -> bool {
        let entry = entry.trim();
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') => (name, Some(port)),
            _ => (entry, None),
        };
        let name = name.strip_prefix('*').unwrap_or(name);
        let name = name.strip_prefix('.').unwrap_or(name);
        let letter = |c: char| c.is_alphanumeric() || "-_.:[]".contains(c);
        !name.is_empty()
            && name.chars().all(letter)
            && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
    }

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
}
