//! Attempts that ended without saying whether their effect happened: refused, or found out.

#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{future::poll_fn, task::Poll, time::Duration};

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use idem_runtime::{Operation, Outcome, Recovered, RequestContext, idempotent};
use tests::{
    faults::{Call, Fault, Faults, Gate, Ground, PATIENCE, eventually},
    server::Answer,
    shop::{Place, Shop, payment},
    with_faults_on_both_stores,
};
use tokio::{runtime, task::JoinHandle, time::timeout};

/// Longer than the default lease, shorter than the time to live.
const LAPSE: Duration = Duration::from_secs(31);
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

with_faults_on_both_stores!(
    every_uncertain_end_is_refused_until_the_time_to_live_is_over,
    every_uncertain_end_is_found_out,
    an_answer_that_was_found_out_is_recorded_whatever_the_policy_records,
    what_never_happened_runs_as_the_same_operation,
    what_cannot_be_found_out_is_refused_and_asked_for_again,
    one_at_a_time_finds_out,
    a_recovery_that_panics_is_asked_for_again,
    a_recovery_whose_client_leaves_goes_on,
    another_request_is_never_recovered,
    an_answer_that_could_not_be_recorded_is_found_out,
);

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse)]
async fn refuse(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    shop.work(&operation, body).await
}

/// What happened, by the key: the application's own books.
async fn find_out(request: RequestContext) -> Recovered {
    let shop = request.state::<Shop>().expect("the router's state").clone();
    assert!(request.operation().attempt() > 1);
    assert!(!request.body().is_empty(), "it sees the request");
    // Who asks comes by the extractor's place.
    shop.come_to(Place::Extractor).await;
    let key = request.headers()["idempotency-key"].to_str().expect("text");
    let id = request.operation().id();
    match key.split('-').next() {
        Some("answered") => Recovered::answered((StatusCode::CREATED, format!("found {id}"))),
        Some("failed") => Recovered::answered((StatusCode::BAD_GATEWAY, format!("found {id}"))),
        Some("never") => Recovered::never_happened(),
        Some("panic") => panic!("on purpose"),
        _ => Recovered::unknown(),
    }
}

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = find_out)]
async fn recover(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    let response = shop.work(&operation, body).await;
    // Only the first attempt ends as its body says.
    match operation.attempt() {
        1 => response,
        attempt => (StatusCode::CREATED, format!("attempt {attempt}")).into_response(),
    }
}

/// The uncertain ends; `None` is an owner that dies.
const ENDS: [(Option<u16>, &str); 5] = [
    (None, "201"),
    (Some(500), "panic after"),
    (Some(500), "500"),
    (Some(503), "503"),
    (Some(408), "408"),
];

macro_rules! end_uncertainly {
    ($handler:ident, $ground:ident, $key:expr, $end:expr) => {{
        let (shop, _) = Shop::over(&$ground);
        let (status, body) = $end;
        match status {
            Some(status) => {
                let answer = shop.call($handler, payment($key, body)).await;
                assert_eq!(answer.status, status, "{body}");
            }
            None => {
                let held = shop.hold_at(Place::AfterEffect);
                let (dying, key) = (shop.clone(), $key.to_owned());
                tokio::spawn(async move { dying.call($handler, payment(&key, body)).await });
                held.reached().await;
                $ground.clock.advance(LAPSE);
            }
        }
        shop.operation().id()
    }};
}

async fn every_uncertain_end_is_refused_until_the_time_to_live_is_over(ground: Ground) {
    for (number, end) in ENDS.into_iter().enumerate() {
        let key = number.to_string();
        let id = end_uncertainly!(refuse, ground, &key, end);
        let (shop, _) = Shop::over(&ground);
        for _ in 0..3 {
            let refused = shop.call(refuse, payment(&key, end.1)).await;
            refused.assert_refused(409, "unknown_outcome");
            assert_eq!(refused.json()["operation_id"], id.to_string());
        }
        shop.call(refuse, payment(&key, "202")).await.assert_refused(422, "mismatch");
        ground.clock.advance(TTL - LAPSE - Duration::from_secs(1));
        shop.call(refuse, payment(&key, end.1)).await.assert_refused(409, "unknown_outcome");
        assert_eq!(shop.effects.count(), 0);
        ground.clock.advance(LAPSE + Duration::from_secs(1));
        let fresh = shop.call(refuse, payment(&key, "201")).await;
        assert_eq!((fresh.status, shop.effects.count()), (201, 1));
        assert_ne!(shop.operation().id(), id);
    }
}

async fn every_uncertain_end_is_found_out(ground: Ground) {
    for (number, end) in ENDS.into_iter().enumerate() {
        let key = format!("answered-{number}");
        let id = end_uncertainly!(recover, ground, &key, end);
        let (shop, _) = Shop::over(&ground);
        for _ in 0..3 {
            let answer = shop.call(recover, payment(&key, end.1)).await;
            answer.assert_is(201, &format!("found {id}"), true);
        }
        assert_eq!((shop.effects.count(), shop.told(Outcome::Recorded)), (0, 1));
        assert_eq!(shop.told(Outcome::Replayed), 2);
    }
}

async fn an_answer_that_was_found_out_is_recorded_whatever_the_policy_records(ground: Ground) {
    let id = end_uncertainly!(recover, ground, "failed", (Some(503), "503"));
    let (shop, faults) = Shop::over(&ground);
    for _ in 0..3 {
        let answer = shop.call(recover, payment("failed", "503")).await;
        answer.assert_is(502, &format!("found {id}"), true);
    }
    assert_eq!((faults.calls(Call::Complete), shop.effects.count()), (1, 0));
}

async fn what_never_happened_runs_as_the_same_operation(ground: Ground) {
    for (number, end) in ENDS.into_iter().enumerate() {
        let key = format!("never-{number}");
        let id = end_uncertainly!(recover, ground, &key, end);
        let (shop, _) = Shop::over(&ground);
        // A body whose second attempt succeeds, except that it panics whenever it is told to.
        let answer = shop.call(recover, payment(&key, end.1)).await;
        assert_eq!(shop.operation().id(), id);
        assert_eq!(shop.operation().attempt(), 2);
        assert_eq!(shop.effects.count(), usize::from(end.1 != "408"));
        if end.1 != "panic after" {
            answer.assert_is(201, "attempt 2", false);
            shop.call(recover, payment(&key, end.1)).await.assert_is(201, "attempt 2", true);
        }
    }
}

async fn what_cannot_be_found_out_is_refused_and_asked_for_again(ground: Ground) {
    let id = end_uncertainly!(recover, ground, "unknown", (Some(503), "503"));
    let (shop, _) = Shop::over(&ground);
    for asked in 1..=3 {
        let held = shop.hold_at(Place::Extractor);
        held.open();
        let refused = shop.call(recover, payment("unknown", "503")).await;
        refused.assert_refused(409, "unknown_outcome");
        assert_eq!(refused.json()["operation_id"], id.to_string());
        timeout(PATIENCE, held.reached()).await.expect("asked");
        assert_eq!(shop.told(Outcome::Released), asked);
    }
    assert_eq!(shop.effects.count(), 0);
}

type Asking = (Shop, Faults, Gate, JoinHandle<Answer>);

/// A process that stands in its recovery.
async fn asking(ground: &Ground, key: &'static str) -> Asking {
    let (shop, faults) = Shop::over(ground);
    let held = shop.hold_at(Place::Extractor);
    let asker = shop.clone();
    let running = tokio::spawn(async move { asker.call(recover, payment(key, "503")).await });
    held.reached().await;
    (shop, faults, held, running)
}

async fn one_at_a_time_finds_out(ground: Ground) {
    let id = end_uncertainly!(recover, ground, "answered", (Some(503), "503"));
    let (shop, _, held, running) = asking(&ground, "answered").await;
    for shop in [shop, Shop::over(&ground).0] {
        for _ in 0..10 {
            let refused = shop.call(recover, payment("answered", "503")).await;
            refused.assert_refused(409, "in_flight");
        }
        shop.call(recover, payment("answered", "201")).await.assert_refused(422, "mismatch");
    }
    held.open();
    running.await.expect("an answer").assert_is(201, &format!("found {id}"), true);
}

async fn a_recovery_that_panics_is_asked_for_again(ground: Ground) {
    end_uncertainly!(recover, ground, "panic", (Some(503), "503"));
    let (shop, _) = Shop::over(&ground);
    for _ in 0..3 {
        let failed = shop.call(recover, payment("panic", "503")).await;
        failed.assert_refused(500, "handler_panicked");
    }
    assert_eq!((shop.effects.count(), shop.told(Outcome::Released)), (0, 3));
}

async fn a_recovery_whose_client_leaves_goes_on(ground: Ground) {
    let id = end_uncertainly!(recover, ground, "answered", (Some(503), "503"));
    let (shop, _, held, running) = asking(&ground, "answered").await;
    running.abort();
    assert!(running.await.is_err());
    assert_eq!(shop.engine.detached(), 1);
    held.open();
    eventually("it is recorded", || shop.told(Outcome::Recorded) == 1).await;
    let replay = shop.call(recover, payment("answered", "503")).await;
    replay.assert_is(201, &format!("found {id}"), true);
}

async fn another_request_is_never_recovered(ground: Ground) {
    end_uncertainly!(recover, ground, "answered", (Some(503), "503"));
    let (shop, _) = Shop::over(&ground);
    shop.call(recover, payment("answered", "201")).await.assert_refused(422, "mismatch");
    assert_eq!(shop.told(Outcome::Recorded), 0);
}

/// Recovery itself may die before its record: the next retry asks once more.
async fn an_answer_that_could_not_be_recorded_is_found_out(ground: Ground) {
    let id = end_uncertainly!(recover, ground, "answered", (Some(503), "503"));
    let (dying, faults) = Shop::over(&ground);
    let held = faults.hold_before(Call::Complete);
    let asker = dying.clone();
    let running =
        tokio::spawn(async move { asker.call(recover, payment("answered", "503")).await });
    held.reached().await;
    ground.clock.advance(LAPSE);
    let (shop, _) = Shop::over(&ground);
    let answer = shop.call(recover, payment("answered", "503")).await;
    answer.assert_is(201, &format!("found {id}"), true);
    assert_eq!(shop.told(Outcome::Recorded), 1);
    held.open();
    running.await.expect("an answer").assert_is(201, &format!("found {id}"), true);
    assert_eq!((dying.effects.count(), shop.effects.count()), (0, 0));
}

/// Before the effect, after it, before the record, after it: whatever the await at which a process
/// dies, nothing is repeated that is to be refused or found out.
#[test]
fn a_crash_at_any_await_repeats_nothing_that_is_refused_or_found_out() {
    let machine = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let machine = machine.expect("a runtime");
    for (sqlite, finds_out) in [(false, false), (false, true), (true, false), (true, true)] {
        let key = "answered";
        let (mut crashes, mut unknown, mut found) = (0, 0, 0);
        let call = async move |shop: Shop| match finds_out {
            true => shop.call(recover, payment(key, "201")).await,
            false => shop.call(refuse, payment(key, "201")).await,
        };
        for polls in 1..200 {
            let ground = machine.block_on(async {
                if sqlite { Ground::sqlite().await } else { Ground::memory().await }
            });
            let (first, faults) = Shop::over(&ground);
            for call in [Call::Claim, Call::Complete] {
                faults.always(call, Fault::Yield);
            }
            let dies = runtime::Builder::new_current_thread().enable_all().build();
            let dies = dies.expect("a runtime");
            let mut running = Box::pin(call(first.clone()));
            let mut left = polls;
            let finished = dies.block_on(poll_fn(|context| {
                if left == 0 {
                    return Poll::Ready(false);
                }
                left -= 1;
                running.as_mut().poll(context).map(|answer| answer.status == 201)
            }));
            dies.shutdown_background();
            drop(running);
            if finished {
                break;
            }
            crashes += 1;
            ground.clock.advance(LAPSE);
            let (second, _) = Shop::over(&ground);
            let answer = machine.block_on(call(second.clone()));
            match (answer.status, answer.is_replay()) {
                (409, false) if !finds_out => {
                    answer.assert_refused(409, "unknown_outcome");
                    unknown += 1;
                }
                (201, replay) => found += usize::from(replay),
                _ => panic!("{answer:?} after {polls} polls"),
            }
            let effects = first.effects.count() + second.effects.count();
            assert!(effects <= 1, "{effects} effects after {polls} polls");
        }
        assert!(crashes >= 4 && unknown + found >= 3, "{crashes}: {unknown} {found}");
    }
}
