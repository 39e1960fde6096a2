//! Laws 27 and 28: checkpoints.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::{
    Ask, LEASE, StoreFixture, TTL, any_claim, any_issue, assert_done, assert_fenced, assert_gone,
    assert_same, checkpoint_of, claim_on, completion_of,
};
use crate::{
    record::{FORMAT, Flags, Record},
    store::{Checkpoint, Claim},
};

/// Law 27: whoever is granted the next claim finds the last checkpoint's payload and format; only
/// completing and forgetting end it; it moves no time.
pub async fn a_checkpoint_survives_the_attempt(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    let granted = store.granted(&claim, "nobody has used the key").await;
    fixture.advance(LEASE / 2).await;
    let every_byte: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    for payload in [Bytes::from(every_byte), Bytes::new(), Bytes::from_static(b"first")] {
        let checkpoint = Checkpoint { payload, ..checkpoint_of(&claim, b"") };
        for reason in ["it holds the claim", "the first answer may have been lost"] {
            assert_done(&store.checkpoint(&checkpoint).await, reason);
            let record = second.kept(&claim.key, "it is claimed").await;
            let expected = Record { payload: checkpoint.payload.clone(), ..granted.clone() };
            assert_same(&expected, &record, LEASE / 2, "nothing but the payload changes");
        }
    }
    let again = second.granted(&claim, "it holds the claim").await;
    assert_eq!(again.payload, &b"first"[..], "its own checkpoint comes back");

    // The owner stopped waiting for one, and went on to the next.
    let overtaken = checkpoint_of(&claim, b"overtaken");
    let _ = store.checkpoint(&overtaken).now_or_never();
    assert_done(&store.checkpoint(&checkpoint_of(&claim, b"last")).await, "it holds the claim");

    fixture.advance(LEASE).await;
    let lapsed = second.kept(&claim.key, "the lease's end removes nothing").await;
    assert!(lapsed.lease_left.is_zero(), "a checkpoint does not renew the lease: {lapsed:?}");
    let late = checkpoint_of(&claim, b"late");
    assert_done(&store.checkpoint(&late).await, "nobody has claimed since");
    // A claimant of the next release reads the payload in the format that it was written in.
    let next = Claim { format: FORMAT + 1, ..claim_on(claim.key) };
    let record = second.granted(&next, "a late checkpoint does not renew the lease").await;
    assert_eq!(record.attempt, 2, "it is a takeover");
    assert_eq!(record.payload, late.payload, "the checkpoint survives a takeover");
    assert_eq!(record.format, FORMAT, "the format is the payload's");

    assert_done(&second.release(&next.key, &next.token).await, "it holds the claim");
    let last = claim_on(claim.key);
    let record = store.granted(&last, "the claim was given up").await;
    assert_eq!(record.payload, late.payload, "the checkpoint survives a release");
    let completion = completion_of(&last, b"answer");
    assert_done(&store.complete(&completion).await, "it holds the claim");
    let record = second.refused(&claim_on(claim.key), "it is completed").await;
    assert_eq!(record.payload, completion.payload, "completing replaces the checkpoint");

    let forgotten = any_claim();
    store.granted(&forgotten, "nobody has used the key").await;
    let checkpoint = checkpoint_of(&forgotten, b"so far");
    assert_done(&store.checkpoint(&checkpoint).await, "it holds the claim");
    let reason = "it holds the claim";
    assert_done(&store.forget(&forgotten.key, &forgotten.token).await, reason);
    let record = second.granted(&claim_on(forgotten.key), "it was forgotten").await;
    assert!(record.payload.is_empty(), "forgetting ends the checkpoint: {record:?}");

    let issue = any_issue();
    assert_done(&store.issue(&issue).await, "nobody has used the key");
    let user = claim_on(issue.key);
    let granted = store.granted(&user, "the key was issued").await;
    let checkpoint = checkpoint_of(&user, b"so far");
    assert_done(&store.checkpoint(&checkpoint).await, "it holds the claim");
    let expected = Record { payload: checkpoint.payload, ..granted };
    assert_eq!(expected.flags, Flags::ISSUED);
    let record = second.kept(&issue.key, "it is claimed").await;
    assert_same(&expected, &record, Duration::ZERO, "nothing but the payload changes");
}

/// Law 28: under a token that another claim has replaced, or whose claim has ended, nothing is
/// checkpointed; where there is no record, none is made.
pub async fn a_fenced_owner_checkpoints_nothing(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let old = any_claim();
    store.granted(&old, "nobody has used the key").await;
    fixture.advance(LEASE).await;
    let new = claim_on(old.key);
    second.granted(&new, "the lease is over").await;
    let stale = checkpoint_of(&old, b"stale");
    let own = checkpoint_of(&new, b"stale");

    let running = second.kept(&old.key, "it was taken over").await;
    let reason = "another claim has replaced the token, and runs";
    assert_fenced(store.checkpoint(&stale).await, &running, reason);
    assert_same(&running, &store.kept(&old.key, reason).await, Duration::ZERO, reason);

    assert_done(&second.release(&new.key, &new.token).await, "it holds the claim");
    let released = second.kept(&old.key, "releasing removes nothing").await;
    let reason = "the claim was given up";
    for checkpoint in [&stale, &own] {
        assert_fenced(store.checkpoint(checkpoint).await, &released, reason);
    }
    assert_same(&released, &store.kept(&old.key, reason).await, Duration::ZERO, reason);

    let last = claim_on(old.key);
    store.granted(&last, "the claim was given up").await;
    assert_done(&store.complete(&completion_of(&last, b"answer")).await, "it holds the claim");
    let completed = second.kept(&old.key, "it is completed").await;
    let reason = "it is completed";
    for checkpoint in [&stale, &checkpoint_of(&last, b"stale")] {
        assert_fenced(second.checkpoint(checkpoint).await, &completed, reason);
    }
    assert_same(&completed, &store.kept(&old.key, reason).await, Duration::ZERO, reason);

    let issue = any_issue();
    assert_done(&store.issue(&issue).await, "nobody has used the key");
    let issued = second.kept(&issue.key, "it was issued").await;
    let issuer = Claim { token: issue.token, ..claim_on(issue.key) };
    let reason = "nobody has claimed the key, and its issuer does not hold it";
    assert_fenced(store.checkpoint(&checkpoint_of(&issuer, b"stale")).await, &issued, reason);

    let [absent, forgotten, over] = [any_claim(), any_claim(), any_claim()];
    for claim in [&forgotten, &over] {
        store.granted(claim, "nobody has used the key").await;
    }
    assert_done(&store.forget(&forgotten.key, &forgotten.token).await, "it holds the claim");
    fixture.advance(TTL).await;
    for claim in [&absent, &forgotten, &over] {
        let reason = "there is no record";
        assert_gone(&store.checkpoint(&checkpoint_of(claim, b"stale")).await, reason);
        second.none(&claim.key, reason).await;
    }
}
