//! What is said to git-upload-pack: protocol version 2, and version 0 for servers that know no better.
//!
//! A clone needs three requests: which protocol, which commit, the pack. Nothing is negotiated, because we
//! have nothing. Capabilities that let a server choose an address for us (packfile-uris, bundle-uri) are
//! never asked for, and an answer that uses them anyway is refused. Answers for gitprotocol-v2,
//! gitprotocol-http and gitprotocol-pack.

use std::io::{BufReader, Read};

use gix::ObjectId;
use secrecy::zeroize::Zeroizing;

use super::error::{Doing, Error, from_http, from_status};
use super::pktline::{self, Fault, Packet, Packets};
use crate::git::http::{Client, Response};

/// Advertised references that are read from a version 0 server before it is called hostile.
const MAX_REFS: usize = 1_000_000;
/// Bytes of all their names.
const MAX_REF_BYTES: usize = 64 << 20;
/// Capability lines of version 2.
const MAX_CAPABILITIES: usize = 200;

const HANDSHAKE: Doing = "asking for the repository";
const LISTING: Doing = "listing branches";

/// A reference's id and full name.
pub(super) type Reference = (ObjectId, String);

/// A response, frame by frame.
pub(super) type Frames = Packets<BufReader<Response>>;

/// Who is being talked to, and how to report about it.
pub(super) struct Conversation<'a> {
    client: &'a Client,
    /// The repository as the user named it.
    url: String,
    /// Where it answered, after redirects.
    base: ::url::Url,
    /// Blotted out of what the server says.
    secrets: Vec<Zeroizing<String>>,
}

/// What the server calls its protocol.
pub(super) enum Greeting {
    /// Version 2 with its capabilities.
    Version2(Vec<String>),
    /// Version 0: the references came at once.
    Version0 {
        capabilities: Vec<String>,
        refs: Vec<Reference>,
    },
}

/// The commit to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its id; `None` when HEAD is unborn.
    pub(super) id: Option<ObjectId>,
    /// The id to set HEAD to: that of the commit when `id` is an annotated tag.
    pub(super) peeled: Option<ObjectId>,
    /// The branch HEAD points to, in full.
    pub(super) name: Option<String>,
}

impl<'a> Conversation<'a> {
    /// Says hello.
    pub(super) fn open(
        client: &'a Client,
        url: &::url::Url,
        secrets: Vec<Zeroizing<String>>,
    ) -> Result<(Conversation<'a>, Greeting), Error> {
        let text = url.to_string();
        let (base, response) = client
            .get(
                url,
                "info/refs?service=git-upload-pack",
                &[("Git-Protocol", "version=2"), ("Pragma", "no-cache")],
            )
            .map_err(|error| from_http(&text, HANDSHAKE, error))?;
        let conversation = Conversation {
            client,
            url: text,
            base,
            secrets,
        };
        if response.status != 200 {
            return Err(conversation.refused(&response));
        }
        if response.content_type != "application/x-git-upload-pack-advertisement" {
            return Err(Error::NotGit {
                url: conversation.url,
                detail: match response.content_type.as_str() {
                    "" => "the answer has no content type".to_owned(),
                    kind if kind.starts_with("text/html") => "a web page came back".to_owned(),
                    kind if kind.starts_with("text/plain") => {
                        "the server speaks only the old dumb protocol, or none".to_owned()
                    }
                    _ => "something else than a list of branches came back".to_owned(),
                },
            });
        }
        let greeting = conversation.greeting(response)?;
        Ok((conversation, greeting))
    }

    fn greeting(&self, response: Response) -> Result<Greeting, Error> {
        let mut packets = Packets::new(BufReader::new(response));
        let mut first = self.text(&mut packets, HANDSHAKE)?;
        if let Some(line) = &first
            && line.starts_with("# service=")
        {
            if line != "# service=git-upload-pack" {
                return Err(self.broken(HANDSHAKE, "another service answered"));
            }
            if self.text(&mut packets, HANDSHAKE)?.is_some() {
                return Err(self.broken(HANDSHAKE, "its announcement does not end"));
            }
            first = self.text(&mut packets, HANDSHAKE)?;
        }
        match first.as_deref() {
            Some("version 2") => {
                let mut capabilities = Vec::new();
                while let Some(line) = self.text(&mut packets, HANDSHAKE)? {
                    if capabilities.len() == MAX_CAPABILITIES {
                        return Err(self.broken(HANDSHAKE, "it lists too many capabilities"));
                    }
                    capabilities.push(line);
                }
                self.drain(packets);
                Ok(Greeting::Version2(capabilities))
            }
            Some("version 1") => {
                let first = self.text(&mut packets, HANDSHAKE)?;
                self.references(packets, first)
            }
            _ => self.references(packets, first),
        }
    }

    /// The reference list of version 0 and 1.
    fn references(&self, mut packets: Frames, first: Option<String>) -> Result<Greeting, Error> {
        let mut capabilities = Vec::new();
        let mut refs = Vec::new();
        let mut bytes = 0;
        let mut line = first;
        while let Some(text) = line {
            bytes += text.len();
            if refs.len() == MAX_REFS || bytes > MAX_REF_BYTES {
                return Err(self.broken(HANDSHAKE, "it lists too many references"));
            }
            let reference = match text.split_once('\0') {
                Some((reference, words)) if refs.is_empty() => {
                    capabilities = words.split(' ').map(str::to_owned).collect();
                    reference
                }
                _ => &text,
            };
            if !reference.starts_with("shallow ") {
                let (id, name) = reference
                    .split_once(' ')
                    .ok_or_else(|| self.broken(HANDSHAKE, "a reference has no name"))?;
                // The stand-in of a repository without references, which only carries capabilities.
                if name != "capabilities^{}" {
                    refs.push((self.id(id, HANDSHAKE)?, name.to_owned()));
                }
            }
            line = self.text(&mut packets, HANDSHAKE)?;
        }
        self.drain(packets);
        Ok(Greeting::Version0 { capabilities, refs })
    }

    /// Which commit `branch`, or HEAD, is.
    pub(super) fn wanted(
        &self,
        greeting: &Greeting,
        branch: Option<&str>,
    ) -> Result<Wanted, Error> {
        let (refs, symbolic) = match greeting {
            Greeting::Version2(capabilities) => {
                self.object_format(capabilities)?;
                self.list(capabilities, branch)?
            }
            Greeting::Version0 { capabilities, refs } => {
                self.object_format(capabilities)?;
                let symbolic = capabilities
                    .iter()
                    .find_map(|word| word.strip_prefix("symref=HEAD:"))
                    .map(str::to_owned);
                (refs.clone(), symbolic)
            }
        };
        let find = |name: &str| {
            refs.iter()
                .find(|(_, found)| found == name)
                .map(|(id, _)| *id)
        };
        let Some(branch) = branch else {
            let id = find("HEAD");
            return Ok(Wanted {
                id,
                peeled: id,
                name: symbolic,
            });
        };
        let name = format!("refs/heads/{branch}");
        if let Some(id) = find(&name) {
            return Ok(Wanted {
                id: Some(id),
                peeled: Some(id),
                name: Some(name),
            });
        }
        let tag = format!("refs/tags/{branch}");
        match find(&tag) {
            Some(id) => Ok(Wanted {
                id: Some(id),
                peeled: find(&format!("{tag}^{{}}")).or(Some(id)),
                name: None,
            }),
            None => Err(Error::NoBranch {
                url: self.url.clone(),
                branch: branch.to_owned(),
            }),
        }
    }

    /// `ls-refs` of version 2: the references with our prefixes, and where HEAD points.
    fn list(
        &self,
        capabilities: &[String],
        branch: Option<&str>,
    ) -> Result<(Vec<Reference>, Option<String>), Error> {
        let offers = |name: &str| {
            capabilities
                .iter()
                .find_map(|line| line.strip_prefix("ls-refs"))
                .is_some_and(|rest| {
                    rest.trim_start_matches('=')
                        .split(' ')
                        .any(|word| word == name)
                })
        };
        let mut body = Vec::new();
        pktline::write(&mut body, "command=ls-refs\n");
        self.write_own_capabilities(&mut body, capabilities);
        pktline::write_delimiter(&mut body);
        pktline::write(&mut body, "peel\n");
        pktline::write(&mut body, "symrefs\n");
        if offers("unborn") {
            pktline::write(&mut body, "unborn\n");
        }
        match branch {
            None => pktline::write(&mut body, "ref-prefix HEAD\n"),
            Some(branch) => {
                pktline::write(&mut body, &format!("ref-prefix refs/heads/{branch}\n"));
                pktline::write(&mut body, &format!("ref-prefix refs/tags/{branch}\n"));
            }
        }
        pktline::write_flush(&mut body);
        let mut packets = self.ask(&body, LISTING, true)?;
        let mut refs = Vec::new();
        let mut bytes = 0;
        let mut symbolic = None;
        while let Some(line) = self.text(&mut packets, LISTING)? {
            bytes += line.len();
            if refs.len() >= MAX_REFS || bytes > MAX_REF_BYTES {
                return Err(self.broken(LISTING, "it lists too many references"));
            }
            let mut words = line.split(' ');
            let id = words.next().unwrap_or_default();
            let name = words
                .next()
                .ok_or_else(|| self.broken(LISTING, "a reference has no name"))?;
            let attributes: Vec<&str> = words.collect();
            if name == "HEAD" {
                symbolic = attributes
                    .iter()
                    .find_map(|word| word.strip_prefix("symref-target:"))
                    .map(str::to_owned);
            }
            if id == "unborn" {
                continue;
            }
            refs.push((self.id(id, LISTING)?, name.to_owned()));
            if let Some(peeled) = attributes
                .iter()
                .find_map(|word| word.strip_prefix("peeled:"))
            {
                refs.push((self.id(peeled, LISTING)?, format!("{name}^{{}}")));
            }
        }
        self.drain(packets);
        Ok((refs, symbolic))
    }

    pub(super) fn write_own_capabilities(&self, body: &mut Vec<u8>, theirs: &[String]) {
        if theirs
            .iter()
            .any(|line| line == "agent" || line.starts_with("agent="))
        {
            let agent = concat!("agent=celeriac/", env!("CARGO_PKG_VERSION"), "\n");
            pktline::write(body, agent);
        }
        if theirs.iter().any(|line| line.starts_with("object-format=")) {
            pktline::write(body, "object-format=sha1\n");
        }
    }

    fn object_format(&self, capabilities: &[String]) -> Result<(), Error> {
        match capabilities
            .iter()
            .find_map(|line| line.strip_prefix("object-format="))
        {
            None | Some("sha1") => Ok(()),
            Some(format) => Err(Error::ObjectFormat {
                url: self.url.clone(),
                format: self.clean(format),
            }),
        }
    }

    pub(super) fn ask(&self, body: &[u8], doing: Doing, version_2: bool) -> Result<Frames, Error> {
        let mut headers = vec![
            ("Content-Type", "application/x-git-upload-pack-request"),
            ("Accept", "application/x-git-upload-pack-result"),
        ];
        if version_2 {
            headers.push(("Git-Protocol", "version=2"));
        }
        let response = self
            .client
            .post(&self.base, "git-upload-pack", &headers, body)
            .map_err(|error| from_http(&self.url, doing, error))?;
        if response.status != 200 {
            return Err(self.refused(&response));
        }
        if response.content_type != "application/x-git-upload-pack-result" {
            return Err(Error::NotGit {
                url: self.url.clone(),
                detail: format!("something else came back while {doing}"),
            });
        }
        Ok(Packets::new(BufReader::with_capacity(64 * 1024, response)))
    }

    fn refused(&self, response: &Response) -> Error {
        from_status(
            &self.url,
            response.status,
            response.retry_after,
            self.client.sends_token_to(&self.base),
        )
    }

    /// The next line as text, `None` at the end of a message or section. Error lines become errors.
    pub(super) fn text(&self, packets: &mut Frames, doing: Doing) -> Result<Option<String>, Error> {
        match packets.next() {
            Ok(Packet::Data(content)) => {
                let content = content.strip_suffix(b"\n").unwrap_or(content);
                let text = String::from_utf8_lossy(content);
                match text.strip_prefix("ERR ") {
                    Some(message) => Err(self.remote(message)),
                    None => Ok(Some(text.into_owned())),
                }
            }
            Ok(Packet::Flush | Packet::Delimiter | Packet::ResponseEnd) => Ok(None),
            Err(fault) => Err(self.fault(fault, doing)),
        }
    }

    /// What a broken stream of frames means.
    pub(super) fn fault(&self, fault: Fault, doing: Doing) -> Error {
        match fault {
            Fault::Io(source) => {
                let error = self.client.read_error(&source);
                from_http(&self.url, doing, error)
            }
            Fault::End => {
                let source = std::io::Error::new(
                    std::io::ErrorKind::UnexpectedEof,
                    "the answer ended before its end mark",
                );
                from_http(&self.url, doing, self.client.read_error(&source))
            }
            Fault::Length if doing == HANDSHAKE => Error::NotGit {
                url: self.url.clone(),
                detail: "the answer is not a list of branches".to_owned(),
            },
            Fault::Length => self.broken(doing, "its frames have no proper length"),
        }
    }

    /// What the server itself says is wrong.
    pub(super) fn remote(&self, message: &str) -> Error {
        Error::Remote {
            url: self.url.clone(),
            message: self.clean(message),
        }
    }

    /// A rule of the protocol that was broken.
    pub(super) fn broken(&self, doing: Doing, detail: &str) -> Error {
        Error::Protocol {
            url: self.url.clone(),
            doing,
            detail: detail.to_owned(),
        }
    }

    /// The repository as the user named it.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Printable, short, and without the token.
    fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.secrets {
            text = text.replace(secret.as_str(), "***");
        }
        let printable: String = text
            .trim()
            .chars()
            .map(|letter| if letter.is_control() { ' ' } else { letter })
            .take(300)
            .collect();
        printable
    }

    pub(super) fn id(&self, hex: &str, doing: Doing) -> Result<ObjectId, Error> {
        if hex.len() == 64 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(Error::ObjectFormat {
                url: self.url.clone(),
                format: "sha256".to_owned(),
            });
        }
        ObjectId::from_hex(hex.as_bytes())
            .ok()
            .filter(|id| !id.is_null())
            .ok_or_else(|| self.broken(doing, "an object id is no id"))
    }

    /// Reads what little may follow, so that the connection can be used again.
    fn drain(&self, packets: Frames) {
        let mut rest = packets.into_inner().take(4096);
        // A failure here only means that the next request opens a new connection.
        let _ = std::io::copy(&mut rest, &mut std::io::sink());
    }
}
