//! Laws 22 to 26: server-issued keys.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{sync::Barrier, task::JoinSet};

use super::{
    Ask, KEPT, LEASE, SLACK, StoreFixture, TTL, VALID, any_claim, any_issue, assert_done,
    assert_fenced, assert_left, assert_same, assert_ttl, checkpoint_of, claim_on, completion_of,
    issue_on, race,
};
use crate::{
    key::{Key, OperationId},
    record::{Fingerprint, Flags, Record, State, Ttl},
    store::{Claim, Completion, Issue, Renewal, Written},
};

/// A claim on a key that the server must have handed out, with a time to live that an issued key
/// has no use for.
fn user_of(key: Key) -> Claim {
    Claim { issued_only: true, ttl: Ttl::Forever, ..claim_on(key) }
}

/// Law 22: to a claim that is `issued_only` a key without a record is unknown, and none is made; an
/// issued key is granted to exactly one claim, which says what the operation is.
pub async fn only_issued_keys_are_granted_to_who_asks_for_them(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let claim = any_claim();
    let guess = user_of(claim.key);
    store.unknown(&guess, "nobody has handed the key out").await;
    second.none(&claim.key, "nothing is made for an unknown key").await;
    let record = second.granted(&claim, "it does not ask for an issued key").await;
    assert_eq!((record.attempt, record.flags), (1, Flags::NONE), "it is an ordinary key");

    let found = store.refused(&guess, "the record that is there runs").await;
    assert_same(&record, &found, Duration::ZERO, "a refusal changes nothing");
    fixture.advance(LEASE).await;
    let taker = Claim { ttl: Ttl::For(TTL), ..guess };
    let record = store.granted(&taker, "a record that is there is decided like any other").await;
    assert_eq!(record.attempt, 2, "it is a takeover");
    fixture.advance(TTL).await;
    store.unknown(&taker, "its record is over").await;
    second.none(&claim.key, "nothing is made for an unknown key").await;

    let issue = any_issue();
    assert_done(&store.issue(&issue).await, "nobody has used the key");
    let user = user_of(issue.key);
    let winner = race(fixture, &user, 1, "on an issued key").await;
    assert_eq!(winner.state, State::Running);
    assert_eq!(winner.flags, Flags::ISSUED);
    assert_eq!(winner.payload, issue.payload, "what was issued comes with the claim");
    assert_eq!(winner.operation, user.operation, "the first user says what the operation is");
    assert_eq!(winner.fingerprint, user.fingerprint, "the first user says what the request is");
    assert_ne!(winner.operation_id, issue.operation_id, "the operation id is the first user's");
    let before = store.kept(&issue.key, "it was claimed").await;
    assert_same(&winner, &before, Duration::ZERO, "read back");
    fixture.advance(LEASE).await;
    let next = race(fixture, &user, 2, "after the lease's end").await;
    assert_eq!(next.operation_id, winner.operation_id, "the operation is the same");
}

/// Law 23: exactly one of any number of calls issues a key; again under its token changes nothing,
/// and nor does issuing over any other record.
pub async fn issuing_happens_once(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let issue = any_issue();
    assert_done(&store.issue(&issue).await, "nobody has used the key");
    let record = second.kept(&issue.key, "it was issued").await;
    assert_eq!(record.state, State::Issued);
    assert_eq!(record.flags, Flags::ISSUED);
    assert_eq!(record.attempt, 0, "nobody has claimed it");
    assert_eq!(record.key, issue.key);
    assert_eq!(record.scope, issue.scope);
    assert_eq!(record.operation, issue.operation);
    assert_eq!(record.operation_id, issue.operation_id);
    assert_eq!(record.token, issue.token);
    assert_eq!(record.fingerprint, Fingerprint::NONE, "no request has used it");
    assert_eq!(record.format, issue.format);
    assert_eq!(record.payload, issue.payload);
    assert_eq!(record.lease_left, Duration::ZERO, "an issued record has no lease");
    assert_times(&record, VALID, KEPT, "it was just issued");
    assert!(record.age <= SLACK, "it was just made, not {:?} ago", record.age);

    fixture.advance(LEASE).await;
    let again = Issue {
        operation_id: OperationId::random(),
        valid_for: Ttl::Forever,
        payload: Bytes::from_static(b"another"),
        ..issue.clone()
    };
    assert_done(&second.issue(&again).await, "the first call's answer may have been lost");
    let before = store.kept(&issue.key, "it was issued").await;
    assert_same(&record, &before, LEASE, "only the first call counts");
    let reason = "the key was issued under another token";
    assert_fenced(second.issue(&issue_on(issue.key)).await, &before, reason);

    // Whoever claims under the issuer's token has used the key all the same.
    let user = Claim { token: issue.token, ..user_of(issue.key) };
    let running = store.granted(&user, "the key was issued").await;
    let ordinary = any_claim();
    let claimed = store.granted(&ordinary, "nobody has used the key").await;
    for (record, issue) in [(&running, &issue), (&claimed, &issue_on(ordinary.key))] {
        let reason = "the key is in use";
        assert_fenced(second.issue(issue).await, record, reason);
        assert_same(record, &store.kept(&issue.key, reason).await, Duration::ZERO, reason);
    }
    assert_done(&store.complete(&completion_of(&user, b"answer")).await, "it holds the claim");
    let completed = store.kept(&issue.key, "it is completed").await;
    assert_fenced(second.issue(&issue).await, &completed, "the key was used");

    fixture.advance(KEPT).await;
    assert_done(&store.issue(&issue_on(ordinary.key)).await, "its record is over, swept or not");
    let record = second.kept(&ordinary.key, "it was issued").await;
    assert_eq!(
        (record.state, record.attempt),
        (State::Issued, 0),
        "nothing of the old one is left"
    );
    assert!(record.age <= SLACK, "the record is a new one: {record:?}");
    one_of_many_issues(fixture).await;
}

/// Has many issue one key at once, through both handles.
async fn one_of_many_issues(fixture: &dyn StoreFixture) {
    const ISSUERS: usize = 64;
    let key = any_issue().key;
    let start = Arc::new(Barrier::new(ISSUERS));
    let mut issuers = JoinSet::new();
    for issuer in 0..ISSUERS {
        let store = if issuer % 2 == 0 { fixture.store() } else { fixture.second() };
        let start = Arc::clone(&start);
        issuers.spawn(async move {
            let issue = issue_on(key);
            start.wait().await;
            (issue.token, store.issue(&issue).await)
        });
    }
    let (mut winners, mut seen) = (Vec::new(), Vec::new());
    for (token, answer) in issuers.join_all().await {
        match answer {
            Ok(Written::Done) => winners.push(token),
            Ok(Written::Fenced(record)) => seen.push(record.token),
            answer => panic!("each call is done or fenced; got {answer:?}"),
        }
    }
    let [winner] = winners[..] else {
        panic!("exactly one call must issue the key, and {} did", winners.len());
    };
    assert!(seen.iter().all(|token| *token == winner), "the others see the winner's record");
    let record = fixture.store().kept(&key, "it was issued").await;
    assert_eq!(record.token, winner, "the record is the winner's");
}

/// Law 24: an issued key's validity counts from issuing and nothing moves it; when it is over the
/// key is refused and still known; a run that began in time completes after it.
pub async fn an_issued_key_keeps_its_validity(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let keys: [Key; 7] = std::array::from_fn(|_| any_issue().key);
    for key in keys {
        assert_done(&store.issue(&issue_on(key)).await, "nobody has used the key");
    }
    let [unused, completed, released, forgotten, lapsed, late, long] = keys.map(user_of);
    fixture.advance(LEASE).await;
    let (valid, kept) = (VALID - LEASE, KEPT - LEASE);
    for claim in [&completed, &released, &forgotten, &lapsed] {
        let record = store.granted(claim, "the key was issued").await;
        assert_times(&record, valid, kept, "a claim does not extend it");
        let record = second.granted(claim, "it holds the claim").await;
        assert_times(&record, valid, kept, "asking again does not extend it");
        let renewal = Renewal { key: claim.key, token: claim.token, lease: LEASE };
        let renewed = store.renew(&[renewal]).await;
        assert!(matches!(renewed.as_deref(), Ok([true])), "it holds the claim: {renewed:?}");
        let checkpoint = checkpoint_of(claim, b"so far");
        assert_done(&store.checkpoint(&checkpoint).await, "it holds the claim");
        let record = second.kept(&claim.key, "it is claimed").await;
        assert_times(&record, valid, kept, "neither renewal nor checkpoint extends it");
    }
    let tombstone = Completion { flags: Flags::TOMBSTONE, ..completion_of(&completed, b"") };
    assert_done(&store.complete(&tombstone).await, "it holds the claim");
    assert_done(&store.release(&released.key, &released.token).await, "it holds the claim");
    assert_done(&store.forget(&forgotten.key, &forgotten.token).await, "it holds the claim");
    for claim in [&completed, &released, &forgotten] {
        let record = second.kept(&claim.key, "ending a claim does not remove it").await;
        assert_times(&record, valid, kept, "no end of a claim extends it");
        assert!(record.flags.contains(Flags::ISSUED), "it stays an issued key: {record:?}");
    }

    fixture.advance(VALID - LEASE - SLACK).await;
    let found = second.refused(&user_of(completed.key), "it is completed").await;
    assert!(found.flags.contains(Flags::TOMBSTONE), "flags are added: {found:?}");
    assert!(!found.valid_left.is_over(), "its validity is not over: {found:?}");
    store.granted(&late, "its validity is not over").await;
    let long = Claim { lease: KEPT, ..long };
    let record = store.granted(&long, "its validity is not over").await;
    assert!(record.kept_left >= Ttl::For(record.lease_left), "kept as long as leased: {record:?}");
    assert_ttl(record.valid_left, Ttl::For(SLACK), "validity", "a lease does not extend it");

    fixture.advance(SLACK).await;
    for claim in [&unused, &completed, &released, &forgotten, &lapsed] {
        let before = store.kept(&claim.key, "it is kept longer than it is valid").await;
        assert!(before.valid_left.is_over(), "its validity is over: {before:?}");
        for next in [user_of(claim.key), claim_on(claim.key)] {
            let found = second.refused(&next, "its validity is over, whoever asks").await;
            assert_same(&before, &found, Duration::ZERO, "an expired key is left as it is");
        }
    }
    for claim in [&lapsed, &late] {
        let completion = completion_of(claim, b"late");
        assert_done(&store.complete(&completion).await, "it began in time, and holds the claim");
        let found = second.refused(&user_of(claim.key), "its validity is over").await;
        assert_eq!((found.state, &found.payload), (State::Completed, &completion.payload));
        assert!(found.valid_left.is_over(), "completing does not extend it: {found:?}");
    }

    fixture.advance(KEPT - VALID - SLACK).await;
    let ended = [&unused, &completed, &released, &forgotten, &lapsed, &late];
    join_all(ended.map(|claim| store.kept(&claim.key, "it is not over"))).await;
    fixture.advance(SLACK).await;
    for claim in ended {
        second.none(&claim.key, "it is no longer kept").await;
        second.unknown(&user_of(claim.key), "it is no longer kept").await;
    }
    assert_eq!(second.swept(usize::MAX).await, ended.len(), "what is over is swept");
    assert_done(&store.complete(&completion_of(&long, b"late")).await, "its lease is alive");
    let found = second.refused(&user_of(long.key), "its validity is over").await;
    assert_eq!(found.state, State::Completed, "it is known while it is kept");

    let brief = Issue { kept_for: Ttl::For(LEASE), ..any_issue() };
    assert_done(&store.issue(&brief).await, "nobody has used the key");
    let record = second.kept(&brief.key, "it was issued").await;
    assert_times(&record, VALID, VALID, "it is kept as long as it is valid");
    let endless = Issue { valid_for: Ttl::Forever, ..any_issue() };
    assert_done(&store.issue(&endless).await, "nobody has used the key");
    let record = second.granted(&user_of(endless.key), "the key was issued").await;
    assert_eq!((record.valid_left, record.kept_left), (Ttl::Forever, Ttl::Forever));
}

/// So much is left of a record's times.
#[track_caller]
fn assert_times(record: &Record, valid: Duration, kept: Duration, reason: &str) {
    assert_ttl(record.valid_left, Ttl::For(valid), "validity", reason);
    assert_ttl(record.kept_left, Ttl::For(kept), "time it is kept", reason);
}

/// Law 25: an issued key whose claim is forgotten is issued again, with its validity and with its
/// payload as it stands; its next user says anew what the operation is.
pub async fn a_forgotten_issued_key_is_issued_again(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let [plain, marked] = [any_issue(), any_issue()];
    for issue in [&plain, &marked] {
        assert_done(&store.issue(issue).await, "nobody has used the key");
    }
    let [first, other] = [user_of(plain.key), user_of(marked.key)];
    store.granted(&first, "the key was issued").await;
    store.granted(&other, "the key was issued").await;
    fixture.advance(LEASE).await;
    let mark = checkpoint_of(&other, b"so far");
    assert_done(&store.checkpoint(&mark).await, "nobody has claimed since");
    for (claim, payload) in [(&first, &plain.payload), (&other, &mark.payload)] {
        let reason = "it holds the claim, late or not";
        assert_done(&store.forget(&claim.key, &claim.token).await, reason);
        let record = second.kept(&claim.key, "an issued key is not removed").await;
        assert_eq!((record.state, record.flags), (State::Issued, Flags::ISSUED));
        assert_eq!(record.attempt, 0, "nobody has claimed it");
        assert_eq!(record.lease_left, Duration::ZERO, "an issued record has no lease");
        assert_eq!(&record.payload, payload, "the payload stays as it stands");
        assert_times(&record, VALID - LEASE, KEPT - LEASE, "forgetting does not extend it");

        let reason = "it was forgotten under this token, and the answer may have been lost";
        assert_done(&store.forget(&claim.key, &claim.token).await, reason);
        let reason = "the claim was forgotten";
        assert_fenced(store.complete(&completion_of(claim, b"late")).await, &record, reason);
        assert_fenced(store.release(&claim.key, &claim.token).await, &record, reason);

        let fingerprint = Fingerprint { scheme: "law/2".into(), digest: [9; 32] };
        let next = Claim { fingerprint, ..user_of(claim.key) };
        let record = second.granted(&next, "nothing is left that could differ").await;
        assert_eq!(record.attempt, 1, "the attempts are counted afresh");
        assert_eq!(record.operation_id, next.operation_id, "it is another operation");
        assert_eq!(record.fingerprint, next.fingerprint, "it is another request");
        assert_eq!(&record.payload, payload, "the payload stays as it stands");
        let reason = "another claim has replaced the token";
        assert_fenced(store.forget(&claim.key, &claim.token).await, &record, reason);
    }
}

/// Law 26: an issued key that was released keeps payload, fingerprint and operation id; the same
/// request is the next attempt, another one is refused.
pub async fn a_released_issued_key_stays_with_its_request(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let issue = any_issue();
    assert_done(&store.issue(&issue).await, "nobody has used the key");
    let claim = user_of(issue.key);
    let running = store.granted(&claim, "the key was issued").await;
    assert_done(&store.release(&claim.key, &claim.token).await, "it holds the claim");
    let released = second.kept(&issue.key, "releasing removes nothing").await;
    let expected = Record { state: State::Released, lease_left: Duration::ZERO, ..running.clone() };
    assert_same(&expected, &released, Duration::ZERO, "only the claim is given up");

    let digest = [0; 32];
    let other = Fingerprint { digest, ..claim.fingerprint.clone() };
    let other = Claim { fingerprint: other, ..user_of(issue.key) };
    let found = second.refused(&other, "what became of the first request is not known").await;
    assert_same(&released, &found, Duration::ZERO, "a refusal changes nothing");
    let record = second.granted(&user_of(issue.key), "the claim was given up").await;
    assert_eq!(record.attempt, 2, "the attempts are counted on");
    assert_eq!(record.operation_id, claim.operation_id, "the operation is the same");
    assert_eq!(record.payload, issue.payload, "what was issued comes with each claim");
    assert_left(record.lease_left, LEASE, "lease", "it was just claimed");
}
