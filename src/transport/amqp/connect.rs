//! From an address to a connection: failover, login, TLS, and what the broker says meanwhile.
//!
//! A [`Line`] is one TCP connection. Requests that may be refused go through channels of their
//! own ([`Line::ask`]), because a refusal closes the channel it was made on; whatever ends the
//! whole connection ends the [`Life`] of the transport's channel that it belongs to.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{
    AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism,
};
use lapin::{Connection, ConnectionProperties, Event};

use tokio::sync::OnceCell;

use super::error::{broken, explain, failed};
use super::greeting;
use super::life::Life;
use super::options::Options;
use crate::transport::Error;
use crate::transport::url::{BrokerUrl, Scheme};

/// Smaller than the usual 128 KiB, because lapin sets buffers of 32 frames aside for each
/// direction; larger messages are cut into more frames.
const FRAME_MAX: u32 = 32 * 1024;
/// How often a connection is looked at that ended without a word.
const GLANCE: Duration = Duration::from_secs(1);

const CONNECTING: &str = "connecting to RabbitMQ";
const CONNECTION: &str = "the connection to RabbitMQ";

/// Checked addresses.
#[derive(Debug)]
pub(super) struct Connector {
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Target {
    url: BrokerUrl,
    tls: OwnedTLSConfig,
    /// RabbitMQ's major version, once it was asked.
    version: OnceCell<Option<u32>>,
}

impl Connector {
    /// Checks addresses and the files they name; connects nowhere.
    pub(super) fn new(urls: &[BrokerUrl]) -> Result<Self, Error> {
        let mut targets = Vec::new();
        for url in urls {
            if url.scheme.is_redis() {
                return Err(Error::Url(format!(
                    "{url} is not an address of RabbitMQ; all addresses of a list must be of one \
                     kind of broker"
                )));
            }
            let tls = certificates(url)?;
            targets.push(Target {
                url: url.clone(),
                tls,
                version: OnceCell::new(),
            });
        }
        if targets.is_empty() {
            return Err(Error::Url(
                "no broker address was given; a correct one is amqp://user:password@rabbit:5672//"
                    .to_owned(),
            ));
        }
        Ok(Self { targets })
    }

    /// Tries each address once, beginning with the first as kombu does with every new connection;
    /// the last error is reported with its address.
    pub(super) async fn connect(
        &self,
        options: &Options,
        life: &Life,
    ) -> Result<(usize, Line), Error> {
        let mut last = Error::Closed;
        let mut order: Vec<usize> = (0..self.targets.len()).collect();
        if options.shuffle {
            order[1..].sort_by_cached_key(|_| uuid::Uuid::new_v4());
        }
        for index in order {
            match self.connect_to(index, options, life).await {
                Ok(line) => return Ok((index, line)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Whether a server limits prefetch for a whole channel, as RabbitMQ did up to its third
    /// version. One that does not say what it is does.
    pub(super) async fn limits_channels(&self, index: usize, options: &Options) -> bool {
        let Target { url, tls, version } = &self.targets[index];
        let ask = || async {
            let uri = address(url, options).ok()?;
            greeting::major_version(&uri, tls, options.connect_timeout).await
        };
        version.get_or_init(ask).await.is_none_or(|major| major < 4)
    }

    /// One more connection to the broker of a known address.
    pub(super) async fn connect_to(
        &self,
        index: usize,
        options: &Options,
        life: &Life,
    ) -> Result<Line, Error> {
        let Target { url, tls, .. } = &self.targets[index];
        let uri = address(url, options)?;
        let name = options.connection_name.as_str();
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "celeriac".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let connecting = Connection::connect_uri_with_config(
            uri,
            properties,
            tls.clone(),
            lapin::runtime::default_runtime().map_err(|error| broken(CONNECTING, &error))?,
        );
        let unreachable = |reason: String| Error::Connection {
            operation: CONNECTING,
            reason: format!("{url}: {reason}"),
        };
        let connection = match tokio::time::timeout(options.connect_timeout, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(unreachable(explain(&error))),
            Err(_) => {
                return Err(unreachable(format!(
                    "no answer within {:?} (broker_connection_timeout)",
                    options.connect_timeout
                )));
            }
        };
        tokio::spawn(watch(
            connection.status().clone(),
            Box::pin(connection.events_listener()),
            life.clone(),
        ));
        Ok(Line {
            connection,
            spare: Mutex::new(None),
            patience: options.request_timeout,
        })
    }
}

/// Follows what the broker says about a connection, to its end.
async fn watch(
    status: lapin::ConnectionStatus,
    mut events: std::pin::Pin<Box<dyn futures::Stream<Item = Event> + Send>>,
    life: Life,
) {
    let mut glance = tokio::time::interval(GLANCE);
    loop {
        let error = tokio::select! {
            () = life.over() => return,
            event = events.next() => match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    log::warn!(
                        "RabbitMQ takes no messages at present: {reason}. Publishing waits until \
                         it has room again; tasks go on"
                    );
                    continue;
                }
                Some(Event::ConnectionUnblocked) => {
                    log::info!("RabbitMQ takes messages again");
                    continue;
                }
                Some(Event::Error(error)) => Some(error),
                Some(_) => None,
                None => return,
            },
            _ = glance.tick() => None,
        };
        // Faults of single channels are announced here as well.
        if !status.connected() {
            life.fail(match error {
                Some(error) => broken(CONNECTION, &error),
                None => Error::Connection {
                    operation: CONNECTION,
                    reason: "it was closed".to_owned(),
                },
            });
            return;
        }
    }
}

/// One TCP connection.
pub(super) struct Line {
    connection: Connection,
    /// A channel for requests that nobody uses at the moment.
    spare: Mutex<Option<lapin::Channel>>,
    patience: Duration,
}

impl Line {
    /// A channel of one's own.
    pub(super) async fn channel(&self) -> Result<lapin::Channel, Error> {
        let opening = self.connection.create_channel();
        match self.answer("opening a channel", opening).await? {
            Ok(channel) => Ok(channel),
            Err(error) => Err(broken("opening a channel", &error)),
        }
    }

    /// Makes a request that may be refused.
    pub(super) async fn ask<T, F>(
        &self,
        operation: &'static str,
        request: impl FnOnce(lapin::Channel) -> F + Send,
    ) -> Result<T, Error>
    where
        F: Future<Output = lapin::Result<T>> + Send,
    {
        let spare = self.spare().take();
        let channel = match spare.filter(|channel| channel.status().connected()) {
            Some(channel) => channel,
            None => self.channel().await?,
        };
        match self.answer(operation, request(channel.clone())).await? {
            Ok(answer) => {
                *self.spare() = Some(channel);
                Ok(answer)
            }
            Err(error) => Err(failed(operation, &error)),
        }
    }

    /// Waits for an answer. While the broker is short of memory or disk it does not even read
    /// what a connection says that publishes: then it has all the time it needs.
    async fn answer<T>(
        &self,
        operation: &'static str,
        request: impl Future<Output = T> + Send,
    ) -> Result<T, Error> {
        let mut request = std::pin::pin!(request);
        loop {
            match tokio::time::timeout(self.patience, request.as_mut()).await {
                Ok(answer) => return Ok(answer),
                Err(_) if self.connection.status().blocked() => {}
                Err(_) => {
                    return Err(Error::Connection {
                        operation,
                        reason: format!("RabbitMQ did not answer within {:?}", self.patience),
                    });
                }
            }
        }
    }

    /// Says goodbye.
    pub(super) async fn close(&self) {
        if self.connection.status().connected() {
            let closing = self.connection.close(200, "OK".into());
            if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), closing).await {
                log::debug!("While closing a connection to RabbitMQ: {error}");
            }
        }
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Option<lapin::Channel>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address in lapin's form.
fn address(url: &BrokerUrl, options: &Options) -> Result<AMQPUri, Error> {
    let scheme = match url.scheme {
        Scheme::Amqps => AMQPScheme::AMQPS,
        _ => AMQPScheme::AMQP,
    };
    let login = url
        .query_value("login_method")
        .unwrap_or(&options.login_method);
    let mechanism: SASLMechanism = login.parse().map_err(|_| {
        Error::Url(format!(
            "broker_login_method: {login} is none of PLAIN, AMQPLAIN and EXTERNAL"
        ))
    })?;
    let heartbeat = match url.query_value("heartbeat") {
        Some(text) => text.parse().map_err(|_| {
            Error::Url(format!(
                "`heartbeat` in the broker address: {text} is no number of seconds"
            ))
        })?,
        None => options.heartbeat.as_secs_f64(),
    };
    Ok(AMQPUri {
        scheme,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: url.username.clone().unwrap_or_else(|| "guest".to_owned()),
                password: url.password().unwrap_or("guest").to_owned(),
            },
            // kombu does the same: a name that is also an IPv6 address costs a refused attempt.
            // A certificate is for the name, though.
            host: match (url.host.as_str(), url.scheme) {
                ("localhost", Scheme::Amqp) => "127.0.0.1".to_owned(),
                (host, _) => host.to_owned(),
            },
            port: url.port_or_default(),
        },
        vhost: url.virtual_host.clone(),
        query: AMQPQueryString {
            frame_max: Some(FRAME_MAX),
            heartbeat: Some(heartbeat.clamp(0.0, f64::from(u16::MAX)) as u16),
            auth_mechanism: Some(mechanism),
            ..AMQPQueryString::default()
        },
    })
}

/// Reads the files that `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile` of an `amqps://`
/// address name.
fn certificates(url: &BrokerUrl) -> Result<OwnedTLSConfig, Error> {
    let wrong = |key: &str, wanted: &str| {
        Error::Url(format!(
            "`{key}` in the broker address {wanted}; a correct one is \
             amqps://user:password@rabbit:5671//?ssl_ca_certs=/etc/ssl/ca.pem"
        ))
    };
    if url.scheme != Scheme::Amqps {
        return Ok(OwnedTLSConfig::default());
    }
    let read = |key: &'static str| match url.query_value(key) {
        None | Some("") => Ok(None),
        Some(path) => std::fs::read(path)
            .map(Some)
            .map_err(|error| wrong(key, &format!("names {path}, which cannot be read: {error}"))),
    };
    let verify = url.query_value("ssl_cert_reqs").unwrap_or("required");
    if !matches!(
        verify.to_ascii_lowercase().as_str(),
        "required" | "cert_required"
    ) {
        return Err(wrong(
            "ssl_cert_reqs",
            "must be `required`: certificates of RabbitMQ are always checked; give the CA of a \
             private one as ssl_ca_certs",
        ));
    }
    let cert_chain = read("ssl_ca_certs")?
        .map(String::from_utf8)
        .transpose()
        .map_err(|_| wrong("ssl_ca_certs", "must name a PEM file"))?;
    let identity = match (read("ssl_certfile")?, read("ssl_keyfile")?) {
        (Some(pem), Some(key)) => Some(OwnedIdentity::PKCS8 { pem, key }),
        (Some(both), None) => Some(OwnedIdentity::PKCS8 {
            pem: both.clone(),
            key: both,
        }),
        (None, Some(_)) => return Err(wrong("ssl_keyfile", "needs `ssl_certfile` as well")),
        (None, None) => None,
    };
    Ok(OwnedTLSConfig {
        identity,
        cert_chain,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Result<AMQPUri, Error> {
        address(&BrokerUrl::parse(text)?, &Options::default())
    }

    #[test]
    fn addresses_mean_what_they_mean_to_kombu() {
        let plain = uri("amqp://").unwrap();
        assert_eq!(plain.authority.host, "127.0.0.1");
        assert_eq!((plain.authority.port, plain.vhost.as_str()), (5672, "/"));
        assert_eq!(plain.authority.userinfo.username, "guest");
        assert_eq!(plain.query.heartbeat, Some(5));
        let given = uri("amqps://u:p%40w@[::1]/my%2Fhost?heartbeat=7").unwrap();
        assert_eq!(
            (given.authority.host.as_str(), given.authority.port),
            ("::1", 5671)
        );
        assert_eq!(given.authority.userinfo.password, "p@w");
        assert_eq!(given.vhost, "my/host");
        assert_eq!(given.query.heartbeat, Some(7));
        assert!(uri("amqp://h?heartbeat=often").is_err());
        assert!(uri("amqp://h?login_method=GSSAPI").is_err());
    }

    #[test]
    fn a_list_is_of_one_kind_and_certificates_are_always_checked() {
        let new = |text: &str| Connector::new(&BrokerUrl::parse_list(text).unwrap());
        assert!(new("amqp://a;redis://b").is_err());
        assert_eq!(new("amqp://a;pyamqp://b").unwrap().targets.len(), 2);
        let error = new("amqps://u:geheim@a?ssl_cert_reqs=none")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("ssl_ca_certs") && !error.contains("geheim"),
            "{error}"
        );
        let error = new("amqps://a?ssl_ca_certs=/nowhere/ca.pem")
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/ca.pem"), "{error}");
    }
}
