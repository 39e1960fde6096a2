//! Records in this process's memory.

mod entry;
mod manage;

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::future::BoxFuture;
use hashbrown::{HashTable, hash_table::Entry as Place};

use self::entry::{Bare, Entry, Operations};
use super::{
    Checkpoint, Claim, Claimed, Clock, Completion, Issue, Manage, Renewal, Store, StoreError,
    StoreErrorKind, Written,
    clock::{Millis, NEVER},
    row::{Ended, Opening},
};
use crate::{
    key::{Key, Token},
    record::{FORMAT, Record},
};

/// The name of this store in errors.
const NAME: &str = "memory";
/// How many records one shard has at the most, about: it is locked while its table grows, which
/// takes some tens of nanoseconds for each.
const RECORDS_A_SHARD: usize = 4_096;
/// Well above the number of threads that a server has, so that two of them rarely meet at one lock,
/// and few enough to go through.
const SHARDS: RangeInclusive<usize> = 64..=4_096;
/// How many due entries an insertion works off: more than it adds, so that they cannot pile up.
const STEPS_AN_INSERTION: usize = 2;
/// How many due entries are worked off under one lock: a pause of some tens of microseconds.
const STEPS_A_LOCK: usize = 128;

/// A store in this process's memory: for tests, and for single processes that may forget at a
/// restart.
///
/// It protects against retries that reach **this** process while it lives. Two replicas do not see
/// each other's records, and a restart forgets all of them: where a repetition costs money, use a
/// durable store.
///
/// It is bounded by a number of records and by a number of bytes
/// ([`MemoryStoreBuilder::max_records`], [`MemoryStoreBuilder::max_bytes`]). Nothing that is not
/// expired is ever dropped to make room, since a dropped record is an operation that runs twice: at
/// a bound, new keys are neither claimed nor issued ([`StoreErrorKind::Full`]). What is already
/// claimed can always be completed.
///
/// A clone is another handle to the same records.
///
/// ```
/// use idem_runtime::store::MemoryStore;
///
/// let store = MemoryStore::builder().max_records(10_000).build();
/// # drop(store);
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Shared>);

struct Shared {
    shards: Box<[Mutex<Shard>]>,
    operations: Operations,
    clock: Clock,
    max_records: usize,
    max_bytes: usize,
    records: AtomicUsize,
    bytes: AtomicUsize,
    /// Where the next sweep begins.
    next_swept: AtomicUsize,
}

/// How a [`MemoryStore`] is made.
#[derive(Debug)]
#[must_use = "a builder makes nothing until `build` is called"]
pub struct MemoryStoreBuilder {
    max_records: usize,
    max_bytes: usize,
    clock: Option<Clock>,
}

impl MemoryStoreBuilder {
    /// At most this many records at a time. By default 1,000,000: eleven new keys a second, each
    /// kept for a day.
    pub fn max_records(mut self, records: usize) -> Self {
        self.max_records = records;
        self
    }

    /// No new keys while the records take more than about this many bytes. By default 512 MiB:
    /// those million records with answers of 300 bytes each, headers included.
    ///
    /// What is counted is the records themselves, without the allocator's own share. Responses and
    /// checkpoints of claims that were granted before are recorded beyond this bound, since
    /// refusing them would repeat what has already happened.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Goes by this clock instead of [`Clock::monotonic`].
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = Some(clock.into());
        self
    }

    /// Makes the store.
    pub fn build(self) -> MemoryStore {
        let shards =
            self.max_records.div_ceil(RECORDS_A_SHARD).clamp(*SHARDS.start(), *SHARDS.end());
        MemoryStore(Arc::new(Shared {
            shards: (0..shards.next_power_of_two()).map(|_| Mutex::default()).collect(),
            operations: Operations::default(),
            clock: self.clock.unwrap_or_else(Clock::monotonic),
            max_records: self.max_records,
            max_bytes: self.max_bytes,
            records: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            next_swept: AtomicUsize::new(0),
        }))
    }
}

impl MemoryStore {
    /// An empty store with the default bounds.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// A store with other bounds or another clock.
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder { max_records: 1_000_000, max_bytes: 512 << 20, clock: None }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("records", &self.0.records.load(Ordering::Relaxed))
            .field("bytes", &self.0.bytes.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

/// One part of the keys.
#[derive(Default)]
struct Shard {
    entries: HashTable<Entry>,
    /// When entries are to be looked at, soonest first, by their hash: at their end, or before it
    /// where that has moved away since. What is gone by then is ignored.
    due: BinaryHeap<Reverse<(Millis, u64)>>,
}

/// What working off due entries came to.
struct Expired {
    removed: usize,
    /// Whether more entries are due.
    more: bool,
}

/// The hash of a key: it is a digest, and any eight bytes of it are as good as a hash can be.
fn hash(key: &Key) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *key.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn rehash(entry: &Entry) -> u64 {
    hash(&entry.key())
}

impl Shard {
    fn find(&self, key: &Key) -> Option<&Entry> {
        self.entries.find(hash(key), |entry| entry.is_of(key))
    }

    /// Sees to it that an entry comes up when it ends, unless it comes up before.
    fn schedule(due: &mut BinaryHeap<Reverse<(Millis, u64)>>, comes_up: Millis, entry: &Entry) {
        if entry.kept_until() < comes_up {
            due.push(Reverse((entry.kept_until(), rehash(entry))));
        }
    }

    /// Forgets what the heap says of entries that are gone, once that is the larger part of it.
    fn compact(&mut self) {
        if self.due.len() > 2 * self.entries.len() + STEPS_A_LOCK {
            let live = self.entries.iter().filter(|entry| entry.kept_until() != NEVER);
            self.due = live.map(|entry| Reverse((entry.kept_until(), rehash(entry)))).collect();
        }
    }
}

impl Shared {
    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        // Bytes that are no part of the hash.
        let [.., a, b] = *key.as_bytes();
        lock(&self.shards[usize::from(u16::from_le_bytes([a, b])) & (self.shards.len() - 1)])
    }

    /// Takes the place of one more record, if there is any.
    fn reserve(&self) -> bool {
        let one_more = |records| (records < self.max_records).then_some(records + 1);
        self.bytes.load(Ordering::Relaxed) < self.max_bytes
            && self.records.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Counts an entry's weight anew after a change.
    fn reweigh(&self, before: usize, after: usize) {
        // Wrapping, so that adding a negative difference subtracts.
        self.bytes.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    fn discard(&self, entry: &Entry) {
        self.records.fetch_sub(1, Ordering::Relaxed);
        self.reweigh(entry.weight(), 0);
    }

    /// Claims or issues a key.
    fn open<O: Opening>(&self, opening: &O) -> Result<O::Answer, StoreError> {
        match self.try_open(opening) {
            Err(error) if error.kind() == StoreErrorKind::Full => {
                // Something may have expired in any shard. None is locked here: two claims that
                // each held their own and waited for the other's would wait for ever.
                self.make_room();
                self.try_open(opening)
            }
            answer => answer,
        }
    }

    fn try_open<O: Opening>(&self, opening: &O) -> Result<O::Answer, StoreError> {
        let failed = |kind| StoreError::new(NAME, kind);
        let key = opening.key();
        let mut shard = self.shard(key);
        let now = self.clock.now();
        let Shard { entries, due } = &mut *shard;
        match entries.entry(hash(key), |entry| entry.is_of(key), rehash) {
            Place::Occupied(mut place) => {
                let entry = place.get_mut();
                if entry.is_found(opening.format(), now).map_err(failed)? {
                    let mut row = entry.row(&self.operations);
                    let (changed, answer) = opening.on_row(&mut row, now);
                    if changed {
                        self.replace(due, entry, Entry::of(&row, &self.operations));
                    }
                    return Ok(answer);
                }
                let row = opening.make(now);
                if let Some(row) = &row {
                    self.replace(due, entry, Entry::of(row, &self.operations));
                }
                Ok(opening.made(row, now))
            }
            Place::Vacant(place) => {
                let row = opening.make(now);
                if let Some(row) = &row {
                    if !self.reserve() {
                        return Err(failed(StoreErrorKind::Full));
                    }
                    let entry = Entry::of(row, &self.operations);
                    self.reweigh(0, entry.weight());
                    Shard::schedule(due, NEVER, &entry);
                    place.insert(entry);
                    self.expire(&mut shard, now, STEPS_AN_INSERTION);
                }
                Ok(opening.made(row, now))
            }
        }
    }

    /// Puts an entry in the place of what was there under its key.
    fn replace(&self, due: &mut BinaryHeap<Reverse<(Millis, u64)>>, entry: &mut Entry, by: Entry) {
        let before = std::mem::replace(entry, by);
        self.reweigh(before.weight(), entry.weight());
        Shard::schedule(due, before.kept_until(), entry);
    }

    /// Changes a row under a token, as `change` says.
    fn change<'p>(
        &self,
        key: &Key,
        format: u16,
        change: impl FnOnce(&mut Bare<'p>, Millis) -> Ended,
    ) -> Result<Written, StoreError> {
        let mut shard = self.shard(key);
        let now = self.clock.now();
        let Shard { entries, due } = &mut *shard;
        let Ok(mut place) = entries.find_entry(hash(key), |entry| entry.is_of(key)) else {
            return Ok(Written::Gone);
        };
        let entry = place.get_mut();
        if !entry.is_found(format, now).map_err(|kind| StoreError::new(NAME, kind))? {
            return Ok(Written::Gone);
        }
        let mut row = entry.bare_row();
        Ok(match change(&mut row, now) {
            Ended::Changed => {
                let by = entry.with(&row);
                self.replace(due, entry, by);
                Written::Done
            }
            Ended::Removed => {
                let (entry, _) = place.remove();
                self.discard(&entry);
                shard.compact();
                Written::Done
            }
            Ended::Already => Written::Done,
            Ended::Fenced => Written::Fenced(entry.row(&self.operations).into_record(now)),
        })
    }

    fn renew(&self, renewal: &Renewal) -> bool {
        let mut shard = self.shard(&renewal.key);
        let now = self.clock.now();
        let Shard { entries, due } = &mut *shard;
        let entry = entries.find_mut(hash(&renewal.key), |entry| entry.is_of(&renewal.key));
        match entry {
            Some(entry) if matches!(entry.is_found(FORMAT, now), Ok(true)) => {
                let mut row = entry.bare_row();
                let renewed = row.renew(renewal, now);
                if renewed {
                    let by = entry.with(&row);
                    self.replace(due, entry, by);
                }
                renewed
            }
            _ => false,
        }
    }

    fn read(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        let shard = self.shard(key);
        let now = self.clock.now();
        let Some(entry) = shard.find(key) else { return Ok(None) };
        match entry.is_found(FORMAT, now) {
            Ok(is_found) => Ok(is_found.then(|| entry.row(&self.operations).into_record(now))),
            Err(kind) => Err(StoreError::new(NAME, kind)),
        }
    }

    /// Frees space in whichever shard has some: for an insertion that finds none.
    fn make_room(&self) {
        let mut freed = 0;
        for shard in self.shards_in_turn() {
            freed += self.expire_under_lock(shard, STEPS_A_LOCK).removed;
            if freed >= STEPS_A_LOCK {
                return;
            }
        }
    }

    /// Removes what is over, and lets other tasks have their turn after each lock that was long.
    async fn sweep(&self, limit: usize) -> usize {
        let mut removed = 0;
        for shard in self.shards_in_turn() {
            while removed < limit {
                let steps = STEPS_A_LOCK.min(limit - removed);
                let expired = self.expire_under_lock(shard, steps);
                removed += expired.removed;
                if expired.removed > 0 {
                    tokio::task::yield_now().await;
                }
                if !expired.more {
                    break;
                }
            }
        }
        removed
    }

    /// All shards, beginning with another one each time, so that what is bounded comes round.
    fn shards_in_turn(&self) -> impl Iterator<Item = &Mutex<Shard>> {
        let first = self.next_swept.fetch_add(1, Ordering::Relaxed) % self.shards.len();
        let (before, rest) = self.shards.split_at(first);
        rest.iter().chain(before)
    }

    fn expire_under_lock(&self, shard: &Mutex<Shard>, steps: usize) -> Expired {
        let mut shard = lock(shard);
        // Taken under the lock: time that passes while it is waited for counts.
        let now = self.clock.now();
        self.expire(&mut shard, now, steps)
    }

    /// Works off at most so many of a shard's due entries.
    fn expire(&self, shard: &mut Shard, now: Millis, steps: usize) -> Expired {
        let is_due =
            |shard: &Shard| matches!(shard.due.peek(), Some(Reverse((due, _))) if *due <= now);
        let mut removed = 0;
        for _ in 0..steps {
            if !is_due(shard) {
                break;
            }
            let Some(Reverse((_, hash))) = shard.due.pop() else { break };
            // A row of a newer format is over for its own release only.
            let is_over = |entry: &Entry| matches!(entry.is_found(FORMAT, now), Ok(false));
            let lasts = |entry: &Entry| (now + 1..NEVER).contains(&entry.kept_until());
            let is_its = |entry: &Entry| rehash(entry) == hash;
            if let Ok(place) =
                shard.entries.find_entry(hash, |entry| is_its(entry) && is_over(entry))
            {
                let (entry, _) = place.remove();
                self.discard(&entry);
                removed += 1;
            } else if let Some(entry) =
                shard.entries.find(hash, |entry| is_its(entry) && lasts(entry))
            {
                Shard::schedule(&mut shard.due, NEVER, entry);
            }
        }
        shard.compact();
        Expired { removed, more: is_due(shard) }
    }
}

/// Locks a shard. A thread that panicked under the lock leaves it whole, since each change of an
/// entry is complete before anything that could panic.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store for MemoryStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move { self.0.open(claim) })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.0.open(issue) })
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let Checkpoint { key, format, .. } = checkpoint;
            self.0.change(key, *format, |row, _| row.checkpoint(checkpoint))
        })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let Completion { key, format, .. } = completion;
            self.0.change(key, *format, |row, now| row.complete(completion, now))
        })
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.0.change(key, FORMAT, |row, now| row.release(*token, now)) })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.0.change(key, FORMAT, |row, now| row.forget(*token, now)) })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move { Ok(claims.iter().map(|claim| self.0.renew(claim)).collect()) })
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { self.0.read(key) })
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move { Ok(self.0.sweep(limit).await) })
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
