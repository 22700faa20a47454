//! Permits in Redis: two sorted sets for each user, one for each repository, changed by scripts
//! only, so that no two workers can both take the last one. The server's clock is the only one that counts.
//!
//! | key | member → score |
//! | --- | --- |
//! | `celeriac.running.<user>` | permit → when it ends unless it is renewed |
//! | `celeriac.started.<user>` | task id → when it started |
//! | `celeriac.analysing.<digest>` | the same for a repository, of which one analysis may run |
//!
//! All end by themselves.

use redis::{Cmd, Value};

use super::core::Core;
use super::keys::Keys;
use crate::protocol::permit::{Answer, Ask, LEASE, Scope};
use crate::transport::Error;

/// KEYS: running, started. ARGV: permit, task, most that run, milliseconds of a lease, most that
/// start, milliseconds of their window. Returns 0, or 1 and how many run, or 2 and after how many
/// milliseconds the next may start.
pub(super) const TAKE: &str = r#"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local most, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local starts, window = tonumber(ARGV[5]), tonumber(ARGV[6])
local function number(value) return string.format('%.0f', value) end
if most > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', number(now))
  local running = redis.call('ZCARD', KEYS[1])
  if running >= most and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return {1, running} end
end
if starts > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', number(now - window))
  if not redis.call('ZSCORE', KEYS[2], ARGV[2]) then
    if redis.call('ZCARD', KEYS[2]) >= starts then
      local first = redis.call('ZRANGE', KEYS[2], -starts, -starts, 'WITHSCORES')
      return {2, tonumber(first[2]) + window - now}
    end
    redis.call('ZADD', KEYS[2], number(now), ARGV[2])
    redis.call('PEXPIRE', KEYS[2], number(window))
  end
end
if most > 0 then
  redis.call('ZADD', KEYS[1], number(now + lease), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], number(lease))
end
return {0, 0}
"#;

/// KEYS: the running set of each permit's scope. ARGV: milliseconds of a lease, then the permits
/// in the same order. One that has ended meanwhile is entered again: its task does run.
pub(super) const RENEW: &str = r#"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 1, #KEYS do
  redis.call('ZADD', KEYS[i], string.format('%.0f', now + ARGV[1]), ARGV[i + 1])
  redis.call('PEXPIRE', KEYS[i], ARGV[1])
end
return #KEYS
"#;

/// Permits renewed by one call: a script's arguments are copied to its stack.
const AT_ONCE: usize = 500;

fn running(keys: &Keys, scope: &Scope) -> String {
    let prefix = keys.prefix();
    match scope {
        Scope::User(user) => format!("{prefix}celeriac.running.{user}"),
        Scope::Repository(digest) => format!("{prefix}celeriac.analysing.{digest}"),
    }
}

fn started(keys: &Keys, scope: &Scope) -> String {
    let (Scope::User(name) | Scope::Repository(name)) = scope;
    format!("{}celeriac.started.{name}", keys.prefix())
}

pub(super) async fn take(core: &Core, ask: &Ask<'_>) -> Result<Answer, Error> {
    if !core.scripted {
        return Ok(Answer::Unable);
    }
    let running = running(&core.keys, ask.scope);
    let started = started(&core.keys, ask.scope);
    let mut cmd = core
        .scripts
        .take_permit
        .call([running.as_str(), started.as_str()].into_iter());
    cmd.arg(ask.holder)
        .arg(ask.task)
        .arg(ask.allowance.running)
        .arg(milliseconds(LEASE))
        .arg(ask.allowance.starts)
        .arg(milliseconds(ask.allowance.window));
    let replies = core.call("counting what runs", vec![cmd]).await?;
    Ok(match replies.first() {
        Some(Value::Array(items)) => match items[..] {
            [Value::Int(0), _] => Answer::Granted,
            [Value::Int(1), Value::Int(running)] => Answer::TooMany(running.unsigned_abs()),
            [Value::Int(2), Value::Int(after)] => {
                let after = u64::try_from(after).unwrap_or(1).max(1);
                Answer::TooSoon(std::time::Duration::from_millis(after))
            }
            _ => Answer::Unable,
        },
        _ => Answer::Unable,
    })
}

pub(super) async fn renew(core: &Core, held: &[(Scope, String)]) -> Result<(), Error> {
    if !core.scripted {
        return Ok(());
    }
    for some in held.chunks(AT_ONCE) {
        let keys: Vec<String> = some
            .iter()
            .map(|(scope, _)| running(&core.keys, scope))
            .collect();
        let mut cmd = core
            .scripts
            .renew_permits
            .call(keys.iter().map(String::as_str));
        cmd.arg(milliseconds(LEASE));
        for (_, holder) in some {
            cmd.arg(holder);
        }
        core.call("renewing permits", vec![cmd]).await?;
    }
    Ok(())
}

/// The command that gives a permit back.
pub(super) fn release(core: &Core, scope: &Scope, holder: &str) -> Cmd {
    let mut cmd = redis::cmd("ZREM");
    cmd.arg(running(&core.keys, scope)).arg(holder);
    cmd
}

fn milliseconds(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
