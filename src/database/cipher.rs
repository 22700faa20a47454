//! Fernet: how tokens are encrypted, in the database and perhaps already in a task's
//! arguments.
//!
//! The format is that of Python's `cryptography.fernet`, and several keys work as its
//! `MultiFernet`: the first encrypts, all decrypt, so keys can be rotated. Plain texts live in
//! [`SecretString`], which is erased when dropped and prints nothing.

use fernet::Fernet;
use secrecy::zeroize::{Zeroize, Zeroizing};
use secrecy::{ExposeSecret, SecretString};

use super::error::Error;

/// The keys of `TOKEN_ENCRYPTION_KEYS`; there may be none.
#[derive(Clone, Default)]
pub struct Keys {
    keys: Vec<Fernet>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.keys.len())
    }
}

impl Keys {
    /// Reads keys separated by commas or white space. An empty text is no keys.
    pub fn parse(text: &SecretString) -> Result<Self, Error> {
        let keys = text
            .expose_secret()
            .split(|character: char| character == ',' || character.is_whitespace())
            .filter(|key| !key.is_empty())
            .enumerate()
            .map(|(place, key)| {
                Fernet::new(key).ok_or(Error::Key {
                    position: place + 1,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// Whether nothing can be encrypted or decrypted.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Encrypts with the first key.
    pub fn encrypt(&self, secret: &SecretString) -> Result<String, Error> {
        let key = self.keys.first().ok_or(Error::NoKey {
            operation: "encrypt a token",
        })?;
        Ok(key.encrypt(secret.expose_secret().as_bytes()))
    }

    /// Decrypts with whichever key fits; `max_age` in seconds, if given, must not be exceeded.
    pub fn decrypt(&self, token: &str, max_age: Option<u64>) -> Result<SecretString, Error> {
        const OPERATION: &str = "decrypt a token";
        if self.keys.is_empty() {
            return Err(Error::NoKey {
                operation: OPERATION,
            });
        }
        let opened = self.keys.iter().find_map(|key| match max_age {
            Some(seconds) => key.decrypt_with_ttl(token, seconds).ok(),
            None => key.decrypt(token).ok(),
        });
        let Some(opened) = opened else {
            let too_old =
                max_age.filter(|_| self.keys.iter().any(|key| key.decrypt(token).is_ok()));
            return Err(match too_old {
                Some(seconds) => Error::Expired {
                    operation: OPERATION,
                    seconds,
                },
                None => Error::Cipher {
                    operation: OPERATION,
                },
            });
        };
        let bytes = Zeroizing::new(opened);
        let text = std::str::from_utf8(&bytes).map_err(|_| Error::Cipher {
            operation: OPERATION,
        })?;
        Ok(SecretString::from(text))
    }

    /// A token as it came with a task: decrypted if it is encrypted, else as it is.
    pub fn decrypt_if_fernet(
        &self,
        mut token: String,
        max_age: Option<u64>,
    ) -> Result<SecretString, Error> {
        if !is_fernet(&token) {
            return Ok(SecretString::from(token));
        }
        let opened = self.decrypt(&token, max_age);
        token.zeroize();
        opened
    }
}

/// Whether the text has the form of a Fernet token: URL-safe base64 of a version byte 0x80, a
/// time of this millennium, and at least one block. No access token of a git host begins so.
pub fn is_fernet(text: &str) -> bool {
    text.len() >= 100
        && text.starts_with("gAAAAA")
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'='))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=";

    fn keys(text: &str) -> Keys {
        Keys::parse(&SecretString::from(text)).unwrap()
    }

    #[test]
    fn the_vector_of_the_fernet_specification_is_opened() {
        let token = "gAAAAAAdwJ6wAAECAwQFBgcICQoLDA0ODy021cpGVWKZ_eEwCGM4BLLF_5CV9dOPmrhuVUPgJobwOz7JcbmrR64jVmpU4IwqDA==";
        assert!(is_fernet(token));
        assert_eq!(
            keys(OLD).decrypt(token, None).unwrap().expose_secret(),
            "hello"
        );
        assert!(matches!(
            keys(OLD).decrypt(token, Some(60)),
            Err(Error::Expired { seconds: 60, .. })
        ));
    }

    #[test]
    fn the_first_key_encrypts_and_every_key_decrypts() {
        let new = Fernet::generate_key();
        let before = keys(OLD).encrypt(&SecretString::from("geheim")).unwrap();
        let rotated = keys(&format!("{new}, {OLD}"));
        assert_eq!(
            rotated.decrypt(&before, None).unwrap().expose_secret(),
            "geheim"
        );
        let after = rotated.encrypt(&SecretString::from("geheim")).unwrap();
        assert!(keys(OLD).decrypt(&after, None).is_err());
        assert_eq!(
            keys(&new).decrypt(&after, None).unwrap().expose_secret(),
            "geheim"
        );
    }

    #[test]
    fn a_plain_token_passes_and_an_encrypted_one_needs_its_key() {
        let plain = "github_pat_11ABCDEFG0abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghij";
        let passed = Keys::default()
            .decrypt_if_fernet(plain.to_owned(), None)
            .unwrap();
        assert_eq!(passed.expose_secret(), plain);
        let sealed = keys(OLD).encrypt(&SecretString::from(plain)).unwrap();
        let opened = keys(OLD)
            .decrypt_if_fernet(sealed.clone(), Some(60))
            .unwrap();
        assert_eq!(opened.expose_secret(), plain);
        let error = Keys::default()
            .decrypt_if_fernet(sealed.clone(), None)
            .unwrap_err();
        assert!(matches!(error, Error::NoKey { .. }));
        let other = keys(&Fernet::generate_key()).decrypt_if_fernet(sealed.clone(), None);
        let text = other.unwrap_err().to_string();
        assert!(
            text.contains("TOKEN_ENCRYPTION_KEYS") && !text.contains(&sealed),
            "{text}"
        );
    }

    #[test]
    fn a_bad_key_is_named_by_its_position_and_not_by_its_text() {
        let text = SecretString::from(format!("{OLD},hunter2"));
        let error = Keys::parse(&text).unwrap_err().to_string();
        assert!(
            error.contains("key number 2") && !error.contains("hunter2"),
            "{error}"
        );
        assert!(!format!("{:?}", keys(OLD)).contains("cw_0x"));
    }
}
