//! Broker addresses: one parser for every scheme a Celery user may have in `broker_url`.
//!
//! Owns the text form only: schemes, percent-decoding, `;` lists, kombu's log form with the
//! password as `**`, and errors that name the wrong part without repeating a secret. Which
//! options a broker understands is the business of its own directory. Answers for
//! `kombu/utils/url.py` and `kombu.Connection.as_uri`.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use super::Error;

/// The kinds of broker address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// `redis://`
    Redis,
    /// `rediss://`, Redis over TLS.
    Rediss,
    /// `redis+socket://`, Redis on a Unix socket.
    RedisSocket,
    /// `sentinel://`, a Redis master found through its sentinels.
    Sentinel,
    /// `amqp://` and `pyamqp://`
    Amqp,
    /// `amqps://`
    Amqps,
}

impl Scheme {
    /// The word in front of `://`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Rediss => "rediss",
            Self::RedisSocket => "redis+socket",
            Self::Sentinel => "sentinel",
            Self::Amqp => "amqp",
            Self::Amqps => "amqps",
        }
    }

    /// Whether a Redis server is behind it.
    pub fn is_redis(self) -> bool {
        !matches!(self, Self::Amqp | Self::Amqps)
    }

    /// The port used when the address names none.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Redis | Self::Rediss | Self::RedisSocket => 6379,
            Self::Sentinel => 26379,
            Self::Amqp => 5672,
            Self::Amqps => 5671,
        }
    }

    /// A correct address of this kind, for error texts.
    fn example(self) -> &'static str {
        match self {
            Self::Redis => "redis://user:password@queue:6379/0",
            Self::Rediss => "rediss://user:password@queue:6379/0?ssl_cert_reqs=required",
            Self::RedisSocket => "redis+socket:///run/redis/redis.sock?virtual_host=0",
            Self::Sentinel => "sentinel://:password@sentinel1:26379/0;sentinel://sentinel2:26379",
            Self::Amqp => "amqp://user:password@rabbit:5672/vhost",
            Self::Amqps => "amqps://user:password@rabbit:5671/vhost",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        Some(match word.to_ascii_lowercase().as_str() {
            "redis" => Self::Redis,
            "rediss" => Self::Rediss,
            "redis+socket" => Self::RedisSocket,
            "sentinel" => Self::Sentinel,
            "amqp" | "pyamqp" => Self::Amqp,
            "amqps" => Self::Amqps,
            _ => return None,
        })
    }
}

/// One broker address, taken apart. `Display` and `Debug` never show the password.
#[derive(Clone)]
pub struct BrokerUrl {
    /// What kind of broker it is.
    pub scheme: Scheme,
    /// User name, percent-decoded.
    pub username: Option<String>,
    password: Option<SecretString>,
    /// Host name or address without brackets; empty for a socket.
    pub host: String,
    /// The port given, if one was.
    pub port: Option<u16>,
    /// What follows the host's slash, percent-decoded: database, virtual host (`/` when the
    /// address says `//` or nothing), or the path of the socket.
    pub virtual_host: String,
    /// The query's keys and values, percent-decoded, in order.
    pub query: Vec<(String, String)>,
}

impl BrokerUrl {
    /// Reads one address.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        let Some((word, rest)) = text.split_once("://") else {
            return Err(Error::Url(format!(
                "the broker address has no scheme such as `redis://`; a correct one is {}",
                Scheme::Redis.example()
            )));
        };
        let Some(scheme) = Scheme::from_word(word) else {
            // What stands before `://` of a mistyped address may hold a password.
            let named = if word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+') {
                format!(" `{word}`")
            } else {
                String::new()
            };
            return Err(Error::Url(format!(
                "the broker address has an unknown scheme{named}; known are redis, rediss, \
                 redis+socket, sentinel, amqp, amqps and pyamqp, as in {}",
                Scheme::Redis.example()
            )));
        };
        let wrong = |part: &str| {
            Error::Url(format!(
                "{part} in the broker address; a correct one is {}",
                scheme.example()
            ))
        };

        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, query),
            None => (rest, ""),
        };
        if rest.contains('#') {
            return Err(wrong(
                "a `#` is not allowed (write it as %23 in a password)",
            ));
        }
        let (authority, path) = match rest.find('/') {
            Some(slash) => (&rest[..slash], Some(&rest[slash + 1..])),
            None => (rest, None),
        };
        if !authority.contains('@') && path.is_some_and(|path| path.contains('@')) {
            return Err(wrong(
                "a `/` stands before the `@` (write it as %2F in a user name or password)",
            ));
        }
        let (userinfo, location) = match authority.rsplit_once('@') {
            Some((userinfo, location)) => (Some(userinfo), location),
            None => (None, authority),
        };
        let (username, password) = match userinfo {
            None => (None, None),
            Some(userinfo) => {
                let (user, password) = match userinfo.split_once(':') {
                    Some((user, password)) => (user, Some(password)),
                    None => (userinfo, None),
                };
                let user =
                    percent_decode(user).ok_or_else(|| wrong("the user name is not UTF-8"))?;
                let password = match password {
                    None | Some("") => None,
                    Some(password) => Some(SecretString::from(
                        percent_decode(password)
                            .ok_or_else(|| wrong("the password is not UTF-8"))?,
                    )),
                };
                (Some(user).filter(|user| !user.is_empty()), password)
            }
        };

        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |part: &str| {
                percent_decode(&part.replace('+', " "))
                    .ok_or_else(|| wrong("the query is not UTF-8"))
            };
            pairs.push((decode(key)?, decode(value)?));
        }

        if scheme == Scheme::RedisSocket {
            // Both `redis+socket:///path` and `redis+socket://path` are in use.
            let path = match path {
                Some(path) => format!("{location}/{path}"),
                None => location.to_owned(),
            };
            let path = percent_decode(&path).ok_or_else(|| wrong("the path is not UTF-8"))?;
            if path.is_empty() {
                return Err(wrong("there is no path of a socket"));
            }
            let path = if path.starts_with('/') {
                path
            } else {
                format!("/{path}")
            };
            let url = Self {
                scheme,
                username,
                password,
                host: String::new(),
                port: None,
                virtual_host: path,
                query: pairs,
            };
            url.database()?;
            return Ok(url);
        }

        let (host, port) = if let Some(rest) = location.strip_prefix('[') {
            let (host, rest) = rest
                .split_once(']')
                .ok_or_else(|| wrong("a `]` is missing"))?;
            (host, rest.strip_prefix(':'))
        } else {
            match location.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (location, None),
            }
        };
        let port = match port {
            None | Some("") => None,
            Some(digits) => Some(digits.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(
                || {
                    wrong(
                        "the port is not a number from 1 to 65535 (a `:` or `@` of a password is \
                         written %3A or %40)",
                    )
                },
            )?),
        };
        let host = percent_decode(host).ok_or_else(|| wrong("the host is not UTF-8"))?;
        let host = if host.is_empty() {
            "localhost".to_owned()
        } else {
            host
        };
        let path = percent_decode(path.unwrap_or_default())
            .ok_or_else(|| wrong("the part after the host is not UTF-8"))?;
        let virtual_host = match scheme {
            Scheme::Amqp | Scheme::Amqps if path.is_empty() => "/".to_owned(),
            _ => path,
        };
        let url = Self {
            scheme,
            username,
            password,
            host,
            port,
            virtual_host,
            query: pairs,
        };
        if scheme.is_redis() {
            url.database()?;
        }
        Ok(url)
    }

    /// Reads a list of addresses separated by `;`, to be tried in turn.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, Error> {
        let urls = text
            .split(';')
            .filter(|part| !part.trim().is_empty())
            .map(Self::parse)
            .collect::<Result<Vec<_>, _>>()?;
        if urls.is_empty() {
            return Err(Error::Url(format!(
                "the broker address is empty; a correct one is {}",
                Scheme::Redis.example()
            )));
        }
        Ok(urls)
    }

    /// The password, percent-decoded. Only for the login itself.
    pub fn password(&self) -> Option<&str> {
        self.password.as_ref().map(ExposeSecret::expose_secret)
    }

    /// The port to connect to.
    pub fn port_or_default(&self) -> u16 {
        self.port.unwrap_or_else(|| self.scheme.default_port())
    }

    /// The last value of a query key.
    pub fn query_value(&self, key: &str) -> Option<&str> {
        self.query
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// The number of the Redis database.
    pub fn database(&self) -> Result<i64, Error> {
        let text = match self.scheme {
            Scheme::RedisSocket => self.query_value("virtual_host").unwrap_or_default(),
            _ => &self.virtual_host,
        };
        let digits = text.trim_matches('/');
        if digits.is_empty() {
            return Ok(0);
        }
        digits.parse::<i64>().ok().filter(|number| *number >= 0).ok_or_else(|| {
            Error::Url(format!(
                "the database `{digits}` is not a number in the broker address; a correct one is {}",
                self.scheme.example()
            ))
        })
    }
}

/// kombu's log form. The password is `**` even when there is none, as in Celery's banner.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scheme == Scheme::RedisSocket {
            write!(f, "redis+socket://{}", self.virtual_host)?;
            return match self.query_value("virtual_host") {
                Some(database) => write!(f, "?virtual_host={database}"),
                None => Ok(()),
            };
        }
        let user = match (&self.username, self.scheme.is_redis()) {
            (Some(user), _) => user.as_str(),
            (None, true) => "",
            (None, false) => "guest",
        };
        let host: &dyn fmt::Display = if self.host.contains(':') {
            &format_args!("[{}]", self.host)
        } else {
            &self.host
        };
        let port = self.port_or_default();
        write!(f, "{}://{user}:**@{host}:{port}/", self.scheme.as_str())?;
        if self.scheme.is_redis() {
            write!(f, "{}", self.database().unwrap_or_default())
        } else {
            write!(f, "{}", self.virtual_host)
        }
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BrokerUrl({self})")
    }
}

/// Undoes `%XX`; a lone `%` stays, as in Python. None when the bytes are not UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = bytes
            .get(at + 1..at + 3)
            .filter(|_| bytes[at] == b'%')
            .and_then(|pair| std::str::from_utf8(pair).ok())
            .filter(|pair| pair.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|pair| u8::from_str_radix(pair, 16).ok());
        match escape {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_address_is_taken_apart_and_percent_decoded() {
        let url = BrokerUrl::parse("redis://us%40er:p%2Fa%3As%25s@queue:6380/3").unwrap();
        assert_eq!(url.scheme, Scheme::Redis);
        assert_eq!(url.username.as_deref(), Some("us@er"));
        assert_eq!(url.password(), Some("p/a:s%s"));
        assert_eq!((url.host.as_str(), url.port), ("queue", Some(6380)));
        assert_eq!(url.database().unwrap(), 3);
    }

    #[test]
    fn missing_parts_have_the_defaults_of_kombu() {
        let url = BrokerUrl::parse("redis://").unwrap();
        assert_eq!(
            (url.host.as_str(), url.port_or_default()),
            ("localhost", 6379)
        );
        assert_eq!(url.database().unwrap(), 0);
        assert_eq!(BrokerUrl::parse("redis://:pw@h").unwrap().username, None);
        assert_eq!(BrokerUrl::parse("amqp://h").unwrap().virtual_host, "/");
        assert_eq!(BrokerUrl::parse("amqp://h//").unwrap().virtual_host, "/");
        assert_eq!(
            BrokerUrl::parse("pyamqp://h/vh%2Fx").unwrap().virtual_host,
            "vh/x"
        );
        assert_eq!(
            BrokerUrl::parse("amqps://h").unwrap().port_or_default(),
            5671
        );
        assert_eq!(BrokerUrl::parse("redis://[::1]:7/1").unwrap().host, "::1");
    }

    #[test]
    fn password_is_never_shown() {
        for (text, shown) in [
            ("redis://127.0.0.1:6391/0", "redis://:**@127.0.0.1:6391/0"),
            ("redis://:topsecret@h", "redis://:**@h:6379/0"),
            (
                "rediss://me:topsecret@[::1]/2",
                "rediss://me:**@[::1]:6379/2",
            ),
            (
                "amqp://guest:topsecret@127.0.0.1",
                "amqp://guest:**@127.0.0.1:5672//",
            ),
            ("amqp://h/vh", "amqp://guest:**@h:5672/vh"),
            (
                "redis+socket:///run/r.sock?virtual_host=1",
                "redis+socket:///run/r.sock?virtual_host=1",
            ),
            ("sentinel://:topsecret@s1/1", "sentinel://:**@s1:26379/1"),
        ] {
            let url = BrokerUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("topsecret"));
        }
    }

    #[test]
    fn errors_name_the_part_and_show_an_example_but_no_secret() {
        for (text, part) in [
            ("topsecret", "no scheme"),
            ("http://topsecret@h", "unknown scheme `http`"),
            ("redis://:topsecret@h:port/0", "port"),
            ("redis://:topsecret@h:0/0", "port"),
            ("redis://:top/secret@h/0", "%2F"),
            ("redis://:topsecret#@h/0", "%23"),
            ("redis://:topsecret@h/zero", "database `zero`"),
            ("redis+socket://", "path of a socket"),
            ("redis+socket:///x?virtual_host=y", "database `y`"),
            ("redis://[::1:6379", "]"),
        ] {
            let error = BrokerUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(error.contains("://"), "{error}");
            assert!(
                !error.contains("topsecret") && !error.contains("secret@"),
                "{error}"
            );
        }
        assert!(BrokerUrl::parse_list(" ; ").is_err());
    }

    #[test]
    fn list_keeps_the_order_of_the_addresses() {
        let urls = BrokerUrl::parse_list("redis://a;redis://b:7/1").unwrap();
        let shown: Vec<_> = urls.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["redis://:**@a:6379/0", "redis://:**@b:7/1"]);
    }

    #[test]
    fn any_text_is_an_address_or_an_error() {
        for text in [
            "://",
            "redis://%",
            "redis://%zz@",
            "redis://@@@",
            "amqp://[",
            "redis://:@:/?&=&",
        ] {
            drop(BrokerUrl::parse(text));
        }
    }
}
