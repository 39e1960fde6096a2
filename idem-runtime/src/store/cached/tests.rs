use std::{
    collections::HashMap,
    mem::discriminant,
    sync::{Mutex, atomic::AtomicUsize},
};

use futures_util::{FutureExt, future::join_all};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::{sync::Semaphore, task::yield_now};

use super::*;
#[cfg(feature = "seal")]
use crate::store::Sealed;
use crate::{
    decision::OnUnknown,
    key::ScopeDigest,
    record::{FORMAT, Fingerprint, Flags, State},
    store::{ManualClock, MemoryStore},
};

const MAX_AGE: Duration = Duration::from_secs(10);
const HOUR: Duration = Duration::from_secs(3600);
const NO_VEIL: Veil = Veil { seal: None, redact: None };

/// An engine's view of a store: what is at hand comes first.
#[derive(Debug)]
struct Front {
    store: Cached,
    veil: Veil,
}

impl Front {
    fn over(store: Arc<dyn Store>, options: ReplayCache) -> Self {
        let cache = Arc::new(Cache::new(options).unwrap());
        Self { store: Cached { store, cache }, veil: NO_VEIL }
    }

    fn cache(&self) -> &Arc<Cache> {
        &self.store.cache
    }

    /// What is at hand for a claim.
    fn find(&self, claim: &Claim) -> Option<Record> {
        let replays = Replays { cache: Arc::clone(self.cache()), veil: self.veil.clone() };
        replays.find(claim).map(|(_, record)| record)
    }

    async fn run(&self, claim: &Claim, payload: &[u8]) -> Record {
        let claimed = self.store.claim(claim).await.unwrap();
        let Claimed::Granted(record) = claimed else { panic!("not granted: {claimed:?}") };
        let written = self.store.complete(&completion(claim, payload)).await.unwrap();
        assert_eq!(written, Written::Done);
        record
    }

    /// A repetition that asks the store.
    async fn ask(&self, claim: &Claim) -> Claimed {
        self.store.claim(&again(claim)).await.unwrap()
    }

    async fn purge(&self, purge: Purge) -> Purged {
        self.store.manage().unwrap().purge(&purge).await.unwrap()
    }
}

fn claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: Arc::from("POST /"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test".into(), digest: [2; 32] },
        token: Token::random(),
        lease: Duration::from_secs(30),
        ttl: Ttl::For(HOUR),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

/// The same request, sent again.
fn again(claim: &Claim) -> Claim {
    Claim { token: Token::random(), operation_id: OperationId::random(), ..claim.clone() }
}

fn completion(claim: &Claim, payload: &[u8]) -> Completion {
    let (flags, payload) = (Flags::NONE, Bytes::copy_from_slice(payload));
    let Claim { key, token, ttl, .. } = *claim;
    Completion { key, token, ttl, flags, payload, format: FORMAT }
}

fn memory() -> (MemoryStore, ManualClock) {
    let clock = Clock::manual();
    (MemoryStore::builder().clock(clock.clone()).build(), clock)
}

fn front() -> (Front, MemoryStore, ManualClock) {
    let (store, clock) = memory();
    let options = ReplayCache::new().clock(clock.clone());
    (Front::over(Arc::new(store.clone()), options), store, clock)
}

/// What a store behind another one does not see to itself.
macro_rules! pass_on {
    () => {
        fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
            self.store.issue(issue)
        }

        fn checkpoint<'a>(
            &'a self,
            checkpoint: &'a Checkpoint,
        ) -> BoxFuture<'a, Result<Written, StoreError>> {
            self.store.checkpoint(checkpoint)
        }

        fn complete<'a>(
            &'a self,
            completion: &'a Completion,
        ) -> BoxFuture<'a, Result<Written, StoreError>> {
            self.store.complete(completion)
        }

        fn release<'a>(
            &'a self,
            key: &'a Key,
            token: &'a Token,
        ) -> BoxFuture<'a, Result<Written, StoreError>> {
            self.store.release(key, token)
        }

        fn forget<'a>(
            &'a self,
            key: &'a Key,
            token: &'a Token,
        ) -> BoxFuture<'a, Result<Written, StoreError>> {
            self.store.forget(key, token)
        }

        fn renew<'a>(
            &'a self,
            claims: &'a [Renewal],
        ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
            self.store.renew(claims)
        }

        fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
            self.store.read(key)
        }

        fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
            self.store.sweep(limit)
        }
    };
}

impl Store for Front {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        match self.find(claim) {
            Some(record) => Box::pin(async { Ok(Claimed::Found(record)) }),
            None => self.store.claim(claim),
        }
    }

    pass_on!();

    fn manage(&self) -> Option<&dyn Manage> {
        self.store.manage()
    }
}

/// The laws of a store hold for whoever is answered from what is at hand: for ever, if need be,
/// where purges are made by one engine.
#[cfg(feature = "testing")]
mod laws {
    use super::*;
    use crate::testing::StoreFixture;

    struct Fixture {
        front: Arc<Front>,
        clock: ManualClock,
    }

    impl Fixture {
        fn new() -> Self {
            let (store, clock) = memory();
            let options = ReplayCache::new().max_age(Duration::MAX).clock(clock.clone());
            Self { front: Arc::new(Front::over(Arc::new(store), options)), clock }
        }
    }

    impl StoreFixture for Fixture {
        fn store(&self) -> Arc<dyn Store> {
            Arc::clone(&self.front) as Arc<dyn Store>
        }

        fn second(&self) -> Arc<dyn Store> {
            self.store()
        }

        fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
            Box::pin(async move { self.clock.advance(by) })
        }
    }

    crate::store_laws!(Fixture::new());
    crate::manage_laws!(Fixture::new());
}

#[tokio::test]
async fn what_is_at_hand_is_the_record_but_for_the_time_that_has_passed() {
    let (front, store, clock) = front();
    let claim = claim();
    front.run(&claim, b"paid").await;
    assert!(front.find(&again(&claim)).is_none(), "nobody has asked for it yet");
    front.ask(&claim).await;
    for _ in 0..9 {
        clock.advance(Duration::from_secs(1));
        let truth = store.read(&claim.key).await.unwrap();
        assert_eq!(front.find(&again(&claim)), truth);
    }
    clock.advance(Duration::from_millis(999));
    assert!(front.find(&again(&claim)).is_some());
    clock.advance(Duration::from_millis(1));
    assert!(front.find(&again(&claim)).is_none(), "it is ten seconds old");
    front.ask(&claim).await;
    assert!(front.find(&again(&claim)).is_some(), "it was asked for again");
}

#[tokio::test]
async fn it_is_over_with_the_record() {
    let (front, store, clock) = front();
    let claim = Claim { ttl: Ttl::For(Duration::from_secs(5)), ..claim() };
    front.run(&claim, b"paid").await;
    front.ask(&claim).await;
    clock.advance(Duration::from_millis(4_999));
    assert!(front.find(&again(&claim)).is_some());
    clock.advance(Duration::from_millis(1));
    assert!(store.read(&claim.key).await.unwrap().is_none());
    assert!(front.find(&again(&claim)).is_none());

    // A key that was handed out is known for longer than it is valid.
    let issue = Issue {
        key: Key::from_bytes(rand::random()),
        scope: claim.scope,
        operation: Arc::clone(&claim.operation),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(Duration::from_secs(5)),
        kept_for: Ttl::For(HOUR),
        payload: Bytes::new(),
        format: FORMAT,
    };
    front.store.issue(&issue).await.unwrap();
    let claim = Claim { issued_only: true, ..claim_on(issue.key) };
    front.run(&claim, b"paid").await;
    front.ask(&claim).await;
    assert!(front.find(&again(&claim)).is_some());
    clock.advance(Duration::from_secs(5));
    assert!(front.find(&again(&claim)).is_none(), "the store says that it has expired");
    assert!(matches!(front.ask(&claim).await, Claimed::Found(_)));
    assert!(front.find(&again(&claim)).is_none(), "a refusal is not kept");
}

#[tokio::test]
async fn only_the_same_request_is_answered() {
    let (front, _, _) = front();
    let claim = claim();
    front.run(&claim, b"paid").await;
    front.ask(&claim).await;
    let mut others = [again(&claim), again(&claim), again(&claim), again(&claim)];
    others[0].fingerprint.digest[31] ^= 1;
    others[1].fingerprint.scheme = "test2".into();
    others[2].key = Key::from_bytes([0; 32]);
    others[3].format = 0;
    for other in &others {
        assert!(front.find(other).is_none(), "{other:?}");
    }
    // Whether the key must have been handed out is asked of keys without a record only.
    assert!(front.find(&Claim { issued_only: true, ..again(&claim) }).is_some());
    assert!(front.find(&again(&claim)).is_some());
}

#[tokio::test]
async fn nothing_but_what_is_completed_is_kept() {
    let (front, _, clock) = front();
    let claim = claim();
    let (store, cache) = (&front.store, front.cache());
    store.claim(&claim).await.unwrap();
    assert!(matches!(front.ask(&claim).await, Claimed::Found(_)));
    assert!(cache.records.is_empty(), "it is running");
    store.release(&claim.key, &claim.token).await.unwrap();
    let refused = Claim { on_unknown: OnUnknown::Refuse, ..again(&claim) };
    assert!(matches!(store.claim(&refused).await.unwrap(), Claimed::Found(_)));
    assert!(cache.records.is_empty(), "it was released");
    let second = again(&claim);
    store.claim(&second).await.unwrap();
    clock.advance(Duration::from_secs(31));
    assert!(matches!(store.claim(&refused).await.unwrap(), Claimed::Found(_)));
    assert!(cache.records.is_empty(), "its lease is over");
    store.complete(&completion(&second, b"paid")).await.unwrap();
    store.read(&claim.key).await.unwrap();
    assert!(cache.records.is_empty(), "it was not asked for by a claim");
    assert!(matches!(store.claim(&refused).await.unwrap(), Claimed::Found(_)));
    assert_eq!(cache.records.len(), 1);
}

#[cfg(feature = "seal")]
#[tokio::test]
async fn what_is_sealed_is_kept_sealed() {
    let (front, store, _) = front();
    let seal: Arc<dyn crate::Seal> = Arc::new(crate::KeyRing::new(1, &[7; 32]));
    let veil = Veil { seal: Some(seal), redact: None };
    let front = Front { veil: veil.clone(), ..front };
    let cached = Cached { store: Arc::new(store.clone()), cache: Arc::clone(front.cache()) };
    let sealed = Sealed { store: Arc::new(cached), veil };
    let claim = claim();
    sealed.claim(&claim).await.unwrap();
    sealed.complete(&completion(&claim, b"paid")).await.unwrap();
    sealed.claim(&again(&claim)).await.unwrap();
    let (_, kept) = front.cache().find(&again(&claim)).unwrap();
    assert_eq!(kept.payload, store.read(&claim.key).await.unwrap().unwrap().payload);
    assert_ne!(kept.payload, "paid");
    assert_eq!(front.find(&again(&claim)).unwrap().payload, "paid");
}

#[tokio::test]
async fn a_tombstone_is_kept_as_one() {
    let (front, _, _) = front();
    let claim = claim();
    front.store.claim(&claim).await.unwrap();
    let tombstone = Completion { flags: Flags::TOMBSTONE, ..completion(&claim, b"") };
    front.store.complete(&tombstone).await.unwrap();
    front.ask(&claim).await;
    let found = front.cache().find(&again(&claim));
    assert!(matches!(found, Some((Decision::NotReplayable, _))), "{found:?}");
}

#[tokio::test]
async fn what_this_engine_does_to_a_key_ends_what_was_kept_of_it() {
    let (front, store, _) = front();
    let purged_elsewhere = async |claim: &Claim| {
        front.run(claim, b"paid").await;
        front.ask(claim).await;
        let purged = store.manage().unwrap().purge(&Purge::Key(claim.key)).await.unwrap();
        assert_eq!(purged.removed, 1);
        assert!(front.find(&again(claim)).is_some(), "nobody heard of the purge");
    };
    let other = |claim: &Claim| {
        let mut other = again(claim);
        other.fingerprint.digest = [9; 32];
        other
    };

    let first = claim();
    purged_elsewhere(&first).await;
    assert!(matches!(front.claim(&other(&first)).await.unwrap(), Claimed::Granted(_)));
    assert!(front.find(&again(&first)).is_none(), "another request was granted its key");

    let second = claim();
    purged_elsewhere(&second).await;
    let issue = Issue {
        key: second.key,
        scope: second.scope,
        operation: Arc::clone(&second.operation),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(HOUR),
        kept_for: Ttl::For(HOUR),
        payload: Bytes::new(),
        format: FORMAT,
    };
    assert_eq!(front.store.issue(&issue).await.unwrap(), Written::Done);
    assert!(front.find(&again(&second)).is_none(), "its key was handed out");

    let third = claim();
    purged_elsewhere(&third).await;
    store.claim(&other(&third)).await.unwrap();
    assert!(matches!(front.claim(&other(&third)).await.unwrap(), Claimed::Found(_)));
    assert!(front.find(&again(&third)).is_none(), "another request is running under its key");
}

/// Where a call of a [`Far`] store pauses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Claim,
    Claimed,
    Purge(Key),
    Purged,
}

type Pause = dyn Fn(At) -> BoxFuture<'static, ()> + Send + Sync;

/// A remote store: claims and purges pause on their ways there and back.
struct Far {
    store: MemoryStore,
    pause: Box<Pause>,
}

impl fmt::Debug for Far {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl Store for Far {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            (self.pause)(At::Claim).await;
            let claimed = self.store.claim(claim).await;
            (self.pause)(At::Claimed).await;
            claimed
        })
    }

    pass_on!();

    fn is_remote(&self) -> bool {
        true
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }
}

impl Manage for Far {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.store.find(operation_id)
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        self.store.list(listing)
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            let Purge::Key(key) = *purge else { panic!("a scope is purged") };
            (self.pause)(At::Purge(key)).await;
            let purged = self.store.purge(purge).await;
            (self.pause)(At::Purged).await;
            purged
        })
    }
}

const PURGE: At = At::Purge(Key::from_bytes([0; 32]));

/// A front whose calls wait for a permit at one place.
fn held_at(place: At) -> (Arc<Front>, Arc<Semaphore>) {
    let (store, clock) = memory();
    let permits = Arc::new(Semaphore::new(0));
    let go_on = Arc::clone(&permits);
    let pause = move |at| -> BoxFuture<'static, ()> {
        let go_on = Arc::clone(&go_on);
        Box::pin(async move {
            if discriminant(&at) == discriminant(&place) {
                go_on.acquire().await.unwrap().forget();
            }
        })
    };
    let far = Arc::new(Far { store, pause: Box::new(pause) });
    (Arc::new(Front::over(far, ReplayCache::new().clock(clock))), permits)
}

/// Lets all others go as far as they can.
async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

#[tokio::test]
async fn an_answer_that_a_purge_has_overtaken_is_not_good() {
    let (front, go_on) = held_at(At::Claimed);
    let claim = claim();
    go_on.add_permits(1);
    front.run(&claim, b"paid").await;
    // Read before the purge, and answered after it.
    let (asking, asked) = (Arc::clone(&front), claim.clone());
    let late = tokio::spawn(async move { asking.ask(&asked).await });
    settle().await;
    assert_eq!(front.purge(Purge::Key(claim.key)).await.removed, 1);
    go_on.add_permits(1);
    assert!(matches!(late.await.unwrap(), Claimed::Found(_)), "so the store said");
    assert!(front.find(&again(&claim)).is_none());
}

#[tokio::test]
async fn what_is_said_while_a_purge_goes_on_is_not_kept() {
    for place in [PURGE, At::Purged] {
        let (front, go_on) = held_at(place);
        let (kept, purged) = (claim(), claim());
        for claim in [&kept, &purged] {
            front.run(claim, b"paid").await;
            front.ask(claim).await;
            assert!(front.find(&again(claim)).is_some());
        }
        let (purging, key) = (Arc::clone(&front), purged.key);
        let purge = tokio::spawn(async move { purging.purge(Purge::Key(key)).await });
        settle().await;
        for claim in [&kept, &purged] {
            assert!(front.find(&again(claim)).is_none(), "a purge is going on");
        }
        front.ask(&kept).await;
        assert!(front.find(&again(&kept)).is_none(), "a purge is going on");
        go_on.add_permits(1);
        assert_eq!(purge.await.unwrap().removed, 1);
        assert!(front.cache().records.is_empty());
        front.ask(&kept).await;
        assert!(front.find(&again(&kept)).is_some(), "the purge is over");
    }
}

#[tokio::test]
async fn a_purge_that_is_given_up_ends_too() {
    let (front, _) = held_at(PURGE);
    let claim = claim();
    front.run(&claim, b"paid").await;
    let purging = front.purge(Purge::Key(claim.key));
    assert!(tokio::time::timeout(Duration::from_millis(5), purging).await.is_err());
    front.ask(&claim).await;
    assert!(front.find(&again(&claim)).is_some());
}

#[tokio::test]
async fn what_is_kept_is_bounded() {
    const BYTES: usize = 1 << 20;
    let (store, clock) = memory();
    let options = ReplayCache::new().max_bytes(BYTES).clock(clock.clone());
    let front = Front::over(Arc::new(store), options);
    let records = &front.cache().records;
    let mut rng = SmallRng::seed_from_u64(7);
    let mut fullest = 0;
    for number in 0..4_000 {
        let claim = claim();
        let payload = vec![b'.'; rng.random_range(0..4_000)];
        front.run(&claim, &payload).await;
        front.ask(&claim).await;
        if number % 20 != 0 {
            continue;
        }
        let kept = records.iter().map(|(key, kept)| Bytewise.weight(&key, &kept)).sum::<u64>();
        assert_eq!(records.weight(), kept);
        assert!(kept <= BYTES as u64, "{kept} bytes");
        fullest = fullest.max(kept);
    }
    assert!(fullest > BYTES as u64 * 8 / 10, "{fullest} bytes");
    let claim = claim();
    front.run(&claim, &vec![b'.'; BYTES / 2]).await;
    front.ask(&claim).await;
    assert!(front.find(&again(&claim)).is_none(), "it would take the place of all others");

    // What is too old goes with the next sweep.
    assert!(!records.is_empty());
    clock.advance(MAX_AGE);
    assert_eq!(front.store.sweep(10).await.unwrap(), 0);
    assert!(records.is_empty());
}

#[test]
fn nothing_is_kept_where_it_would_be_of_no_use() {
    let (remote, near) = (held_at(PURGE).0.store.store.clone(), Arc::new(memory().0));
    let kept = |store: Arc<dyn Store>, options: Option<ReplayCache>| {
        Cached::over(store, options, &NO_VEIL).1.is_some()
    };
    assert!(kept(remote.clone(), Some(ReplayCache::new())));
    assert!(!kept(near, Some(ReplayCache::new())), "the store is as near");
    assert!(!kept(remote.clone(), None));
    assert!(!kept(remote.clone(), Some(ReplayCache::new().max_bytes(0))));
    assert!(!kept(remote, Some(ReplayCache::new().max_age(Duration::from_micros(999)))));
}

/// Two engines over one store, and what has been purged through which of them, and when.
struct World {
    store: MemoryStore,
    clock: ManualClock,
    engines: [Front; 2],
    purged: Arc<Mutex<HashMap<OperationId, (usize, Millis)>>>,
    keys: [Key; 3],
    replays: AtomicUsize,
    stale: AtomicUsize,
}

impl World {
    const MAX_AGE: Duration = Duration::from_secs(1);
    const TTL: Duration = Duration::from_secs(4);

    fn new(seed: u64) -> Self {
        let (store, clock) = memory();
        let purged = Arc::new(Mutex::new(HashMap::new()));
        let engines = [0, 1].map(|engine| {
            let rng = Mutex::new(SmallRng::seed_from_u64(seed ^ (engine as u64 + 1) << 32));
            let (records, time, purged) = (store.clone(), clock.clone(), Arc::clone(&purged));
            let pause = move |at| -> BoxFuture<'static, ()> {
                let turns = rng.lock().unwrap().random_range(0..6);
                let (records, time) = (records.clone(), Clock::from(time.clone()));
                let purged = Arc::clone(&purged);
                Box::pin(async move {
                    for _ in 0..turns {
                        yield_now().await;
                    }
                    // What is purged the moment after.
                    if let At::Purge(key) = at
                        && let Some(record) = read(&records, &key)
                    {
                        purged.lock().unwrap().insert(record.operation_id, (engine, time.now()));
                    }
                })
            };
            let far = Arc::new(Far { store: store.clone(), pause: Box::new(pause) });
            Front::over(far, ReplayCache::new().max_age(Self::MAX_AGE).clock(clock.clone()))
        });
        let keys = [1, 2, 3].map(|byte| Key::from_bytes([byte; 32]));
        let [replays, stale] = [AtomicUsize::new(0), AtomicUsize::new(0)];
        Self { store, clock, engines, purged, keys, replays, stale }
    }

    async fn client(&self, mut rng: SmallRng) {
        for _ in 0..60 {
            let engine = rng.random_range(0..2);
            let key = self.keys[rng.random_range(0..3)];
            match rng.random_range(0..15) {
                0 => drop(self.engines[engine].purge(Purge::Key(key)).await),
                1..3 => self.clock.advance(Duration::from_millis(rng.random_range(0..300))),
                _ => self.request(engine, key, &mut rng).await,
            }
            yield_now().await;
        }
    }

    async fn request(&self, number: usize, key: Key, rng: &mut SmallRng) {
        let engine = &self.engines[number];
        let mut claim = Claim { ttl: Ttl::For(Self::TTL), ..claim_on(key) };
        claim.fingerprint.digest[0] = rng.random_range(0..2);
        if let Some(record) = engine.find(&claim) {
            return self.judge(number, &claim, &record);
        }
        let Claimed::Granted(record) = engine.store.claim(&claim).await.unwrap() else { return };
        for _ in 0..rng.random_range(0..6) {
            yield_now().await;
        }
        let payload = record.operation_id.as_bytes();
        let (store, token) = (&engine.store, &claim.token);
        // Somebody may have purged it or taken it over meanwhile.
        let _ = match rng.random_range(0..10) {
            0 => store.release(&key, token).await,
            1 => store.forget(&key, token).await,
            _ => store.complete(&completion(&claim, payload)).await,
        };
    }

    /// What was at hand is so, or was so a moment ago.
    fn judge(&self, engine: usize, claim: &Claim, record: &Record) {
        self.replays.fetch_add(1, Ordering::SeqCst);
        assert_eq!(record.state, State::Completed);
        assert_eq!(record.fingerprint, claim.fingerprint);
        assert_eq!(&record.payload[..], record.operation_id.as_bytes());
        assert!(!record.valid_left.is_over() && record.valid_left <= Ttl::For(Self::TTL));
        match read(&self.store, &claim.key) {
            Some(truth) if truth.operation_id == record.operation_id => {
                assert_eq!((truth.state, &truth.payload), (State::Completed, &record.payload));
                assert!(record.valid_left <= truth.valid_left, "{record:?} of {truth:?}");
            }
            other => {
                self.stale.fetch_add(1, Ordering::SeqCst);
                let purged = self.purged.lock().unwrap().get(&record.operation_id).copied();
                let (by, at) = purged.unwrap_or_else(|| panic!("{record:?} is over; {other:?}"));
                assert_ne!(by, engine, "it was purged through this engine: {record:?}");
                let age = until(at, Clock::from(self.clock.clone()).now());
                assert!(age < Self::MAX_AGE, "it was purged {age:?} ago: {record:?}");
            }
        }
    }
}

fn read(store: &MemoryStore, key: &Key) -> Option<Record> {
    store.read(key).now_or_never().unwrap().unwrap()
}

/// Whatever comes first: what is replayed was the store's word no longer ago than it may be.
#[tokio::test]
async fn nothing_is_replayed_that_was_purged_here_or_too_long_ago_elsewhere() {
    let (mut replays, mut stale) = (0, 0);
    for seed in 0..300 {
        let world = World::new(seed);
        let clients = (0..8).map(|client| {
            let rng = SmallRng::seed_from_u64(seed << 8 | client);
            world.client(rng)
        });
        join_all(clients).await;
        replays += world.replays.load(Ordering::SeqCst);
        stale += world.stale.load(Ordering::SeqCst);
    }
    println!("{replays} replays, {stale} of them of what was purged elsewhere");
    assert!(replays > 5_000 && stale > 500, "{replays} replays, {stale} stale ones");
}
