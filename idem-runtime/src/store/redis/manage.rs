//! Searching all records: for look-ups, operators and sweeps.
//!
//! Redis has no order in which to look for anything but a key, so a search goes through the keys of
//! all masters (`SCAN`), some hundred at a time. The servers answer others in between; for each
//! million keys such a search takes them some seconds of work. Keys that move between nodes
//! meanwhile may be missed.

use std::{collections::BTreeMap, sync::PoisonError};

use futures_util::future::{BoxFuture, join_all};
use redis::FromRedisValue as _;

use super::{
    RedisStore, Shared,
    connection::{Node, command, failure, unexpected, within},
    readable,
    record::decode,
    script::{Outcome, Step},
};
use crate::{
    key::{Key, OperationId},
    record::{FORMAT, Record},
    store::{Listing, Manage, Page, Place, Purge, Purged, StoreError, clock::Millis, row::Row},
};

/// How many keys a server looks at before it answers others.
const KEYS_AT_ONCE: usize = 500;
/// At how many of a server's keys a sweep looks if there are as many, whatever it may remove.
const KEYS_A_SWEEP: usize = 1_000;
/// How many times it asks a server for keys at the most, where few of them are records.
const SCANS_A_SWEEP: usize = 200;

/// A part of a server's keys.
struct Keys {
    keys: Vec<Key>,
    /// Where the next part begins; zero after the last one.
    next: u64,
}

impl Shared {
    async fn masters(&self) -> Result<Vec<Node>, StoreError> {
        let masters = self.connection.send_to_all(self.patience, command("PING")).await?;
        Ok(masters.into_iter().map(|(node, _)| node).collect())
    }

    /// Reads a part of the records' keys of a server.
    async fn scan(&self, node: &Node, from: u64) -> Result<Keys, StoreError> {
        let mut scan = command("SCAN");
        scan.arg(from).arg("MATCH").arg(self.pattern()).arg("COUNT").arg(KEYS_AT_ONCE);
        scan.arg("TYPE").arg("string");
        let answer = within(self.patience, self.connection.send_to(node, scan)).await?;
        let (next, names): (u64, Vec<Vec<u8>>) =
            redis::from_redis_value(answer).map_err(|error| failure(error.into()))?;
        let keys =
            names.iter().filter_map(|name| key_of(name.strip_prefix(self.prefix.as_bytes())?));
        Ok(Keys { keys: keys.collect(), next })
    }

    /// What the names of all records match: the prefix and as many characters as a digest has.
    fn pattern(&self) -> String {
        let mut pattern = String::with_capacity(self.prefix.len() + 64);
        for character in self.prefix.chars() {
            if "*?[]^-\\".contains(character) {
                pattern.push('\\');
            }
            pattern.push(character);
        }
        pattern.extend(std::iter::repeat_n('?', 64));
        pattern
    }

    /// Goes through all records, without their payloads, until it is told to stop.
    async fn for_each(&self, mut visit: impl FnMut(Row, Millis) -> bool) -> Result<(), StoreError> {
        for node in self.masters().await? {
            let mut from = 0;
            loop {
                let part = self.scan(&node, from).await?;
                for row in join_all(part.keys.iter().map(|key| self.look(key))).await {
                    if let Some((row, now)) = row?
                        && !visit(row, now)
                    {
                        return Ok(());
                    }
                }
                from = part.next;
                if from == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reads a record of any format without its payload. One that cannot be read is passed over: to
    /// find others does not depend on it.
    async fn look(&self, key: &Key) -> Result<Option<(Row, Millis)>, StoreError> {
        let step = Step::new("look", u16::MAX, []);
        let answer = self.step(key, step).await?;
        let row = answer.record.and_then(|(record, now)| Some((decode(*key, &record).ok()?, now?)));
        if row.is_none() && answer.outcome != Outcome::Nothing {
            tracing::warn!(?key, "a damaged record is passed over");
        }
        Ok(row)
    }

    /// Removes a record of any format, unless it is running. `None` says that there was none.
    async fn purge(&self, key: &Key) -> Result<Option<bool>, StoreError> {
        let step = Step::new("purge", u16::MAX, []);
        let answer = self.step(key, step).await?;
        Ok(match readable(answer.outcome)? {
            Outcome::Done => Some(true),
            Outcome::Refused => Some(false),
            _ => None,
        })
    }

    pub(super) async fn sweep(&self, limit: usize) -> Result<usize, StoreError> {
        let mut removed = 0;
        for node in self.masters().await? {
            let (mut looked, mut scans) = (0, 0);
            let start = self.swept_until(&node);
            let mut from = start;
            let mut is_second_round = false;
            while removed < limit
                && looked < limit.max(KEYS_A_SWEEP)
                && scans < limit.max(SCANS_A_SWEEP)
            {
                let part = self.scan(&node, from).await?;
                scans += 1;
                looked += part.keys.len();
                let mut keys = &part.keys[..];
                while !keys.is_empty() && removed < limit {
                    let (some, rest) = keys.split_at(keys.len().min(limit - removed));
                    for is_over in join_all(some.iter().map(|key| self.sweep_one(key))).await {
                        removed += usize::from(is_over?);
                    }
                    keys = rest;
                }
                if !keys.is_empty() {
                    break;
                }
                from = part.next;
                if from == 0 && (start == 0 || is_second_round) {
                    break;
                }
                is_second_round |= from == 0;
            }
            self.swept.lock().unwrap_or_else(PoisonError::into_inner).insert(node, from);
        }
        Ok(removed)
    }

    fn swept_until(&self, node: &Node) -> u64 {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        swept.get(node).copied().unwrap_or(0)
    }

    async fn sweep_one(&self, key: &Key) -> Result<bool, StoreError> {
        let step = Step::new("sweep", FORMAT, []);
        Ok(self.step(key, step).await?.outcome == Outcome::Done)
    }

    /// Where the record of an operation was when it was claimed.
    async fn noted(&self, operation_id: &OperationId) -> Result<Option<Key>, StoreError> {
        let mut note = command("GET");
        note.arg(self.operation_name(operation_id));
        let note = within(self.patience, self.connection.send(&note)).await?;
        let note: Option<Vec<u8>> =
            Option::from_redis_value(note).map_err(|error| failure(error.into()))?;
        let Some(note) = note else { return Ok(None) };
        let key = note.try_into().map_err(|_| failure(unexpected()))?;
        Ok(Some(Key::from_bytes(key)))
    }
}

/// Reads a key from its hexadecimal digits.
fn key_of(digits: &[u8]) -> Option<Key> {
    let digit =
        |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut key = [0; 32];
    if digits.len() != 2 * key.len() {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(Key::from_bytes(key))
}

impl Manage for RedisStore {
    /// By the note that was made when the operation was claimed, which costs two look-ups. Where
    /// there is none, since the process died in between or the record is kept for longer than was
    /// known then, all records are searched. So does an id that never was: let no strangers ask.
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            let mut key = self.0.noted(operation_id).await?;
            if key.is_none() {
                self.0
                    .for_each(|row, _| {
                        let is_it = row.operation_id == *operation_id;
                        if is_it {
                            key = Some(row.key);
                        }
                        !is_it
                    })
                    .await?;
            }
            let Some(key) = key else { return Ok(None) };
            let record = self.0.read(&key).await?;
            Ok(record.filter(|record| record.operation_id == *operation_id))
        })
    }

    /// Searches all records for each page.
    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move {
            let mut oldest = BTreeMap::new();
            let mut is_more = false;
            self.0
                .for_each(|row, now| {
                    let place = Place { created: row.created, key: row.key };
                    let record = row.record(now);
                    if listing.kind.covers(&record)
                        && listing.scope.is_none_or(|scope| scope == record.scope)
                        && listing.after.is_none_or(|after| place > after)
                    {
                        oldest.insert(place, record);
                        if oldest.len() > listing.limit.max(1) {
                            oldest.pop_last();
                            is_more = true;
                        }
                    }
                    true
                })
                .await?;
            let next = oldest.last_key_value().map(|(place, _)| *place).filter(|_| is_more);
            Ok(Page { records: oldest.into_values().collect(), next })
        })
    }

    /// Of a scope, searches all records.
    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            let (keys, limit) = match purge {
                Purge::Key(key) => (vec![*key], 1),
                Purge::Scope { scope, limit } => {
                    let mut keys = Vec::new();
                    let found = |row: Row, _| {
                        if row.scope == *scope {
                            keys.push(row.key);
                        }
                        true
                    };
                    self.0.for_each(found).await?;
                    (keys, *limit)
                }
            };
            let mut purged = Purged::default();
            for key in keys {
                if purged.removed == limit {
                    break;
                }
                match self.0.purge(&key).await? {
                    Some(true) => purged.removed += 1,
                    Some(false) => purged.running += 1,
                    None => {}
                }
            }
            Ok(purged)
        })
    }
}
