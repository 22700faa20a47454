//! The part of a URL that names a PostgreSQL server: login, hosts, parameters.
//!
//! Parameters are those of libpq; one that could not be honoured is an error that names it.

use std::time::Duration;

use tokio_postgres::config::{Config, SslMode, TargetSessionAttrs};

use super::{Server, Tls, Verify};

/// Parameters of libpq and SQLAlchemy drivers that change nothing here.
const IGNORED: &[&str] = &[
    "client_encoding",
    "fallback_application_name",
    "gssencmode",
    "gssdelegation",
    "krbsrvname",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "sslcompression",
    "sslnegotiation",
    "sslsni",
    "channel_binding",
    "prepared_statement_cache_size",
    "prepare_threshold",
    "pool_size",
    "max_overflow",
    "pool_pre_ping",
];

pub(super) fn server(rest: &str) -> Result<Server, String> {
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));

    let mut server = Server {
        config: Config::new(),
        tls: Tls::default(),
    };
    let config = &mut server.config;
    config
        .connect_timeout(Duration::from_secs(10))
        .keepalives_idle(Duration::from_secs(30))
        .tcp_user_timeout(Duration::from_secs(30))
        .application_name("celeriac")
        .ssl_mode(SslMode::Prefer);

    let mut named = Named::default();
    let hosts = match authority.rsplit_once('@') {
        Some((login, hosts)) => {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            named.user = Some(decoded(user)?);
            if !password.is_empty() {
                config.password(decoded(password)?);
            }
            hosts
        }
        None => authority,
    };
    for host in hosts.split(',').filter(|host| !host.is_empty()) {
        let (name, port) = host_and_port(host)?;
        named.hosts.push(name);
        named.ports.push(port);
    }
    let name = decoded(path.trim_start_matches('/'))?;
    if !name.is_empty() {
        named.database = Some(name);
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        parameter(&mut server, &mut named, &decoded(key)?, decoded(value)?)?;
    }
    named.apply(&mut server.config)?;
    Ok(server)
}

/// What both the body of the URL and its parameters may name.
#[derive(Default)]
struct Named {
    user: Option<String>,
    database: Option<String>,
    hosts: Vec<String>,
    ports: Vec<u16>,
}

impl Named {
    fn apply(self, config: &mut Config) -> Result<(), String> {
        let Some(user) = self.user.filter(|user| !user.is_empty()) else {
            return Err("it names no user".to_owned());
        };
        config.user(user);
        if let Some(database) = self.database {
            config.dbname(database);
        }
        if self.hosts.is_empty() {
            config.host_path("/var/run/postgresql");
        }
        for host in self.hosts {
            // A name that begins with a slash is the directory of a socket.
            config.host(host);
        }
        for port in self.ports {
            config.port(port);
        }
        Ok(())
    }
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, port)) => (host, port.strip_prefix(':').unwrap_or("")),
            None => return Err("the bracket of an IPv6 address is not closed".to_owned()),
        },
        None => text.split_once(':').unwrap_or((text, "")),
    };
    if port.is_empty() {
        return Ok((decoded(host)?, 5432));
    }
    let port = port.parse::<u16>().map_err(|_| {
        "the port is not a number below 65536 (a password with : / @ ? # or % in it must be \
         percent-encoded: / is %2F, @ is %40)"
            .to_owned()
    })?;
    Ok((decoded(host)?, port))
}

fn parameter(
    server: &mut Server,
    named: &mut Named,
    key: &str,
    value: String,
) -> Result<(), String> {
    let config = &mut server.config;
    match key {
        "sslmode" | "ssl" => {
            let (mode, verify) = match value.as_str() {
                "disable" | "false" => (SslMode::Disable, Verify::Nothing),
                "allow" | "prefer" | "" => (SslMode::Prefer, Verify::Nothing),
                "require" | "true" => (SslMode::Require, Verify::Nothing),
                "verify-ca" => (SslMode::Require, Verify::Authority),
                "verify-full" => (SslMode::Require, Verify::Host),
                _ => {
                    return Err(format!(
                        "{key} is {value:?}, not one of disable, allow, prefer, require, \
                         verify-ca, verify-full"
                    ));
                }
            };
            config.ssl_mode(mode);
            server.tls.verify = verify;
        }
        "sslrootcert" => {
            // libpq's word for the roots of the system; ours are built in.
            server.tls.root = (value != "system").then(|| value.into());
        }
        "sslcert" => server.tls.certificate = Some(value.into()),
        "sslkey" => server.tls.key = Some(value.into()),
        "user" => named.user = Some(value),
        "password" => {
            config.password(value);
        }
        "dbname" => named.database = Some(value),
        "host" => named.hosts = value.split(',').map(str::to_owned).collect(),
        "port" => {
            named.ports = value
                .split(',')
                .map(|port| {
                    port.parse()
                        .map_err(|_| format!("port {port:?} is not a number"))
                })
                .collect::<Result<_, _>>()?;
        }
        "application_name" => {
            config.application_name(value);
        }
        "options" => {
            config.options(value);
        }
        "connect_timeout" => {
            config.connect_timeout(seconds(key, &value)?.max(Duration::from_secs(2)));
        }
        "keepalives" => {
            config.keepalives(value != "0");
        }
        "keepalives_idle" => {
            config.keepalives_idle(seconds(key, &value)?);
        }
        "keepalives_interval" => {
            config.keepalives_interval(seconds(key, &value)?);
        }
        "keepalives_count" => {
            let count = value
                .parse()
                .map_err(|_| format!("{key} is not a number"))?;
            config.keepalives_retries(count);
        }
        "tcp_user_timeout" => {
            let ms = value
                .parse()
                .map_err(|_| format!("{key} is not a number"))?;
            config.tcp_user_timeout(Duration::from_millis(ms));
        }
        "target_session_attrs" => {
            config.target_session_attrs(match value.as_str() {
                "read-write" | "primary" => TargetSessionAttrs::ReadWrite,
                "any" => TargetSessionAttrs::Any,
                _ => {
                    return Err(format!(
                        "{key} is {value:?}, not any, primary or read-write"
                    ));
                }
            });
        }
        ignored if IGNORED.contains(&ignored) => {}
        unknown => return Err(format!("the parameter {unknown:?} is not known")),
    }
    Ok(())
}

fn seconds(key: &str, value: &str) -> Result<Duration, String> {
    value
        .parse()
        .map(Duration::from_secs)
        .map_err(|_| format!("{key} is {value:?}, not a whole number of seconds"))
}

/// Takes percent encoding off. A plus sign stays one, as in libpq.
pub(super) fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte != b'%' {
            bytes.push(byte);
            rest = tail;
            continue;
        }
        let digits = tail
            .get(..2)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(0) | None => {
                return Err(
                    "a percent sign is not followed by two hexadecimal digits (a percent \
                            sign itself is written %25)"
                        .to_owned(),
                );
            }
            Some(byte) => bytes.push(byte),
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8 after decoding".to_owned())
}
