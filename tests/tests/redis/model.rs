//! The script against the code of the embedded stores, at random.

use std::{sync::Arc, time::Duration};

use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, Record, ScopeDigest, Token, Ttl,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, MemoryStore, Renewal, Store,
        StoreError, Written,
    },
    testing::StoreFixture as _,
};
use rand::{RngExt as _, SeedableRng as _};

use super::{Fixture, claim_on};

/// Which of a record's times its age is.
const AGE: usize = 3;

/// What a store answered, as text: the records in it without their times, and the times beside it.
fn told<T: std::fmt::Debug>(answer: &T, record: Option<&Record>) -> (String, Option<[Ttl; 4]>) {
    match record {
        None => (format!("{answer:?}"), None),
        Some(record) => {
            let zero = Duration::ZERO;
            let (valid_left, kept_left) = (Ttl::Forever, Ttl::Forever);
            let untimed =
                Record { lease_left: zero, age: zero, valid_left, kept_left, ..record.clone() };
            let times = [
                Ttl::For(record.lease_left),
                record.valid_left,
                record.kept_left,
                Ttl::For(record.age),
            ];
            (format!("{answer:?} {untimed:?} {:?}", record.payload), Some(times))
        }
    }
}

/// Does one thing to a store that is drawn from all that can be done, and says what it answered.
async fn do_anything(store: &dyn Store, draw: &[u8; 8], number: u64) -> (String, Option<[Ttl; 4]>) {
    let pick = |index: usize, count: u8| usize::from(draw[index] % count);
    let key = Key::from_bytes([draw[1] % 2; 32]);
    let token = Token::from_bytes([draw[2] % 3; 16]);
    let spans = [45, 105, 3_615, 14_415].map(Duration::from_secs);
    let ttls = [Ttl::For(spans[0]), Ttl::For(spans[2]), Ttl::Forever];
    let payload = bytes::Bytes::from(number.to_string());
    let format = FORMAT + u16::from(draw[7].is_multiple_of(10));
    let operation_id = OperationId::from_bytes(u128::from(number).to_be_bytes());
    match pick(0, 9) {
        0..=2 => {
            let schemes = ["test/1", "test/11", "other/1"];
            let claim = Claim {
                operation: Arc::from(format!("operation {number}")),
                operation_id,
                fingerprint: Fingerprint { scheme: schemes[pick(3, 3)].into(), digest: [0; 32] },
                token,
                lease: spans[pick(4, 4).min(pick(5, 4))],
                ttl: ttls[pick(5, 3)],
                issued_only: draw[6].is_multiple_of(4),
                on_unknown: [OnUnknown::Rerun, OnUnknown::Rerun, OnUnknown::Refuse][pick(6, 3)],
                format,
                ..claim_on(key)
            };
            let answer = store.claim(&claim).await;
            let kind = match &answer {
                Ok(Claimed::Granted(record)) => return told(&"granted", Some(record)),
                Ok(Claimed::Found(record)) => return told(&"found", Some(record)),
                Ok(Claimed::Unknown) => "unknown".to_owned(),
                Err(error) => error.kind().to_string(),
            };
            told(&kind, None)
        }
        3 => {
            let issue = Issue {
                key,
                scope: ScopeDigest::from_bytes([1; 32]),
                operation: Arc::from("issuing"),
                operation_id,
                token,
                valid_for: ttls[pick(4, 3)],
                kept_for: ttls[pick(5, 3)],
                payload,
                format,
            };
            written(store.issue(&issue).await)
        }
        4 => written(store.checkpoint(&Checkpoint { key, token, payload, format }).await),
        5 => {
            let flags = [Flags::NONE, Flags::TOMBSTONE][pick(4, 2)];
            let ttl = ttls[pick(5, 3)];
            written(store.complete(&Completion { key, token, ttl, flags, payload, format }).await)
        }
        6 => written(store.release(&key, &token).await),
        7 => written(store.forget(&key, &token).await),
        _ => {
            let lease = spans[pick(4, 3)];
            let renewal = Renewal { key, token, lease };
            told(&store.renew(&[renewal]).await.map_err(|error| error.kind()), None)
        }
    }
}

fn written(answer: Result<Written, StoreError>) -> (String, Option<[Ttl; 4]>) {
    match answer {
        Ok(Written::Fenced(record)) => told(&"fenced", Some(&record)),
        answer => told(&answer.map_err(|error| error.kind()), None),
    }
}

/// The script says in its own language what the embedded stores say by one piece of code: here both
/// are asked the same, at random, and must answer the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_script_does_what_the_other_stores_do() {
    const RUNS: usize = 60;
    const STEPS: u64 = 60;
    let seed: u64 = std::env::var("IDEM_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("IDEM_TEST_SEED={seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut outcomes = std::collections::BTreeMap::new();
    for run in 0..RUNS {
        let fixture = Fixture::single().await;
        let clock = Clock::manual();
        let memory = MemoryStore::builder().clock(clock.clone()).build();
        let mut history = Vec::new();
        for step in 0..STEPS {
            // Times in the test are odd multiples of 15 seconds, and what passes is a multiple of
            // 30: nothing is ever just over.
            if random.random_range(0..4) == 0 {
                let passed = Duration::from_secs([30, 60, 1_800][random.random_range(0..3)]);
                history.push(format!("{passed:?} pass"));
                clock.advance(passed);
                fixture.advance(passed).await;
            }
            let draw: [u8; 8] = random.random();
            let (expected, expected_times) = do_anything(&memory, &draw, step).await;
            let (actual, actual_times) = do_anything(&fixture.store, &draw, step).await;
            history.push(format!("{draw:?}: {expected}"));
            let history = || history.join("\n");
            assert_eq!(actual, expected, "run {run}:\n{}", history());
            let pairs =
                actual_times.into_iter().flatten().zip(expected_times.into_iter().flatten());
            for (number, (actual, expected)) in pairs.enumerate() {
                let is_near = match (actual, expected) {
                    // Where a claim has ended as it was made, its claimant says how long it took,
                    // and no time has passed for that.
                    (Ttl::For(actual), Ttl::For(expected)) if number == AGE => {
                        actual < expected + Duration::from_secs(10)
                    }
                    (Ttl::For(actual), Ttl::For(expected)) => {
                        actual.abs_diff(expected) < Duration::from_secs(10)
                    }
                    (actual, expected) => actual == expected,
                };
                assert!(is_near, "run {run}: {actual:?}, not {expected:?}\n{}", history());
            }
            let kind = expected.split_whitespace().next().unwrap_or_default().to_owned();
            *outcomes.entry(kind).or_insert(0) += 1;
        }
    }
    println!("{outcomes:?}");
    assert!(outcomes.len() > 6, "a test that reaches everything: {outcomes:?}");
}
