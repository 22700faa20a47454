//! What is done every now and then: signs of life, renewal of leases and bindings, and the
//! search for deliveries whose worker is gone.
//!
//! An owner that gave no sign for three seconds is dead; its deliveries go back newest first,
//! so that the oldest is delivered next. What Python peers have left is found by age, with
//! kombu's own sweep and lock. Both move a delivery only while its score is the one seen.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio::time::Instant;

use super::core::{Core, now};
use super::keys;
use super::reply::texts;
use super::unacked::{CHUNK, Wanted, micros};
use crate::transport::{Error, Tag};

/// How long an owner counts as alive after its last sign.
const ALIVE: Duration = Duration::from_secs(3);
/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// After an outage all workers come back one after the other; nobody is dead before this time.
pub(super) const GRACE: Duration = Duration::from_secs(4);
/// Time between the two looks that find an owner dead.
const SECOND_LOOK: Duration = Duration::from_millis(500);
/// Time between two comparisons of what is ours here and there: a command that was sent on a
/// connection given up since may have been executed long afterwards.
const AUDIT: Duration = Duration::from_secs(20);
/// How long a sweep may take; who holds its lock for longer has died in the middle of one, or lost
/// its connection. kombu's own lock would keep everybody from sweeping for five minutes.
const SWEEP: Duration = Duration::from_secs(10);
/// Time between two renewals of bindings.
const REBIND: Duration = Duration::from_secs(60);

/// Another worker that was found holding the lock of the sweep.
struct Sweeper {
    token: Vec<u8>,
    since: Instant,
}

impl Sweeper {
    fn new(token: Vec<u8>) -> Self {
        let since = Instant::now();
        Self { token, since }
    }
}

impl Core {
    /// Looks after leases, owners and bindings until the channel ends.
    pub(super) async fn keep_house(self: Arc<Self>) {
        if let Err(error) = self.keep_house_until_fault().await {
            self.fail_with(error);
        }
    }

    async fn keep_house_until_fault(&self) -> Result<(), Error> {
        let third = (self.options.visibility_timeout / 3).max(Duration::from_millis(100));
        let mut renewed = Instant::now();
        let mut rebound = Instant::now();
        let mut swept: Option<Instant> = None;
        let mut sweeper: Option<Sweeper> = None;
        let mut beaten: Option<Instant> = None;
        let mut seen: HashSet<String> = HashSet::new();
        let mut audited = Instant::now();
        let mut unknown = Vec::new();
        let pause = BEAT.min(third);
        loop {
            let (consuming, holding) = {
                let state = self.state();
                (!state.sources.is_empty(), !state.held.is_empty())
            };
            // Who has stopped consuming and still works on something is not dead.
            if (consuming || holding) && beaten.is_none_or(|at| at.elapsed() >= BEAT) {
                let lapsed = self.beat().await? && beaten.is_some();
                beaten = Some(Instant::now());
                if lapsed {
                    // We were silent for long enough to be taken for dead.
                    self.renew_all().await?;
                    renewed = Instant::now();
                }
                if consuming && Instant::now() >= self.settled_at {
                    seen = self.recover_dead(seen).await?;
                }
            } else if !consuming {
                // Proves that the connection lives.
                self.call("asking Redis for a sign of life", vec![redis::cmd("PING")])
                    .await?;
            }
            if renewed.elapsed() + pause / 2 >= third {
                renewed = Instant::now();
                self.renew_all().await?;
            }
            if consuming
                && swept.is_none_or(|at| at.elapsed() >= self.options.unacked_restore_interval)
            {
                swept = Some(Instant::now());
                self.tolerate(self.sweep(&mut sweeper).await)?;
            }
            if consuming && audited.elapsed() >= AUDIT {
                audited = Instant::now();
                let now_unknown = self.unknown().await?;
                // Seen twice, for a fetch or an acknowledgement may be on its way.
                let (lost, news) = now_unknown
                    .into_iter()
                    .partition(|one| unknown.contains(one));
                unknown = news;
                self.tolerate(self.hand_back_unknown(lost).await)?;
            }
            if rebound.elapsed() >= REBIND {
                rebound = Instant::now();
                self.tolerate(self.rebind().await)?;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// A refusal is logged and tried again next time; anything else ends the channel.
    fn tolerate(&self, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Err(Error::Refused { operation, reason }) => {
                log::warn!("{operation}: {reason}");
                Ok(())
            }
            other => other,
        }
    }

    /// Gives a sign of life. True when the last one had run out.
    pub(super) async fn beat(&self) -> Result<bool, Error> {
        let owner = &self.ledger.owner;
        let alive = self.keys.alive(owner);
        let expire = |key: &str| {
            let mut cmd = redis::cmd("EXPIRE");
            cmd.arg(key).arg(self.owned_ttl().as_secs());
            cmd
        };
        let mut exists = redis::cmd("EXISTS");
        exists.arg(&alive);
        let mut set = redis::cmd("SET");
        set.arg(&alive)
            .arg(&self.options.node)
            .arg("PX")
            .arg(ALIVE.as_millis() as u64);
        let mut add = redis::cmd("SADD");
        add.arg(&self.keys.owners).arg(owner);
        let commands = vec![
            exists,
            set,
            add,
            expire(&self.keys.owners),
            expire(&self.keys.owned(owner)),
        ];
        match self.call("giving a sign of life", commands).await {
            Ok(replies) => Ok(matches!(replies.first(), Some(Value::Int(0)))),
            Err(error) => self.tolerate(Err(error)).map(|()| false),
        }
    }

    /// Finds owners that have fallen silent and hands back their deliveries. An owner must be
    /// found silent twice, so that a pause of the server itself does not look like a death.
    async fn recover_dead(&self, before: HashSet<String>) -> Result<HashSet<String>, Error> {
        let silent = self.silent_owners().await?;
        if silent.is_empty() {
            return Ok(silent);
        }
        let confirmed = if silent.is_subset(&before) {
            silent
        } else {
            tokio::time::sleep(SECOND_LOOK).await;
            self.silent_owners()
                .await?
                .intersection(&silent)
                .cloned()
                .collect()
        };
        for owner in &confirmed {
            self.tolerate(self.recover(owner).await)?;
        }
        Ok(confirmed)
    }

    async fn silent_owners(&self) -> Result<HashSet<String>, Error> {
        let mut members = redis::cmd("SMEMBERS");
        members.arg(&self.keys.owners);
        let owners: Vec<String> = match self.call("looking for dead workers", vec![members]).await {
            Ok(mut replies) => replies.pop().map(texts).unwrap_or_default(),
            Err(error) => {
                self.tolerate(Err(error))?;
                return Ok(HashSet::new());
            }
        };
        let others: Vec<String> = owners
            .into_iter()
            .filter(|owner| *owner != self.ledger.owner)
            .collect();
        let looks = others
            .iter()
            .map(|owner| {
                let mut cmd = redis::cmd("EXISTS");
                cmd.arg(self.keys.alive(owner));
                cmd
            })
            .collect();
        let signs = self.call("looking for dead workers", looks).await?;
        Ok(others
            .into_iter()
            .zip(signs)
            .filter(|(_, sign)| matches!(sign, Value::Int(0)))
            .map(|(owner, _)| owner)
            .collect())
    }

    /// Hands back the deliveries of a dead owner.
    async fn recover(&self, owner: &str) -> Result<(), Error> {
        let operation = "recovering the messages of a dead worker";
        let mut lock = redis::cmd("SET");
        lock.arg(self.keys.recovering(owner))
            .arg(&self.ledger.owner)
            .arg("NX")
            .arg("PX")
            .arg(10_000);
        if !matches!(
            self.call(operation, vec![lock]).await?.pop(),
            Some(Value::Okay)
        ) {
            return Ok(());
        }
        let owned = self.keys.owned(owner);
        let mut fence = redis::cmd("SET");
        fence
            .arg(self.keys.fenced(owner))
            .arg(&self.ledger.owner)
            .arg("EX")
            .arg(self.owned_ttl().as_secs());
        let mut read = redis::cmd("HGETALL");
        read.arg(&owned);
        let replies = self.call(operation, vec![fence, read]).await?;
        let flat = replies.into_iter().nth(1).map(texts).unwrap_or_default();
        let mut left: Vec<(u64, &str, bool)> = flat
            .chunks_exact(2)
            .filter_map(|pair| {
                let score = pair[1].trim_end_matches('!');
                Some((
                    micros(score)?,
                    pair[0].as_str(),
                    score.len() < pair[1].len(),
                ))
            })
            .collect();
        left.sort_unstable_by_key(|(score, ..)| std::cmp::Reverse(*score));
        let mut moved = 0;
        for chunk in left.chunks(CHUNK) {
            let wanted = chunk
                .iter()
                .map(|(score, tag, died)| Wanted {
                    tag: Tag((*tag).into()),
                    score: keys::score(*score),
                    list: None,
                    died: *died,
                })
                .collect();
            moved += self.move_to_queues(wanted, &owned).await?;
        }
        let mut delete = redis::cmd("DEL");
        delete.arg(&owned).arg(self.keys.recovering(owner));
        let mut forget = redis::cmd("SREM");
        forget.arg(&self.keys.owners).arg(owner);
        self.call(operation, vec![delete, forget]).await?;
        log::warn!("worker {owner} is gone; {moved} of its messages went back to their queues");
        Ok(())
    }

    /// kombu's sweep: hands back what nobody has renewed for the visibility timeout. One worker at a
    /// time: kombu restores a tag that it read as old even if somebody has just fetched it again.
    async fn sweep(&self, other: &mut Option<Sweeper>) -> Result<(), Error> {
        if !self.options.ack_emulation {
            return Ok(());
        }
        let operation = "restoring old messages";
        let token = uuid::Uuid::new_v4().simple().to_string();
        let mut lock = redis::cmd("SET");
        lock.arg(&self.keys.mutex)
            .arg(&token)
            .arg("NX")
            .arg("PX")
            .arg(self.options.unacked_mutex_expire.min(SWEEP).as_millis() as u64);
        let mut look = redis::cmd("GET");
        look.arg(&self.keys.mutex);
        let holder = self.call(operation, vec![lock, look.clone()]).await?.pop();
        let Some(Value::BulkString(holder)) = holder else {
            return Ok(());
        };
        if holder != token.as_bytes() {
            let same = other.take().filter(|sweeper| sweeper.token == holder);
            let sweeper = other.insert(same.unwrap_or_else(|| Sweeper::new(holder)));
            if sweeper.since.elapsed() < SWEEP {
                return Ok(());
            }
            return self.restore_overdue().await;
        }
        *other = None;
        let swept = self.restore_overdue().await;
        if self.scripted {
            let mut unlock = self.scripts.unlock.call([&*self.keys.mutex].into_iter());
            unlock.arg(&token);
            self.call(operation, vec![unlock]).await?;
        } else {
            let holder = self.call(operation, vec![look]).await?.pop();
            if matches!(holder, Some(Value::BulkString(holder)) if holder == token.as_bytes()) {
                let mut unlock = redis::cmd("DEL");
                unlock.arg(&self.keys.mutex);
                self.call(operation, vec![unlock]).await?;
            }
        }
        swept
    }

    /// Safe beside another sweep: a delivery moves only while its score is the one that was read.
    async fn restore_overdue(&self) -> Result<(), Error> {
        let limit = now().saturating_sub(self.options.visibility_timeout.as_micros() as u64);
        let mut read = redis::cmd("ZREVRANGEBYSCORE");
        read.arg(&self.keys.index)
            .arg(keys::score(limit))
            .arg(0)
            .arg("WITHSCORES");
        if let Some(count) = self.options.unacked_restore_limit {
            read.arg("LIMIT").arg(0).arg(count);
        }
        let flat = self
            .call("restoring old messages", vec![read])
            .await?
            .pop()
            .map(texts);
        let flat = flat.unwrap_or_default();
        let owned = self.keys.owned(&self.ledger.owner);
        for chunk in flat.chunks(2 * CHUNK) {
            let wanted: Vec<Wanted> = {
                let state = self.state();
                chunk
                    .chunks_exact(2)
                    .map(|pair| (Tag(pair[0].as_str().into()), pair[1].clone()))
                    // Ours are renewed in time; a stall of this process is no reason to run
                    // them twice.
                    .filter(|(tag, _)| !state.held.contains_key(tag))
                    .map(|(tag, score)| Wanted {
                        tag,
                        score,
                        list: None,
                        died: false,
                    })
                    .collect()
            };
            let moved = self.move_to_queues(wanted, &owned).await?;
            if moved > 0 {
                log::info!("Restored {moved} messages that were unacknowledged for too long");
            }
        }
        Ok(())
    }

    /// Declares bindings anew, in case the server has evicted or lost them, and drops the
    /// tables that have expired.
    async fn rebind(&self) -> Result<(), Error> {
        let bindings = self.bindings().clone();
        let mut commands: Vec<Cmd> = bindings
            .iter()
            .flat_map(|binding| self.bind_commands(binding))
            .collect();
        if self.scripted && bindings.iter().any(|binding| binding.expires.is_some()) {
            let mut prune = self.scripts.prune.call([&*self.keys.deadlines].into_iter());
            prune
                .arg(self.keys.binding(""))
                .arg(self.keys.permanent(""))
                .arg(100);
            commands.push(prune);
        }
        self.call("declaring bindings", commands).await.map(drop)
    }

    /// Removes every trace of this process from the server.
    pub(super) async fn forget_owner(&self) -> Result<(), Error> {
        let owner = &self.ledger.owner;
        let mut delete = redis::cmd("DEL");
        delete
            .arg(self.keys.alive(owner))
            .arg(self.keys.owned(owner))
            .arg(self.keys.fenced(owner));
        let mut forget = redis::cmd("SREM");
        forget.arg(&self.keys.owners).arg(owner);
        self.call("closing", vec![delete, forget]).await.map(drop)
    }
}
