//! Opening connections: failover list, sentinels, TLS, deadlines, keepalive.
//!
//! A channel connects once to find the server that works and opens all its connections there.
//! Every socket has TCP keepalive and a user time-out, so that even a connection nobody writes
//! to ends when its peer is gone.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo,
    IntoConnectionInfo as _, ProtocolVersion, PushInfo, RedisConnectionInfo, RedisError,
    TlsCertificates, Value,
};
use secrecy::ExposeSecret as _;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::options::Options;
use crate::transport::Error;
use crate::transport::url::{BrokerUrl, Scheme};

/// One entry of the failover list.
#[derive(Debug, Clone)]
enum Target {
    Server(BrokerUrl),
    Sentinels(Vec<BrokerUrl>),
}

/// Knows where brokers may be.
#[derive(Debug)]
pub(super) struct Connector {
    targets: Vec<Target>,
    options: Options,
}

/// What the `ssl_*` keys of an address ask for.
#[derive(Debug, Clone)]
struct Tls {
    /// The server's certificate is not checked at all.
    unchecked: bool,
    /// The certificate is checked, but not whether it names this host.
    unnamed: bool,
    certificates: TlsCertificates,
}

/// A server that answered.
#[derive(Debug, Clone)]
pub(super) struct Link {
    info: ConnectionInfo,
    tls: Option<Tls>,
    command_timeout: Duration,
    connect_timeout: Duration,
    client_name: Option<String>,
    /// The address in the list that led here.
    pub(super) url: BrokerUrl,
    /// Number of the database.
    pub(super) database: i64,
}

impl Connector {
    /// Checks addresses and options; connects nowhere.
    pub(super) fn new(urls: &[BrokerUrl], options: &Options) -> Result<Self, Error> {
        let mut targets: Vec<Target> = Vec::new();
        for url in urls {
            if !url.scheme.is_redis() {
                return Err(Error::Url(format!("{url} is not an address of Redis")));
            }
            url.database()?;
            if url.scheme == Scheme::Rediss {
                certificates(url)?;
            }
            if url.scheme != Scheme::Sentinel {
                targets.push(Target::Server(url.clone()));
            } else if let Some(Target::Sentinels(group)) = targets.last_mut() {
                group.push(url.clone());
            } else {
                targets.push(Target::Sentinels(vec![url.clone()]));
            }
        }
        if targets.is_empty() {
            return Err(Error::Url(
                "no broker address was given; a correct one is redis://queue:6379/0".to_owned(),
            ));
        }
        let sentinels = targets
            .iter()
            .any(|target| matches!(target, Target::Sentinels(_)));
        if sentinels && options.master_name.is_none() {
            return Err(Error::Url(
                "sentinel:// needs the broker transport option `master_name`, as in \
                 {\"master_name\": \"mymaster\"}"
                    .to_owned(),
            ));
        }
        Ok(Self {
            targets,
            options: options.clone(),
        })
    }

    /// Tries each target once; the last error is reported with its address.
    pub(super) async fn connect(&self) -> Result<(Link, MultiplexedConnection), Error> {
        let mut last = None;
        for target in &self.targets {
            match target {
                Target::Server(url) => match self.server(url, None).await {
                    Ok(found) => return Ok(found),
                    Err(error) => last = Some(error),
                },
                Target::Sentinels(urls) => {
                    for url in urls {
                        match self.by_sentinel(url).await {
                            Ok(found) => return Ok(found),
                            Err(error) => last = Some(error),
                        }
                    }
                }
            }
        }
        Err(last.unwrap_or(Error::Closed))
    }

    async fn server(
        &self,
        url: &BrokerUrl,
        address: Option<(String, u16)>,
    ) -> Result<(Link, MultiplexedConnection), Error> {
        let database = url.database()?;
        let (host, port) = address.unwrap_or_else(|| (url.host.clone(), url.port_or_default()));
        let (addr, tls) = match url.scheme {
            Scheme::RedisSocket => (ConnectionAddr::Unix(url.virtual_host.clone().into()), None),
            Scheme::Rediss => {
                let tls = certificates(url)?;
                let insecure = tls.unchecked;
                (
                    ConnectionAddr::TcpTls {
                        host,
                        port,
                        insecure,
                        tls_params: None,
                    },
                    Some(tls),
                )
            }
            _ => (ConnectionAddr::Tcp(host, port), None),
        };
        let mut settings = RedisConnectionInfo::default()
            .set_db(database)
            .set_skip_set_lib_name();
        if let Some(username) = &url.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = url.password() {
            settings = settings.set_password(password);
        }
        let link = Link {
            info: connection_info(addr, settings)?,
            tls,
            command_timeout: self.options.command_timeout,
            connect_timeout: self.options.connect_timeout,
            client_name: self.options.client_name.clone(),
            url: url.clone(),
            database,
        };
        let connection = link.open(None).await?;
        Ok((link, connection))
    }

    async fn by_sentinel(&self, url: &BrokerUrl) -> Result<(Link, MultiplexedConnection), Error> {
        let mut settings = RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(username) = &self.options.sentinel_username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &self.options.sentinel_password {
            settings = settings.set_password(password.expose_secret());
        }
        let sentinel = Link {
            info: connection_info(
                ConnectionAddr::Tcp(url.host.clone(), url.port_or_default()),
                settings,
            )?,
            tls: None,
            command_timeout: self.options.command_timeout,
            connect_timeout: self.options.connect_timeout,
            client_name: None,
            url: url.clone(),
            database: 0,
        };
        let mut connection = sentinel.open(None).await?;
        let master = self.options.master_name.as_deref().unwrap_or_default();
        let address: Option<(String, u16)> = redis::cmd("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(master)
            .query_async(&mut connection)
            .await
            .map_err(|error| failed("asking a sentinel for the master", &error))?;
        let Some(address) = address else {
            return Err(Error::Connection {
                operation: "asking a sentinel for the master",
                reason: format!("{url} knows no master named `{master}` (option master_name)"),
            });
        };
        let (link, mut connection) = self.server(url, Some(address)).await?;
        // A sentinel may still name a master that was demoted.
        let role: Vec<Value> = redis::cmd("ROLE")
            .query_async(&mut connection)
            .await
            .map_err(|error| failed("asking the server for its role", &error))?;
        match role.first() {
            Some(Value::BulkString(role)) if role != b"master" => Err(Error::Connection {
                operation: "connecting to the master",
                reason: format!("the server named by {url} is a replica"),
            }),
            _ => Ok((link, connection)),
        }
    }
}

impl Link {
    /// One more connection to the same server. With `pushes` it speaks RESP3 and hands on what
    /// the server says unasked.
    pub(super) async fn open(
        &self,
        pushes: Option<mpsc::UnboundedSender<PushInfo>>,
    ) -> Result<MultiplexedConnection, Error> {
        let mut config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.command_timeout));
        let mut info = self.info.clone();
        if let Some(pushes) = pushes {
            config = config.set_push_sender(pushes);
            let settings = info
                .redis_settings()
                .clone()
                .set_protocol(ProtocolVersion::RESP3);
            info = info.set_redis_settings(settings);
        }
        let mut connection = self
            .client(info)?
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(|error| self.unreachable(&error))?;
        if let Some(name) = &self.client_name {
            let named: Result<Value, RedisError> = redis::cmd("CLIENT")
                .arg("SETNAME")
                .arg(name)
                .query_async(&mut connection)
                .await;
            named.map_err(|error| failed("naming the connection", &error))?;
        }
        Ok(connection)
    }

    /// A connection whose commands may block; the caller has a deadline of its own.
    pub(super) async fn open_blocking(&self) -> Result<MultiplexedConnection, Error> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(None);
        self.client(self.info.clone())?
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(|error| self.unreachable(&error))
    }

    /// A connection for subscriptions.
    pub(super) async fn open_pubsub(&self) -> Result<redis::aio::PubSub, Error> {
        let client = self.client(self.info.clone())?;
        match timeout(self.connect_timeout, client.get_async_pubsub()).await {
            Ok(Ok(pubsub)) => Ok(pubsub),
            Ok(Err(error)) => Err(self.unreachable(&error)),
            Err(_) => Err(Error::Connection {
                operation: "connecting to Redis",
                reason: self.silent(),
            }),
        }
    }

    fn client(&self, info: ConnectionInfo) -> Result<Client, Error> {
        let client = match &self.tls {
            None => Client::open(info),
            Some(tls) => {
                Client::build_with_tls(info, tls.certificates.clone()).and_then(|client| {
                    let info = client.get_connection_info().clone();
                    let mut addr = info.addr().clone();
                    addr.set_danger_accept_invalid_hostnames(tls.unnamed);
                    Client::open(info.set_addr(addr))
                })
            }
        };
        client.map_err(|error| Error::Url(format!("the broker address cannot be used: {error}")))
    }

    /// The first words on a new connection were not answered.
    pub(super) fn unwelcome(&self, error: &RedisError) -> Error {
        // What the server says before it closes is lost with the connection.
        let hint = if error.is_connection_dropped() {
            "; a Redis in protected mode does that to all but its own host (set requirepass, or \
             protected-mode no), one with too many clients as well"
        } else {
            ""
        };
        Error::Connection {
            operation: "connecting to Redis",
            reason: format!("{} closed the connection: {error}{hint}", self.url),
        }
    }

    fn silent(&self) -> String {
        format!(
            "{} did not answer within {:?} (broker_connection_timeout)",
            self.url, self.connect_timeout
        )
    }

    fn unreachable(&self, error: &RedisError) -> Error {
        let reason = match error.kind() {
            redis::ErrorKind::AuthenticationFailed => {
                format!("{} refused the user name or password: {error}", self.url)
            }
            _ if error.is_timeout() => self.silent(),
            _ => format!("{} cannot be reached: {error}", self.url),
        };
        Error::Connection {
            operation: "connecting to Redis",
            reason,
        }
    }
}

/// A connection error of an operation; with the server's words and no secret.
pub(super) fn failed(operation: &'static str, error: &RedisError) -> Error {
    Error::Connection {
        operation,
        reason: error.to_string(),
    }
}

fn connection_info(
    addr: ConnectionAddr,
    settings: RedisConnectionInfo,
) -> Result<ConnectionInfo, Error> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive)
        .set_user_timeout(Duration::from_secs(10));
    let info = addr
        .into_connection_info()
        .map_err(|error| Error::Url(format!("the broker address cannot be used: {error}")))?;
    Ok(info.set_redis_settings(settings).set_tcp_settings(tcp))
}

/// Reads the `ssl_*` keys of a `rediss://` address. Without any of them kombu checks nothing.
fn certificates(url: &BrokerUrl) -> Result<Tls, Error> {
    let wrong = |key: &str, wanted: &str| {
        Error::Url(format!(
            "`{key}` in the broker address {wanted}; a correct one is \
             rediss://user:password@queue:6379/0?ssl_cert_reqs=required&ssl_ca_certs=/etc/ssl/ca.pem"
        ))
    };
    let read = |key: &'static str| match url.query_value(key) {
        None | Some("") => Ok(None),
        Some(path) => std::fs::read(path)
            .map(Some)
            .map_err(|error| wrong(key, &format!("names {path}, which cannot be read: {error}"))),
    };
    let any = url.query.iter().any(|(key, _)| key.starts_with("ssl_"));
    let unchecked = match url
        .query_value("ssl_cert_reqs")
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        None => !any,
        Some("none" | "cert_none") => true,
        Some("required" | "cert_required" | "optional" | "cert_optional") => false,
        Some(_) => {
            return Err(wrong(
                "ssl_cert_reqs",
                "must be one of required, optional and none",
            ));
        }
    };
    let unnamed = url
        .query_value("ssl_check_hostname")
        .is_some_and(|value| value.eq_ignore_ascii_case("false"));
    let client_tls = match (read("ssl_certfile")?, read("ssl_keyfile")?) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig {
            client_cert,
            client_key,
        }),
        (Some(both), None) => Some(ClientTlsConfig {
            client_cert: both.clone(),
            client_key: both,
        }),
        (None, Some(_)) => return Err(wrong("ssl_keyfile", "needs `ssl_certfile` as well")),
        (None, None) => None,
    };
    let certificates = TlsCertificates {
        client_tls,
        root_cert: read("ssl_ca_certs")?,
    };
    Ok(Tls {
        unchecked,
        unnamed,
        certificates,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connector(text: &str, options: &Options) -> Result<Connector, Error> {
        Connector::new(&BrokerUrl::parse_list(text)?, options)
    }

    #[test]
    fn certificate_is_checked_exactly_when_asked() {
        for (query, unchecked, unnamed) in [
            ("", true, false),
            ("?ssl_cert_reqs=CERT_NONE", true, false),
            ("?ssl_cert_reqs=required", false, false),
            ("?ssl_check_hostname=true", false, false),
            (
                "?ssl_cert_reqs=required&ssl_check_hostname=false",
                false,
                true,
            ),
        ] {
            let url = BrokerUrl::parse(&format!("rediss://h/0{query}")).unwrap();
            let tls = certificates(&url).unwrap();
            assert_eq!(
                (tls.unchecked, tls.unnamed),
                (unchecked, unnamed),
                "{query}"
            );
        }
        let error = connector("rediss://:pw@h/0?ssl_cert_reqs=maybe", &Options::default());
        assert!(error.unwrap_err().to_string().contains("ssl_cert_reqs"));
        let error = connector(
            "rediss://h/0?ssl_ca_certs=/nowhere/ca.pem",
            &Options::default(),
        );
        assert!(error.unwrap_err().to_string().contains("/nowhere/ca.pem"));
    }

    #[test]
    fn sentinels_need_the_name_of_their_master() {
        let error = connector("sentinel://a;sentinel://b", &Options::default()).unwrap_err();
        assert!(error.to_string().contains("master_name"), "{error}");
        let options = Options {
            master_name: Some("m".into()),
            ..Options::default()
        };
        let found = connector("sentinel://a;sentinel://b;redis://c", &options).unwrap();
        assert_eq!(found.targets.len(), 2);
    }

    #[test]
    fn address_of_another_broker_is_refused() {
        assert!(connector("amqp://h", &Options::default()).is_err());
    }
}
