//! The Lua scripts, and what they are given and give back.
//!
//! Each does one step that must not be torn apart, so that a client that dies between two
//! bytes loses nothing. None re-encodes an envelope: Lua's JSON library damages long numbers
//! and empty arrays, so envelopes pass through as bytes and only their routing is looked at.
//! Where a server refuses scripts the callers use plain commands; they say what they give up.

use redis::Cmd;

/// A script and the hash the server knows it by.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    hash: String,
}

impl Script {
    fn new(source: &'static str) -> Self {
        Self {
            source,
            hash: redis::Script::new(source).get_hash().to_owned(),
        }
    }

    /// Starts a call with its keys; arguments follow.
    pub(super) fn call<'a>(&self, keys: impl ExactSizeIterator<Item = &'a str>) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(&self.hash).arg(keys.len());
        for key in keys {
            cmd.arg(key);
        }
        cmd
    }

    /// The command that makes the server know it.
    pub(super) fn load(&self) -> Cmd {
        let mut cmd = redis::cmd("SCRIPT");
        cmd.arg("LOAD").arg(self.source);
        cmd
    }
}

/// All scripts.
#[derive(Debug)]
pub(super) struct Scripts {
    /// Pops and records deliveries.
    pub(super) fetch: Script,
    /// Settles deliveries that are done.
    pub(super) ack: Script,
    /// Renews leases.
    pub(super) lease: Script,
    /// Moves deliveries back to lists.
    pub(super) give_back: Script,
    /// Routes a message over a direct exchange.
    pub(super) route: Script,
    /// Pushes to a list that expires.
    pub(super) push: Script,
    /// Registers a binding that expires.
    pub(super) bind: Script,
    /// Drops binding tables that have expired.
    pub(super) prune: Script,
    /// Deletes a lock if it is still ours.
    pub(super) unlock: Script,
    /// Gives a user's permit.
    pub(super) take_permit: Script,
    /// Renews permits.
    pub(super) renew_permits: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            fetch: Script::new(FETCH),
            ack: Script::new(ACK),
            lease: Script::new(LEASE),
            give_back: Script::new(GIVE_BACK),
            route: Script::new(ROUTE),
            push: Script::new(PUSH),
            bind: Script::new(BIND),
            prune: Script::new(PRUNE),
            unlock: Script::new(UNLOCK),
            take_permit: Script::new(super::permits::TAKE),
            renew_permits: Script::new(super::permits::RENEW),
        }
    }

    /// Every script.
    pub(super) fn all(&self) -> [&Script; 11] {
        [
            &self.fetch,
            &self.ack,
            &self.lease,
            &self.give_back,
            &self.route,
            &self.push,
            &self.bind,
            &self.prune,
            &self.unlock,
            &self.take_permit,
            &self.renew_permits,
        ]
    }
}

/// KEYS: unacked, index, owned, quarantine, then the lists: for each step all queues in order.
/// ARGV: how many, number of queues, 1 to rotate queues, time in microseconds, stem of tags for
/// messages without one, 1 to record, cap of the quarantine, then the queues' names.
/// Returns list number, tag, envelope for each delivery; an empty tag means that the element
/// went to quarantine and the third value says why.
///
/// Reads, records, and removes last: an error in between (out of memory, a key of the wrong
/// type) leaves the messages where they are.
const FETCH: &str = r#"
local want, queues, rotate = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local now, stem = tonumber(ARGV[4]), ARGV[5]
local record, cap = ARGV[6] == '1', tonumber(ARGV[7])
local lists = #KEYS - 4
local left, total = {}, 0
for i = 1, lists do
  left[i] = redis.call('LLEN', KEYS[4 + i])
  total = total + left[i]
end
if total == 0 then return {} end

local order, picks, taken = {}, {}, {}
for q = 1, queues do order[q] = q end
local function pick()
  for step = 0, lists / queues - 1 do
    for place = 1, queues do
      local q = order[place]
      local i = step * queues + q
      if left[i] > 0 then
        left[i] = left[i] - 1
        taken[i] = (taken[i] or 0) + 1
        picks[#picks + 1] = i
        if rotate and queues > 1 then
          table.remove(order, place)
          order[queues] = q
        end
        return
      end
    end
  end
end
if total < want then want = total end
for _ = 1, want do pick() end

local elements = {}
for i, count in pairs(taken) do
  elements[i] = redis.call('LRANGE', KEYS[4 + i], -count, -1)
end

-- Searched without the quote before it: a search tries every place with the first letter, and
-- quotes are everywhere.
local function once(raw, key)
  local start, stop = string.find(raw, key, 1, true)
  if stop and string.byte(raw, start - 1) == 34 and not string.find(raw, key, stop + 1, true) then
    return stop + 1
  end
end
local function identify(raw, queue)
  local at = once(raw, 'delivery_tag"')
  local tag = at and string.match(raw, '^%s*:%s*"([^"\\%c]+)"', at)
  at = tag and once(raw, 'delivery_info"')
  local info = at and string.match(raw, '^%s*:%s*{([^{}\\]*)}', at)
  if info then
    local exchange = string.match(info, '"exchange"%s*:%s*("[^"]*")')
    local key = string.match(info, '"routing_key"%s*:%s*("[^"]*")')
    if exchange and key then return tag, exchange, key end
  end
  local ok, message = pcall(cjson.decode, raw)
  if not ok then return nil, 'not JSON' end
  if type(message) ~= 'table' or not string.find(raw, '^%s*{') then return nil, 'not a JSON object' end
  local properties = type(message.properties) == 'table' and message.properties or {}
  info = type(properties.delivery_info) == 'table' and properties.delivery_info or {}
  tag = type(properties.delivery_tag) == 'string' and properties.delivery_tag or ''
  local exchange = type(info.exchange) == 'string' and info.exchange or ''
  local key = type(info.routing_key) == 'string' and info.routing_key or queue
  return tag, cjson.encode(exchange), cjson.encode(key)
end

local reply, scores, records, owners, seen = {}, {}, {}, {}, {}
local cursor = {}
for i, count in pairs(taken) do cursor[i] = count end
for n, i in ipairs(picks) do
  local raw = elements[i][cursor[i]]
  cursor[i] = cursor[i] - 1
  local queue = ARGV[7 + (i - 1) % queues + 1]
  local tag, exchange, key = identify(raw, queue)
  if tag then
    -- Only what is the same as bytes and as text can be named again.
    if tag == '' or string.find(tag, '[%c\128-\255]') or seen[tag] or (record and redis.call('HEXISTS', KEYS[1], tag) == 1) then
      tag = stem .. '-' .. n
    end
    seen[tag] = true
    local score = string.format('%.6f', (now + n - 1) / 1000000)
    scores[#scores + 1] = score
    scores[#scores + 1] = tag
    records[#records + 1] = tag
    records[#records + 1] = '[' .. raw .. ', ' .. exchange .. ', ' .. key .. ']'
    owners[#owners + 1] = tag
    owners[#owners + 1] = score
    reply[#reply + 1] = i
    reply[#reply + 1] = tag
    reply[#reply + 1] = raw
  else
    local entry = { reason = exchange, queue = queue, time = now / 1000000 }
    if string.find(raw, '[\128-\255]') then
      entry.message_hex = string.gsub(raw, '.', function(c) return string.format('%02x', string.byte(c)) end)
    else
      entry.message = raw
    end
    redis.call('LPUSH', KEYS[4], cjson.encode(entry))
    redis.call('LTRIM', KEYS[4], 0, cap - 1)
    reply[#reply + 1] = i
    reply[#reply + 1] = ''
    reply[#reply + 1] = exchange
  end
end
if record and #scores > 0 then
  redis.call('ZADD', KEYS[2], unpack(scores))
  redis.call('HSET', KEYS[1], unpack(records))
  redis.call('HSET', KEYS[3], unpack(owners))
end
for i, count in pairs(taken) do
  redis.call('LTRIM', KEYS[4 + i], 0, -(count + 1))
end
return reply
"#;

/// KEYS: unacked, index, owned. ARGV: tag, score, tag, score, …
/// Removes what is still held with that score; returns the tags that are somebody else's.
const ACK: &str = r#"
local mine, all, gone = {}, {}, {}
for i = 1, #ARGV, 2 do
  local score = redis.call('ZSCORE', KEYS[2], ARGV[i])
  all[#all + 1] = ARGV[i]
  if not score or tonumber(score) == tonumber(ARGV[i + 1]) then
    mine[#mine + 1] = ARGV[i]
  else
    gone[#gone + 1] = ARGV[i]
  end
end
if #mine > 0 then
  redis.call('ZREM', KEYS[2], unpack(mine))
  redis.call('HDEL', KEYS[1], unpack(mine))
end
redis.call('HDEL', KEYS[3], unpack(all))
return gone
"#;

/// KEYS: index, owned, fenced. ARGV: seconds the owner's hash lives, then for each: tag, score,
/// new score, new value in the owner's hash.
/// Renews what is still held with that score; returns the tags that are lost. When the owner's
/// hash is gone and nobody took it away, the server has lost its data: everything is claimed
/// anew, for nobody else can have it.
const LEASE: &str = r#"
local lost, renewed, owners = {}, {}, {}
local wiped = redis.call('EXISTS', KEYS[2]) == 0 and redis.call('EXISTS', KEYS[3]) == 0
for i = 2, #ARGV, 4 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if (score and tonumber(score) == tonumber(ARGV[i + 1])) or (wiped and not score) then
    renewed[#renewed + 1] = ARGV[i + 2]
    renewed[#renewed + 1] = ARGV[i]
    owners[#owners + 1] = ARGV[i]
    owners[#owners + 1] = ARGV[i + 3]
  else
    lost[#lost + 1] = ARGV[i]
  end
end
-- A first write that needs no memory lets the others pass on a server that has none left.
redis.call('EXPIRE', KEYS[2], ARGV[1])
if #renewed > 0 then
  redis.call('ZADD', KEYS[1], unpack(renewed))
  redis.call('HSET', KEYS[2], unpack(owners))
  redis.call('EXPIRE', KEYS[2], ARGV[1])
end
if #lost > 0 then redis.call('HDEL', KEYS[2], unpack(lost)) end
return lost
"#;

/// KEYS: unacked, index, owned. ARGV: RPUSH or LPUSH, then for each: tag, score, value expected
/// in the hash, value to push, list.
/// Moves what has not changed since it was read; returns how many moved.
const GIVE_BACK: &str = r#"
local moved = 0
for i = 2, #ARGV, 5 do
  local tag = ARGV[i]
  local score = redis.call('ZSCORE', KEYS[2], tag)
  if not score or tonumber(score) == tonumber(ARGV[i + 1]) then
    local value = redis.call('HGET', KEYS[1], tag)
    if value == ARGV[i + 2] then
      redis.call(ARGV[1], ARGV[i + 4], ARGV[i + 3])
      redis.call('HDEL', KEYS[1], tag)
      redis.call('ZREM', KEYS[2], tag)
      moved = moved + 1
    elseif not value then
      redis.call('ZREM', KEYS[2], tag)
    end
  end
  redis.call('HDEL', KEYS[3], tag)
end
return moved
"#;

/// KEYS: binding table. ARGV: routing key, separator, prefix and suffix of the lists, envelope,
/// milliseconds the lists live or 0. Returns the number of queues reached.
const ROUTE: &str = r#"
local reached = 0
for _, member in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local first, last = string.find(member, ARGV[2], 1, true)
  if first and string.sub(member, 1, first - 1) == ARGV[1] then
    local _, stop = string.find(member, ARGV[2], last + 1, true)
    if stop then
      local list = ARGV[3] .. string.sub(member, stop + 1) .. ARGV[4]
      redis.call('LPUSH', list, ARGV[5])
      if ARGV[6] ~= '0' then redis.call('PEXPIRE', list, ARGV[6]) end
      reached = reached + 1
    end
  end
end
return reached
"#;

/// KEYS: list. ARGV: envelope, milliseconds the list lives.
const PUSH: &str = r#"
local length = redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return length
"#;

/// KEYS: binding table, deadlines. ARGV: member, exchange, milliseconds.
const BIND: &str = r#"
local time = redis.call('TIME')
local due = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3])
redis.call('SADD', KEYS[1], ARGV[1])
local known = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not known or tonumber(known) < due then
  redis.call('ZADD', KEYS[2], string.format('%.0f', due), ARGV[2])
end
return 1
"#;

/// KEYS: deadlines. ARGV: prefix of binding tables, prefix of permanent ones, how many at most.
const PRUNE: &str = r#"
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[3])
for _, exchange in ipairs(due) do
  if redis.call('EXISTS', ARGV[2] .. exchange) == 0 then redis.call('DEL', ARGV[1] .. exchange) end
  redis.call('ZREM', KEYS[1], exchange)
end
return #due
"#;

/// KEYS: lock. ARGV: token.
const UNLOCK: &str = r#"
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"#;
