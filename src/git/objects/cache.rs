//! A cache of two generations: entries go into the young one; when that is full it becomes
//! the old one, and what the old one still held is dropped.
//!
//! A hit in the old generation moves the entry to the young one. That is nearly as good as
//! "least recently used" and needs no list. Weights are bytes; a value that others still hold
//! lives on until they let go of it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Hashes keys that are well distributed in their first bytes, or small numbers.
#[derive(Default)]
pub(crate) struct QuickHasher(u64);

/// For maps whose keys are object names or pack offsets.
pub(crate) type Quick = BuildHasherDefault<QuickHasher>;

const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for QuickHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // An object name: its first bytes are as random as any hash of it.
        let mut first = [0; 8];
        let taken = bytes.len().min(8);
        first[..taken].copy_from_slice(&bytes[..taken]);
        self.write_u64(u64::from_le_bytes(first));
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(SPREAD);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    // The length of a name says nothing, all have the same.
    fn write_usize(&mut self, _: usize) {}
}

/// See the module.
pub(super) struct Cache<K, V> {
    young: HashMap<K, V, Quick>,
    old: HashMap<K, V, Quick>,
    young_weight: usize,
    old_weight: usize,
    generation_limit: usize,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    /// Both generations together hold at most `limit` bytes, apart from one larger value.
    pub(super) fn new(limit: usize) -> Cache<K, V> {
        Cache {
            young: HashMap::default(),
            old: HashMap::default(),
            young_weight: 0,
            old_weight: 0,
            generation_limit: limit / 2,
        }
    }

    pub(super) fn get(&mut self, key: K, weight: impl Fn(&V) -> usize) -> Option<V> {
        if let Some(value) = self.young.get(&key) {
            return Some(value.clone());
        }
        let value = self.old.remove(&key)?;
        let weight = weight(&value);
        self.old_weight = self.old_weight.saturating_sub(weight);
        self.insert(key, value.clone(), weight);
        Some(value)
    }

    pub(super) fn insert(&mut self, key: K, value: V, weight: usize) {
        self.grow(weight);
        if self.young.insert(key, value).is_some() {
            self.young_weight = self.young_weight.saturating_sub(weight);
        }
    }

    /// Values of the cache have become heavier by this much, or one is about to come.
    pub(super) fn grow(&mut self, weight: usize) {
        if self.young_weight > 0 && self.young_weight + weight > self.generation_limit {
            self.old = std::mem::take(&mut self.young);
            self.old_weight = std::mem::take(&mut self.young_weight);
        }
        self.young_weight += weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_lately_outlives_what_was_not() {
        let mut cache = Cache::<u64, u64>::new(20);
        let weight = |_: &u64| 5;
        cache.insert(1, 10, 5);
        cache.insert(2, 20, 5);
        cache.insert(3, 30, 5);
        assert_eq!(cache.get(1, weight), Some(10));
        cache.insert(4, 40, 5);
        assert_eq!(cache.get(2, weight), None);
        assert_eq!(cache.get(1, weight), Some(10));
        assert_eq!(cache.get(4, weight), Some(40));
    }

    #[test]
    fn a_cache_without_room_still_holds_the_last_value() {
        let mut cache = Cache::<u64, u64>::new(0);
        cache.insert(1, 10, 5);
        assert_eq!(cache.get(1, |_| 5), Some(10));
        cache.insert(2, 20, 5);
        cache.insert(3, 30, 5);
        assert_eq!(cache.get(1, |_| 5), None);
    }
}
