//! Leases: renewing them, proving them, and taking them over from a channel that broke.
//!
//! A renewal changes the table of what is held at the moment it is queued, so an acknowledgement
//! that is queued later carries the score that the server has by then.

use std::collections::HashSet;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio::sync::oneshot;

use super::core::{Arrival, Core, Held, Op, State, now};
use super::keys;
use super::reply::texts;
use crate::transport::{Error, Incoming, Tag};

/// Leases renewed in one script call.
const LEASES: usize = 1000;

/// A renewal that is on its way: the tags, and where the replies arrive.
type Renewal = (
    Vec<(Tag, Held, Held)>,
    oneshot::Receiver<Result<Vec<Value>, Error>>,
);

impl Core {
    /// How long the list of our tags outlives us.
    pub(super) fn owned_ttl(&self) -> Duration {
        (self.options.visibility_timeout * 2).max(Duration::from_secs(3600))
    }

    /// The commands that renew leases: old ones and what they become.
    fn renewal(&self, held: &[(Tag, Held, Held)]) -> Vec<Cmd> {
        let owner = &self.ledger.owner;
        if self.scripted {
            let (owned, fenced) = (self.keys.owned(owner), self.keys.fenced(owner));
            let mut cmd = self
                .scripts
                .lease
                .call([&*self.keys.index, &owned, &fenced].into_iter());
            cmd.arg(self.owned_ttl().as_secs());
            for (tag, before, after) in held {
                cmd.arg(&*tag.0)
                    .arg(keys::score(before.score))
                    .arg(keys::score(after.score))
                    .arg(after.owned_value());
            }
            return vec![cmd];
        }
        // Without scripts only the disappearance of a lease is noticed, not a new holder.
        let mut renew = redis::cmd("ZADD");
        renew.arg(&self.keys.index).arg("XX");
        for (tag, _, after) in held {
            renew.arg(keys::score(after.score)).arg(&*tag.0);
        }
        let mut commands = vec![renew];
        for (tag, ..) in held {
            let mut cmd = redis::cmd("ZSCORE");
            cmd.arg(&self.keys.index).arg(&*tag.0);
            commands.push(cmd);
        }
        commands
    }

    /// Queues the renewal of the given leases and notes the new scores in the table. What is
    /// acknowledged later is executed later, with the new score.
    fn queue_renewal(&self, state: &mut State, mut held: Vec<(Tag, Held)>) -> Vec<Renewal> {
        held.sort_by_key(|(_, held)| held.sequence);
        let mut score = now();
        let mut renewals = Vec::new();
        for chunk in held.chunks(LEASES) {
            let mut renewing = Vec::with_capacity(chunk.len());
            for (tag, before) in chunk {
                let after = Held {
                    score,
                    ..before.clone()
                };
                score += 1;
                state.held.insert(tag.clone(), after.clone());
                renewing.push((tag.clone(), before.clone(), after));
            }
            let (done, replies) = oneshot::channel();
            state.ops.push(Op::Call(self.renewal(&renewing), done));
            renewals.push((renewing, replies));
        }
        renewals
    }

    /// Waits for a renewal; the tags that are lost.
    async fn finish_renewal(&self, renewal: Renewal) -> Result<HashSet<Tag>, Error> {
        let (held, replies) = renewal;
        let replies = self.replies("renewing leases", replies).await?;
        if self.scripted {
            let tags = replies.into_iter().next().map(texts).unwrap_or_default();
            return Ok(tags.into_iter().map(|tag| Tag(tag.into())).collect());
        }
        let gone = held.into_iter().zip(replies.into_iter().skip(1));
        Ok(gone
            .filter(|(_, reply)| matches!(reply, Value::Nil))
            .map(|((tag, ..), _)| tag)
            .collect())
    }

    /// Renews everything held and reports what is lost.
    pub(super) async fn renew_all(&self) -> Result<(), Error> {
        let renewals = {
            let mut state = self.state();
            if state.held.is_empty() || state.fault.is_some() {
                return Ok(());
            }
            let held = state
                .held
                .iter()
                .map(|(tag, held)| (tag.clone(), held.clone()))
                .collect();
            self.queue_renewal(&mut state, held)
        };
        self.work.notify_one();
        for renewal in renewals {
            let held = renewal.0.clone();
            let lost = match self.finish_renewal(renewal).await {
                Ok(lost) => lost,
                Err(Error::Refused { operation, reason }) => {
                    log::warn!("{operation}: {reason}");
                    let mut state = self.state();
                    for (tag, before, after) in held {
                        if let Some(entry) = state.held.get_mut(&tag)
                            && entry.score == after.score
                        {
                            entry.score = before.score;
                        }
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if lost.is_empty() {
                continue;
            }
            let mut state = self.state();
            for tag in lost {
                // Settled in the meantime: nothing to report.
                if state.held.remove(&tag).is_none() {
                    continue;
                }
                log::warn!(
                    "the lease of delivery {} was lost: somebody else may have it",
                    tag.0
                );
                let waiting = state.inbound.len();
                state.inbound.retain(
                    |arrival| !matches!(arrival, Arrival::Raw { tag: waiting, .. } if *waiting == tag),
                );
                // Nobody needs to know of what was never handed out.
                if state.inbound.len() == waiting {
                    state.inbound.push_back(Arrival::Event(Incoming::Lost(tag)));
                }
            }
            drop(state);
            self.arrived.notify_one();
            self.work.notify_one();
        }
        Ok(())
    }

    /// Takes over what earlier channels of this transport held and had not sent, and proves what
    /// this one holds. What they held and nobody asks for goes back to its queue.
    pub(super) async fn adopt(&self, wanted: &[Tag]) -> Result<Vec<Tag>, Error> {
        if !wanted.is_empty() {
            // Others must not take us for dead before the first round of the house.
            self.count_consumer();
            self.beat().await?;
        }
        let (renewals, abandoned) = {
            let mut state = self.state();
            if let Some(fault) = &state.fault {
                return Err(fault.error());
            }
            let mut left = self.ledger.left();
            // First of all what the earlier channel could not say any more.
            for (tag, held, settlement) in left.unsent.drain(..) {
                state.ops.push(Op::Settle(tag, held, settlement));
            }
            let mut proving = Vec::new();
            for tag in wanted {
                let held = match state.held.get(tag) {
                    Some(held) => Some(held.clone()),
                    None => left.orphans.remove(tag),
                };
                let Some(held) = held else { continue };
                proving.push((tag.clone(), held));
            }
            let abandoned: Vec<(Tag, Held)> = left.orphans.drain().collect();
            drop(left);
            (self.queue_renewal(&mut state, proving), abandoned)
        };
        self.work.notify_one();
        let mut proven = Vec::new();
        for renewal in renewals {
            let held = renewal.0.clone();
            let lost = self.finish_renewal(renewal).await?;
            let mut state = self.state();
            for (tag, ..) in held {
                if lost.contains(&tag) {
                    state.held.remove(&tag);
                } else {
                    proven.push(tag);
                }
            }
        }
        self.hand_back(abandoned).await?;
        let unknown = self.unknown().await?;
        self.hand_back_unknown(unknown).await?;
        Ok(proven)
    }

    /// Asks for one lease by renewing it.
    pub(super) async fn prove(&self, tag: &Tag) -> Result<bool, Error> {
        let renewals = {
            let mut state = self.state();
            if let Some(fault) = &state.fault {
                return Err(fault.error());
            }
            let Some(held) = state.held.get(tag).cloned() else {
                // Left by an earlier channel: nobody has said yet that it is lost.
                return Ok(self.ledger.left().orphans.contains_key(tag));
            };
            self.queue_renewal(&mut state, vec![(tag.clone(), held)])
        };
        self.work.notify_one();
        let mut ours = true;
        for renewal in renewals {
            if self.finish_renewal(renewal).await?.contains(tag) {
                self.state().held.remove(tag);
                ours = false;
            }
        }
        Ok(ours)
    }
}
