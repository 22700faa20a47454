//! The steps that have to be one step, as Lua scripts.
//!
//! They keep to the keys and values Celery 5.7 uses, so that Python workers and this one may
//! count the same chord and store the same task.

/// A script, and the hash the server knows it by.
pub(super) struct Script {
    pub(super) text: &'static str,
    pub(super) hash: String,
}

/// All scripts.
pub(super) struct Scripts {
    pub(super) store: Script,
    pub(super) part: Script,
    pub(super) extend: Script,
    pub(super) done: Script,
}

impl Script {
    fn new(text: &'static str) -> Self {
        Self {
            text,
            hash: redis::Script::new(text).get_hash().to_owned(),
        }
    }
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            store: Script::new(STORE),
            part: Script::new(PART),
            extend: Script::new(EXTEND),
            done: Script::new(DONE),
        }
    }
}

/// Stores a document and wakes who waits, unless the stored one tells of a success.
///
/// The state stands at the beginning of every JSON document Celery or this worker wrote, so a
/// few bytes decide. Any other document (compressed, another serializer) is handed to the
/// caller, who reads it and, if it tells of no success, calls again naming it as known.
///
/// KEYS: task. ARGV: document, seconds to live or 0, known document or nothing.
/// Returns 1 when stored, 0 when there is a success, or the document to be looked at.
const STORE: &str = r#"
local function set(...)
  if ARGV[2] == '0' then
    return redis.call('SET', KEYS[1], ARGV[1], ...)
  end
  return redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2], ...)
end
-- Most tasks have nothing stored yet, and one call says so.
if not set('NX') then
  local head = redis.call('GETRANGE', KEYS[1], 0, 20)
  if string.find(head, '^{"status": ?"SUCCESS"') then
    -- The very same document: an earlier try arrived and its answer was lost.
    return redis.call('GET', KEYS[1]) == ARGV[1] and 1 or 0
  end
  if not string.find(head, '^{"status": ?"') then
    local there = redis.call('GET', KEYS[1])
    if there ~= ARGV[3] then
      return there
    end
  end
  set()
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"#;

/// Counts a part of a chord and claims its completion when it was the last.
///
/// KEYS: parts, extra size, size, counted, group, claim.
/// ARGV: task id, part, index, ordered (1 or 0), chord's seconds to live or 0, group's or 0,
/// claim's seconds, token.
/// Returns {-1} when the chord is finished, {0} to wait, {2} when another worker has claimed it,
/// else {1, saved group or false, parts}.
const PART: &str = r#"
local parts, extra, size, counted, group, claim = unpack(KEYS)
local id, part, index, ordered = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local owner = redis.call('GET', claim)
if owner == 'done' then
  return {-1}
end
if redis.call('SADD', counted, id .. ':' .. index) == 1 then
  if ordered then
    redis.call('ZADD', parts, index, part)
  else
    redis.call('RPUSH', parts, part)
  end
end
if ARGV[5] ~= '0' then
  for _, key in ipairs({parts, extra, size, counted}) do
    redis.call('EXPIRE', key, ARGV[5])
  end
  if ARGV[6] ~= '0' then
    redis.call('EXPIRE', group, ARGV[6])
  end
end
local expected = redis.call('GET', size)
if not expected then
  return {0}
end
local there = ordered and redis.call('ZCARD', parts) or redis.call('LLEN', parts)
if there ~= tonumber(expected) + tonumber(redis.call('GET', extra) or 0) then
  return {0}
end
-- A claim with our token is one whose answer was lost on the way.
if owner ~= ARGV[8] and not redis.call('SET', claim, ARGV[8], 'NX', 'EX', ARGV[7]) then
  return {2}
end
local all = ordered and redis.call('ZRANGE', parts, 0, -1) or redis.call('LRANGE', parts, 0, -1)
return {1, redis.call('GET', group), all}
"#;

/// Renews a claim that is still ours, or takes it again when it ran out and nobody has it.
///
/// KEYS: claim, size. ARGV: token, seconds. Returns 1 when it is ours.
const EXTEND: &str = r#"
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  return redis.call('EXPIRE', KEYS[1], ARGV[2])
end
if not owner and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
  return 1
end
return 0
"#;

/// Forgets a chord whose claim is ours, and remembers for a while that it is finished.
///
/// KEYS: claim, parts, extra size, size, counted. ARGV: token, seconds to remember.
const DONE: &str = r#"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('SET', KEYS[1], 'done', 'EX', ARGV[2])
return 1
"#;
