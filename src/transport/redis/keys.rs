//! Names of every key, set member and channel; see the table in the directory's page.
//!
//! kombu's own names are exact, byte for byte. Ours begin with `celeriac.` and are unknown to
//! Python peers. `global_keyprefix` stands in front of every name, kombu's and ours.

use std::fmt::Write as _;

use super::options::Options;

/// Builds names for one broker database.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
    sep: String,
    steps: Vec<u8>,
    fanout_prefix: String,
    fanout_patterns: bool,
    /// Hash: tag to `[envelope, exchange, routing key]`.
    pub(super) unacked: String,
    /// Sorted set: tag to time of delivery.
    pub(super) index: String,
    /// Lock of the sweep.
    pub(super) mutex: String,
    /// Sorted set: exchange to the time its binding table may be dropped.
    pub(super) deadlines: String,
    /// Set of the owners that consume, ours.
    pub(super) owners: String,
    /// List of messages nobody could process, ours.
    pub(super) quarantine: String,
    /// Sorted set: revoked task id to the time it was revoked, ours.
    pub(super) revoked: String,
}

impl Keys {
    pub(super) fn new(options: &Options, database: i64) -> Self {
        let prefix = &options.global_keyprefix;
        Self {
            sep: options.sep.clone(),
            steps: options.priority_steps.clone(),
            fanout_prefix: options.fanout_prefix.replace("{db}", &database.to_string()),
            fanout_patterns: options.fanout_patterns,
            unacked: format!("{prefix}{}", options.unacked_key),
            index: format!("{prefix}{}", options.unacked_index_key),
            mutex: format!("{prefix}{}", options.unacked_mutex_key),
            deadlines: format!("{prefix}_kombu.binding_deadlines"),
            owners: format!("{prefix}celeriac.owners"),
            quarantine: format!("{prefix}celeriac.quarantine"),
            revoked: format!("{prefix}celeriac.revoked"),
            prefix: prefix.clone(),
        }
    }

    /// The same names with channels as kombu before 5.4 made them behind sentinels: it forgot
    /// to put in the number of the database.
    pub(super) fn with_literal_database(&self, options: &Options) -> Self {
        Self {
            fanout_prefix: options.fanout_prefix.clone(),
            ..self.clone()
        }
    }

    /// What is put in front of every name.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The separator of lists and bindings.
    pub(super) fn sep(&self) -> &str {
        &self.sep
    }

    /// What follows a queue's name in the list of a priority.
    pub(super) fn suffix(&self, priority: u8) -> String {
        let priority = priority.min(9);
        match self.steps.iter().rev().find(|step| **step <= priority) {
            Some(0) | None => String::new(),
            Some(step) => format!("{}{step}", self.sep),
        }
    }

    /// The list a message of this priority waits in.
    pub(super) fn list(&self, queue: &str, priority: u8) -> String {
        format!("{}{queue}{}", self.prefix, self.suffix(priority))
    }

    /// All lists of a queue, first priority first.
    pub(super) fn lists(&self, queue: &str) -> Vec<String> {
        self.steps
            .iter()
            .map(|step| self.list(queue, *step))
            .collect()
    }

    /// Table of an exchange's bindings.
    pub(super) fn binding(&self, exchange: &str) -> String {
        format!("{}_kombu.binding.{exchange}", self.prefix)
    }

    /// The bindings among them that never expire.
    pub(super) fn permanent(&self, exchange: &str) -> String {
        format!("{}_kombu.binding_permanent.{exchange}", self.prefix)
    }

    /// One member of a binding table.
    pub(super) fn member(&self, routing_key: &str, pattern: &str, queue: &str) -> String {
        format!("{routing_key}{sep}{pattern}{sep}{queue}", sep = self.sep)
    }

    /// Routing key, pattern and queue of a member.
    pub(super) fn parse_member<'a>(&self, member: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        let (routing_key, rest) = member.split_once(self.sep.as_str())?;
        let (pattern, queue) = rest.split_once(self.sep.as_str())?;
        Some((routing_key, pattern, queue))
    }

    /// The channel of a fan-out message.
    pub(super) fn channel(&self, exchange: &str, routing_key: &str) -> String {
        let mut channel = format!("{}{}{exchange}", self.prefix, self.fanout_prefix);
        if self.fanout_patterns && !routing_key.is_empty() {
            channel.push('/');
            channel.push_str(routing_key);
        }
        channel
    }

    /// The pattern that subscribes to a binding key.
    pub(super) fn subscription(&self, exchange: &str, binding_key: &str) -> String {
        self.channel(exchange, &binding_key.replace('#', "*"))
    }

    /// The exchange and the routing key of a channel.
    pub(super) fn parse_channel<'a>(&self, channel: &'a str) -> (&'a str, &'a str) {
        let channel = channel
            .strip_prefix(self.prefix.as_str())
            .unwrap_or(channel);
        let channel = match channel
            .strip_prefix('/')
            .and_then(|rest| rest.split_once('.'))
        {
            Some((_, rest)) => rest,
            None => channel,
        };
        channel.split_once('/').unwrap_or((channel, ""))
    }

    /// Lives as long as its owner says so every second.
    pub(super) fn alive(&self, owner: &str) -> String {
        format!("{}celeriac.alive.{owner}", self.prefix)
    }

    /// Sorted set of the tags an owner holds, in order of delivery.
    pub(super) fn owned(&self, owner: &str) -> String {
        format!("{}celeriac.owned.{owner}", self.prefix)
    }

    /// Left behind by whoever took an owner's deliveries away.
    pub(super) fn fenced(&self, owner: &str) -> String {
        format!("{}celeriac.fenced.{owner}", self.prefix)
    }

    /// Lock of a recovery.
    pub(super) fn recovering(&self, owner: &str) -> String {
        format!("{}celeriac.recovering.{owner}", self.prefix)
    }
}

/// The regular expression kombu stores for the binding key of a topic exchange.
pub(super) fn topic_pattern(binding_key: &str) -> String {
    let mut pattern = String::from("^");
    for (at, word) in binding_key.split('.').enumerate() {
        if at > 0 {
            pattern.push_str("\\.");
        }
        match word {
            "*" => pattern.push_str("[^\\.]+"),
            "#" => pattern.push_str(".*?"),
            _ => {
                for c in word.chars() {
                    // What Python's re.escape escapes.
                    if "()[]{}?*+-|^$\\.&~# \t\n\r\u{b}\u{c}".contains(c) {
                        pattern.push('\\');
                    }
                    pattern.push(c);
                }
            }
        }
    }
    pattern.push('$');
    pattern
}

/// A point in time as kombu writes scores: seconds with six decimals.
pub(super) fn score(micros: u64) -> String {
    let mut text = String::with_capacity(20);
    // Writing to a String cannot fail.
    let _ = write!(text, "{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::new(&Options::default(), 0)
    }

    #[test]
    fn priorities_go_to_the_lists_of_kombu() {
        let keys = keys();
        assert_eq!(keys.list("celery", 0), "celery");
        assert_eq!(keys.list("celery", 2), "celery");
        assert_eq!(keys.list("celery", 3), "celery\u{6}\u{16}3");
        assert_eq!(keys.list("celery", 8), "celery\u{6}\u{16}6");
        assert_eq!(keys.list("celery", 200), "celery\u{6}\u{16}9");
        assert_eq!(keys.lists("q").len(), 4);
    }

    #[test]
    fn channels_follow_the_rules_of_fan_out() {
        let keys = keys();
        assert_eq!(keys.channel("celery.pidbox", ""), "/0.celery.pidbox");
        assert_eq!(
            keys.subscription("celeryev", "worker.#"),
            "/0.celeryev/worker.*"
        );
        assert_eq!(
            keys.parse_channel("/0.celeryev/task.multi"),
            ("celeryev", "task.multi")
        );
        assert_eq!(
            keys.parse_channel("/0.celery.pidbox"),
            ("celery.pidbox", "")
        );
        let options = Options {
            global_keyprefix: "pfx:".into(),
            fanout_prefix: String::new(),
            fanout_patterns: false,
            ..Options::default()
        };
        let keys = Keys::new(&options, 5);
        assert_eq!(keys.channel("celeryev", "x"), "pfx:celeryev");
        assert_eq!(keys.unacked, "pfx:unacked");
        assert_eq!(keys.binding("celery"), "pfx:_kombu.binding.celery");
    }

    #[test]
    fn binding_members_have_three_fields() {
        let keys = keys();
        assert_eq!(
            keys.member("celery", "", "celery"),
            "celery\u{6}\u{16}\u{6}\u{16}celery"
        );
        assert_eq!(
            keys.parse_member("a\u{6}\u{16}\u{6}\u{16}q"),
            Some(("a", "", "q"))
        );
        assert_eq!(keys.parse_member("nonsense"), None);
    }

    #[test]
    fn topic_patterns_are_those_of_kombu() {
        assert_eq!(topic_pattern("a.*.b-c.#"), r"^a\.[^\.]+\.b\-c\..*?$");
    }

    #[test]
    fn scores_have_six_decimals() {
        assert_eq!(score(1_795_390_659_000_005), "1795390659.000005");
    }
}
