//! Stores that fail, answers that are lost, handlers that panic: nothing runs unprotected, nothing
//! that was done is forgotten, nobody waits for longer than was said.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use axum::{body::Bytes, extract::State, handler::Handler, response::Response};
use idem_runtime::{
    Anchor, IdempotentExt, Outcome, Policy, Refusal, StoreOutage,
    store::StoreErrorKind::{self, Corrupt, Full, Newer, Refused, TimedOut, TooLarge, Unreachable},
};
use tests::{
    faults::{Call, Fault, Ground, HangUp, PATIENCE, eventually},
    server::{Answer, Server, send},
    shop::{Place, Shop, payment},
    with_faults_on_both_stores,
};
use tokio::time::Instant;

const SOON: Duration = Duration::from_millis(50);
/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

fn refused(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

with_faults_on_both_stores!(
    a_store_that_fails_at_the_claim_refuses_and_runs_nothing,
    a_store_that_fails_at_the_claim_lets_run_what_the_policy_says,
    a_store_that_never_answers_a_claim_is_waited_for_as_long_as_was_said,
    a_claim_whose_answer_is_lost_is_not_its_own_duplicate,
    a_claim_whose_answers_are_all_lost_is_taken_back_as_if_it_had_never_been,
    a_rerun_whose_claim_is_taken_back_keeps_what_the_first_attempt_left,
    a_long_outage_does_not_make_the_engine_busy,
    a_store_that_panics_is_one_that_cannot_be_reached,
    a_completion_whose_answer_is_lost_is_recorded_once_and_the_owner_answers,
    a_store_that_is_away_when_a_handler_ends_catches_up,
    a_store_that_never_answers_a_completion_holds_up_no_reply,
    a_process_that_is_cut_off_after_the_effect_is_protected_until_its_lease_ends,
    an_answer_is_given_up_when_its_time_is_over,
    an_answer_too_large_for_the_store_leaves_the_fact,
    a_claim_that_cannot_be_given_up_at_once_is_given_up_later,
    a_panic_anywhere_is_an_unknown_outcome_and_the_key_is_free_at_once,
    a_panic_after_the_client_hung_up_releases_the_key,
    a_handler_that_panics_before_its_first_await_is_caught,
    an_observer_that_panics_harms_nobody,
    a_refusal_that_cannot_be_rendered_leaves_the_key_as_it_should_be,
);

async fn a_store_that_fails_at_the_claim_refuses_and_runs_nothing(ground: Ground) {
    let codes: [(StoreErrorKind, &str); 7] = [
        (Unreachable, "store_unavailable"),
        (TimedOut, "store_unavailable"),
        (Refused, "store_unavailable"),
        (Full, "store_full"),
        (TooLarge, "store_full"),
        (Newer, "record_unreadable"),
        (Corrupt, "record_unreadable"),
    ];
    for (kind, code) in codes {
        let (shop, faults) = Shop::over(&ground);
        faults.always(Call::Claim, Fault::Fail(kind));
        let answer = shop.pay(&format!("{kind:?}"), "201").await;
        assert_eq!(refused(&answer), (503, code.to_owned()), "{kind:?}");
        assert!(answer.headers.contains_key("retry-after"), "{kind:?}");
        assert_eq!(shop.effects.count(), 0, "{kind:?}");
        faults.mend(Call::Claim);
        let retry = shop.pay(&format!("{kind:?}"), "201").await;
        assert!(retry.text().starts_with("attempt 1 of"), "{kind:?}: {}", retry.text());
    }
}

async fn a_store_that_fails_at_the_claim_lets_run_what_the_policy_says(ground: Ground) {
    for kind in [Unreachable, TimedOut, Refused, Full, TooLarge, Newer, Corrupt] {
        let (shop, faults) = Shop::with(&ground, |engine| engine.store_outage(StoreOutage::Open));
        faults.always(Call::Claim, Fault::Fail(kind));
        let answer = shop.pay(&format!("{kind:?}"), "201").await;
        // A store that answers is not out: what cannot be read may say that it was done, and what is
        // full stays full.
        let runs = matches!(kind, Unreachable | TimedOut | Refused);
        assert_eq!(answer.status, if runs { 201 } else { 503 }, "{kind:?}");
        assert_eq!(shop.effects.count(), usize::from(runs), "{kind:?}");
        assert_eq!(shop.told(Outcome::Unprotected), usize::from(runs), "{kind:?}");
    }
}

async fn a_store_that_never_answers_a_claim_is_waited_for_as_long_as_was_said(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.store_timeout(SOON));
    faults.once(Call::Claim, Fault::Hang);
    let asked = Instant::now();
    let answer = shop.pay("k", "201").await;
    assert_eq!(refused(&answer), (503, "store_unavailable".to_owned()));
    assert!((SOON..SOON * 20).contains(&asked.elapsed()), "{:?}", asked.elapsed());
    assert_eq!(shop.pay("k", "201").await.status, 201);
    assert_eq!(shop.effects.count(), 1);
}

async fn a_claim_whose_answer_is_lost_is_not_its_own_duplicate(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.once(Call::Claim, Fault::LoseAnswer);
    let answer = shop.pay("k", "201").await;
    assert!(answer.text().starts_with("attempt 1 of"), "{}", answer.text());
    assert_eq!((answer.status, shop.effects.count(), faults.calls(Call::Claim)), (201, 1, 2));
    assert!(shop.pay("k", "201").await.is_replay());
}

async fn a_claim_whose_answers_are_all_lost_is_taken_back_as_if_it_had_never_been(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.always(Call::Claim, Fault::LoseAnswer);
    // It takes a while until the store answers again at all.
    faults.once(Call::Read, Fault::Fail(Unreachable));
    faults.once(Call::Forget, Fault::LoseAnswer);
    assert_eq!(refused(&shop.pay("k", "201").await), (503, "store_unavailable".to_owned()));
    assert_eq!(shop.effects.count(), 0);
    faults.mend(Call::Claim);
    assert!(shop.engine.drain(PATIENCE).await);
    // Even another request may use the key: the first one never began.
    let answer = shop.pay("k", "202").await;
    assert!(answer.text().starts_with("attempt 1 of"), "{}", answer.text());
    assert_eq!((answer.status, shop.effects.count()), (202, 1));
}

async fn a_rerun_whose_claim_is_taken_back_keeps_what_the_first_attempt_left(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    assert_eq!(shop.pay("k", "500").await.status, 500);
    let first = shop.operation().id();
    faults.always(Call::Claim, Fault::LoseAnswer);
    assert_eq!(shop.pay("k", "500").await.status, 503);
    faults.mend(Call::Claim);
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(refused(&shop.pay("k", "201").await), (422, "mismatch".to_owned()));
    assert_eq!(shop.pay("k", "500").await.status, 500);
    assert_eq!(shop.operation().id(), first);
}

async fn a_long_outage_does_not_make_the_engine_busy(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.detached_limit(2));
    faults.cut_off();
    for key in 0..20 {
        let answer = shop.pay(&key.to_string(), "201").await;
        assert_eq!(refused(&answer), (503, "store_unavailable".to_owned()));
    }
    faults.restore();
    assert_eq!(shop.pay("k", "201").await.status, 201);
}

async fn a_store_that_panics_is_one_that_cannot_be_reached(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.always(Call::Claim, Fault::Panic);
    assert_eq!(refused(&shop.pay("k", "201").await), (503, "store_unavailable".to_owned()));
    faults.mend(Call::Claim);
    faults.once(Call::Complete, Fault::Panic);
    assert_eq!(shop.pay("k", "201").await.status, 201);
    assert!(shop.pay("k", "201").await.is_replay());
    assert_eq!(shop.effects.count(), 1);
}

async fn a_completion_whose_answer_is_lost_is_recorded_once_and_the_owner_answers(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.once(Call::Complete, Fault::LoseAnswer);
    let answer = shop.pay("k", "201").await;
    assert_eq!((answer.status, answer.is_replay(), faults.calls(Call::Complete)), (201, false, 2));
    let replay = shop.pay("k", "201").await;
    assert_eq!((replay.text(), replay.is_replay()), (answer.text(), true));
    assert_eq!((shop.effects.count(), shop.told(Outcome::Recorded)), (1, 1));
}

async fn a_store_that_is_away_when_a_handler_ends_catches_up(ground: Ground) {
    for kind in [Unreachable, Full, Refused] {
        let key = format!("{kind:?}");
        let (shop, faults) = Shop::with(&ground, |engine| engine.record_wait(SOON));
        faults.always(Call::Complete, Fault::Fail(kind));
        let answer = shop.pay(&key, "201").await;
        assert_eq!((answer.status, shop.told(Outcome::RecordDelayed)), (201, 1), "{key}");
        assert_eq!(shop.engine.detached(), 1, "{key}");
        let duplicate = shop.pay(&key, "201").await;
        assert_eq!(refused(&duplicate), (409, "in_flight".to_owned()), "{key}");
        assert!(!shop.engine.drain(SOON).await, "{key}");
        faults.mend(Call::Complete);
        assert!(shop.engine.drain(PATIENCE).await, "{key}");
        assert_eq!(shop.told(Outcome::RecordCaughtUp), 1, "{key}");
        let replay = shop.pay(&key, "201").await;
        assert_eq!((replay.text(), replay.is_replay()), (answer.text(), true), "{key}");
        assert_eq!(shop.effects.count(), 1, "{key}");
    }
}

async fn a_store_that_never_answers_a_completion_holds_up_no_reply(ground: Ground) {
    let (shop, faults) =
        Shop::with(&ground, |engine| engine.record_wait(SOON).store_timeout(SOON * 2));
    faults.once(Call::Complete, Fault::Hang);
    let asked = Instant::now();
    assert_eq!(shop.pay("k", "201").await.status, 201);
    assert!((SOON..SOON * 20).contains(&asked.elapsed()), "{:?}", asked.elapsed());
    assert!(shop.engine.drain(PATIENCE).await);
    assert!(shop.pay("k", "201").await.is_replay());
}

async fn a_process_that_is_cut_off_after_the_effect_is_protected_until_its_lease_ends(
    ground: Ground,
) {
    let (cut_off, faults) = Shop::with(&ground, |engine| engine.record_wait(SOON));
    let held = cut_off.hold_at(Place::AfterEffect);
    let running = cut_off.start_to_pay("k", "201");
    held.reached().await;
    faults.cut_off();
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);

    let (other, _) = Shop::over(&ground);
    ground.clock.advance(LAPSE - Duration::from_secs(2));
    assert_eq!(refused(&other.pay("k", "201").await), (409, "in_flight".to_owned()));
    ground.clock.advance(Duration::from_secs(2));
    // Nobody can know: the default is to run it again, as the same operation.
    let again = other.pay("k", "201").await;
    assert!(again.text().starts_with("attempt 2 of"), "{}", again.text());
    assert_eq!(other.operation().id(), cut_off.operation().id());

    // The first one comes back, and changes nothing.
    faults.restore();
    assert!(cut_off.engine.drain(PATIENCE).await);
    assert_eq!(cut_off.told(Outcome::LeaseLost), 1);
    assert!(cut_off.operation().is_lease_lost());
    assert_eq!(cut_off.pay("k", "201").await.text(), again.text());
}

async fn an_answer_is_given_up_when_its_time_is_over(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.record_wait(SOON).ttl(SOON * 6));
    faults.always(Call::Complete, Fault::Fail(Unreachable));
    assert_eq!(shop.pay("k", "201").await.status, 201);
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(shop.told(Outcome::RecordLost), 1);
    // Until its lease ends.
    assert_eq!(refused(&shop.pay("k", "201").await), (409, "in_flight".to_owned()));
}

async fn an_answer_too_large_for_the_store_leaves_the_fact(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.once(Call::Complete, Fault::Fail(TooLarge));
    let answer = shop.pay("k", "201").await;
    assert!(answer.text().starts_with("attempt 1 of"), "the first caller gets everything");
    let retry = shop.pay("k", "201").await;
    assert_eq!(refused(&retry), (410, "not_replayable".to_owned()));
    assert_eq!(shop.effects.count(), 1);
}

async fn a_claim_that_cannot_be_given_up_at_once_is_given_up_later(ground: Ground) {
    for (body, call, attempt) in [("500", Call::Release, 2), ("422", Call::Forget, 1)] {
        let (shop, faults) = Shop::with(&ground, |engine| engine.record_wait(SOON));
        faults.always(call, Fault::Fail(Unreachable));
        assert_eq!(shop.pay(body, body).await.status.to_string(), body);
        assert_eq!(refused(&shop.pay(body, body).await), (409, "in_flight".to_owned()));
        faults.mend(call);
        faults.once(call, Fault::LoseAnswer);
        assert!(shop.engine.drain(PATIENCE).await);
        assert_eq!(shop.pay(body, body).await.status.to_string(), body);
        assert_eq!(shop.operation().attempt(), attempt);
    }
}

async fn a_panic_anywhere_is_an_unknown_outcome_and_the_key_is_free_at_once(ground: Ground) {
    for (body, effects) in
        [("panic in extractor", 0), ("panic before", 0), ("panic after", 1), ("panic in body", 1)]
    {
        let (shop, _) = Shop::over(&ground);
        let first = shop.pay(body, body).await;
        assert_eq!(refused(&first), (500, "handler_panicked".to_owned()), "{body}");
        assert_eq!((shop.effects.count(), shop.told(Outcome::Released)), (effects, 1), "{body}");
        let second = shop.pay(body, body).await;
        assert_eq!(refused(&second), (500, "handler_panicked".to_owned()), "{body}");
        assert_eq!(second.json()["operation_id"], first.json()["operation_id"], "{body}");
        if body != "panic in extractor" {
            assert_eq!(shop.operation().attempt(), 2, "{body}");
        }
    }
}

async fn a_panic_after_the_client_hung_up_releases_the_key(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let server = Server::start(shop.router()).await;
    let held = shop.hold_at(Place::AfterEffect);
    let caller = HangUp::Http1Close.post(server.address, "/pay", "k", "panic after").await;
    held.reached().await;
    let gone = caller.hang_up();
    eventually("it goes on", || shop.engine.detached() == 1).await;
    held.open();
    assert!(shop.engine.drain(PATIENCE).await);
    drop(gone);
    assert_eq!((shop.engine.detached(), shop.told(Outcome::Released)), (0, 1));
    let retry = send(server.post("/pay", "k", "panic after")).await;
    assert_eq!((retry.code().as_str(), shop.operation().attempt()), ("handler_panicked", 2));
}

fn panics_at_once(State(shop): State<Shop>) -> impl Future<Output = Response> + Send {
    assert!(shop.effects.happen() > 2, "on purpose");
    async { Response::default() }
}

async fn a_handler_that_panics_before_its_first_await_is_caught(ground: Ground) {
    const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key"));
    let (shop, _) = Shop::over(&ground);
    let statuses = async {
        let mut statuses = Vec::new();
        for _ in 0..4 {
            let handler = panics_at_once.idempotent(POLICY);
            statuses.push(handler.call(payment("k", ""), shop.clone()).await.status().as_u16());
        }
        statuses
    };
    assert_eq!(statuses.await, [500, 500, 200, 200]);
    assert_eq!((shop.effects.count(), shop.engine.detached()), (3, 0));
}

async fn an_observer_that_panics_harms_nobody(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| {
        engine.observer(|_: &idem_runtime::Event<'_>| panic!("on purpose")).lease(SOON * 2)
    });
    faults.once(Call::Renew, Fault::Fail(Unreachable));
    let held = shop.hold_at(Place::BeforeEffect);
    let running = shop.start_to_pay("k", "201");
    held.reached().await;
    eventually("renewals go on", || faults.calls(Call::Renew) > 2).await;
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);
    assert!(shop.pay("k", "201").await.is_replay());
}

async fn a_refusal_that_cannot_be_rendered_leaves_the_key_as_it_should_be(ground: Ground) {
    let panics = |_: &Refusal| -> Response<Bytes> { panic!("on purpose") };
    let (shop, _) = Shop::with(&ground, |engine| engine.refusals(panics));
    for attempt in [1, 2] {
        assert!(shop.start_to_pay("k", "panic after").await.is_err());
        assert_eq!(shop.operation().attempt(), attempt);
    }
    // What has panicked is over: it does not go on in the background.
    assert_eq!((shop.told(Outcome::Released), shop.told(Outcome::Detached)), (2, 0));
    assert_eq!(shop.engine.detached(), 0);
}
