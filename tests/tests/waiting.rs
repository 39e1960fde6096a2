//! Duplicates that wait for the answer of the request that they repeat.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use axum::http::{HeaderValue, Request};
use idem_runtime::{InFlight, Outcome, RefusalKind, store::StoreErrorKind};
use tests::{
    faults::{Call, Fault, Faults, Gate, Ground, PATIENCE, eventually},
    server::Answer,
    shop::{Place, Shop, pay, payment},
    with_faults_on_both_stores,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

with_faults_on_both_stores!(
    a_duplicate_gets_the_answer_when_it_is_there,
    a_duplicate_is_refused_at_the_bound,
    a_client_may_wait_for_less_and_never_for_more,
    a_preference_that_cannot_be_read_is_none,
    a_waiter_whose_client_leaves_is_gone_at_once,
    waiters_of_an_owner_without_an_answer_are_refused_and_none_runs,
    another_request_is_refused_without_waiting,
    a_thousand_waiters_have_one_effect_and_cost_few_looks,
    waiters_are_sent_away_at_a_shutdown,
    an_owner_in_another_process_wakes_waiters,
    waiters_of_an_owner_that_died_are_refused_when_its_lease_is_over,
    a_store_that_fails_for_a_while_only_delays_the_news,
    a_duplicate_that_may_not_wait_here_is_refused_at_once_elsewhere,
);

fn shop(ground: &Ground, bound: Duration) -> (Shop, Faults) {
    Shop::with(ground, |engine| engine.in_flight(InFlight::Wait(bound)))
}

/// A shop whose handler stands in its body, with its effect done.
async fn busy(ground: &Ground, body: &str) -> (Shop, Faults, Gate, JoinHandle<Answer>) {
    let (shop, faults) = shop(ground, PATIENCE * 2);
    let held = shop.hold_at(Place::AfterEffect);
    let running = shop.start_to_pay("k", body);
    held.reached().await;
    (shop, faults, held, running)
}

/// Duplicates that have been told that the request is running.
async fn waiters(
    shop: &Shop,
    faults: &Faults,
    body: &str,
    count: usize,
) -> Vec<JoinHandle<Answer>> {
    let before = faults.answers(Call::Claim);
    let waiting = (0..count).map(|_| shop.start_to_pay("k", body)).collect();
    eventually("all have asked", || faults.answers(Call::Claim) >= before + count).await;
    waiting
}

async fn prefer(shop: &Shop, preference: &'static [u8]) -> (Answer, Duration) {
    let mut request: Request<_> = payment("k", "201");
    let preference = HeaderValue::from_bytes(preference).expect("a header");
    request.headers_mut().insert("prefer", preference);
    let start = Instant::now();
    let answer = timeout(PATIENCE, shop.call(pay, request)).await.expect("within its bound");
    (answer, start.elapsed())
}

async fn a_duplicate_gets_the_answer_when_it_is_there(ground: Ground) {
    let (shop, faults, held, running) = busy(&ground, "201").await;
    let waiting = waiters(&shop, &faults, "201", 3).await;
    assert!(waiting.iter().all(|waiter| !waiter.is_finished()));
    held.open();
    let answer = running.await.expect("an answer");
    let start = Instant::now();
    for waiter in waiting {
        let replay = waiter.await.expect("an answer");
        assert_eq!((replay.status, replay.text(), replay.is_replay()), (201, answer.text(), true));
    }
    assert!(start.elapsed() < Duration::from_millis(900), "woken, not found by the next look");
    assert_eq!((shop.effects.count(), shop.told(Outcome::Replayed)), (1, 3));
}

async fn a_duplicate_is_refused_at_the_bound(ground: Ground) {
    let (shop, _) = shop(&ground, Duration::from_millis(150));
    let held = shop.hold_at(Place::BeforeEffect);
    let running = shop.start_to_pay("k", "201");
    held.reached().await;
    let start = Instant::now();
    let refused = shop.pay("k", "201").await;
    assert!(start.elapsed() >= Duration::from_millis(150));
    refused.assert_refused(409, "in_flight");
    assert!(refused.headers.contains_key("retry-after"));
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);
}

async fn a_client_may_wait_for_less_and_never_for_more(ground: Ground) {
    let (shop, _, held, running) = busy(&ground, "201").await;
    for none in [&b"wait=0"[..], b"respond-async, wait=0", b"handling=lenient;a=b, wait=0;c"] {
        let (answer, after) = prefer(&shop, none).await;
        answer.assert_refused(409, "in_flight");
        assert!(after < Duration::from_secs(1), "{none:?}: {after:?}");
    }
    let (answer, after) = prefer(&shop, b"wait=1").await;
    answer.assert_refused(409, "in_flight");
    assert!(after >= Duration::from_secs(1), "{after:?}");
    held.open();
    running.await.expect("an answer");
    let (short, _) =
        Shop::with(&ground, |engine| engine.in_flight(InFlight::Wait(Duration::from_millis(50))));
    let held = short.hold_at(Place::BeforeEffect);
    let running = short.start_to_pay("other", "201");
    held.reached().await;
    let mut request = payment("other", "201");
    request.headers_mut().insert("prefer", HeaderValue::from_static("wait=999999999999999"));
    let start = Instant::now();
    short.call(pay, request).await.assert_refused(409, "in_flight");
    assert!(start.elapsed() < Duration::from_secs(5));
    held.open();
    running.await.expect("an answer");
}

async fn a_preference_that_cannot_be_read_is_none(ground: Ground) {
    let (shop, _) = shop(&ground, Duration::from_millis(100));
    let held = shop.hold_at(Place::BeforeEffect);
    let running = shop.start_to_pay("k", "201");
    held.reached().await;
    for unreadable in [
        &b"wait"[..],
        b"wait=",
        b"wait=-1",
        b"wait=0.5",
        b"wait=soon",
        b"wait=99999999999999999999",
        b"\xff",
        b"",
    ] {
        let (answer, after) = prefer(&shop, unreadable).await;
        answer.assert_refused(409, "in_flight");
        assert!(after >= Duration::from_millis(100), "{unreadable:?}: {after:?}");
    }
    held.open();
    running.await.expect("an answer");
}

async fn a_waiter_whose_client_leaves_is_gone_at_once(ground: Ground) {
    let (shop, faults, held, running) = busy(&ground, "201").await;
    for waiter in waiters(&shop, &faults, "201", 5).await {
        // It may be polled once more, to be on its way from the claim to its place.
        tokio::time::sleep(Duration::from_millis(20)).await;
        waiter.abort();
        assert!(waiter.await.is_err(), "it was gone");
    }
    assert_eq!((shop.engine.detached(), shop.told(Outcome::Detached)), (0, 0));
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);
    assert_eq!(shop.effects.count(), 1);
    let reads = faults.calls(Call::Read);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(faults.calls(Call::Read) <= reads + 1, "nobody looks for those who left");
}

async fn waiters_of_an_owner_without_an_answer_are_refused_and_none_runs(ground: Ground) {
    for (body, status, effects) in [("503", 503, 1), ("panic after", 500, 1), ("422", 422, 0)] {
        let (shop, _) = Shop::over(&ground);
        assert_eq!(shop.pay("other", "201").await.status, 201);
        let (shop, faults, held, running) = busy(&ground, body).await;
        let waiting = waiters(&shop, &faults, body, 50).await;
        held.open();
        assert_eq!(running.await.expect("an answer").status, status, "{body}");
        for waiter in waiting {
            let refused = timeout(PATIENCE, waiter).await.expect("woken").expect("an answer");
            refused.assert_refused(409, "in_flight");
            assert!(refused.headers.contains_key("retry-after"), "{body}");
        }
        assert_eq!(shop.effects.count(), effects, "{body}: only the owner ran");
        assert_eq!(faults.calls(Call::Claim), 51, "{body}: nobody claimed again");
        ground.clock.advance(Duration::from_secs(25 * 60 * 60));
    }
}

async fn another_request_is_refused_without_waiting(ground: Ground) {
    let (shop, _, held, running) = busy(&ground, "201").await;
    let refused = timeout(Duration::from_secs(5), shop.pay("k", "202")).await.expect("at once");
    refused.assert_refused(422, "mismatch");
    held.open();
    running.await.expect("an answer");
}

async fn a_thousand_waiters_have_one_effect_and_cost_few_looks(ground: Ground) {
    let (shop, faults, held, running) = busy(&ground, "201").await;
    let waiting = waiters(&shop, &faults, "201", 1_000).await;
    let looked = faults.calls(Call::Read);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let looks = faults.calls(Call::Read) - looked;
    assert!(looks <= 12, "{looks} looks in half a second");
    held.open();
    let answer = running.await.expect("an answer");
    for waiter in waiting {
        let replay = timeout(PATIENCE, waiter).await.expect("woken").expect("an answer");
        assert_eq!((replay.status, replay.text(), replay.is_replay()), (201, answer.text(), true));
    }
    assert_eq!(shop.effects.count(), 1);
    assert_eq!(faults.calls(Call::Claim), 1_001);
    assert!(faults.calls(Call::Read) < 60, "{} looks", faults.calls(Call::Read));
}

async fn waiters_are_sent_away_at_a_shutdown(ground: Ground) {
    let (shop, faults, held, running) = busy(&ground, "201").await;
    let waiting = waiters(&shop, &faults, "201", 20).await;
    shop.engine.shut_down();
    for waiter in waiting {
        let refused = timeout(PATIENCE, waiter).await.expect("woken").expect("an answer");
        refused.assert_refused(503, "shutting_down");
        assert!(refused.headers.contains_key("retry-after"));
    }
    let late = timeout(Duration::from_secs(5), shop.pay("k", "201")).await.expect("at once");
    late.assert_refused(503, "shutting_down");
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201, "the owner is not cancelled");
    assert_eq!(shop.pay("k", "201").await.status, 201, "what is there is replayed");
    assert_eq!(shop.told(Outcome::Refused(RefusalKind::ShuttingDown)), 21);
}

async fn an_owner_in_another_process_wakes_waiters(ground: Ground) {
    let (owner, _, held, running) = busy(&ground, "201").await;
    let (other, faults) = shop(&ground, PATIENCE * 2);
    let waiting = waiters(&other, &faults, "201", 20).await;
    held.open();
    let answer = running.await.expect("an answer");
    for waiter in waiting {
        let replay = timeout(PATIENCE, waiter).await.expect("found").expect("an answer");
        assert_eq!((replay.text(), replay.is_replay()), (answer.text(), true));
    }
    assert_eq!((owner.effects.count(), other.effects.count()), (1, 0));
}

async fn waiters_of_an_owner_that_died_are_refused_when_its_lease_is_over(ground: Ground) {
    let (owner, _, held, running) = busy(&ground, "201").await;
    let (other, faults) = shop(&ground, PATIENCE * 2);
    let waiting = waiters(&other, &faults, "201", 20).await;
    ground.clock.advance(LAPSE);
    for waiter in waiting {
        let refused = timeout(PATIENCE, waiter).await.expect("found").expect("an answer");
        refused.assert_refused(409, "in_flight");
    }
    assert_eq!(other.effects.count(), 0, "none of them ran");
    let retry = other.pay("k", "201").await;
    assert_eq!((retry.status, retry.is_replay(), other.effects.count()), (201, false, 1));
    held.open();
    assert_eq!(running.await.expect("an answer").text(), retry.text());
    assert_eq!(owner.effects.count(), 1);
}

async fn a_store_that_fails_for_a_while_only_delays_the_news(ground: Ground) {
    for fault in [Fault::Fail(StoreErrorKind::Unreachable), Fault::Panic] {
        let (shop, faults, held, running) = busy(&ground, "201").await;
        faults.always(Call::Read, fault);
        let waiting = waiters(&shop, &faults, "201", 5).await;
        held.open();
        let answer = running.await.expect("an answer");
        let failed = faults.calls(Call::Read);
        eventually("it looked in vain", || faults.calls(Call::Read) > failed).await;
        faults.mend(Call::Read);
        for waiter in waiting {
            let replay = timeout(PATIENCE, waiter).await.expect("found").expect("an answer");
            assert_eq!((replay.text(), replay.is_replay()), (answer.text(), true));
        }
        ground.clock.advance(Duration::from_secs(25 * 60 * 60));
    }
}

async fn a_duplicate_that_may_not_wait_here_is_refused_at_once_elsewhere(ground: Ground) {
    let (_, _, held, running) = busy(&ground, "201").await;
    let (strict, _) = Shop::over(&ground);
    let refused = timeout(Duration::from_secs(5), strict.pay("k", "201")).await.expect("at once");
    refused.assert_refused(409, "in_flight");
    held.open();
    running.await.expect("an answer");
}
