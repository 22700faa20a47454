//! What waits for its ETA, in little room.
//!
//! A decoded request takes some kilobytes, and tens of thousands may wait for hours. So a
//! message that is not due is kept as it came, compressed with a dictionary of what all task
//! messages have in common, beside the delivery's tag; it is decoded again when it is due, or
//! when somebody wants to see it. Does not know when that is: the consumer's timer does.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use secrecy::zeroize::Zeroizing;
use serde_json::{Map, Value};

use crate::protocol::envelope::{Envelope, Properties};
use crate::transport::{Delivery, Tag};

/// What task messages have in common, in the form of [`pack`]; the most common at the end.
const COMMON: &[u8] = br#"{"test_task":"analyze_repo_task","https://github.com/":".git","queue":"celery.map"},"subtask_type":"chain","immutable":true},"chord":null}[[{"task":"test_task","args":[],"kwargs":{},"options":{"task_id":"","reply_to":""},"subtask_type":null,"immutable":false}],{"user_github_token":"user_id","repo_url":"https://github.com/"},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}][{"lang":"py","task":"analyze_repo_task","id":"","shadow":null,"eta":"2026-11-22T23:37:07.520266+00:00","expires":null,"group":null,"group_index":null,"retries":0,"timelimit":[null,null],"root_id":"","parent_id":null,"argsrepr":"('user-1', 'https://github.com/')","kwargsrepr":"{}","origin":"gen1@localhost","ignore_result":false,"replaced_task_nesting":0,"stamped_headers":null,"stamps":{}},["application/json","utf-8"],["","",2,0,null],["celery","","celery"],false,0][[],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]"#;
/// Above, compression would keep the consumer from its work for too long.
const MOST: usize = 64 << 10;
/// More would be slower and save little.
const LEVEL: i32 = 3;

/// One message that waits.
struct Record {
    tag: Tag,
    /// Hash of the task's id, for looking it up without decoding all others.
    mark: u64,
    /// Bytes before compression; 0: they are not compressed.
    length: u32,
    /// Wiped at the end, for the arguments may hold a secret.
    bytes: Zeroizing<Box<[u8]>>,
}

/// Messages that wait, by the serial number of their request.
pub struct Scheduled {
    records: Mutex<HashMap<u64, Record>>,
    packer: Mutex<Option<zstd::bulk::Compressor<'static>>>,
    hasher: RandomState,
}

impl fmt::Debug for Scheduled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Scheduled({})", self.len())
    }
}

impl Default for Scheduled {
    fn default() -> Self {
        Self {
            records: Mutex::default(),
            packer: Mutex::new(zstd::bulk::Compressor::with_dictionary(LEVEL, COMMON).ok()),
            hasher: RandomState::new(),
        }
    }
}

impl Scheduled {
    fn records(&self) -> MutexGuard<'_, HashMap<u64, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a delivery until its request is taken or removed.
    pub fn hold(&self, serial: u64, id: &str, delivery: &Delivery) {
        let plain = Zeroizing::new(pack(delivery));
        let mut packer = self.packer.lock().unwrap_or_else(PoisonError::into_inner);
        let packed = packer
            .as_mut()
            .filter(|_| plain.len() <= MOST)
            .and_then(|packer| packer.compress(&plain).ok());
        drop(packer);
        let (length, bytes) = match packed {
            Some(packed) => (u32::try_from(plain.len()).unwrap_or(0), packed),
            None => (0, plain.to_vec()),
        };
        let record = Record {
            tag: delivery.tag.clone(),
            mark: self.hasher.hash_one(id),
            length,
            bytes: Zeroizing::new(bytes.into_boxed_slice()),
        };
        self.records().insert(serial, record);
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.records().len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this one still waits.
    pub fn contains(&self, serial: u64) -> bool {
        self.records().contains_key(&serial)
    }

    /// Takes one out; `None`: it was removed before.
    pub fn take(&self, serial: u64) -> Option<Delivery> {
        let record = self.records().remove(&serial)?;
        record.unpack()
    }

    /// Shows one.
    pub fn show(&self, serial: u64) -> Option<Delivery> {
        self.records().get(&serial)?.unpack()
    }

    /// The serial numbers in the order of arrival.
    pub fn serials(&self) -> Vec<u64> {
        let mut serials: Vec<u64> = self.records().keys().copied().collect();
        serials.sort_unstable();
        serials
    }

    /// The serial numbers that may be those of a task; another id may have the same hash.
    pub fn candidates(&self, id: &str) -> Vec<u64> {
        let mark = self.hasher.hash_one(id);
        let records = self.records();
        let found = records.iter().filter(|(_, record)| record.mark == mark);
        found.map(|(serial, _)| *serial).collect()
    }

    /// The tags of all of them.
    pub fn tags(&self) -> Vec<Tag> {
        let records = self.records();
        records.values().map(|record| record.tag.clone()).collect()
    }

    /// Removes those whose delivery is not ours any more; says how many those were.
    pub fn retain(&self, keep: impl Fn(&Tag) -> bool) -> usize {
        let mut records = self.records();
        let before = records.len();
        records.retain(|_, record| keep(&record.tag));
        before - records.len()
    }
}

impl Record {
    fn unpack(&self) -> Option<Delivery> {
        let plain = if self.length == 0 {
            self.bytes.to_vec()
        } else {
            let mut unpacker = zstd::bulk::Decompressor::with_dictionary(COMMON).ok()?;
            unpacker
                .decompress(&self.bytes, self.length as usize)
                .ok()?
        };
        unpack(&Zeroizing::new(plain), self.tag.clone())
    }
}

/// All but the body.
type Head = (
    Map<String, Value>,
    (Option<String>, Option<String>),
    (
        Option<String>,
        Option<String>,
        Option<u8>,
        Option<u8>,
        Option<String>,
    ),
    (String, String, String),
    bool,
    u32,
);

/// A delivery without its tag: the length of the head, the head as JSON, the body.
fn pack(delivery: &Delivery) -> Vec<u8> {
    let Envelope {
        body,
        content_type,
        content_encoding,
        headers,
        properties,
    } = &delivery.envelope;
    let head = (
        headers,
        (content_type, content_encoding),
        (
            &properties.correlation_id,
            &properties.reply_to,
            properties.delivery_mode,
            properties.priority,
            &properties.expiration,
        ),
        (&delivery.queue, &delivery.exchange, &delivery.routing_key),
        delivery.redelivered,
        delivery.deaths,
    );
    let head = serde_json::to_vec(&head).expect("because every part has a form in JSON");
    let mut bytes = Vec::with_capacity(8 + head.len() + body.len());
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(head);
    bytes.extend(body);
    bytes
}

fn unpack(bytes: &[u8], tag: Tag) -> Option<Delivery> {
    let (length, rest) = bytes.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (head, body) = rest.split_at_checked(length)?;
    let (headers, content, properties, names, redelivered, deaths): Head =
        serde_json::from_slice(head).ok()?;
    let (correlation_id, reply_to, delivery_mode, priority, expiration) = properties;
    Some(Delivery {
        tag,
        envelope: Envelope {
            body: body.to_vec(),
            content_type: content.0,
            content_encoding: content.1,
            headers,
            properties: Properties {
                correlation_id,
                reply_to,
                delivery_mode,
                priority,
                expiration,
            },
        },
        queue: names.0,
        exchange: names.1,
        routing_key: names.2,
        redelivered,
        deaths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::publish::TaskCall;
    use serde_json::json;

    fn delivery(id: &str, args: Vec<Value>) -> Delivery {
        let mut call = TaskCall::new(id, "analyze_repo_task", args, Map::new());
        call.origin = "gen4711@a-host".to_owned();
        call.reply_to = uuid::Uuid::new_v4().to_string();
        let mut envelope = call.to_envelope().unwrap();
        let big: Value = serde_json::from_str("123456789012345678901234567890").unwrap();
        envelope.headers.insert("big".to_owned(), big);
        Delivery {
            tag: Tag(format!("tag of {id}").into()),
            envelope,
            queue: "celery".to_owned(),
            exchange: String::new(),
            routing_key: "celery".to_owned(),
            redelivered: true,
            deaths: 2,
        }
    }

    fn same(one: &Delivery, other: &Delivery) {
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
    }

    #[test]
    fn a_delivery_comes_back_as_it_was_held() {
        let scheduled = Scheduled::default();
        let large = delivery("large", vec![json!("x".repeat(MOST + 1))]);
        let small = delivery("small", vec![json!(["ä", 1.5, null])]);
        scheduled.hold(2, "large", &large);
        scheduled.hold(1, "small", &small);
        assert_eq!(scheduled.serials(), [1, 2]);
        assert_eq!(scheduled.candidates("small"), [1]);
        same(&scheduled.show(1).unwrap(), &small);
        same(&scheduled.take(1).unwrap(), &small);
        same(&scheduled.take(2).unwrap(), &large);
        assert!(scheduled.is_empty() && scheduled.take(1).is_none());
    }

    #[test]
    fn a_usual_message_takes_less_than_three_hundred_bytes() {
        let scheduled = Scheduled::default();
        let id = uuid::Uuid::new_v4().to_string();
        let args = vec![
            json!("user-17"),
            json!("https://github.com/some/repository"),
        ];
        scheduled.hold(1, &id, &delivery(&id, args));
        let size = scheduled.records()[&1].bytes.len();
        assert!(size < 300, "{size} bytes");
    }

    #[test]
    fn what_is_no_longer_ours_is_forgotten() {
        let scheduled = Scheduled::default();
        for (serial, id) in [(1, "a"), (2, "b")] {
            scheduled.hold(serial, id, &delivery(id, Vec::new()));
        }
        let kept = Tag("tag of b".into());
        assert_eq!(scheduled.retain(|tag| *tag == kept), 1);
        assert_eq!(
            (scheduled.tags(), scheduled.contains(1)),
            (vec![kept], false)
        );
    }
}
