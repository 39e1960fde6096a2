//! Operators: what they find, settle and purge, and whom they meet at it.

#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Request, State},
    http,
    response::Response,
};
use bytes::Bytes;
use idem_runtime::{
    Anchor, Became, CallError, FORMAT, Idempotency, KeyName, LookUpError, Operation, OperationId,
    Outcome, Record, RefusalKind, SettleError, Ttl, idempotent,
    store::{Claim, Claimed, Kind, Listing, Page, Purged, Store, StoreErrorKind},
};
use tests::{
    faults::{Call, Fault, Ground},
    server::engine,
    shop::{Place, Shop, pay, payment},
    stores::TestStore,
    with_faults_on_both_stores,
};

/// The default lease.
const LEASE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// For how long what was settled is kept.
const SETTLED: Duration = Duration::from_secs(600);
const VALID: Duration = Duration::from_secs(300);

with_faults_on_both_stores!(
    what_was_done_is_what_every_retry_gets,
    what_was_not_done_frees_the_key,
    an_issued_key_is_settled_within_its_validity,
    what_is_not_unsettled_is_refused_and_left_alone,
    an_answer_that_is_none_is_refused_before_anything_is_claimed,
    what_a_function_did_is_settled_with_its_value,
    of_two_operators_at_once_one_wins,
    a_retry_that_runs_is_not_settled,
    a_retry_meets_an_operator_as_one_in_flight,
    a_retry_that_waits_gets_what_is_settled,
    an_operator_that_dies_leaves_it_unsettled,
    an_operator_that_is_too_late_changes_nothing,
    a_key_that_was_used_anew_is_not_settled_as_what_it_was,
    a_store_that_fails_leaves_it_settled_or_unsettled,
    a_record_is_found_by_its_name_and_by_its_id,
    a_listing_goes_through_all_pages,
    a_purged_key_was_never_used,
    a_purge_of_a_scope_ends_at_it,
    what_cannot_be_read_is_purged_by_its_name,
    a_store_that_cannot_be_searched_says_so,
);

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse)]
async fn refuse(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    shop.work(&operation, body).await
}

#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("10s"))]
async fn wait(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    shop.work(&operation, body).await
}

/// Its first attempt ends without saying whether its effect happened.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn recovers(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    let mut response = shop.work(&operation, body).await;
    if operation.attempt() == 1 {
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

const NONCE: Anchor = Anchor::header("Idempotency-Key").space("nonces").ttl(VALID);

#[idempotent(anchor = NONCE, issued, on_unknown = refuse)]
async fn redeem(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    shop.work(&operation, body).await
}

/// What the operator found in the books.
fn settled() -> http::Response<Bytes> {
    http::Response::builder()
        .status(201)
        .header("x-fee", "1")
        .header("x-fee", "2")
        .header("set-cookie", "the operator's")
        .body(Bytes::from_static(b"as the books say"))
        .expect("an answer")
}

/// An attempt that ended without saying whether its effect happened.
async fn unsettled(shop: &Shop, key: &str) -> OperationId {
    let answer = shop.call(refuse, payment(key, "503")).await;
    assert_eq!(answer.status, 503);
    shop.operation().id()
}

async fn found(engine: &Idempotency, id: OperationId) -> Option<(Became, Record)> {
    let found = engine.admin().find_operation(id).await.expect("an answer");
    found.map(|found| (found.became, found.record))
}

async fn assert_unsettled(engine: &Idempotency, id: OperationId) {
    let found = found(engine, id).await;
    assert!(matches!(found, Some((Became::UnknownOutcome, _))), "{found:?}");
}

/// The name of a nonce.
fn named(key: &str) -> KeyName {
    KeyName::of(&NONCE, key)
}

async fn what_was_done_is_what_every_retry_gets(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let id = unsettled(&shop, "k").await;
    shop.call(refuse, payment("k", "503")).await.assert_refused(409, "unknown_outcome");
    ground.clock.advance(LEASE);
    shop.engine.admin().settle_done(id, &settled(), SETTLED).await.expect("settled");
    assert_eq!(shop.told(Outcome::SettledDone), 1);

    // In this process and in another one, until its time is over.
    for shop in [shop.clone(), Shop::over(&ground).0] {
        for _ in 0..2 {
            let retry = shop.call(refuse, payment("k", "503")).await;
            retry.assert_is(201, "as the books say", true);
            let fees: Vec<_> = retry.headers.get_all("x-fee").iter().collect();
            assert_eq!(fees, ["1", "2"]);
            assert!(!retry.headers.contains_key("set-cookie"), "it speaks to one caller");
        }
        shop.call(refuse, payment("k", "201")).await.assert_refused(422, "mismatch");
    }
    let (_, record) = found(&shop.engine, id).await.expect("the record");
    assert_eq!((record.operation_id, record.attempt), (id, 2));
    assert_eq!(record.kept_left, Ttl::For(SETTLED));
    ground.clock.advance(SETTLED);
    assert!(found(&shop.engine, id).await.is_none());
    assert_eq!(shop.effects.count(), 1);
}

async fn what_was_not_done_frees_the_key(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let id = unsettled(&shop, "k").await;
    shop.engine.admin().settle_not_done(id).await.expect("settled");
    assert_eq!(shop.told(Outcome::SettledNotDone), 1);
    assert!(found(&shop.engine, id).await.is_none());
    let fresh = shop.call(refuse, payment("k", "201")).await;
    assert_eq!(fresh.status, 201);
    let operation = shop.operation();
    assert_eq!(operation.attempt(), 1, "it is another operation");
    assert_ne!(operation.id(), id, "it is another operation");

    // Also one whose owner died, on its second attempt.
    let held = shop.hold_at(Place::AfterEffect);
    let dying = shop.start_to_pay("dead", "201");
    held.reached().await;
    ground.clock.advance(LEASE);
    let second = shop.hold_at(Place::AfterEffect);
    let dying_too = shop.start_to_pay("dead", "201");
    second.reached().await;
    assert_eq!(shop.operation().attempt(), 2);
    ground.clock.advance(LEASE);
    let id = shop.operation().id();
    shop.engine.admin().settle_not_done(id).await.expect("settled");
    held.open();
    second.open();
    for late in [dying, dying_too] {
        let answer = late.await.expect("an answer");
        assert!([201, 409].contains(&answer.status), "{answer:?}");
    }
    assert!(found(&shop.engine, id).await.is_none(), "nobody who was late has recorded anything");
}

async fn an_issued_key_is_settled_within_its_validity(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let admin = shop.engine.admin();
    for key in ["done", "not done", "expired"] {
        shop.engine.issue(&NONCE, "a", key, 7).await.expect("issued");
        let answer = shop.call(redeem, payment(key, "503")).await;
        assert_eq!(answer.status, 503);
        let id = shop.operation().id();
        match key {
            "done" => admin.settle_done(id, &settled(), TTL).await.expect("settled"),
            "not done" => admin.settle_not_done(id).await.expect("settled"),
            _ => assert_unsettled(&shop.engine, id).await,
        }
    }
    shop.call(redeem, payment("done", "503")).await.assert_is(201, "as the books say", true);
    let again = admin.find("a", &named("not done")).await.expect("an answer").expect("a record");
    assert!(matches!(again.became, Became::Issued), "{again:?}");
    assert_eq!(shop.call(redeem, payment("not done", "201")).await.status, 201);

    let expired = admin.find("a", &named("expired")).await.expect("an answer").expect("a record");
    ground.clock.advance(VALID);
    shop.call(redeem, payment("done", "503")).await.assert_refused(400, "expired_key");
    let id = expired.record.operation_id;
    for answer in [admin.settle_done(id, &settled(), TTL).await, admin.settle_not_done(id).await] {
        assert!(matches!(answer, Err(SettleError::Expired)), "{answer:?}");
    }
    assert_eq!(admin.purge_operation(id).await.expect("purged").removed, 1);
}

async fn what_is_not_unsettled_is_refused_and_left_alone(ground: Ground) {
    let (shop, _) = Shop::with(&ground, |engine| engine.response_body_limit(10));
    let admin = shop.engine.admin();
    let refused = async |id: OperationId| {
        let before = found(&shop.engine, id).await.map(|(_, record)| record);
        let done = admin.settle_done(id, &settled(), SETTLED).await;
        let not_done = admin.settle_not_done(id).await;
        let after = found(&shop.engine, id).await.map(|(_, record)| record);
        assert_eq!(before, after, "a refusal changes nothing");
        let (Err(done), Err(not_done)) = (done, not_done) else { panic!("{before:?} was settled") };
        assert_eq!(done.to_string(), not_done.to_string());
        done
    };

    assert!(matches!(refused(OperationId::random()).await, SettleError::NotFound));

    let held = shop.hold_at(Place::AfterEffect);
    let running = shop.start_to_pay("running", "201");
    held.reached().await;
    ground.clock.advance(LEASE / 3);
    let id = shop.operation().id();
    match refused(id).await {
        SettleError::StillRunning { lease_left } => assert_eq!(lease_left, LEASE - LEASE / 3),
        other => panic!("{other:?}"),
    }
    held.open();
    // Its answer is larger than the limit, so that a tombstone is left.
    running.await.expect("an answer");
    let tombstone = found(&shop.engine, id).await.expect("a record").0;
    assert!(matches!(tombstone, Became::Tombstone { status: Some(201) }), "{tombstone:?}");
    assert!(matches!(refused(id).await, SettleError::AlreadySettled));

    let id = unsettled(&shop, "settled").await;
    let short = http::Response::new(Bytes::from_static(b"settled"));
    admin.settle_done(id, &short, SETTLED).await.expect("settled");
    assert!(matches!(refused(id).await, SettleError::AlreadySettled));

    shop.engine.issue(&NONCE, "a", "issued", ()).await.expect("issued");
    let issued = admin.find("a", &named("issued")).await.expect("an answer").expect("a record");
    assert!(matches!(refused(issued.record.operation_id).await, SettleError::NeverUsed));

    let id = unsettled(&shop, "over").await;
    ground.clock.advance(TTL);
    assert!(matches!(refused(id).await, SettleError::NotFound));
}

async fn an_answer_that_is_none_is_refused_before_anything_is_claimed(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    let id = unsettled(&shop, "k").await;
    let admin = shop.engine.admin();
    let before = faults.calls(Call::Claim);
    let mut interim = settled();
    *interim.status_mut() = http::StatusCode::CONTINUE;
    let no_time = Ttl::For(Duration::ZERO);
    let forever = Ttl::Forever;
    for (answer, ttl) in [(&interim, forever), (&settled(), no_time)] {
        let refused = admin.settle_done(id, answer, ttl).await;
        assert!(matches!(refused, Err(SettleError::NotAnAnswer(_))), "{refused:?}");
    }
    assert_eq!(faults.calls(Call::Claim), before);
    admin.settle_done(id, &settled(), forever).await.expect("settled");
    assert_eq!(found(&shop.engine, id).await.expect("a record").1.kept_left, Ttl::Forever);
}

/// What it returned must be read back: a response in its place would be refused for ever.
async fn what_a_function_did_is_settled_with_its_value(ground: Ground) {
    #[idempotent(anchor = arg(event), scope = global, on_unknown = refuse, operation = operation)]
    async fn deliver(
        idem: &Idempotency,
        shop: Shop,
        event: u64,
        met: Arc<OnceLock<OperationId>>,
    ) -> Result<String, CallError> {
        let _ = met.set(operation.id());
        shop.effects.happen();
        panic!("on purpose")
    }
    let (shop, _) = Shop::over(&ground);
    let met = Arc::default();
    let call = || deliver(&shop.engine, shop.clone(), 7, Arc::clone(&met));
    let panicked = call().await.expect_err("a panic");
    assert_eq!(panicked.kind(), RefusalKind::HandlerPanicked);
    let id = *met.get().expect("it ran");
    assert_eq!(call().await.expect_err("unknown").kind(), RefusalKind::UnknownOutcome);

    let admin = shop.engine.admin();
    let refused = admin.settle_done(id, &settled(), SETTLED).await;
    assert!(matches!(refused, Err(SettleError::NotAnAnswer(_))), "{refused:?}");
    assert_unsettled(&shop.engine, id).await;
    let by_tuple = HashMap::from([((1, 2), 3)]);
    let refused = admin.settle_done_with_value(id, &by_tuple, SETTLED).await;
    assert!(matches!(refused, Err(SettleError::Json(_))), "{refused:?}");
    assert_unsettled(&shop.engine, id).await;
    admin.settle_done_with_value(id, "as the books say", SETTLED).await.expect("settled");
    for _ in 0..2 {
        assert_eq!(call().await.expect("a value"), "as the books say");
    }
    assert_eq!((shop.effects.count(), shop.told(Outcome::SettledDone)), (1, 1));

    let id = unsettled(&shop, "k").await;
    let refused = admin.settle_done_with_value(id, "as the books say", SETTLED).await;
    assert!(matches!(refused, Err(SettleError::NotAnAnswer(_))), "{refused:?}");
    assert_unsettled(&shop.engine, id).await;
}

async fn of_two_operators_at_once_one_wins(ground: Ground) {
    for round in 0..20 {
        let (one, _) = Shop::over(&ground);
        let (other, _) = Shop::over(&ground);
        let key = format!("k{round}");
        let id = unsettled(&one, &key).await;
        let (first, second) = (one.engine.clone(), other.engine.clone());
        let done =
            tokio::spawn(async move { first.admin().settle_done(id, &settled(), TTL).await });
        let not_done = tokio::spawn(async move { second.admin().settle_not_done(id).await });
        let (done, not_done) = (done.await.expect("no panic"), not_done.await.expect("no panic"));
        let retry = one.call(refuse, payment(&key, "503")).await;
        match (&done, &not_done) {
            (Ok(()), Err(SettleError::StillRunning { .. } | SettleError::AlreadySettled)) => {
                retry.assert_is(201, "as the books say", true);
            }
            (Err(SettleError::StillRunning { .. } | SettleError::NotFound), Ok(())) => {
                assert_eq!((retry.status, one.operation().attempt()), (503, 1), "it ran afresh");
            }
            answers => panic!("{answers:?}"),
        }
        let told = [(&one, Outcome::SettledDone), (&other, Outcome::SettledNotDone)];
        let told: usize = told.iter().map(|(shop, outcome)| shop.told(*outcome)).sum();
        assert_eq!(told, 1, "one has settled it");
    }
}

async fn a_retry_that_runs_is_not_settled(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let first = shop.pay("k", "503").await;
    assert_eq!(first.status, 503);
    let id = shop.operation().id();
    let held = shop.hold_at(Place::AfterEffect);
    let retry = shop.start_to_pay("k", "503");
    held.reached().await;
    assert_eq!(shop.operation().id(), id);
    let refused = shop.engine.admin().settle_done(id, &settled(), TTL).await;
    assert!(matches!(refused, Err(SettleError::StillRunning { .. })), "{refused:?}");
    held.open();
    assert_eq!(retry.await.expect("an answer").status, 503);
    shop.engine.admin().settle_done(id, &settled(), TTL).await.expect("settled");
}

/// An operator who stands between the claim and what is written under it.
fn settling(
    shop: &Shop,
    id: OperationId,
    done: bool,
) -> tokio::task::JoinHandle<Result<(), SettleError>> {
    let engine = shop.engine.clone();
    tokio::spawn(async move {
        match done {
            true => engine.admin().settle_done(id, &settled(), TTL).await,
            false => engine.admin().settle_not_done(id).await,
        }
    })
}

async fn a_retry_meets_an_operator_as_one_in_flight(ground: Ground) {
    for done in [true, false] {
        let (shop, faults) = Shop::over(&ground);
        let key = format!("{done}");
        assert_eq!(shop.pay(&key, "503").await.status, 503);
        let id = shop.operation().id();
        let held = faults.hold_before(if done { Call::Complete } else { Call::Forget });
        let operator = settling(&shop, id, done);
        held.reached().await;
        let (retry, _) = Shop::over(&ground);
        retry.pay(&key, "503").await.assert_refused(409, "in_flight");
        assert_eq!(retry.effects.count(), 0);
        held.open();
        operator.await.expect("no panic").expect("settled");
        let answer = retry.pay(&key, "503").await;
        match done {
            true => answer.assert_is(201, "as the books say", true),
            false => assert_eq!((answer.status, retry.operation().attempt()), (503, 1)),
        }
    }
}

async fn a_retry_that_waits_gets_what_is_settled(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    assert_eq!(shop.call(wait, payment("k", "503")).await.status, 503);
    let id = shop.operation().id();
    let held = faults.hold_before(Call::Complete);
    let operator = settling(&shop, id, true);
    held.reached().await;
    let waiter = shop.clone();
    let waiting = tokio::spawn(async move { waiter.call(wait, payment("k", "503")).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    held.open();
    operator.await.expect("no panic").expect("settled");
    waiting.await.expect("an answer").assert_is(201, "as the books say", true);
    assert_eq!(shop.effects.count(), 1);
}

async fn an_operator_that_dies_leaves_it_unsettled(ground: Ground) {
    for done in [true, false] {
        let (shop, faults) = Shop::over(&ground);
        let id = unsettled(&shop, &format!("{done}")).await;
        let held = faults.hold_before(if done { Call::Complete } else { Call::Forget });
        let operator = settling(&shop, id, done);
        held.reached().await;
        operator.abort();
        assert!(operator.await.is_err());
        let running = found(&shop.engine, id).await.expect("a record");
        assert!(matches!(running.0, Became::Running), "{running:?}");
        let (other, _) = Shop::over(&ground);
        let early = other.engine.admin().settle_not_done(id).await;
        assert!(matches!(early, Err(SettleError::StillRunning { .. })), "{early:?}");
        // Never longer than a lease, and it is kept for as long as it was.
        ground.clock.advance(LEASE);
        assert_unsettled(&other.engine, id).await;
        let kept = found(&other.engine, id).await.expect("a record").1.kept_left;
        assert_eq!(kept, Ttl::For(TTL - LEASE));
        let refused = other.call(refuse, payment(&format!("{done}"), "503")).await;
        refused.assert_refused(409, "unknown_outcome");
        other.engine.admin().settle_done(id, &settled(), TTL).await.expect("settled");
    }
}

async fn an_operator_that_is_too_late_changes_nothing(ground: Ground) {
    for done in [true, false] {
        for still_runs in [true, false] {
            let (shop, faults) = Shop::over(&ground);
            let key = format!("{done} {still_runs}");
            assert_eq!(shop.call(recovers, payment(&key, "201")).await.status, 503);
            let id = shop.operation().id();
            let late = faults.hold_before(if done { Call::Complete } else { Call::Forget });
            let operator = settling(&shop, id, done);
            late.reached().await;
            ground.clock.advance(LEASE);

            // A retry takes the operator's claim over.
            let (other, _) = Shop::over(&ground);
            let held = other.hold_at(Place::AfterEffect);
            let (caller, body) = (other.clone(), payment(&key, "201"));
            let retry = tokio::spawn(async move { caller.call(recovers, body).await });
            held.reached().await;
            let retry = if still_runs {
                late.open();
                let refused = operator.await.expect("no panic");
                assert!(matches!(refused, Err(SettleError::StillRunning { .. })), "{refused:?}");
                held.open();
                retry.await.expect("an answer")
            } else {
                held.open();
                let answer = retry.await.expect("an answer");
                late.open();
                let refused = operator.await.expect("no panic");
                assert!(matches!(refused, Err(SettleError::AlreadySettled)), "{refused:?}");
                answer
            };
            retry.assert_is(201, &format!("attempt 3 of {id}"), false);
            let again = other.call(recovers, payment(&key, "201")).await;
            again.assert_is(201, &format!("attempt 3 of {id}"), true);
            assert_eq!(shop.told(Outcome::SettledDone) + shop.told(Outcome::SettledNotDone), 0);
        }
    }
}

async fn a_key_that_was_used_anew_is_not_settled_as_what_it_was(ground: Ground) {
    for used_anew in [true, false] {
        for done in [true, false] {
            let (shop, faults) = Shop::over(&ground);
            let key = format!("{used_anew} {done}");
            let id = unsettled(&shop, &key).await;
            let held = faults.hold_before(Call::Claim);
            let operator = settling(&shop, id, done);
            held.reached().await;
            let (other, _) = Shop::over(&ground);
            other.engine.admin().settle_not_done(id).await.expect("settled");
            if used_anew {
                let anew = unsettled(&other, &key).await;
                assert_ne!(anew, id);
                held.open();
                let late = operator.await.expect("no panic");
                assert!(matches!(late, Err(SettleError::NotFound)), "{late:?}");
                assert_unsettled(&other.engine, anew).await;
            } else {
                held.open();
                let late = operator.await.expect("no panic");
                assert!(matches!(late, Err(SettleError::NotFound)), "{late:?}");
                assert_eq!(other.call(refuse, payment(&key, "201")).await.status, 201);
                assert_eq!(other.operation().attempt(), 1, "it is free");
                assert_eq!(faults.calls(Call::Forget), 0, "no record was made that had to go");
            }
        }
    }

    // A key that was issued, forgotten, and is free.
    let (shop, faults) = Shop::over(&ground);
    shop.engine.issue(&NONCE, "a", "k", 7).await.expect("issued");
    assert_eq!(shop.call(redeem, payment("k", "503")).await.status, 503);
    let id = shop.operation().id();
    let held = faults.hold_before(Call::Claim);
    let operator = settling(&shop, id, true);
    held.reached().await;
    let (other, _) = Shop::over(&ground);
    other.engine.admin().settle_not_done(id).await.expect("settled");
    held.open();
    let late = operator.await.expect("no panic");
    assert!(matches!(late, Err(SettleError::NotFound)), "{late:?}");
    let free = other.engine.admin().find("a", &named("k")).await.expect("an answer");
    assert!(matches!(free.expect("a record").became, Became::Issued));
    assert_eq!(other.call(redeem, payment("k", "201")).await.status, 201);
}

async fn a_store_that_fails_leaves_it_settled_or_unsettled(ground: Ground) {
    let failed = |answer: Result<(), SettleError>| match answer {
        Err(SettleError::LookUp(LookUpError::Store(error))) => error.kind(),
        other => panic!("{other:?}"),
    };
    let unreachable = Fault::Fail(StoreErrorKind::Unreachable);

    // The claim's answer is lost: it is asked for again.
    let (shop, faults) = Shop::over(&ground);
    let id = unsettled(&shop, "lost claim").await;
    faults.once(Call::Claim, Fault::LoseAnswer);
    shop.engine.admin().settle_done(id, &settled(), TTL).await.expect("settled");
    assert_eq!(found(&shop.engine, id).await.expect("a record").1.attempt, 2);

    // It is lost again and again: what may have been claimed is given back.
    let id = unsettled(&shop, "no claim").await;
    faults.always(Call::Claim, Fault::LoseAnswer);
    let answer = shop.engine.admin().settle_done(id, &settled(), TTL).await;
    assert_eq!(failed(answer), StoreErrorKind::TimedOut);
    faults.mend(Call::Claim);
    assert!(shop.engine.drain(Duration::from_secs(10)).await);
    assert_unsettled(&shop.engine, id).await;

    // What was settled is not written: it can be settled again at once.
    faults.once(Call::Complete, unreachable.clone());
    let answer = shop.engine.admin().settle_done(id, &settled(), TTL).await;
    assert_eq!(failed(answer), StoreErrorKind::Unreachable);
    assert_unsettled(&shop.engine, id).await;
    faults.once(Call::Forget, unreachable);
    let answer = shop.engine.admin().settle_not_done(id).await;
    assert_eq!(failed(answer), StoreErrorKind::Unreachable);
    assert_unsettled(&shop.engine, id).await;

    // It is written, and the answer is lost.
    faults.once(Call::Complete, Fault::LoseAnswer);
    let answer = shop.engine.admin().settle_done(id, &settled(), TTL).await;
    assert_eq!(failed(answer), StoreErrorKind::TimedOut);
    let again = shop.engine.admin().settle_done(id, &settled(), TTL).await;
    assert!(matches!(again, Err(SettleError::AlreadySettled)), "{again:?}");
    let retry = shop.call(refuse, payment("no claim", "503")).await;
    retry.assert_is(201, "as the books say", true);
}

/// A payment of another tenant.
fn payment_of(tenant: &str, key: &str, body: &str) -> Request {
    Request::post("/pay")
        .header("x-api-key", tenant)
        .header("idempotency-key", key)
        .body(Body::from(body.to_owned()))
        .expect("a request")
}

async fn a_record_is_found_by_its_name_and_by_its_id(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let admin = shop.engine.admin();
    for tenant in ["a", "b"] {
        shop.engine.issue(&NONCE, tenant, "k", "somebody's data".to_owned()).await.expect("issued");
        shop.call(redeem, payment_of(tenant, "k", "201")).await;
        let id = shop.operation().id();
        let by_id = admin.find_operation(id).await.expect("an answer").expect("a record");
        let by_name = admin.find(tenant, &named("k")).await.expect("an answer").expect("a record");
        assert_eq!(by_id.record, by_name.record);
        assert_eq!(by_id.record.scope, admin.scope(tenant));
        let Became::Completed(answer) = by_id.became else { panic!("{by_id:?}") };
        let shown = format!("{:?} {answer:?} {admin:?}", by_id.record);
        assert!(!shown.contains("attempt 1 of") && !shown.contains("somebody"), "{shown}");
    }
    assert!(admin.find("c", &named("k")).await.expect("an answer").is_none());
    assert!(admin.find_operation(OperationId::random()).await.expect("an answer").is_none());
    let nameless = admin.find("a", &KeyName::of(&Anchor::header("K"), "k")).await;
    assert!(matches!(nameless, Err(LookUpError::Name(_))), "{nameless:?}");
}

async fn a_listing_goes_through_all_pages(ground: Ground) {
    let (shop, _) = Shop::with(&ground, |engine| engine.response_body_limit(10));
    let admin = shop.engine.admin();
    let mut unsettled_ids = Vec::new();
    for number in 0..5 {
        for tenant in ["a", "b"] {
            let key = number.to_string();
            let answer = shop.call(refuse, payment_of(tenant, &key, "503")).await;
            assert_eq!(answer.status, 503);
            if tenant == "b" {
                unsettled_ids.push(shop.operation().id());
            }
        }
        ground.clock.advance(Duration::from_secs(1));
    }
    shop.call(refuse, payment_of("b", "large", "201")).await;
    let tombstone = shop.operation().id();
    let older = shop.hold_at(Place::BeforeEffect);
    let first = shop.start_to_pay("older", "201");
    older.reached().await;
    let older_id = shop.operation().id();
    ground.clock.advance(Duration::from_secs(1));
    let younger = shop.hold_at(Place::BeforeEffect);
    let second = shop.start_to_pay("younger", "201");
    younger.reached().await;
    let younger_id = shop.operation().id();

    let all = async |kind, scope: Option<&str>, limit| {
        let scope = scope.map(|scope| admin.scope(scope));
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let listing = Listing { kind, scope, after, limit };
            let Page { records, next, .. } = admin.list(&listing).await.expect("a page");
            assert!(records.iter().all(|record| record.payload.is_empty()));
            ids.extend(records.iter().map(|record| record.operation_id));
            match next {
                Some(next) => after = Some(next),
                None => return ids,
            }
        }
    };
    for limit in [1, 3, 100] {
        assert_eq!(all(Kind::Unsettled, Some("b"), limit).await, unsettled_ids);
        assert_eq!(all(Kind::Unsettled, None, limit).await.len(), 10);
        assert_eq!(all(Kind::Tombstones, None, limit).await, [tombstone]);
        assert_eq!(all(Kind::Running, None, limit).await, [older_id, younger_id], "oldest first");
        assert_eq!(all(Kind::Running, Some("b"), limit).await, []);
        assert_eq!(all(Kind::Any, None, limit).await.len(), 13);
        assert_eq!(all(Kind::Any, Some("c"), limit).await, []);
    }
    older.open();
    younger.open();
    first.await.expect("an answer");
    second.await.expect("an answer");
}

async fn a_purged_key_was_never_used(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let admin = shop.engine.admin();
    assert_eq!(shop.pay("k", "201").await.status, 201);
    let id = shop.operation().id();
    assert_eq!(admin.purge_operation(id).await.expect("purged"), Purged { removed: 1, running: 0 });
    assert_eq!(admin.purge_operation(id).await.expect("purged"), Purged::default());
    assert_eq!(shop.told(Outcome::Purged), 1);
    assert_eq!(shop.pay("k", "201").await.status, 201);
    assert_eq!((shop.effects.count(), shop.operation().attempt()), (2, 1), "it ran again");

    shop.engine.issue(&NONCE, "a", "n", 7).await.expect("issued");
    let purged = admin.purge("b", &named("n")).await.expect("purged");
    assert_eq!(purged, Purged::default(), "another tenant's key is another key");
    assert_eq!(admin.purge("a", &named("n")).await.expect("purged").removed, 1);
    shop.call(redeem, payment("n", "201")).await.assert_refused(400, "unknown_key");

    let held = shop.hold_at(Place::AfterEffect);
    let running = shop.start_to_pay("running", "201");
    held.reached().await;
    let purged = admin.purge_operation(shop.operation().id()).await.expect("an answer");
    assert_eq!(purged, Purged { removed: 0, running: 1 });
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);
    let retry = shop.pay("running", "201").await;
    assert!(retry.is_replay(), "what runs is not purged: {retry:?}");
    assert_eq!(shop.told(Outcome::Purged), 2);
}

async fn a_purge_of_a_scope_ends_at_it(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let admin = shop.engine.admin();
    // More than one call of the store removes.
    const MANY: usize = 1_203;
    for number in 0..MANY {
        let key = number.to_string();
        assert_eq!(shop.call(pay, payment_of("b", &key, "201")).await.status, 201);
    }
    assert_eq!(shop.pay("mine", "201").await.status, 201);
    let held = shop.hold_at(Place::AfterEffect);
    let caller = shop.clone();
    let running =
        tokio::spawn(async move { caller.call(pay, payment_of("b", "running", "201")).await });
    held.reached().await;
    let purged = admin.purge_scope("b").await.expect("purged");
    assert_eq!(purged, Purged { removed: MANY, running: 1 });
    assert_eq!(shop.told(Outcome::Purged), 1);
    held.open();
    running.await.expect("an answer");
    let purged = admin.purge_scope("b").await.expect("purged");
    assert_eq!(purged, Purged { removed: 1, running: 0 });
    assert_eq!(admin.purge_scope("b").await.expect("purged"), Purged::default());
    assert_eq!(shop.told(Outcome::Purged), 2);
    assert!(shop.pay("mine", "201").await.is_replay(), "another tenant's stay");
    let effects = shop.effects.count();
    assert_eq!(shop.call(pay, payment_of("b", "7", "201")).await.status, 201);
    assert_eq!(shop.effects.count(), effects + 1, "it runs again");
}

async fn what_cannot_be_read_is_purged_by_its_name(ground: Ground) {
    let (store, _) = ground.faulty();
    let store = TestStore::new(store);
    let engine = engine(store.clone()).build();
    let admin = engine.admin();
    engine.issue(&NONCE, "a", "k", 7).await.expect("issued");
    let found = admin.find("a", &named("k")).await.expect("an answer").expect("a record");
    assert_eq!(admin.purge("a", &named("k")).await.expect("purged").removed, 1);
    let newer = Claim {
        key: found.record.key,
        scope: found.record.scope,
        operation: Arc::from("POST /"),
        operation_id: OperationId::random(),
        fingerprint: found.record.fingerprint,
        token: idem_runtime::Token::random(),
        lease: LEASE,
        ttl: Ttl::For(TTL),
        issued_only: false,
        on_unknown: idem_runtime::OnUnknown::Rerun,
        format: FORMAT + 1,
    };
    assert!(matches!(store.claim(&newer).await, Ok(Claimed::Granted(_))));
    let unreadable = |answer: Option<LookUpError>| match answer {
        Some(LookUpError::Unreadable(error)) => error.kind(),
        other => panic!("{other:?}"),
    };
    let id = newer.operation_id;
    assert_eq!(unreadable(admin.find("a", &named("k")).await.err()), StoreErrorKind::Newer);
    assert_eq!(unreadable(admin.find_operation(id).await.err()), StoreErrorKind::Newer);
    assert_eq!(unreadable(admin.purge_operation(id).await.err()), StoreErrorKind::Newer);
    let settled = admin.settle_not_done(id).await;
    assert!(matches!(settled, Err(SettleError::LookUp(LookUpError::Unreadable(_)))), "{settled:?}");
    let any = Listing { kind: Kind::Any, scope: None, after: None, limit: 10 };
    let listed = admin.list(&any).await.expect("a page").records;
    assert_eq!(listed.iter().map(|record| record.format).collect::<Vec<_>>(), [FORMAT + 1]);

    let running = admin.purge("a", &named("k")).await.expect("an answer");
    assert_eq!(running, Purged { removed: 0, running: 1 });
    ground.clock.advance(LEASE);
    assert_eq!(admin.purge("a", &named("k")).await.expect("purged").removed, 1);
    assert!(admin.find("a", &named("k")).await.expect("an answer").is_none());
}

async fn a_store_that_cannot_be_searched_says_so(ground: Ground) {
    let (store, _) = ground.faulty();
    let engine = engine(TestStore::new(store).unsearchable()).build();
    let admin = engine.admin();
    let id = OperationId::random();
    let any = Listing { kind: Kind::Any, scope: None, after: None, limit: 10 };
    for error in [
        admin.find_operation(id).await.err(),
        admin.list(&any).await.err(),
        admin.purge_operation(id).await.err(),
        admin.purge("a", &named("k")).await.err(),
        admin.purge_scope("a").await.err(),
    ] {
        assert!(matches!(error, Some(LookUpError::NotSearchable)), "{error:?}");
    }
    let settled = admin.settle_not_done(id).await;
    let not_searchable = Err::<(), _>(SettleError::LookUp(LookUpError::NotSearchable));
    assert_eq!(format!("{settled:?}"), format!("{not_searchable:?}"));
    assert!(admin.find("a", &named("k")).await.expect("an answer").is_none());
}
