//! Plain functions: once for each key, whoever delivers again and whatever dies or goes away.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed"
)]

use std::{
    collections::HashMap,
    error::Error,
    future::poll_fn,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use axum::extract::State;
use idem_runtime::{
    CallError, Idempotency, Mode, Operation, Outcome, RefusalKind, Scope, StepError, StoreOutage,
    idempotent,
    store::{StoreError, StoreErrorKind},
};
use serde::{Deserialize, Serialize};
use tests::{
    faults::{Call, Fault, Faults, Gate, Ground, PATIENCE, eventually},
    shop::{Place, Shop, payment},
    with_faults_on_both_stores,
};
use tokio::{runtime, task::JoinHandle, time::timeout};

/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

with_faults_on_both_stores!(also on one thread:
    fifty_redeliveries_at_once_run_once,
    another_call_under_the_key_is_a_mismatch,
    what_is_in_flight_is_refused_or_waited_for,
    a_caller_that_goes_away_anywhere_changes_nothing,
    who_waits_and_goes_away_leaves_nothing_behind,
    a_panic_is_an_unknown_outcome,
    an_error_is_an_unknown_outcome_and_the_next_attempt_the_same_operation,
    under_refuse_an_error_stays_unknown,
    an_error_before_any_effect_frees_the_key,
    but_not_in_a_later_attempt_nor_after_a_step,
    steps_are_taken_once_in_all_attempts,
    an_owner_that_was_replaced_gives_the_value_of_the_other,
    a_value_of_another_type_is_neither_replayed_nor_run_again,
    what_is_too_large_or_cannot_be_written_is_known_to_be_done,
    a_store_that_fails_runs_nothing,
    a_store_that_fails_at_the_record_delays_it,
    a_full_backlog_refuses,
    scopes_are_said_and_keep_tenants_apart,
    values_that_cannot_be_keys_are_refused,
    where_idem_observes_or_is_off_everything_runs,
    a_named_space_knows_its_functions_and_handlers_apart,
    a_deploy_that_compares_more_or_less_repeats_nothing,
    each_function_is_a_space_of_its_own,
    what_was_carried_along_is_there,
    the_observer_hears_of_calls,
);

#[derive(Debug)]
enum Failed {
    Refused,
    Unknown,
    Step,
    Call(CallError),
}

impl Failed {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused)
    }
}

impl From<CallError> for Failed {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Delivered {
    attempt: u32,
    id: String,
    key: String,
}

/// Does what its body says.
#[idempotent(
    anchor = arg(event),
    scope = global,
    operation = operation,
    nothing_happened = Failed::is_refusal,
)]
async fn deliver(
    idem: &Idempotency,
    shop: Shop,
    event: String,
    body: &'static str,
) -> Result<Delivered, Failed> {
    work(&shop, &operation, body).await
}

/// What every attempt of every test saw.
static SEEN: Mutex<Vec<Delivered>> = Mutex::new(Vec::new());

async fn work(shop: &Shop, operation: &Operation, body: &str) -> Result<Delivered, Failed> {
    shop.come_to(Place::BeforeEffect).await;
    if body == "refused" || body == "refused later" && operation.attempt() == 2 {
        return Err(Failed::Refused);
    }
    shop.effects.happen();
    shop.come_to(Place::AfterEffect).await;
    let delivered = Delivered {
        attempt: operation.attempt(),
        id: operation.id().to_string(),
        key: operation.derive("downstream").to_string(),
    };
    SEEN.lock().expect("a lock").push(delivered.clone());
    match body {
        "panic" => panic!("on purpose"),
        "fails" => Err(Failed::Unknown),
        "fails once" | "refused later" if operation.attempt() == 1 => Err(Failed::Unknown),
        _ => Ok(delivered),
    }
}

fn call(shop: &Shop, event: &str, body: &'static str) -> JoinHandle<Result<Delivered, Failed>> {
    let (shop, event) = (shop.clone(), event.to_owned());
    tokio::spawn(async move { deliver(&shop.engine.clone(), shop, event, body).await })
}

async fn called(shop: &Shop, event: &str, body: &'static str) -> Result<Delivered, Failed> {
    timeout(PATIENCE, call(shop, event, body)).await.expect("an end").expect("no panic")
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, impl Into<Failed>>) -> CallError {
    match result.map_err(Into::into) {
        Err(Failed::Call(error)) => error,
        other => panic!("expected a refusal: {other:?}"),
    }
}

async fn fifty_redeliveries_at_once_run_once(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let (other, _) = Shop::over(&ground);
    let held = shop.hold_at(Place::BeforeEffect);
    let also_held = other.hold_at(Place::BeforeEffect);
    held.open();
    also_held.open();
    let calls: Vec<_> =
        (0..50).map(|n| call(if n % 2 == 0 { &shop } else { &other }, "e", "ok")).collect();
    let mut values = Vec::new();
    for call in calls {
        match call.await.expect("no panic") {
            Ok(delivered) => values.push(delivered),
            Err(Failed::Call(error)) => assert_eq!(error.kind(), RefusalKind::InFlight),
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(shop.effects.count() + other.effects.count(), 1);
    let replay = called(&other, "e", "ok").await.expect("a value");
    assert!(!values.is_empty() && values.iter().all(|value| *value == replay), "{values:?}");
    assert_eq!(replay.attempt, 1);
}

#[idempotent(anchor = arg(event), scope = global, fingerprint = arg(amount, to))]
async fn pay(
    idem: &Idempotency,
    shop: Shop,
    event: u32,
    amount: f64,
    to: HashMap<&'static str, u8>,
) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

async fn another_call_under_the_key_is_a_mismatch(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let pay = |amount, to: [(&'static str, u8); 2]| {
        let shop = shop.clone();
        async move { pay(&shop.engine.clone(), shop, 1, amount, HashMap::from(to)).await }
    };
    assert_eq!(pay(100.0, [("a", 1), ("b", 2)]).await.unwrap(), 1);
    for _ in 0..8 {
        assert_eq!(pay(1e2, [("b", 2), ("a", 1)]).await.unwrap(), 1, "whatever the order");
    }
    for other in [pay(100.5, [("a", 1), ("b", 2)]).await, pay(100.0, [("a", 1), ("b", 3)]).await] {
        let error = refused(other);
        assert_eq!(error.kind(), RefusalKind::Mismatch);
        assert!(error.operation_id().is_some() && !error.is_retryable(), "{error}");
    }
    assert_eq!(shop.effects.count(), 1);
}

#[idempotent(anchor = arg(event), scope = global, in_flight = wait("10s"), operation = operation)]
async fn waited_for(
    idem: &Idempotency,
    shop: Shop,
    event: &'static str,
    body: &'static str,
) -> Result<Delivered, Failed> {
    work(&shop, &operation, body).await
}

fn wait_for(
    shop: &Shop,
    event: &'static str,
    body: &'static str,
) -> JoinHandle<Result<Delivered, Failed>> {
    let shop = shop.clone();
    tokio::spawn(async move { waited_for(&shop.engine.clone(), shop, event, body).await })
}

async fn what_is_in_flight_is_refused_or_waited_for(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let (other, _) = Shop::over(&ground);
    let held = shop.hold_at(Place::AfterEffect);
    let running = call(&shop, "e", "ok");
    held.reached().await;
    let error = refused(called(&other, "e", "ok").await);
    assert_eq!(error.kind(), RefusalKind::InFlight);
    assert!(error.is_retryable() && error.retry_after().is_some_and(|wait| !wait.is_zero()));
    held.open();
    let value = running.await.unwrap().unwrap();
    assert_eq!(called(&other, "e", "ok").await.unwrap(), value);

    for (event, body) in [("waits", "ok"), ("waits in vain", "fails")] {
        let held = shop.hold_at(Place::AfterEffect);
        let running = wait_for(&shop, event, body);
        held.reached().await;
        let waiting: Vec<_> = (0..10).map(|_| wait_for(&other, event, body)).collect();
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
        held.open();
        let value = running.await.unwrap();
        for waiting in waiting {
            let waited = timeout(PATIENCE, waiting).await.expect("an end").unwrap();
            match &value {
                Ok(value) => assert_eq!(waited.unwrap(), *value),
                Err(_) => assert_eq!(refused(waited).kind(), RefusalKind::InFlight),
            }
        }
    }
    assert_eq!((shop.effects.count(), other.effects.count()), (3, 0));
}

/// Where a call can stand when its caller goes away.
#[derive(Clone, Copy, Debug)]
enum Point {
    ClaimUnsent,
    ClaimUnanswered,
    In(Place),
    RecordUnsent,
    RecordUnanswered,
}

const POINTS: [Point; 6] = [
    Point::ClaimUnsent,
    Point::ClaimUnanswered,
    Point::In(Place::BeforeEffect),
    Point::In(Place::AfterEffect),
    Point::RecordUnsent,
    Point::RecordUnanswered,
];

fn hold_at(point: Point, ending: Call, shop: &Shop, faults: &Faults) -> Gate {
    match point {
        Point::ClaimUnsent => faults.hold_before(Call::Claim),
        Point::ClaimUnanswered => faults.hold_after(Call::Claim),
        Point::In(place) => shop.hold_at(place),
        Point::RecordUnsent => faults.hold_before(ending),
        Point::RecordUnanswered => faults.hold_after(ending),
    }
}

async fn a_caller_that_goes_away_anywhere_changes_nothing(ground: Ground) {
    for (body, ending) in [("ok", Call::Complete), ("fails once", Call::Release)] {
        for point in POINTS {
            let (shop, faults) = Shop::over(&ground);
            let event = format!("{point:?} {body}");
            let held = hold_at(point, ending, &shop, &faults);
            let running = call(&shop, &event, body);
            held.reached().await;
            assert_eq!(shop.engine.detached(), 0, "{event}: the caller is still there");
            running.abort();
            assert!(running.await.expect_err("it was dropped").is_cancelled());
            eventually(&format!("{event}: it goes on"), || shop.engine.detached() == 1).await;
            assert!(!shop.engine.drain(Duration::from_millis(5)).await, "{event}: it is not done");
            held.open();
            assert!(shop.engine.drain(PATIENCE).await, "{event}: it is done in the end");
            assert_eq!((shop.told(Outcome::Detached), shop.effects.count()), (1, 1), "{event}");
            let value = called(&shop, &event, body).await.expect("a value");
            let attempt = if body == "ok" { 1 } else { 2 };
            assert_eq!(
                (value.attempt, shop.effects.count()),
                (attempt, attempt as usize),
                "{event}"
            );
        }
    }
}

async fn who_waits_and_goes_away_leaves_nothing_behind(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let held = shop.hold_at(Place::BeforeEffect);
    let running = wait_for(&shop, "e", "ok");
    held.reached().await;
    let waiting = wait_for(&shop, "e", "ok");
    tokio::time::sleep(Duration::from_millis(20)).await;
    waiting.abort();
    let _ = waiting.await;
    assert_eq!(shop.engine.detached(), 0);
    held.open();
    assert_eq!(running.await.unwrap().unwrap().attempt, 1);
}

async fn a_panic_is_an_unknown_outcome(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let error = refused(called(&shop, "e", "panic").await);
    assert_eq!(error.kind(), RefusalKind::HandlerPanicked);
    assert!(error.is_retryable());
    let value = called(&shop, "e", "ok").await.unwrap();
    assert_eq!((value.attempt, Some(value.id)), (2, error.operation_id().map(|id| id.to_string())));
}

async fn an_error_is_an_unknown_outcome_and_the_next_attempt_the_same_operation(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    for attempt in 1..=2 {
        let failed = called(&shop, "e", "fails").await;
        assert!(matches!(failed, Err(Failed::Unknown)), "{failed:?}");
        assert_eq!(shop.told(Outcome::Released), attempt);
    }
    let value = called(&shop, "e", "ok").await.unwrap();
    assert_eq!((value.attempt, shop.effects.count()), (3, 3));
    let of_it: Vec<_> = {
        let seen = SEEN.lock().expect("a lock");
        seen.iter().filter(|seen| seen.id == value.id).cloned().collect()
    };
    assert_eq!(of_it.iter().map(|seen| seen.attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(of_it.iter().all(|seen| seen.key == value.key), "one key for the downstream");
    assert_eq!(called(&shop, "e", "fails").await.unwrap(), value, "the value is final");
}

#[idempotent(
    anchor = arg(event),
    scope = global,
    on_unknown = refuse,
    operation = operation,
    nothing_happened = Failed::is_refusal,
)]
async fn careful(
    idem: &Idempotency,
    shop: Shop,
    event: &'static str,
    body: &'static str,
) -> Result<Delivered, Failed> {
    work(&shop, &operation, body).await
}

async fn under_refuse_an_error_stays_unknown(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let careful = |event, body| careful(&shop.engine, shop.clone(), event, body);
    assert!(matches!(careful("e", "fails").await, Err(Failed::Unknown)));
    for _ in 0..2 {
        let error = refused(careful("e", "ok").await);
        assert_eq!(error.kind(), RefusalKind::UnknownOutcome);
        assert!(!error.is_retryable() && error.operation_id().is_some());
    }
    assert_eq!(shop.effects.count(), 1);
    assert!(matches!(careful("other", "refused").await, Err(Failed::Refused)));
    assert_eq!(careful("other", "ok").await.unwrap().attempt, 1, "nothing had happened");
}

async fn an_error_before_any_effect_frees_the_key(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert!(matches!(called(&shop, "e", "refused").await, Err(Failed::Refused)));
    assert_eq!(shop.told(Outcome::Forgotten), 1);
    assert_eq!(called(&shop, "e", "ok").await.unwrap().attempt, 1);
}

#[idempotent(
    anchor = arg(event),
    scope = global,
    operation = operation,
    nothing_happened = Failed::is_refusal,
)]
async fn stepwise(
    idem: &Idempotency,
    shop: Shop,
    event: &'static str,
    body: &'static str,
) -> Result<u32, Failed> {
    let step = async || {
        shop.effects.happen();
        Ok::<_, std::convert::Infallible>(operation.attempt())
    };
    let one: u32 = operation.step("one", step()).await?;
    shop.come_to(Place::AfterEffect).await;
    if operation.attempt() == 1 {
        return match body {
            "refused" => Err(Failed::Refused),
            _ => Err(Failed::Unknown),
        };
    }
    let two: u32 = operation.step("two", step()).await?;
    Ok(10 * one + two)
}

impl<E> From<StepError<E>> for Failed {
    fn from(_: StepError<E>) -> Self {
        Self::Step
    }
}

async fn but_not_in_a_later_attempt_nor_after_a_step(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert!(matches!(called(&shop, "e", "refused later").await, Err(Failed::Unknown)));
    assert!(matches!(called(&shop, "e", "refused later").await, Err(Failed::Refused)));
    assert_eq!(called(&shop, "e", "ok").await.unwrap().attempt, 3);
    assert_eq!(shop.told(Outcome::Forgotten), 0);

    let stepwise = || stepwise(&shop.engine, shop.clone(), "stepwise", "refused");
    assert!(matches!(stepwise().await, Err(Failed::Refused)));
    assert_eq!(stepwise().await.unwrap(), 12, "the first step had been taken");
}

async fn steps_are_taken_once_in_all_attempts(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let stepwise = || stepwise(&shop.engine, shop.clone(), "e", "");
    assert!(matches!(stepwise().await, Err(Failed::Unknown)));
    for _ in 0..3 {
        assert_eq!(stepwise().await.unwrap(), 12);
    }
    assert_eq!(shop.effects.count(), 2);
}

async fn an_owner_that_was_replaced_gives_the_value_of_the_other(ground: Ground) {
    for (event, slow, fast) in
        [("both", "ok", "ok"), ("one", "fails", "ok"), ("none", "ok", "fails")]
    {
        let (first, _) = Shop::over(&ground);
        let (second, _) = Shop::over(&ground);
        let held = first.hold_at(Place::AfterEffect);
        let running = call(&first, event, slow);
        held.reached().await;
        ground.clock.advance(LAPSE);
        let theirs = called(&second, event, fast).await;
        held.open();
        let ours = running.await.unwrap();
        match theirs {
            Ok(theirs) => assert_eq!((theirs.attempt, ours.unwrap()), (2, theirs), "{event}"),
            Err(_) => {
                let error = refused(ours);
                assert_eq!(error.kind(), RefusalKind::LeaseLost, "{event}");
                assert!(error.is_retryable());
            }
        }
    }
}

/// One function before a deploy and after it.
mod before {
    use super::*;

    #[idempotent(anchor = arg(id), scope = global, space = "deployed")]
    pub(crate) async fn deployed(
        idem: &Idempotency,
        shop: Shop,
        id: u8,
    ) -> Result<String, CallError> {
        shop.effects.happen();
        Ok("secret".to_owned())
    }

    #[idempotent(anchor = arg(id), scope = global, space = "compared", fingerprint = arg(a))]
    pub(crate) async fn compared(
        idem: &Idempotency,
        shop: Shop,
        id: u8,
        a: u8,
    ) -> Result<usize, CallError> {
        Ok(shop.effects.happen())
    }
}

mod after {
    use super::*;

    #[idempotent(anchor = arg(id), scope = global, space = "deployed")]
    pub(crate) async fn deployed(
        idem: &Idempotency,
        shop: Shop,
        id: u8,
    ) -> Result<Vec<u8>, CallError> {
        shop.effects.happen();
        Ok(Vec::new())
    }

    #[idempotent(anchor = arg(id), scope = global, space = "compared", fingerprint = arg(b, a))]
    pub(crate) async fn compared(
        idem: &Idempotency,
        shop: Shop,
        id: u8,
        a: u8,
        b: u8,
    ) -> Result<usize, CallError> {
        Ok(shop.effects.happen())
    }
}

async fn a_value_of_another_type_is_neither_replayed_nor_run_again(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    before::deployed(&shop.engine, shop.clone(), 1).await.unwrap();
    let error = after::deployed(&shop.engine, shop.clone(), 1).await.unwrap_err();
    assert_eq!(error.kind(), RefusalKind::RecordUnreadable);
    let why = error.source().and_then(Error::source).expect("what the reader said");
    assert!(why.downcast_ref::<serde_json::Error>().is_some(), "{why}");
    assert!(!error.to_string().contains("secret"), "{error}");
    assert_eq!(shop.told(Outcome::Refused(RefusalKind::RecordUnreadable)), 1);
    assert_eq!(before::deployed(&shop.engine, shop.clone(), 1).await.unwrap(), "secret");
    assert_eq!(shop.effects.count(), 1);
}

async fn a_deploy_that_compares_more_or_less_repeats_nothing(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let old = |id, a| before::compared(&shop.engine, shop.clone(), id, a);
    let new = |id, a, b| after::compared(&shop.engine, shop.clone(), id, a, b);
    assert_eq!(old(1, 7).await.unwrap(), 1);
    assert_eq!(new(1, 7, 100).await.unwrap(), 1, "compared in what the record knows");
    assert_eq!(new(1, 8, 100).await.unwrap_err().kind(), RefusalKind::Mismatch);
    assert_eq!(new(2, 7, 100).await.unwrap(), 2);
    assert_eq!(old(2, 7).await.unwrap_err().kind(), RefusalKind::RecordUnreadable);
    assert_eq!(shop.effects.count(), 2);
}

#[idempotent(anchor = arg(size), scope = global)]
async fn large(idem: &Idempotency, shop: Shop, size: usize) -> Result<String, CallError> {
    shop.effects.happen();
    Ok("x".repeat(size))
}

#[idempotent(anchor = arg(1), scope = global)]
async fn unwritable(idem: &Idempotency, shop: Shop) -> Result<HashMap<(u8, u8), u8>, CallError> {
    shop.effects.happen();
    Ok(HashMap::from([((1, 2), 3)]))
}

async fn what_is_too_large_or_cannot_be_written_is_known_to_be_done(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.response_body_limit(100));
    let large = |size| large(&shop.engine, shop.clone(), size);
    for size in [98, 99, 1_000] {
        assert_eq!(large(size).await.unwrap().len(), size);
    }
    assert_eq!(large(98).await.unwrap().len(), 98, "98 and two quotes fit");
    for size in [99, 1_000] {
        let error = large(size).await.unwrap_err();
        assert_eq!(error.kind(), RefusalKind::NotReplayable);
        assert!(!error.is_retryable(), "it was done");
    }
    faults.once(Call::Complete, Fault::Fail(StoreErrorKind::TooLarge));
    assert_eq!(large(1).await.unwrap(), "x");
    assert_eq!(large(1).await.unwrap_err().kind(), RefusalKind::NotReplayable);
    assert_eq!(unwritable(&shop.engine, shop.clone()).await.unwrap()[&(1, 2)], 3);
    let error = unwritable(&shop.engine, shop.clone()).await.unwrap_err();
    assert_eq!(error.kind(), RefusalKind::NotReplayable);
    assert_eq!(shop.effects.count(), 5);
}

async fn a_store_that_fails_runs_nothing(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    for (kind, refusal) in [
        (StoreErrorKind::Unreachable, RefusalKind::StoreUnavailable),
        (StoreErrorKind::Refused, RefusalKind::StoreUnavailable),
        (StoreErrorKind::Full, RefusalKind::StoreFull),
        (StoreErrorKind::Newer, RefusalKind::RecordUnreadable),
    ] {
        faults.always(Call::Claim, Fault::Fail(kind));
        let error = refused(called(&shop, "e", "ok").await);
        assert_eq!(error.kind(), refusal);
        let source = error.source().and_then(|source| source.downcast_ref::<StoreError>());
        assert_eq!(source.map(StoreError::kind), Some(kind));
        assert!(error.is_retryable());
        faults.mend(Call::Claim);
    }
    assert_eq!(shop.effects.count(), 0);
    faults.once(Call::Claim, Fault::LoseAnswer);
    assert_eq!(called(&shop, "e", "ok").await.unwrap().attempt, 1, "one token is one claim");

    let (open, faults) = Shop::with(&ground, |engine| engine.store_outage(StoreOutage::Open));
    faults.always(Call::Claim, Fault::Fail(StoreErrorKind::Unreachable));
    assert_eq!(called(&open, "open", "ok").await.unwrap().attempt, 1);
    assert_eq!((open.effects.count(), open.told(Outcome::Unprotected)), (1, 1));
}

async fn a_store_that_fails_at_the_record_delays_it(ground: Ground) {
    let (shop, faults) =
        Shop::with(&ground, |engine| engine.record_wait(Duration::from_millis(50)));
    faults.always(Call::Complete, Fault::Fail(StoreErrorKind::Unreachable));
    let value = called(&shop, "e", "ok").await.expect("its value all the same");
    assert_eq!(shop.told(Outcome::RecordDelayed), 1);
    assert_eq!(refused(called(&shop, "e", "ok").await).kind(), RefusalKind::InFlight);
    faults.mend(Call::Complete);
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(called(&shop, "e", "ok").await.unwrap(), value);
    assert_eq!(shop.effects.count(), 1);
}

async fn a_full_backlog_refuses(ground: Ground) {
    let (shop, _) = Shop::with(&ground, |engine| engine.detached_limit(1));
    let held = shop.hold_at(Place::BeforeEffect);
    let running = call(&shop, "e", "ok");
    held.reached().await;
    running.abort();
    eventually("it goes on", || shop.engine.detached() == 1).await;
    let error = refused(called(&shop, "other", "ok").await);
    assert_eq!((error.kind(), error.is_retryable()), (RefusalKind::Busy, true));
    held.open();
    assert!(shop.engine.drain(PATIENCE).await);
}

#[idempotent(anchor = arg(id))]
async fn unscoped(idem: &Idempotency, shop: Shop, id: u8) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

#[idempotent(anchor = arg(id), scope = arg(tenant))]
async fn of_tenant(
    idem: &Idempotency,
    shop: Shop,
    id: u8,
    tenant: String,
) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

async fn scopes_are_said_and_keep_tenants_apart(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let error = unscoped(&shop.engine, shop.clone(), 1).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (RefusalKind::ScopeMissing, false));
    assert!(error.to_string().contains("write `scope = arg(..)` or `scope = global`"), "{error}");
    let of_tenant = |tenant: &str| of_tenant(&shop.engine, shop.clone(), 1, tenant.to_owned());
    assert_eq!((of_tenant("a").await.unwrap(), of_tenant("b").await.unwrap()), (1, 2));
    assert_eq!((of_tenant("a").await.unwrap(), of_tenant("b").await.unwrap()), (1, 2));
    assert_eq!(of_tenant("").await.unwrap_err().kind(), RefusalKind::ScopeMissing);

    let (store, _) = ground.faulty();
    let global = Idempotency::builder(store).scope(Scope::global()).build();
    assert_eq!(unscoped(&global, shop.clone(), 1).await.unwrap(), 3);
    assert_eq!(unscoped(&global, shop.clone(), 1).await.unwrap(), 3);
}

#[idempotent(anchor = arg(id), format = hex(2), scope = global)]
async fn in_hex(idem: &Idempotency, shop: Shop, id: &'static str) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

#[idempotent(anchor = arg(1), scope = global, fingerprint = arg(map))]
async fn by_map(idem: &Idempotency, map: HashMap<(u8, u8), u8>) -> Result<(), CallError> {
    Ok(())
}

async fn values_that_cannot_be_keys_are_refused(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    for event in ["", "a\nb", &"x".repeat(256)] {
        let error = refused(called(&shop, event, "ok").await);
        assert_eq!((error.kind(), error.is_retryable()), (RefusalKind::KeyMalformed, false));
        assert!(error.source().is_some());
    }
    let in_hex = |id| in_hex(&shop.engine, shop.clone(), id);
    assert_eq!(in_hex("0xABcd").await.unwrap(), 1);
    assert_eq!(in_hex("abcd").await.unwrap(), 1);
    assert_eq!(in_hex("abc").await.unwrap_err().kind(), RefusalKind::KeyMalformed);
    let error = by_map(&shop.engine, HashMap::from([((1, 2), 3)])).await.unwrap_err();
    assert_eq!(error.kind(), RefusalKind::BodyMalformed);
    assert!(error.source().and_then(Error::source).is_some(), "{error:?}");
}

async fn where_idem_observes_or_is_off_everything_runs(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.mode(Mode::Off));
    for effects in 1..=2 {
        assert_eq!(called(&shop, "e", "ok").await.unwrap().attempt, 1);
        assert_eq!((shop.effects.count(), faults.calls(Call::Claim)), (effects, 0));
    }
    let (shop, _) = Shop::with(&ground, |engine| engine.mode(Mode::Observe));
    for effects in 1..=3 {
        called(&shop, "e", "ok").await.unwrap();
        assert_eq!(shop.effects.count(), effects);
    }
    assert!(unscoped(&shop.engine, shop.clone(), 1).await.is_ok(), "it would be refused");
    assert!(call(&shop, "panics", "panic").await.is_err_and(|error| error.is_panic()));
    let told = shop.remember.outcomes();
    let expected = [
        Outcome::Recorded,
        Outcome::Replayed,
        Outcome::Replayed,
        Outcome::Refused(RefusalKind::ScopeMissing),
        Outcome::Released,
    ];
    assert_eq!(told, expected);
}

#[idempotent(anchor = arg(id), scope = global, space = "shared")]
async fn charge(idem: &Idempotency, shop: Shop, id: &'static str) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

#[idempotent(anchor = arg(id), scope = global, space = "shared")]
async fn refund(idem: &Idempotency, shop: Shop, id: &'static str) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

#[idempotent(anchor = header("Idempotency-Key"), scope = global, space = "shared")]
async fn handler(State(shop): State<Shop>, _body: String) -> String {
    shop.effects.happen().to_string()
}

#[idempotent(anchor = header("Idempotency-Key"), scope = global, space = "shared", fingerprint = none)]
async fn careless_handler(State(shop): State<Shop>) -> String {
    shop.effects.happen().to_string()
}

async fn a_named_space_knows_its_functions_and_handlers_apart(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(charge(&shop.engine, shop.clone(), "of a function").await.unwrap(), 1);
    let other = refund(&shop.engine, shop.clone(), "of a function").await;
    assert_eq!(other.unwrap_err().kind(), RefusalKind::Mismatch);
    shop.call(handler, payment("of a function", "")).await.assert_refused(422, "mismatch");
    shop.call(careless_handler, payment("of a function", "")).await.assert_refused(422, "mismatch");
    for (key, answer) in [
        ("of a handler", shop.call(handler, payment("of a handler", "")).await),
        ("of another", shop.call(careless_handler, payment("of another", "")).await),
    ] {
        assert_eq!(answer.status, 200);
        let error = charge(&shop.engine, shop.clone(), key).await.unwrap_err();
        assert_eq!(error.kind(), RefusalKind::Mismatch, "{key}");
    }
    assert_eq!(shop.effects.count(), 3);
}

mod elsewhere {
    use super::*;

    #[idempotent(anchor = arg(id), scope = global)]
    pub(crate) async fn job(idem: &Idempotency, shop: Shop, id: u8) -> Result<usize, CallError> {
        Ok(shop.effects.happen())
    }
}

#[idempotent(anchor = arg(id), scope = global)]
async fn job(idem: &Idempotency, shop: Shop, id: u8) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

#[idempotent(anchor = arg(id), scope = global)]
async fn another_job(idem: &Idempotency, shop: Shop, id: u8) -> Result<usize, CallError> {
    Ok(shop.effects.happen())
}

async fn each_function_is_a_space_of_its_own(ground: Ground) {
    // An engine's space is for the requests of an API.
    for (round, space) in [None, Some("api")].into_iter().enumerate() {
        let (shop, _) = Shop::with(&ground, |engine| match space {
            Some(space) => engine.space(space),
            None => engine,
        });
        for expected in [[1, 2, 3], [1, 2, 3]] {
            let id = u8::try_from(round).unwrap();
            let values = [
                job(&shop.engine, shop.clone(), id).await.unwrap(),
                another_job(&shop.engine, shop.clone(), id).await.unwrap(),
                elsewhere::job(&shop.engine, shop.clone(), id).await.unwrap(),
            ];
            assert_eq!(values, expected);
        }
    }
}

tokio::task_local! { static TRACE: u8; }

#[idempotent(anchor = arg(1), scope = global)]
async fn traced(idem: &Idempotency, shop: Shop) -> Result<u8, CallError> {
    shop.come_to(Place::BeforeEffect).await;
    shop.effects.happen();
    Ok(TRACE.try_with(|trace| *trace).unwrap_or_default())
}

async fn what_was_carried_along_is_there(ground: Ground) {
    let (shop, _) = Shop::with(&ground, |engine| {
        engine.carry(|work| match TRACE.try_with(|trace| *trace) {
            Ok(trace) => Box::pin(TRACE.scope(trace, work)),
            Err(_) => work,
        })
    });
    let held = shop.hold_at(Place::BeforeEffect);
    let owner = shop.clone();
    let running =
        tokio::spawn(TRACE.scope(7, async move { traced(&owner.engine.clone(), owner).await }));
    held.reached().await;
    running.abort();
    held.open();
    eventually("it goes on alone", || shop.effects.count() == 1).await;
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(traced(&shop.engine, shop.clone()).await.unwrap(), 7);
}

async fn the_observer_hears_of_calls(ground: Ground) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let (shop, _) = Shop::with(&ground, |engine| {
        engine.observer(move |event: &idem_runtime::Event<'_>| {
            let told = (event.outcome.name(), event.operation.to_owned(), event.attempt);
            hears.lock().expect("a lock").push(told);
        })
    });
    called(&shop, "e", "ok").await.unwrap();
    called(&shop, "e", "ok").await.unwrap();
    let name = "fn plain_functions::deliver".to_owned();
    let expected = [("recorded", name.clone(), Some(1)), ("replayed", name, None)];
    assert_eq!(*heard.lock().expect("a lock"), expected);
}

fn new_runtime() -> runtime::Runtime {
    runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Whatever the await at which a process dies, the redelivery goes on as the same operation after
/// the lease, and at most the step in whose middle it died is taken twice.
#[test]
fn a_crash_at_any_await_repeats_at_most_the_step_that_was_being_taken() {
    // The store's own runtime outlives the processes.
    let machine = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let machine = machine.expect("a runtime");
    for sqlite in [false, true] {
        let (mut crashes, mut repeated) = (0, 0);
        for polls in 1..200 {
            let ground = machine.block_on(async {
                if sqlite { Ground::sqlite().await } else { Ground::memory().await }
            });
            let (first, faults) = Shop::over(&ground);
            for call in [Call::Claim, Call::Checkpoint, Call::Complete] {
                faults.always(call, Fault::Yield);
            }
            let dies = new_runtime();
            let owner = first.clone();
            let mut running =
                Box::pin(async move { two_steps(&owner.engine.clone(), owner, 1).await });
            let mut left = polls;
            let finished = dies.block_on(poll_fn(|context| {
                if left == 0 {
                    return Poll::Ready(false);
                }
                left -= 1;
                running.as_mut().poll(context).map(|value| value.is_ok())
            }));
            // Nothing of the process goes on after its runtime.
            dies.shutdown_background();
            drop(running);
            if finished {
                break;
            }
            crashes += 1;
            let (second, _) = Shop::over(&ground);
            let redelivered = || {
                let second = second.clone();
                machine.block_on(async move { two_steps(&second.engine.clone(), second, 1).await })
            };
            if let Err(error) = redelivered() {
                assert_eq!(error.kind(), RefusalKind::InFlight, "{polls} polls");
                ground.clock.advance(LAPSE);
            }
            assert_eq!(redelivered().expect("a value"), "done", "{polls} polls");
            let effects = first.effects.count() + second.effects.count();
            assert!((2..=3).contains(&effects), "{effects} effects after {polls} polls");
            repeated += usize::from(effects == 3);
        }
        assert!(crashes >= 10 && repeated >= 4, "{crashes} crashes, {repeated} repeated a step");
    }
}

#[idempotent(anchor = arg(id), scope = global, operation = operation)]
async fn two_steps(idem: &Idempotency, shop: Shop, id: u8) -> Result<String, CallError> {
    for name in ["one", "two"] {
        let step = async {
            shop.effects.happen();
            tokio::task::yield_now().await;
            Ok::<_, std::convert::Infallible>(())
        };
        if operation.step(name, step).await.is_err() {
            panic!("no step fails");
        }
    }
    Ok("done".to_owned())
}
