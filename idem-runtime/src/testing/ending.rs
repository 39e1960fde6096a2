//! Laws 8 to 14: ending a claim. Law 21: formats.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    Ask, LEASE, SLACK, StoreFixture, TTL, any_claim, assert_done, assert_fenced, assert_gone,
    assert_newer, assert_same, assert_ttl, claim_on, completion_of,
};
use crate::{
    key::{OperationId, ScopeDigest},
    record::{FORMAT, Fingerprint, Flags, State, Ttl},
    store::{Claim, Completion, Renewal},
};

/// Law 8: payload, flags, fingerprint, scope, operation, operation id and attempt come back as they
/// were written.
pub async fn a_completed_record_keeps_every_byte(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let every_byte: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let payloads = [Bytes::new(), Bytes::from_static(b"\0"), Bytes::from(every_byte)];
    for (payload, flags) in payloads.into_iter().zip([Flags::TOMBSTONE, Flags::NONE, Flags::NONE]) {
        let mut digest = [0; 32];
        digest[1..4].copy_from_slice(&[0xff, b'\'', 0x80]);
        let claim = Claim {
            scope: ScopeDigest::from_bytes(digest),
            operation: Arc::from("POST /größe/{}\n\"'; --\u{1F980}"),
            operation_id: OperationId::from_bytes([0xff; 16]),
            fingerprint: Fingerprint { scheme: "é ".repeat(341).into(), digest },
            ..any_claim()
        };
        store.granted(&claim, "nobody has used the key").await;
        let completion = Completion { payload, flags, ..completion_of(&claim, b"") };
        assert_done(&store.complete(&completion).await, "it holds the claim");

        let found = second.refused(&claim_on(claim.key), "it is completed").await;
        for record in [found, second.kept(&claim.key, "it is completed").await] {
            assert_eq!(record.state, State::Completed);
            assert_eq!(record.flags, flags, "flags");
            assert!(record.payload == completion.payload, "the payload must not change");
            assert_eq!(record.fingerprint, claim.fingerprint, "fingerprint");
            assert_eq!(record.scope, claim.scope, "scope");
            assert_eq!(record.operation, claim.operation, "operation");
            assert_eq!(record.operation_id, claim.operation_id, "operation id");
            assert_eq!(record.token, claim.token, "token");
            assert_eq!(record.attempt, 1, "attempt");
            assert_eq!(record.format, FORMAT, "format");
            assert_eq!(record.lease_left, Duration::ZERO, "a completed record has no lease");
        }
    }
}

/// Law 9: a second completion under the same token changes nothing; releasing and forgetting after
/// it change nothing either.
pub async fn completing_happens_once(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    assert_done(&store.complete(&completion_of(&claim, b"first")).await, "it holds the claim");
    let record = store.kept(&claim.key, "it is completed").await;

    let again = Completion {
        ttl: Ttl::Forever,
        flags: Flags::TOMBSTONE,
        ..completion_of(&claim, b"second")
    };
    assert_done(&second.complete(&again).await, "the first completion's answer may have been lost");
    let reason = "only the first completion counts";
    let zero = Duration::ZERO;
    assert_same(&record, &store.kept(&claim.key, reason).await, zero, reason);

    let reason = "what is completed can no longer be given up";
    assert_fenced(store.release(&claim.key, &claim.token).await, &record, reason);
    assert_fenced(store.forget(&claim.key, &claim.token).await, &record, reason);
    assert_same(&record, &store.kept(&claim.key, reason).await, zero, reason);
}

/// Law 10: the lease's end alone takes nothing away.
pub async fn a_late_owner_completes_if_nobody_claimed_since(fixture: &dyn StoreFixture) {
    let store = fixture.store();
    let [completed, released, forgotten] = [any_claim(), any_claim(), any_claim()];
    for claim in [&completed, &released, &forgotten] {
        store.granted(claim, "nobody has used the key").await;
    }
    fixture.advance(LEASE * 2).await;
    let reason = "nobody has claimed since";
    assert_done(&store.complete(&completion_of(&completed, b"late")).await, reason);
    assert_done(&store.release(&released.key, &released.token).await, reason);
    assert_done(&store.forget(&forgotten.key, &forgotten.token).await, reason);

    let record = store.refused(&claim_on(completed.key), "it is completed").await;
    assert_eq!(record.payload, &b"late"[..]);
    assert_eq!(store.kept(&released.key, "it was released").await.state, State::Released);
    store.none(&forgotten.key, "it was forgotten").await;
}

/// Law 11: under a token that another claim has replaced, completing, releasing and forgetting
/// change nothing.
pub async fn a_fenced_owner_changes_nothing(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let old = any_claim();
    store.granted(&old, "nobody has used the key").await;
    fixture.advance(LEASE).await;
    let new = claim_on(old.key);
    let running = second.granted(&new, "the lease is over").await;

    let reason = "another claim has replaced the token, and runs";
    assert_fenced(store.complete(&completion_of(&old, b"stale")).await, &running, reason);
    assert_fenced(store.release(&old.key, &old.token).await, &running, reason);
    assert_fenced(store.forget(&old.key, &old.token).await, &running, reason);
    assert_same(&running, &store.kept(&old.key, reason).await, Duration::ZERO, reason);

    assert_done(&second.complete(&completion_of(&new, b"new")).await, "it holds the claim");
    let completed = second.kept(&old.key, "it is completed").await;
    let reason = "another claim has replaced the token, and is completed";
    assert_fenced(store.complete(&completion_of(&old, b"stale")).await, &completed, reason);
    assert_fenced(store.release(&old.key, &old.token).await, &completed, reason);
    assert_fenced(store.forget(&old.key, &old.token).await, &completed, reason);
    assert_same(&completed, &store.kept(&old.key, reason).await, Duration::ZERO, reason);
}

/// Law 12: fingerprint, operation id, attempt and what is left of its time stay; only the claim is
/// given up.
pub async fn a_released_record_keeps_what_it_must(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    fixture.advance(LEASE / 2).await;
    assert_done(&store.release(&claim.key, &claim.token).await, "it holds the claim");
    let released = second.kept(&claim.key, "releasing removes nothing").await;
    assert_eq!(released.state, State::Released);
    assert_eq!(released.fingerprint, claim.fingerprint);
    assert_eq!(released.operation_id, claim.operation_id);
    assert_eq!(released.attempt, 1);
    assert_eq!(released.lease_left, Duration::ZERO, "a released record has no lease");
    let left = Ttl::For(TTL - LEASE / 2);
    assert_ttl(released.kept_left, left, "time it is kept", "releasing does not extend it");

    let reason = "it was released under this token, and the answer may have been lost";
    assert_done(&store.release(&claim.key, &claim.token).await, reason);
    let reason = "the claim was given up";
    assert_fenced(store.complete(&completion_of(&claim, b"late")).await, &released, reason);
    assert_fenced(store.forget(&claim.key, &claim.token).await, &released, reason);

    let next = claim_on(claim.key);
    let record = second.granted(&next, "the claim was given up, before its lease ended").await;
    assert_eq!(record.attempt, 2, "the attempts are counted on");
    assert_eq!(record.operation_id, claim.operation_id, "the operation is the same");
    assert_fenced(store.release(&claim.key, &claim.token).await, &record, "it is another's");
}

/// Law 13: nothing is left, not even the operation id.
pub async fn a_forgotten_key_starts_afresh(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    assert_done(&store.forget(&claim.key, &claim.token).await, "it holds the claim");
    second.none(&claim.key, "it was forgotten").await;
    let reason = "it was forgotten";
    assert_gone(&store.complete(&completion_of(&claim, b"late")).await, reason);
    assert_gone(&store.release(&claim.key, &claim.token).await, reason);
    assert_gone(&store.forget(&claim.key, &claim.token).await, reason);

    let other = Claim {
        fingerprint: Fingerprint { scheme: "law/2".into(), digest: [9; 32] },
        ..claim_on(claim.key)
    };
    let record = second.granted(&other, "nothing is left that could differ").await;
    assert_eq!(record.attempt, 1, "the attempts are counted afresh");
    assert_eq!(record.operation_id, other.operation_id, "it is another operation");
    assert_eq!(record.fingerprint, other.fingerprint, "nothing of the first one is left");
}

/// Law 14: ending a claim on a key without a record makes none.
pub async fn a_claim_that_never_was_is_gone(fixture: &dyn StoreFixture) {
    let store = fixture.store();
    let claim = any_claim();
    let reason = "there never was a claim";
    assert_gone(&store.complete(&completion_of(&claim, b"answer")).await, reason);
    assert_gone(&store.release(&claim.key, &claim.token).await, reason);
    assert_gone(&store.forget(&claim.key, &claim.token).await, reason);
    store.none(&claim.key, reason).await;
}

/// Law 21: a record of a newer format than the caller's is refused, and stays as it is.
pub async fn a_newer_record_is_refused_and_kept(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let newer = Claim { format: FORMAT + 1, ..any_claim() };
    let record = store.granted(&newer, "nobody has used the key").await;
    assert_eq!(record.format, FORMAT + 1, "a fresh record has the claimant's format");
    let renewal = Renewal { key: newer.key, token: newer.token, lease: LEASE };

    for passed in [Duration::ZERO, LEASE, TTL + SLACK] {
        fixture.advance(passed).await;
        let reason = format!("the record's format is newer, {passed:?} later too");
        assert_newer(&second.claim(&claim_on(newer.key)).await, &reason);
        assert_newer(&second.read(&newer.key).await, &reason);
        let stale = Completion { format: FORMAT, ..completion_of(&newer, b"old") };
        assert_newer(&second.complete(&stale).await, &reason);
        assert_newer(&second.release(&newer.key, &newer.token).await, &reason);
        assert_newer(&second.forget(&newer.key, &newer.token).await, &reason);
        let renewed = second.renew(&[renewal]).await;
        assert!(matches!(renewed.as_deref(), Ok([false])), "{reason}; renewed: {renewed:?}");
        assert_eq!(second.swept(usize::MAX).await, 0, "a sweep must leave it: {reason}");

        if passed < LEASE {
            let other = Claim { format: FORMAT + 1, ..claim_on(newer.key) };
            let found = store.refused(&other, "the newer claimant's lease is alive").await;
            assert_same(&record, &found, passed, "the older callers changed nothing");
        }
    }
}
