//! Asking for the pack: the last request of the conversation.
//!
//! Everything reachable from one commit, as deltas by offset, without progress texts; nothing is
//! negotiated. The answer is read up to the first byte of the pack.

use gix::ObjectId;

use super::conversation::{Conversation, Frames, Greeting};
use super::error::{Doing, Error};
use super::pktline;

/// Boundary commits of a shallow answer.
const MAX_SHALLOW: usize = 1_000_000;

const ASKING: Doing = "asking for the pack";

/// The answer to the request for a pack, read up to the pack's first byte.
pub(super) struct PackAnswer {
    /// Where history is cut, when a depth was asked for.
    pub(super) shallow: Vec<ObjectId>,
    /// The frames that carry the pack.
    pub(super) packets: Frames,
}

impl Conversation<'_> {
    /// Asks for everything reachable from `id`.
    pub(super) fn request_pack(
        &self,
        greeting: &Greeting,
        id: ObjectId,
        depth: Option<u32>,
    ) -> Result<PackAnswer, Error> {
        match greeting {
            Greeting::Version2(capabilities) => self.request_v2(capabilities, id, depth),
            Greeting::Version0 { capabilities, .. } => self.request_v0(capabilities, id, depth),
        }
    }

    fn request_v2(
        &self,
        capabilities: &[String],
        id: ObjectId,
        depth: Option<u32>,
    ) -> Result<PackAnswer, Error> {
        if !capabilities
            .iter()
            .any(|line| line == "fetch" || line.starts_with("fetch="))
        {
            return Err(self.broken(ASKING, "it offers no fetch"));
        }
        let mut body = Vec::new();
        pktline::write(&mut body, "command=fetch\n");
        self.write_own_capabilities(&mut body, capabilities);
        pktline::write_delimiter(&mut body);
        pktline::write(&mut body, "ofs-delta\n");
        pktline::write(&mut body, "no-progress\n");
        if let Some(depth) = depth {
            pktline::write(&mut body, &format!("deepen {depth}\n"));
        }
        pktline::write(&mut body, &format!("want {id}\n"));
        pktline::write(&mut body, "done\n");
        pktline::write_flush(&mut body);
        let mut packets = self.ask(&body, ASKING, true)?;
        let mut shallow = Vec::new();
        loop {
            match self.text(&mut packets, ASKING)?.as_deref() {
                Some("packfile") => return Ok(PackAnswer { shallow, packets }),
                Some("shallow-info") => self.shallow_section(&mut packets, &mut shallow)?,
                Some("acknowledgments") => while self.text(&mut packets, ASKING)?.is_some() {},
                Some("packfile-uris") => {
                    return Err(self.broken(ASKING, "it wants us to fetch from other addresses"));
                }
                Some(_) => return Err(self.broken(ASKING, "it sends a section nobody asked for")),
                None => return Err(self.broken(ASKING, "it sends no pack")),
            }
        }
    }

    fn request_v0(
        &self,
        capabilities: &[String],
        id: ObjectId,
        depth: Option<u32>,
    ) -> Result<PackAnswer, Error> {
        let offers = |name: &str| capabilities.iter().any(|word| word == name);
        if !offers("side-band-64k") {
            return Err(self.broken(ASKING, "it is too old: it cannot send side-band-64k"));
        }
        if depth.is_some() && !offers("shallow") {
            return Err(self.broken(ASKING, "it cannot send a shallow clone"));
        }
        let mut body = Vec::new();
        let mut line = format!("want {id} side-band-64k");
        for wanted in ["ofs-delta", "no-progress"] {
            if offers(wanted) {
                line.push(' ');
                line.push_str(wanted);
            }
        }
        line.push('\n');
        pktline::write(&mut body, &line);
        if let Some(depth) = depth {
            pktline::write(&mut body, &format!("deepen {depth}"));
        }
        pktline::write_flush(&mut body);
        pktline::write(&mut body, "done\n");
        let mut packets = self.ask(&body, ASKING, false)?;
        let mut shallow = Vec::new();
        if depth.is_some() {
            self.shallow_section(&mut packets, &mut shallow)?;
        }
        match self.text(&mut packets, ASKING)?.as_deref() {
            Some("NAK") => Ok(PackAnswer { shallow, packets }),
            _ => Err(self.broken(ASKING, "it sends no pack")),
        }
    }

    fn shallow_section(
        &self,
        packets: &mut Frames,
        shallow: &mut Vec<ObjectId>,
    ) -> Result<(), Error> {
        while let Some(line) = self.text(packets, ASKING)? {
            if shallow.len() == MAX_SHALLOW {
                return Err(self.broken(ASKING, "it cuts history at too many commits"));
            }
            match line.split_once(' ') {
                Some(("shallow", id)) => shallow.push(self.id(id, ASKING)?),
                Some(("unshallow", _)) => {}
                _ => return Err(self.broken(ASKING, "its list of shallow commits is broken")),
            }
        }
        Ok(())
    }
}
