use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::*;
use crate::{
    decision::OnUnknown,
    key::{OperationId, ScopeDigest},
    record::{Fingerprint, Flags, Ttl},
    store::{Purge, Purged, clock::ManualClock, row::Row},
};

const HOUR: Duration = Duration::from_secs(3600);

fn claim() -> Claim {
    Claim {
        key: Key::from_bytes(rand::random()),
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

fn issue(payload: Bytes) -> Issue {
    Issue {
        key: Key::from_bytes(rand::random()),
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: Arc::from("POST /flows"),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(HOUR),
        kept_for: Ttl::For(HOUR),
        payload,
        format: FORMAT,
    }
}

fn completion(claim: &Claim, payload: Bytes) -> Completion {
    let (flags, format) = (Flags::NONE, FORMAT);
    Completion { key: claim.key, token: claim.token, ttl: claim.ttl, flags, payload, format }
}

fn store(
    builder: impl FnOnce(MemoryStoreBuilder) -> MemoryStoreBuilder,
) -> (MemoryStore, ManualClock) {
    let clock = Clock::manual();
    (builder(MemoryStore::builder()).clock(clock.clone()).build(), clock)
}

fn counts(store: &MemoryStore) -> (usize, usize) {
    (store.0.records.load(Ordering::SeqCst), store.0.bytes.load(Ordering::SeqCst))
}

/// How many entries all heaps have together.
fn due(store: &MemoryStore) -> usize {
    store.0.shards.iter().map(|shard| lock(shard).due.len()).sum()
}

fn is_full<T>(answer: &Result<T, StoreError>) -> bool {
    matches!(answer, Err(error) if error.kind() == StoreErrorKind::Full)
}

#[tokio::test]
async fn at_its_bound_it_refuses_new_keys_and_drops_nothing_that_lives() {
    let (store, clock) = store(|builder| builder.max_records(3));
    let claims = [claim(), claim(), claim()];
    for claim in &claims {
        store.claim(claim).await.unwrap();
    }
    assert!(is_full(&store.claim(&claim()).await));
    // Known keys are no new records, whatever is done to them.
    for claim in &claims {
        assert!(matches!(store.claim(claim).await, Ok(Claimed::Granted(_))));
        let answer = store.complete(&completion(claim, Bytes::new())).await;
        assert_eq!(answer.unwrap(), Written::Done);
    }
    assert!(is_full(&store.claim(&claim()).await));
    clock.advance(HOUR);
    assert!(matches!(store.claim(&claim()).await, Ok(Claimed::Granted(_))), "three have expired");
}

#[tokio::test]
async fn at_its_bound_it_issues_nothing_and_what_is_issued_can_be_used() {
    let (store, clock) = store(|builder| builder.max_records(1).max_bytes(100_000));
    let issued = issue(Bytes::from(vec![0; 100_000]));
    assert_eq!(store.issue(&issued).await.unwrap(), Written::Done);
    assert_eq!(counts(&store).0, 1);
    assert!(counts(&store).1 > 100_000, "what is issued counts");
    assert!(is_full(&store.issue(&issue(Bytes::new())).await));
    assert!(is_full(&store.claim(&claim()).await));
    let unknown = Claim { issued_only: true, ..claim() };
    assert_eq!(store.claim(&unknown).await.unwrap(), Claimed::Unknown, "it needs no room");
    assert_eq!(store.issue(&issued).await.unwrap(), Written::Done, "it is no new record");

    let user = Claim { key: issued.key, ..claim() };
    assert!(matches!(store.claim(&user).await, Ok(Claimed::Granted(_))));
    let Claim { key, token, format, .. } = user;
    let checkpoint = Checkpoint { key, token, payload: Bytes::from(vec![0; 200_000]), format };
    assert_eq!(store.checkpoint(&checkpoint).await.unwrap(), Written::Done);
    assert!(counts(&store).1 > 200_000, "what is checkpointed counts");
    clock.advance(HOUR);
    assert_eq!(store.issue(&issue(Bytes::new())).await.unwrap(), Written::Done);
    assert_eq!(counts(&store).0, 1, "the bound had what was over dropped");
    assert!(counts(&store).1 < 1_000);
}

#[tokio::test]
async fn a_forgotten_record_makes_room() {
    let (store, _) = store(|builder| builder.max_records(1));
    let first = claim();
    store.claim(&first).await.unwrap();
    assert!(is_full(&store.claim(&claim()).await));
    store.forget(&first.key, &first.token).await.unwrap();
    assert_eq!(counts(&store), (0, 0));
    store.claim(&claim()).await.unwrap();
}

#[tokio::test]
async fn bytes_are_bounded_too_and_what_was_claimed_is_always_recorded() {
    let (store, clock) = store(|builder| builder.max_bytes(100_000));
    let [first, second] = [claim(), claim()];
    store.claim(&first).await.unwrap();
    store.claim(&second).await.unwrap();
    for claim in [&first, &second] {
        let payload = Bytes::from(vec![0; 100_000]);
        assert_eq!(store.complete(&completion(claim, payload)).await.unwrap(), Written::Done);
    }
    assert!(counts(&store).1 > 200_000);
    assert!(is_full(&store.claim(&claim()).await));
    clock.advance(HOUR);
    store.claim(&claim()).await.unwrap();
    assert_eq!(counts(&store).0, 1, "the bound had what was over dropped");
    assert!(counts(&store).1 < 1_000);
}

#[test]
fn the_bound_is_exact_however_many_claim_at_once() {
    let (store, _) = store(|builder| builder.max_records(100));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let _ = store.0.open(&claim());
                }
            });
        }
    });
    assert_eq!(counts(&store).0, 100);
}

#[tokio::test]
async fn a_replay_is_not_copied() {
    let (store, _) = store(|builder| builder);
    let claim = claim();
    store.claim(&claim).await.unwrap();
    let payload = Bytes::from(vec![7; 4096]);
    store.complete(&completion(&claim, payload.clone())).await.unwrap();
    let [first, second] = [store.read(&claim.key), store.read(&claim.key)];
    let (first, second) = (first.await.unwrap().unwrap(), second.await.unwrap().unwrap());
    assert_eq!(first.payload, payload);
    assert_eq!(first.payload.as_ptr(), second.payload.as_ptr());
}

#[tokio::test]
async fn claims_alone_keep_the_store_clean() {
    const A_SHARD: usize = 4;
    let (store, clock) = store(|builder| builder);
    let shards = store.0.shards.len();
    for _ in 0..10 {
        for number in 0..A_SHARD * shards {
            // As many of each shard, since an insertion works off what is due in its own only.
            let mut digest: [u8; 32] = rand::random();
            digest[30..].copy_from_slice(&u16::try_from(number % shards).unwrap().to_le_bytes());
            store.claim(&Claim { key: Key::from_bytes(digest), ..claim() }).await.unwrap();
        }
        clock.advance(HOUR);
    }
    assert_eq!(counts(&store).0, A_SHARD * shards, "those of the last round");
    assert_eq!(due(&store), A_SHARD * shards);
}

#[tokio::test]
async fn neither_forgotten_nor_shortened_records_pile_up_in_the_heap() {
    let (store, clock) = store(|builder| builder);
    for _ in 0..20_000 {
        let claim = claim();
        store.claim(&claim).await.unwrap();
        store.forget(&claim.key, &claim.token).await.unwrap();
    }
    let shards = store.0.shards.len();
    assert!(due(&store) <= shards * (STEPS_A_LOCK + 1), "{}", due(&store));
    for _ in 0..20_000 {
        let claim = claim();
        store.claim(&claim).await.unwrap();
        let ttl = Ttl::For(Duration::from_millis(1));
        store.complete(&Completion { ttl, ..completion(&claim, Bytes::new()) }).await.unwrap();
        clock.advance(Duration::from_millis(1));
    }
    assert!(due(&store) <= shards * (STEPS_A_LOCK + 8), "{}", due(&store));
    assert!(counts(&store).0 <= shards * 2, "{:?}", counts(&store));
}

#[tokio::test]
async fn keys_that_share_their_hash_expire_each_for_itself() {
    let (store, clock) = store(|builder| builder);
    let mut claims: Vec<_> = (0..4).map(|_| claim()).collect();
    for (number, claim) in claims.iter_mut().enumerate() {
        let mut digest = [0; 32];
        digest[31] = u8::try_from(number).unwrap();
        claim.key = Key::from_bytes(digest);
        store.claim(claim).await.unwrap();
    }
    let longer = Completion { ttl: Ttl::For(HOUR * 2), ..completion(&claims[1], Bytes::new()) };
    store.complete(&longer).await.unwrap();
    clock.advance(HOUR);
    assert_eq!(store.sweep(usize::MAX).await.unwrap(), 3);
    assert!(store.read(&claims[1].key).await.unwrap().is_some());
    clock.advance(HOUR);
    assert_eq!(store.sweep(usize::MAX).await.unwrap(), 1);
    assert_eq!((counts(&store), due(&store)), ((0, 0), 0));
}

#[tokio::test]
async fn a_bounded_sweep_comes_round_to_every_shard() {
    let (store, clock) = store(|builder| builder);
    for _ in 0..1_000 {
        store.claim(&claim()).await.unwrap();
    }
    clock.advance(HOUR);
    let mut rounds = 0;
    while store.sweep(10).await.unwrap() > 0 {
        rounds += 1;
    }
    assert_eq!((rounds, counts(&store)), (100, (0, 0)));
}

#[tokio::test]
async fn a_panic_under_a_lock_takes_nothing_down() {
    let (store, _) = store(|builder| builder);
    let claim = claim();
    store.claim(&claim).await.unwrap();
    let other = store.clone();
    let panicked = std::thread::spawn(move || {
        let _shard = other.0.shard(&claim.key);
        panic!("under the lock");
    });
    assert!(panicked.join().is_err());
    assert!(store.read(&claim.key).await.unwrap().is_some());
}

#[test]
fn the_default_bounds_agree() {
    let payload = Bytes::from(vec![0; 300]);
    let row = Row { payload, ..Row::fresh(&claim(), 0) };
    let answered = Entry::of(&row, &Operations::default());
    let million = 1_000_000 * answered.weight();
    let MemoryStoreBuilder { max_records, max_bytes, .. } = MemoryStore::builder();
    assert_eq!(max_records, 1_000_000);
    assert!(max_bytes / 10 * 9 < million && million < max_bytes / 10 * 11, "{million}");
}

#[tokio::test]
async fn what_is_purged_is_no_longer_counted() {
    let (store, clock) = store(|builder| builder);
    let claims: Vec<_> = (0..200).map(|_| claim()).collect();
    for claim in &claims {
        store.claim(claim).await.unwrap();
    }
    clock.advance(Duration::from_secs(60));
    let key = Purge::Key(claims[0].key);
    assert_eq!(store.purge(&key).await.unwrap(), Purged { removed: 1, running: 0 });
    let scope = Purge::Scope { scope: claims[0].scope, limit: 150 };
    assert_eq!(store.purge(&scope).await.unwrap().removed, 150);
    assert_eq!(counts(&store).0, 49);
    assert_eq!(store.purge(&scope).await.unwrap().removed, 49);
    assert_eq!(counts(&store), (0, 0));
    assert!(
        due(&store) <= store.0.shards.len() * STEPS_A_LOCK,
        "what the heaps say of them is bounded"
    );
}
