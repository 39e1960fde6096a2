//! Completed records of a remote store, kept at hand: a repetition that was answered a moment ago is
//! answered again without a call of the store.
//!
//! Whoever asks the store, be it for a claim, to wait, to look up or to settle, gets what the store
//! says. What is kept is looked at in one place, before a request's first claim ([`Replays::find`]),
//! and answers one kind of request: the repetition of one that is completed. Everything else, a
//! mismatch too, is the store's to decide.
//!
//! # Why what is kept is true, and for how long it may not be
//!
//! A completed record does not change. [`decide`] never grants a claim on it, so that no token but
//! the one under which it was completed ever holds it; under that one, to complete it again changes
//! nothing, and to release or forget it is refused (laws 4, 5 and 9 of [`Store`]); it is not issued
//! over (law 23) and takes no checkpoint (law 28). It can only go away, in one of three ways:
//!
//! - Its time ends. What is left of it was counted by the store's clock after the store was asked;
//!   here it is counted from before that, so it ends here no later, but for what the two clocks
//!   drift apart, or the store's is set forward, within [`max_age`](ReplayCache::max_age). Time in
//!   which the machine is suspended does not pass for the clock that counts here: it is `max_age` of
//!   waking time.
//! - It is purged through this engine. What is kept says how many purges had begun when the store
//!   was asked for it, and is good only as long as no other one has; nothing is kept of what the
//!   store says while one is going on. So it makes no difference in which order the answers of a
//!   claim and of a purge arrive.
//! - It is purged through another engine or lost by the store, in a failover for instance. Nobody
//!   here hears of that. What was read before it is good for `max_age`, counted from before the
//!   store was asked.
//!
//! A key that is gone in the third way may be claimed anew, here or elsewhere, while its old answer
//! is still at hand. Whatever the store then says to this engine that is not that answer, a grant
//! above all, removes it. An answer that was read before, and comes to be kept after, is what
//! `max_age` is for.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quick_cache::{
    DefaultHashBuilder, OptionsBuilder, Weighter,
    sync::{Cache as Bounded, DefaultLifecycle},
};

use super::{
    Begun, Checkpoint, Claim, Claimed, Clock, Completion, Issue, Listing, Manage, Page, Purge,
    Purged, Renewal, Store, StoreError, StoreErrorKind, Transact, Transaction, Veil, Wake, Written,
    clock::{Millis, NEVER, until},
};
use crate::{
    decision::{Decision, decide},
    key::{Key, OperationId, Token},
    record::{Record, Ttl},
};

/// How completed records of a remote store are kept at hand; given to
/// [`Builder::replay_cache`](crate::Builder::replay_cache).
///
/// ```
/// use std::time::Duration;
/// use idem_runtime::{Idempotency, Scope, store::{MemoryStore, ReplayCache}};
///
/// # let store = MemoryStore::new();
/// let idem = Idempotency::builder(store)
///     .scope(Scope::header("X-API-Key"))
///     .replay_cache(ReplayCache::new().max_bytes(64 << 20).max_age(Duration::from_secs(2)))
///     .build();
/// # let _ = idem;
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is for an engine's builder"]
pub struct ReplayCache {
    max_bytes: usize,
    max_age: Duration,
    clock: Clock,
}

impl ReplayCache {
    /// At most 32 MiB, at most ten seconds old.
    pub fn new() -> Self {
        Self { max_bytes: 32 << 20, max_age: Duration::from_secs(10), clock: Clock::monotonic() }
    }

    /// What is kept takes at most about this many bytes; what was not asked for lately makes room.
    /// A single record that takes more than a thirty-second part of them is not kept. With 0,
    /// nothing is.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// For how long after the store was asked for a record it is replayed without asking again: for
    /// so long a purge by another engine may go unnoticed in this one. Whole milliseconds count;
    /// with none, nothing is kept.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    /// Goes by this clock instead of [`Clock::monotonic`], in a test for instance by the one of the
    /// store. A clock that is set back would let records grow older than they may.
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = clock.into();
        self
    }

    /// Whether anything is to be kept.
    const fn is_off(&self) -> bool {
        self.max_bytes == 0 || self.max_age.as_millis() == 0
    }
}

impl Default for ReplayCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Into how many parts what is kept is divided, each with a lock and a part of the bytes.
const SHARDS: usize = 16;
/// How much of its bytes is for what was asked for more than once. What is kept is old in seconds,
/// so what came last counts for as much as what is asked for often.
const OFTEN_ASKED_FOR: f64 = 0.5;
/// About how many bytes a record takes beside its texts: itself, its place in the table, and what
/// three allocations cost.
const OVERHEAD: usize = size_of::<Kept>() + 200;

/// A completed record, as the store gave it: sealed, if it is.
struct Kept {
    record: Record,
    /// An instant before the store was asked for it.
    since: Millis,
    /// When it is over, or too old.
    until: Millis,
    /// How many purges had begun before the store was asked for it.
    purges: u64,
}

#[derive(Clone, Copy)]
struct Bytewise;

impl Weighter<Key, Arc<Kept>> for Bytewise {
    fn weight(&self, _: &Key, kept: &Arc<Kept>) -> u64 {
        let Record { operation, fingerprint, payload, .. } = &kept.record;
        (OVERHEAD + operation.len() + fingerprint.scheme.len() + payload.len()) as u64
    }
}

/// What is kept, and the purges that end it.
struct Cache {
    records: Bounded<Key, Arc<Kept>, Bytewise>,
    max_age: Duration,
    clock: Clock,
    /// How many purges have begun through this engine, and how many of them have ended.
    purges_begun: AtomicU64,
    purges_ended: AtomicU64,
}

/// What is to be known from before the store is asked.
#[derive(Clone, Copy)]
struct Before {
    now: Millis,
    /// How many purges had begun, if all of them had ended.
    purges: Option<u64>,
}

impl Cache {
    /// `None` where nothing is to be kept.
    fn new(options: ReplayCache) -> Option<Self> {
        if options.is_off() {
            return None;
        }
        let bounds = OptionsBuilder::new()
            .shards(SHARDS)
            .hot_allocation(OFTEN_ASKED_FOR)
            // To remember what was here once would take memory that is not counted.
            .ghost_allocation(0.0)
            .estimated_items_capacity(options.max_bytes / 1024)
            .weight_capacity(options.max_bytes as u64)
            .build()
            .ok()?;
        let (hash, lifecycle) = (DefaultHashBuilder::default(), DefaultLifecycle::default());
        Some(Self {
            records: Bounded::with_options(bounds, Bytewise, hash, lifecycle),
            max_age: options.max_age,
            clock: options.clock,
            purges_begun: AtomicU64::new(0),
            purges_ended: AtomicU64::new(0),
        })
    }

    /// What answers a claim, and how.
    fn find(&self, claim: &Claim) -> Option<(Decision, Record)> {
        let kept = self.records.get(&claim.key)?;
        let now = self.clock.now();
        if now >= kept.until || kept.purges != self.purges_begun.load(Ordering::SeqCst) {
            return None;
        }
        let decision = answer(claim, &kept.record)?;
        let passed = until(kept.since, now);
        let shortened = |ttl| match ttl {
            Ttl::For(left) => Ttl::For(left.saturating_sub(passed)),
            Ttl::Forever => Ttl::Forever,
        };
        let record = kept.record.clone();
        let record = Record {
            valid_left: shortened(record.valid_left),
            kept_left: shortened(record.kept_left),
            age: record.age.saturating_add(passed),
            ..record
        };
        Some((decision, record))
    }

    fn before(&self) -> Before {
        // In this order: what has ended by then had begun before.
        let begun = self.purges_begun.load(Ordering::SeqCst);
        let ended = self.purges_ended.load(Ordering::SeqCst);
        Before { now: self.clock.now(), purges: (begun == ended).then_some(begun) }
    }

    /// Takes note of what the store has said to a claim: of the record that stands in its way, or
    /// that none does.
    fn note(&self, claim: &Claim, found: Option<&Record>, before: Before) {
        match (found.filter(|record| answer(claim, record).is_some()), before.purges) {
            (Some(record), Some(purges)) => self.keep(claim, record, before.now, purges),
            (Some(_), None) => {}
            (None, _) => self.forget(&claim.key),
        }
    }

    fn keep(&self, claim: &Claim, record: &Record, since: Millis, purges: u64) {
        let ends = [Ttl::For(self.max_age), record.valid_left, record.kept_left];
        let until = ends.map(|ttl| end_of(since, ttl)).into_iter().min().unwrap_or(since);
        let record = Record {
            // The claim's is the same, and as a rule a constant.
            fingerprint: claim.fingerprint.clone(),
            // A slice would hold all of the buffer that the store has read.
            payload: Bytes::copy_from_slice(&record.payload),
            ..record.clone()
        };
        self.records.insert(record.key, Arc::new(Kept { record, since, until, purges }));
    }

    /// What is kept of a key is no longer so.
    fn forget(&self, key: &Key) {
        // As a rule there is nothing, and to see that takes a lock that others can share.
        if self.records.contains_key(key) {
            self.records.remove(key);
        }
    }

    /// Removes what is over, or too old.
    fn sweep(&self) {
        let now = self.clock.now();
        self.records.retain(|_, kept| now < kept.until);
    }

    /// Nothing of what is kept is good from now on, and nothing is kept until the purge has ended.
    fn begin_purge(&self) -> Purging<'_> {
        self.purges_begun.fetch_add(1, Ordering::SeqCst);
        Purging(self)
    }
}

/// A purge that is going on, or was: it ends in any case.
struct Purging<'c>(&'c Cache);

impl Drop for Purging<'_> {
    fn drop(&mut self) {
        // Nobody would be answered from it, but what is purged is not to stay in memory either.
        self.0.records.clear();
        self.0.purges_ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// How a record answers a claim, if it is one that does not change and the claim is of a request
/// that it answers.
fn answer(claim: &Claim, record: &Record) -> Option<Decision> {
    let same = record.fingerprint == claim.fingerprint && record.format <= claim.format;
    let decision = decide(record.seen(), claim.asked(same));
    matches!(decision, Decision::Replay | Decision::NotReplayable).then_some(decision)
}

/// The instant at which what had so much left at another one is over, or a little before.
fn end_of(since: Millis, left: Ttl) -> Millis {
    let Ttl::For(left) = left else { return NEVER };
    Millis::try_from(left.as_millis()).map_or(NEVER, |left| since.saturating_add(left))
}

/// What the engine has at hand.
pub(crate) struct Replays {
    cache: Arc<Cache>,
    veil: Veil,
}

impl Replays {
    /// The record that answers a claim, and how it does, if it is at hand.
    pub(crate) fn find(&self, claim: &Claim) -> Option<(Decision, Record)> {
        let (decision, record) = self.cache.find(claim)?;
        Some((decision, self.veil.open(record)))
    }
}

/// A store of which completed records are kept at hand. It never answers from them itself.
pub(crate) struct Cached {
    store: Arc<dyn Store>,
    cache: Arc<Cache>,
}

impl Cached {
    /// Puts a cache in front of a store, if it is remote and something is to be kept. What is kept
    /// is as the store has it; whoever is answered from it sees it through the veil.
    pub(crate) fn over(
        store: Arc<dyn Store>,
        options: Option<ReplayCache>,
        veil: &Veil,
    ) -> (Arc<dyn Store>, Option<Replays>) {
        let options = options.filter(|_| store.is_remote());
        let Some(cache) = options.and_then(Cache::new).map(Arc::new) else { return (store, None) };
        let replays = Replays { cache: Arc::clone(&cache), veil: veil.clone() };
        (Arc::new(Self { store, cache }), Some(replays))
    }

    /// Whoever could write under a key, has it: nothing that is completed stood in its way.
    async fn write(
        &self,
        key: &Key,
        writing: BoxFuture<'_, Result<Written, StoreError>>,
    ) -> Result<Written, StoreError> {
        let written = writing.await?;
        if matches!(written, Written::Done) {
            self.cache.forget(key);
        }
        Ok(written)
    }

    /// The store's own records; asked for only where it has them.
    fn managed(&self) -> Result<&dyn Manage, StoreError> {
        self.store.manage().ok_or(StoreError::new("cache", StoreErrorKind::Refused))
    }

    /// The store's own transactions; asked for only where it has them.
    fn transacted(&self) -> Result<&dyn Transact, StoreError> {
        self.store.transact().ok_or(StoreError::new("cache", StoreErrorKind::Refused))
    }
}

impl fmt::Debug for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached")
            .field("store", &self.store)
            .field("records", &self.cache.records.len())
            .field("bytes", &self.cache.records.weight())
            .finish_non_exhaustive()
    }
}

impl Store for Cached {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            let before = self.cache.before();
            let claimed = self.store.claim(claim).await?;
            let found = match &claimed {
                Claimed::Found(record) => Some(record),
                Claimed::Granted(_) | Claimed::Unknown => None,
            };
            self.cache.note(claim, found, before);
            Ok(claimed)
        })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(&issue.key, self.store.issue(issue)))
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(&checkpoint.key, self.store.checkpoint(checkpoint)))
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(&completion.key, self.store.complete(completion)))
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(key, self.store.release(key, token)))
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(key, self.store.forget(key, token)))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        self.store.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            let swept = self.store.sweep(limit).await;
            // Once a sweep, after its last batch.
            if swept.as_ref().map_or(true, |swept| *swept < limit) {
                self.cache.sweep();
            }
            swept
        })
    }

    fn manage(&self) -> Option<&dyn Manage> {
        self.store.manage().is_some().then_some(self)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        self.store.wake()
    }

    fn transact(&self) -> Option<&dyn Transact> {
        self.store.transact().is_some().then_some(self)
    }
}

impl Manage for Cached {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { self.managed()?.find(operation_id).await })
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move { self.managed()?.list(listing).await })
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            let _purging = self.cache.begin_purge();
            self.managed()?.purge(purge).await
        })
    }
}

impl Transact for Cached {
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>> {
        Box::pin(async move {
            let before = self.cache.before();
            let begun = self.transacted()?.begin(claim).await?;
            match &begun {
                Begun::Found(record) => self.cache.note(claim, Some(record), before),
                Begun::Granted(..) | Begun::Unknown => self.cache.note(claim, None, before),
                // Another process may only be looking at it.
                Begun::Held => {}
            }
            Ok(begun)
        })
    }

    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>> {
        Box::pin(async move { self.transacted()?.begin_unclaimed().await })
    }

    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { self.transacted()?.is_held(key).await })
    }
}

#[cfg(test)]
mod tests;
