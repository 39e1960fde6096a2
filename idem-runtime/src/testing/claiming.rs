//! Laws 1 to 7: claiming.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::{sync::Barrier, task::JoinSet};

use super::{
    Ask, LEASE, SLACK, StoreFixture, TTL, any_claim, assert_done, assert_left, assert_same,
    assert_ttl, claim_on, completion_of,
};
use crate::{
    decision::{Asked, Decision, OnUnknown, decide},
    key::{Key, OperationId},
    record::{Fingerprint, Record, State, Ttl},
    store::{Claim, Claimed, Store},
};

/// Law 1: a claim on a key without a record is granted, as attempt 1 and under the operation id
/// that the claimant proposed.
pub async fn first_claim_wins(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    let record = store.granted(&claim, "nobody has used the key").await;
    assert_eq!(record.state, State::Running);
    assert_eq!(record.attempt, 1, "the first claim is attempt 1");
    assert_eq!(record.operation_id, claim.operation_id, "the proposed operation id is used");
    assert_eq!(record.key, claim.key);
    assert_eq!(record.scope, claim.scope);
    assert_eq!(record.operation, claim.operation);
    assert_eq!(record.fingerprint, claim.fingerprint);
    assert_eq!(record.token, claim.token);
    assert_eq!(record.format, claim.format);
    assert!(record.payload.is_empty(), "nothing is recorded yet");
    assert_left(record.lease_left, LEASE, "lease", "it was just claimed");
    assert_ttl(record.valid_left, Ttl::For(TTL), "validity", "it was just claimed");
    assert_ttl(record.kept_left, Ttl::For(TTL), "time it is kept", "it was just claimed");
    assert!(record.age <= SLACK, "it was just made, not {:?} ago", record.age);

    let zero = std::time::Duration::ZERO;
    assert_same(&record, &second.kept(&claim.key, "it was claimed").await, zero, "read back");
    let found = second.refused(&claim_on(claim.key), "the first claim is alive").await;
    assert_same(&record, &found, zero, "the second claimant sees the first one's record");
}

/// Law 2: of any number of claims at once, exactly one is granted.
pub async fn one_of_many_racing_claims_wins(fixture: &dyn StoreFixture) {
    const ROUNDS: u32 = 8;
    for round in 0..ROUNDS {
        let key = any_claim().key;
        let first = race(fixture, key, 1, "on a fresh key").await;
        fixture.advance(LEASE).await;
        let second = race(fixture, key, 2, "after the lease's end").await;
        assert_eq!(first.operation_id, second.operation_id, "round {round}");
        let released = fixture.store().release(&key, &second.token).await;
        assert_done(&released, "the winner holds the claim");
        let third = race(fixture, key, 3, "after a release").await;
        assert_eq!(first.operation_id, third.operation_id, "round {round}");
    }
}

/// Has many claimants claim one key at once, through both handles, and returns the winner's record.
async fn race(fixture: &dyn StoreFixture, key: Key, attempt: u32, when: &str) -> Record {
    const CLAIMANTS: usize = 64;
    let start = Arc::new(Barrier::new(CLAIMANTS));
    let mut claimants = JoinSet::new();
    for claimant in 0..CLAIMANTS {
        let store = if claimant % 2 == 0 { fixture.store() } else { fixture.second() };
        let start = Arc::clone(&start);
        claimants.spawn(async move {
            let claim = claim_on(key);
            start.wait().await;
            (claim.token, store.claim(&claim).await)
        });
    }
    let (mut winners, mut losers) = (Vec::new(), Vec::new());
    for (token, answer) in claimants.join_all().await {
        match answer {
            Ok(Claimed::Granted(record)) => {
                assert_eq!(record.token, token, "a claim is granted under the claimant's token");
                winners.push(record);
            }
            Ok(Claimed::Found(record)) => losers.push(record),
            Err(error) => panic!("a claim in the race {when} failed: {error:?}"),
        }
    }
    let [winner] = &winners[..] else {
        panic!("exactly one claim must be granted {when}, and {} were", winners.len());
    };
    assert_eq!(winner.attempt, attempt, "one claim in a race is one attempt ({when})");
    for loser in losers {
        assert_eq!(loser.token, winner.token, "losers see the winner's record ({when})");
    }
    winner.clone()
}

/// Law 3: asking again under the token that holds the claim is granted again, with the same
/// attempt, and renews the lease.
pub async fn claiming_twice_with_one_token_is_one_claim(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    fixture.advance(LEASE / 2).await;
    // The acknowledgement was lost, and the claimant, which asks again, proposes another id.
    let again = Claim { operation_id: OperationId::random(), ..claim.clone() };
    let record = second.granted(&again, "it holds the claim").await;
    assert_eq!(record.attempt, 1, "one claim is one attempt");
    assert_eq!(record.operation_id, claim.operation_id, "the record's operation id stays");
    assert_left(record.lease_left, LEASE, "lease", "asking again renews it");

    let shorter = Claim { lease: LEASE / 4, ..claim.clone() };
    let record = store.granted(&shorter, "it holds the claim").await;
    assert_left(record.lease_left, LEASE, "lease", "asking again does not shorten it");

    fixture.advance(LEASE + SLACK).await;
    let strict = Claim { on_unknown: OnUnknown::Refuse, ..claim.clone() };
    let record = store.granted(&strict, "nobody took the claim over since its lease ended").await;
    assert_eq!(record.attempt, 1, "one claim is one attempt, late or not");
    assert_left(record.lease_left, LEASE, "lease", "asking again renews it");
    store.refused(&claim_on(claim.key), "the lease was renewed").await;
}

/// Law 4: whoever is not granted gets the record as it is.
pub async fn a_refused_claim_changes_nothing(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    for state in [State::Running, State::Released, State::Completed] {
        let claim = prepare(&store, state).await;
        let before = store.kept(&claim.key, "it was claimed").await;
        fixture.advance(LEASE / 4).await;
        let other = Claim {
            operation: Arc::from("DELETE /elsewhere"),
            fingerprint: Fingerprint { scheme: "law/1".into(), digest: [0; 32] },
            lease: LEASE * 2,
            ttl: Ttl::Forever,
            ..claim_on(claim.key)
        };
        let found = second.refused(&other, "its fingerprint differs").await;
        let reason = format!("a claim on a record that is {state:?} was refused");
        assert_same(&before, &found, LEASE / 4, &reason);
        let after = store.kept(&claim.key, "a refusal removes nothing").await;
        assert_same(&before, &after, LEASE / 4, &reason);
    }
}

/// Leaves a fresh key in a state (other than issued, which no claim leads to).
async fn prepare(store: &Arc<dyn Store>, state: State) -> Claim {
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    match state {
        State::Issued | State::Running => {}
        State::Released => {
            assert_done(&store.release(&claim.key, &claim.token).await, "it holds the claim");
        }
        State::Completed => {
            let completion = completion_of(&claim, b"answer");
            assert_done(&store.complete(&completion).await, "it holds the claim");
        }
    }
    claim
}

/// Law 5: a claim on an existing record is granted exactly when [`decide`] says
/// [`Run`](Decision::Run); fingerprints of different schemes are never the same.
pub async fn a_claim_follows_the_decision(fixture: &dyn StoreFixture) {
    let store = fixture.store();
    for lapsed in [false, true] {
        for state in [State::Running, State::Released, State::Completed] {
            for on_unknown in [OnUnknown::Rerun, OnUnknown::Refuse, OnUnknown::Recover] {
                for (scheme, digest) in
                    [("law/1", [0xf1; 32]), ("law/1", [2; 32]), ("law/2", [0xf1; 32])]
                {
                    let claim = prepare(&store, state).await;
                    if lapsed {
                        fixture.advance(LEASE).await;
                    }
                    let fingerprint = Fingerprint { scheme: scheme.into(), digest };
                    let same = fingerprint == claim.fingerprint;
                    let seen = store.kept(&claim.key, "it was claimed").await.seen();
                    let asked = Asked { same, issued_only: false, on_unknown };
                    let decision = decide(seen, asked);
                    let next = Claim { fingerprint, on_unknown, ..claim_on(claim.key) };
                    let reason = format!("{seen:?} and {asked:?} lead to {decision:?}");
                    if decision == Decision::Run {
                        let record = store.granted(&next, &reason).await;
                        assert_eq!(record.token, next.token, "{reason}");
                        assert_eq!(record.attempt, 2, "{reason}");
                        assert_eq!(record.operation_id, claim.operation_id, "{reason}");
                        assert_eq!(record.fingerprint, claim.fingerprint, "{reason}");
                    } else {
                        let record = store.refused(&next, &reason).await;
                        assert_eq!(record.token, claim.token, "{reason}");
                    }
                }
            }
        }
    }
}

/// Law 6: after the lease's end, and not before, the next claim is granted, as the next attempt and
/// under the same operation id.
pub async fn a_lapsed_lease_is_taken_over(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    for attempt in 2..=4 {
        fixture.advance(LEASE - SLACK).await;
        second.refused(&claim_on(claim.key), "the lease is not over").await;
        fixture.advance(SLACK).await;
        let lapsed = second.kept(&claim.key, "the lease's end removes nothing").await;
        assert!(lapsed.lease_left.is_zero(), "the lease is over, yet {lapsed:?}");
        let next = claim_on(claim.key);
        let record = second.granted(&next, "the lease is over").await;
        assert_eq!(record.attempt, attempt, "each takeover is the next attempt");
        assert_eq!(record.operation_id, claim.operation_id, "the operation is the same");
        assert_eq!(record.token, next.token, "the claim is the next claimant's");
        assert_left(record.lease_left, LEASE, "lease", "it was just taken over");
        assert!(record.age >= LEASE - SLACK, "the record is as old as its first claim: {record:?}");
    }
}

/// Law 7: keys are bytes; case, trailing spaces and zeros matter.
pub async fn keys_differ_by_every_bit(fixture: &dyn StoreFixture) {
    let store = fixture.store();
    let mut text = [b'a'; 32];
    let mut digests = vec![text, [b'A'; 32], [0; 32], [0xff; 32], [b' '; 32]];
    for tail in [0, b' ', b'A', 0xff] {
        text[31] = tail;
        digests.push(text);
        text[30] = tail;
        digests.push(text);
    }
    let any: [u8; 32] = rand::random();
    for bit in 0..256 {
        let mut flipped = any;
        flipped[bit / 8] ^= 1 << (bit % 8);
        digests.push(flipped);
    }
    digests.push(any);
    let claims: Vec<_> =
        digests.into_iter().map(|digest| claim_on(Key::from_bytes(digest))).collect();
    join_all(claims.iter().map(|claim| store.granted(claim, "no other key is this one"))).await;
    for claim in &claims {
        let record = store.kept(&claim.key, "it was claimed").await;
        assert_eq!((record.key, record.token), (claim.key, claim.token), "each key has its record");
    }
}
