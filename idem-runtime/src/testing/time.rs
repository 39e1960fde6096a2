//! Laws 15 to 20: time.

use std::{collections::HashSet, time::Duration};

use futures_util::future::{join, join_all};

use super::{
    Ask, LEASE, SLACK, StoreFixture, TTL, any_claim, assert_done, assert_gone, assert_left,
    assert_same, assert_ttl, claim_on, completion_of,
};
use crate::{
    key::Token,
    record::{State, Ttl},
    store::{Claim, Completion, Renewal},
};

/// Long enough for a number of milliseconds to leave 32 bits, and of seconds to leave 31.
const CENTURIES: Duration = Duration::from_secs(200 * 365 * 24 * 3600);

/// Law 15: many claims at once, each answered for itself; a lapsed lease that nobody took over is
/// renewed, and none is shortened.
pub async fn renewing_extends_only_what_is_held(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let [held, taken, released, completed, absent] = std::array::from_fn(|_| any_claim());
    for claim in [&held, &taken, &released, &completed] {
        store.granted(claim, "nobody has used the key").await;
    }
    assert_done(&store.release(&released.key, &released.token).await, "it holds the claim");
    assert_done(&store.complete(&completion_of(&completed, b"")).await, "it holds the claim");
    fixture.advance(LEASE).await;
    let taker = claim_on(taken.key);
    let of_taker = second.granted(&taker, "the lease is over").await;

    let renewal = |claim: &Claim| Renewal { key: claim.key, token: claim.token, lease: LEASE };
    let all = [&absent, &held, &taken, &released, &completed, &held].map(renewal);
    let renewed = store.renew(&all).await;
    assert!(
        matches!(renewed.as_deref(), Ok([false, true, false, false, false, true])),
        "only the held one is renewed, late or not, and each is answered in order: {renewed:?}",
    );
    let record = second.kept(&held.key, "it was renewed").await;
    assert_left(record.lease_left, LEASE, "lease", "it was renewed");
    assert_eq!(record.attempt, 1, "renewing is no attempt");
    let record = second.kept(&taken.key, "it was taken over").await;
    assert_same(&of_taker, &record, Duration::ZERO, "the token before renewed nothing");
    assert_eq!(second.kept(&released.key, "it is kept").await.state, State::Released);
    second.none(&absent.key, "renewing makes no record").await;

    fixture.advance(LEASE - SLACK).await;
    second.refused(&claim_on(held.key), "its lease was renewed").await;
    let shorter = Renewal { lease: Duration::from_millis(1), ..renewal(&held) };
    let longer = Renewal { token: Token::random(), lease: LEASE * 9, ..renewal(&held) };
    let renewed = store.renew(&[shorter, longer]).await;
    assert!(matches!(renewed.as_deref(), Ok([true, false])), "one token holds it: {renewed:?}");
    let record = second.kept(&held.key, "it is held").await;
    assert_left(record.lease_left, SLACK, "lease", "renewing does not shorten it");
    let none = store.renew(&[]).await;
    assert!(matches!(none.as_deref(), Ok([])), "nothing to renew is no error: {none:?}");
}

/// Law 16: the time to live counts from completion, and reading or refusing does not extend it.
pub async fn time_to_live_counts_from_completion(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    store.granted(&claim, "nobody has used the key").await;
    fixture.advance(LEASE / 2).await;
    let completion = Completion { ttl: Ttl::For(TTL * 2), ..completion_of(&claim, b"answer") };
    assert_done(&store.complete(&completion).await, "it holds the claim");
    let record = store.kept(&claim.key, "it is completed").await;
    assert_ttl(record.valid_left, completion.ttl, "validity", "it was just completed");
    assert_ttl(record.kept_left, completion.ttl, "time it is kept", "it was just completed");

    for _ in 0..3 {
        fixture.advance(TTL / 2).await;
        second.kept(&claim.key, "its time to live is not over").await;
        second.refused(&claim_on(claim.key), "its time to live is not over").await;
    }
    fixture.advance(TTL / 2 - SLACK).await;
    second.refused(&claim_on(claim.key), "its time to live is not over").await;
    fixture.advance(SLACK).await;
    second.granted(&claim_on(claim.key), "its time to live is over since its completion").await;

    let brief = any_claim();
    store.granted(&brief, "nobody has used the key").await;
    let completion = Completion { ttl: Ttl::For(LEASE), ..completion_of(&brief, b"answer") };
    assert_done(&store.complete(&completion).await, "it holds the claim");
    fixture.advance(LEASE).await;
    second.none(&brief.key, "the completion's time to live is shorter than the claim's").await;
}

/// Law 17: an unfinished record is kept for the time to live from its last claim, and never for the
/// lease only; a running record whose lease is alive outlives even that.
pub async fn an_unfinished_record_is_kept_for_its_time_to_live(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let [running, released, again] = [any_claim(), any_claim(), any_claim()];
    for claim in [&running, &released, &again] {
        store.granted(claim, "nobody has used the key").await;
    }
    fixture.advance(TTL / 2).await;
    assert_done(&store.release(&released.key, &released.token).await, "it holds the claim");
    store.granted(&claim_on(again.key), "the lease is over").await;
    fixture.advance(TTL / 2 - SLACK).await;
    for claim in [&running, &released, &again] {
        second.kept(&claim.key, "its time to live is not over, only its lease").await;
    }
    fixture.advance(SLACK).await;
    second.none(&running.key, "its time to live since its claim is over").await;
    second.none(&released.key, "releasing does not extend its time to live").await;
    second.kept(&again.key, "its time to live counts from its last claim").await;
    fixture.advance(TTL / 2).await;
    second.none(&again.key, "its time to live since its last claim is over").await;

    assert_eq!(second.swept(usize::MAX).await, 3, "what is over is swept");

    let long = Claim { lease: TTL * 2, ..any_claim() };
    let renewed = any_claim();
    store.granted(&long, "nobody has used the key").await;
    store.granted(&renewed, "nobody has used the key").await;
    fixture.advance(LEASE).await;
    let renewal = Renewal { key: renewed.key, token: renewed.token, lease: TTL * 2 };
    let answer = store.renew(&[renewal]).await;
    assert!(matches!(answer.as_deref(), Ok([true])), "it holds the claim: {answer:?}");
    fixture.advance(TTL).await;
    assert_eq!(second.swept(usize::MAX).await, 0, "what is leased must not be swept");
    for claim in [&long, &renewed] {
        let found = second.refused(&claim_on(claim.key), "its lease is alive").await;
        assert!(
            found.kept_left >= Ttl::For(found.lease_left),
            "a record is kept as long as its lease at least: {found:?}",
        );
    }
    fixture.advance(TTL).await;
    for claim in [&long, &renewed] {
        second.none(&claim.key, "its time to live and its lease are over").await;
    }
}

/// Law 18: expired records are gone for readers, for claims and for ending or renewing a claim.
pub async fn expired_records_are_gone_before_any_sweep(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let [completed, running] = [any_claim(), any_claim()];
    for claim in [&completed, &running] {
        store.granted(claim, "nobody has used the key").await;
    }
    assert_done(&store.complete(&completion_of(&completed, b"old")).await, "it holds the claim");
    fixture.advance(TTL).await;

    let reason = "its time to live is over, swept or not";
    for claim in [&completed, &running] {
        second.none(&claim.key, reason).await;
        assert_gone(&store.complete(&completion_of(claim, b"late")).await, reason);
        assert_gone(&store.release(&claim.key, &claim.token).await, reason);
        assert_gone(&store.forget(&claim.key, &claim.token).await, reason);
        let renewal = Renewal { key: claim.key, token: claim.token, lease: LEASE };
        let renewed = store.renew(&[renewal]).await;
        assert!(matches!(renewed.as_deref(), Ok([false])), "{reason}; renewed: {renewed:?}");
    }
    for claim in [&completed, &running] {
        let next = claim_on(claim.key);
        let record = second.granted(&next, reason).await;
        assert_eq!(record.attempt, 1, "the attempts are counted afresh");
        assert_eq!(record.operation_id, next.operation_id, "it is another operation");
        assert!(record.payload.is_empty(), "nothing of the expired record is left: {record:?}");
        assert!(record.age <= SLACK, "the record is a new one: {record:?}");
    }
}

/// Law 19: for ever has no end, and no span of time is too long.
pub async fn for_ever_has_no_end(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = Claim { ttl: Ttl::Forever, ..any_claim() };
    let record = store.granted(&claim, "nobody has used the key").await;
    assert_eq!(record.kept_left, Ttl::Forever, "it is kept for ever");
    fixture.advance(CENTURIES).await;
    let next = Claim { ttl: Ttl::Forever, ..claim_on(claim.key) };
    let record = second.granted(&next, "the lease is over").await;
    assert_eq!(record.attempt, 2, "the record was kept");
    assert_done(&second.complete(&completion_of(&next, b"answer")).await, "it holds the claim");
    fixture.advance(CENTURIES).await;
    assert_eq!(store.swept(usize::MAX).await, 0, "for ever is never over");
    let record = store.kept(&claim.key, "it is kept for ever").await;
    assert_eq!((record.valid_left, record.kept_left), (Ttl::Forever, Ttl::Forever));
    assert_eq!(record.payload, &b"answer"[..]);

    for span in [Duration::MAX, Duration::MAX / 2, Duration::from_millis(u64::MAX)] {
        let claim = Claim { lease: span, ttl: Ttl::For(span), ..any_claim() };
        store.granted(&claim, "no span is too long").await;
        let renewal = Renewal { key: claim.key, token: claim.token, lease: span };
        let renewed = store.renew(&[renewal]).await;
        assert!(matches!(renewed.as_deref(), Ok([true])), "no span is too long: {renewed:?}");
        fixture.advance(LEASE).await;
        second.refused(&claim_on(claim.key), "its lease is very long").await;
        assert_done(
            &store.complete(&completion_of(&claim, b"answer")).await,
            "no span is too long",
        );
        fixture.advance(TTL).await;
        store.kept(&claim.key, "its time to live is very long").await;
    }
}

/// Law 20: sweeping removes what is over and nothing else, at most as many as it was told, also
/// when two processes sweep while claims arrive.
pub async fn sweeping_leaves_the_living(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let over: Vec<_> = (0..20).map(|_| Claim { ttl: Ttl::For(LEASE), ..any_claim() }).collect();
    let [completed, lapsed, leased, for_ever] = std::array::from_fn(|_| any_claim());
    let leased = Claim { lease: TTL, ttl: Ttl::For(LEASE), ..leased };
    let for_ever = Claim { ttl: Ttl::Forever, ..for_ever };
    let living = [&completed, &lapsed, &leased, &for_ever];
    join_all(over.iter().chain(living).map(|claim| store.granted(claim, "its key is fresh"))).await;
    assert_done(&store.complete(&completion_of(&completed, b"")).await, "it holds the claim");
    for claim in over.iter().take(10) {
        assert_done(&store.complete(&completion_of(claim, b"")).await, "it holds the claim");
    }
    assert_eq!(store.swept(usize::MAX).await, 0, "nothing is over yet");
    fixture.advance(LEASE * 2).await;

    assert_eq!(store.swept(0).await, 0, "no more than it was told");
    assert_eq!(store.swept(7).await, 7, "as many as it was told, since more are over");
    let (here, there) = join(store.swept(usize::MAX), second.swept(usize::MAX)).await;
    assert_eq!(here + there, 13, "all that is over is removed, and each is counted once");
    assert_eq!(second.swept(usize::MAX).await, 0, "nothing is left that is over");
    for claim in living {
        let record = second.kept(&claim.key, "it is not over").await;
        assert_eq!(record.token, claim.token, "a sweep changes nothing");
    }

    // Keys that are over are claimed anew while two processes sweep them.
    let over: Vec<_> = (0..100).map(|_| Claim { ttl: Ttl::For(LEASE), ..any_claim() }).collect();
    join_all(over.iter().map(|claim| store.granted(claim, "its key is fresh"))).await;
    fixture.advance(LEASE).await;
    let claims: Vec<_> = over.iter().map(|claim| claim_on(claim.key)).collect();
    let claiming = join_all(claims.iter().map(|claim| store.granted(claim, "its record is over")));
    let sweep = |store: std::sync::Arc<dyn crate::store::Store>| {
        tokio::spawn(async move {
            let mut removed = 0;
            for _ in 0..20 {
                removed += store.swept(3).await;
                tokio::task::yield_now().await;
            }
            removed
        })
    };
    let sweepers = [sweep(fixture.store()), sweep(fixture.second())];
    let records = claiming.await;
    let removed: usize = join_all(sweepers)
        .await
        .into_iter()
        .map(|removed| removed.unwrap_or_else(|error| panic!("a sweeper failed: {error}")))
        .sum();
    assert!(removed <= over.len(), "{removed} of {} were swept", over.len());
    let tokens: HashSet<_> = records.iter().map(|record| record.token).collect();
    for claim in &claims {
        let record = second.kept(&claim.key, "it was just claimed").await;
        assert!(tokens.contains(&record.token) && record.token == claim.token, "{record:?}");
    }
}
