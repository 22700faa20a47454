//! Redis URLs of result backends, and how to connect to what they name.
//!
//! `redis://`, `rediss://` (whose `ssl_cert_reqs` must be given, as in Celery), `socket://`
//! and `sentinel://host:port/0;sentinel://…` with `master_name` among the transport options.
//! Answers for `_params_from_url` of `celery/backends/redis.py`.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2};
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, IntoConnectionInfo,
    RedisConnectionInfo, RedisResult, TlsCertificates, TlsMode,
};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::super::{Error, Options};

const EXAMPLE: &str = "redis://:password@localhost:6379/1";

/// Where Redis is.
pub(super) struct Address {
    kind: Kind,
    database: i64,
    username: Option<String>,
    password: Option<SecretString>,
    tls: Option<Tls>,
    shown: String,
    /// `socket_timeout` and `socket_connect_timeout` of the query.
    pub(super) socket_timeout: Option<Duration>,
    pub(super) connect_timeout: Option<Duration>,
}

enum Kind {
    Host(String, u16),
    Socket(String),
    Sentinels {
        addresses: Vec<(String, u16)>,
        master: String,
        username: Option<String>,
        password: Option<SecretString>,
    },
}

struct Tls {
    verified: bool,
    certificates: TlsCertificates,
}

impl Address {
    /// Reads a URL and what the transport options add to it.
    pub(super) fn parse(text: &str, options: &Options) -> Result<Self, Error> {
        let mut shown = Vec::new();
        let mut urls = Vec::new();
        for part in text
            .split(';')
            .map(str::trim)
            .filter(|part| !part.is_empty())
        {
            let url = Url::parse(part).map_err(|error| {
                wrong(&format!(
                    "{} cannot be read: {error}",
                    crate::database::masked(part)
                ))
            })?;
            shown.push(masked(&url));
            urls.push(url);
        }
        let shown = shown.join(";");
        let Some(first) = urls.first() else {
            return Err(wrong("it is empty"));
        };
        let is_sentinel = first.scheme() == "sentinel";
        if urls.len() > 1 && !is_sentinel {
            return Err(wrong(&format!(
                "{shown}: only sentinel:// takes several addresses"
            )));
        }
        let mut address = Self {
            kind: Kind::Socket(String::new()),
            database: 0,
            username: some(decoded(first.username())),
            password: first
                .password()
                .map(|text| SecretString::from(decoded(text))),
            tls: None,
            shown: shown.clone(),
            socket_timeout: None,
            connect_timeout: None,
        };
        let mut database = first.path().trim_start_matches('/').to_owned();
        address.kind = match first.scheme() {
            "socket" | "redis+socket" | "unix" => {
                database.clear();
                // Both spellings are in use: socket:///path and socket://path.
                let host = first
                    .host_str()
                    .map(|host| format!("/{host}"))
                    .unwrap_or_default();
                Kind::Socket(decoded(&format!("{host}{}", first.path())))
            }
            "sentinel" => {
                let master = options.transport_options.get("master_name");
                let master = master.and_then(|name| name.as_str()).ok_or_else(|| {
                    wrong(&format!(
                        "{shown}: sentinel:// needs the master's name: set \
                         result_backend_transport_options to {{\"master_name\": \"mymaster\"}}"
                    ))
                })?;
                let login = options.transport_options.get("sentinel_kwargs");
                let login = |key: &str| {
                    let value = login.and_then(|login| login.get(key));
                    value.and_then(|value| value.as_str()).map(str::to_owned)
                };
                Kind::Sentinels {
                    addresses: urls.iter().map(|url| host_and_port(url, 26379)).collect(),
                    master: master.to_owned(),
                    username: login("username"),
                    password: login("password").map(SecretString::from),
                }
            }
            _ => {
                let (host, port) = host_and_port(first, 6379);
                Kind::Host(host, port)
            }
        };
        address.read_query(first, &mut database)?;
        if !database.is_empty() {
            address.database = database
                .parse()
                .map_err(|_| wrong(&format!("{shown}: the database must be a number")))?;
        }
        Ok(address)
    }

    fn read_query(&mut self, url: &Url, database: &mut String) -> Result<(), Error> {
        let shown = &self.shown;
        let mut requirement = None;
        let (mut root, mut certificate, mut key) = (None, None, None);
        for (name, value) in url.query_pairs() {
            let read = || {
                std::fs::read(&*value)
                    .map(Some)
                    .map_err(|error| wrong(&format!("{shown}: {name}: {value}: {error}")))
            };
            let seconds = || {
                let number = value.parse().ok();
                number
                    .and_then(|number| Duration::try_from_secs_f64(number).ok())
                    .ok_or_else(|| {
                        wrong(&format!(
                            "{shown}: {name} is {value:?}, not a number of seconds"
                        ))
                    })
            };
            match &*name {
                "ssl_cert_reqs" => requirement = Some(value.to_string()),
                "ssl_ca_certs" => root = read()?,
                "ssl_certfile" => certificate = read()?,
                "ssl_keyfile" => key = read()?,
                "db" | "virtual_host" => *database = value.trim_start_matches('/').to_owned(),
                "password" => self.password = Some(SecretString::from(value.to_string())),
                "username" => self.username = some(value.to_string()),
                "socket_timeout" => self.socket_timeout = Some(seconds()?),
                "socket_connect_timeout" => self.connect_timeout = Some(seconds()?),
                _ => log::debug!("the result backend's parameter {name} changes nothing here"),
            }
        }
        if url.scheme() != "rediss" && requirement.is_none() {
            return Ok(());
        }
        let requirement = requirement.unwrap_or_default();
        let word = requirement.to_ascii_lowercase();
        let verified = match word.strip_prefix("cert_").unwrap_or(&word) {
            "required" | "optional" => true,
            "none" => false,
            _ => {
                return Err(wrong(&format!(
                    "{shown}: a rediss:// URL must say how the server's certificate is checked: \
                     add ?ssl_cert_reqs=required (or optional, or none)"
                )));
            }
        };
        let client_tls = match (certificate, key) {
            (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig {
                client_cert,
                client_key,
            }),
            (None, None) => None,
            _ => {
                return Err(wrong(&format!(
                    "{shown}: ssl_certfile and ssl_keyfile must be given together"
                )));
            }
        };
        // redis takes the process' default; the program may have chosen one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        self.tls = Some(Tls {
            verified,
            certificates: TlsCertificates {
                client_tls,
                root_cert: root,
            },
        });
        Ok(())
    }

    /// The URL without its password.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Opens a connection that many results share.
    pub(super) async fn connect(
        &self,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        match &self.kind {
            Kind::Host(host, port) => {
                let addr = self.address_of(host.clone(), *port);
                self.client(addr)?
                    .get_multiplexed_async_connection_with_config(config)
                    .await
            }
            Kind::Socket(path) => {
                let addr = ConnectionAddr::Unix(path.into());
                self.client(addr)?
                    .get_multiplexed_async_connection_with_config(config)
                    .await
            }
            Kind::Sentinels {
                addresses,
                master,
                username,
                password,
            } => {
                let sentinels = addresses.iter().map(|(host, port)| match &self.tls {
                    Some(_) => self.address_of(host.clone(), *port),
                    None => ConnectionAddr::Tcp(host.clone(), *port),
                });
                let mut builder =
                    SentinelClientBuilder::new(sentinels, master, SentinelServerType::Master)?
                        .set_client_to_redis_db(self.database)
                        .set_client_to_redis_tcp_settings(tcp_settings())
                        .set_client_to_sentinel_tcp_settings(tcp_settings());
                if let Some(username) = &self.username {
                    builder = builder.set_client_to_redis_username(username);
                }
                if let Some(password) = &self.password {
                    builder = builder.set_client_to_redis_password(password.expose_secret());
                }
                if let Some(username) = username {
                    builder = builder.set_client_to_sentinel_username(username);
                }
                if let Some(password) = password {
                    builder = builder.set_client_to_sentinel_password(password.expose_secret());
                }
                if let Some(tls) = &self.tls {
                    let mode = if tls.verified {
                        TlsMode::Secure
                    } else {
                        TlsMode::Insecure
                    };
                    builder = builder
                        .set_client_to_redis_tls_mode(mode)
                        .set_client_to_redis_certificates(tls.certificates.clone());
                }
                builder
                    .build()?
                    .get_async_connection_with_config(config)
                    .await
            }
        }
    }

    fn address_of(&self, host: String, port: u16) -> ConnectionAddr {
        match &self.tls {
            Some(tls) => ConnectionAddr::TcpTls {
                host,
                port,
                insecure: !tls.verified,
                tls_params: None,
            },
            None => ConnectionAddr::Tcp(host, port),
        }
    }

    fn client(&self, addr: ConnectionAddr) -> RedisResult<Client> {
        // The crate's defaults say who the client is with CLIENT SETINFO, which old servers and
        // narrow access lists refuse; it ignores that, but there is no need to ask.
        let mut login = RedisConnectionInfo::default()
            .set_db(self.database)
            .set_skip_set_lib_name();
        if let Some(username) = &self.username {
            login = login.set_username(username);
        }
        if let Some(password) = &self.password {
            login = login.set_password(password.expose_secret());
        }
        let info = addr
            .into_connection_info()?
            .set_redis_settings(login)
            .set_tcp_settings(tcp_settings());
        match &self.tls {
            Some(tls) if tls.verified => Client::build_with_tls(info, tls.certificates.clone()),
            _ => Client::open(info),
        }
    }
}

/// A peer that has gone is noticed by the kernel also while nothing is being asked.
fn tcp_settings() -> TcpSettings {
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5));
    TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive)
}

fn wrong(reason: &str) -> Error {
    Error::Url(format!(
        "CELERY_RESULT_BACKEND: {reason}; a correct value looks like {EXAMPLE}"
    ))
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn host_and_port(url: &Url, port: u16) -> (String, u16) {
    let host = url
        .host_str()
        .filter(|host| !host.is_empty())
        .unwrap_or("localhost");
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (decoded(host), url.port().unwrap_or(port))
}

/// Takes percent encoding off; what is not UTF-8 then is replaced.
fn decoded(text: &str) -> String {
    let pair = format!("x={}", text.replace('+', "%2B"));
    url::form_urlencoded::parse(pair.as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

fn masked(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    if shown.password().is_some() {
        let _ = shown.set_password(Some("**"));
    }
    shown.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(text: &str) -> Result<Address, Error> {
        Address::parse(text, &Options::default())
    }

    #[test]
    fn parts_of_a_url_are_taken_over() {
        let address = parse("redis://ann:s%40+t@h.example:7000/3?socket_timeout=2.5").unwrap();
        assert!(matches!(&address.kind, Kind::Host(host, 7000) if host == "h.example"));
        assert_eq!(address.database, 3);
        assert_eq!(address.username.as_deref(), Some("ann"));
        assert_eq!(address.password.unwrap().expose_secret(), "s@+t");
        assert_eq!(address.socket_timeout, Some(Duration::from_millis(2500)));
        assert_eq!(address.shown, "redis://ann:**@h.example:7000/3");
        let address = parse("redis://").unwrap();
        assert!(matches!(&address.kind, Kind::Host(host, 6379) if host == "localhost"));
        let address = parse("socket:///run/r.sock?virtual_host=4").unwrap();
        assert!(matches!(&address.kind, Kind::Socket(path) if path == "/run/r.sock"));
        assert_eq!(address.database, 4);
        let address = parse("redis://[::1]:7/0").unwrap();
        assert!(matches!(&address.kind, Kind::Host(host, 7) if host == "::1"));
    }

    #[test]
    fn tls_must_say_how_it_is_verified() {
        let error = parse("rediss://:geheim@h/0").err().unwrap().to_string();
        assert!(
            error.contains("ssl_cert_reqs") && !error.contains("geheim"),
            "{error}"
        );
        let tls = |word: &str| {
            parse(&format!("rediss://h/0?ssl_cert_reqs={word}"))
                .unwrap()
                .tls
        };
        assert!(tls("CERT_REQUIRED").unwrap().verified);
        assert!(tls("required").unwrap().verified);
        assert!(!tls("none").unwrap().verified);
    }

    #[test]
    fn sentinels_need_the_name_of_the_master() {
        let url = "sentinel://:geheim@one:26379/1;sentinel://two:26380/1";
        let error = parse(url).err().unwrap().to_string();
        assert!(
            error.contains("master_name") && !error.contains("geheim"),
            "{error}"
        );
        let transport_options = json!({"master_name": "mymaster"})
            .as_object()
            .unwrap()
            .clone();
        let options = Options {
            transport_options,
            ..Options::default()
        };
        let address = Address::parse(url, &options).unwrap();
        assert_eq!(address.database, 1);
        let Kind::Sentinels { addresses, .. } = &address.kind else {
            panic!("not sentinels")
        };
        assert_eq!(
            addresses,
            &[("one".to_owned(), 26379), ("two".to_owned(), 26380)]
        );
    }

    #[test]
    fn a_malformed_url_is_an_error_with_an_example_and_without_the_password() {
        for text in [
            "redis://:geheim@h:port/0",
            "redis://:geheim@h/x",
            "redis://:geheim@a;redis://b",
        ] {
            let error = parse(text).err().unwrap().to_string();
            assert!(
                error.contains("CELERY_RESULT_BACKEND") && error.contains(EXAMPLE),
                "{error}"
            );
            assert!(!error.contains("geheim"), "{error}");
        }
    }
}
