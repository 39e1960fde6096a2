//! A claim is its owner's as long as the owner lives, and nobody's answer is another's to change.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use idem_runtime::{Outcome, store::StoreErrorKind};
use tests::{
    faults::{Call, Fault, Gate, Ground, PATIENCE, eventually},
    server::Answer,
    shop::{Place, Shop},
    with_faults_on_both_stores,
};
use tokio::{
    runtime,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

const SHORT: Duration = Duration::from_millis(300);
/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

fn is_in_flight(answer: &Answer) -> bool {
    answer.status == 409 && answer.code() == "in_flight"
}

/// Asks again and again for so long; whoever asks must never get the claim.
async fn in_flight_for(time: Duration, shop: &Shop, key: &str, body: &str) {
    let start = Instant::now();
    while start.elapsed() < time {
        let duplicate = shop.pay(key, body).await;
        let after = start.elapsed();
        assert!(is_in_flight(&duplicate), "{key} after {after:?}: {}", duplicate.text());
        sleep(Duration::from_millis(10)).await;
    }
}

with_faults_on_both_stores!(in real time:
    a_handler_longer_than_its_lease_keeps_its_claim,
    a_handler_that_blocks_its_thread_keeps_its_claim_and_those_of_others,
    renewals_that_fail_are_tried_again_and_lose_no_claim,
    a_sweep_that_never_ends_keeps_no_renewal_waiting,
    an_answer_that_waits_to_be_recorded_keeps_its_claim,
    an_owner_whose_completion_is_not_answered_yet_has_not_lost_its_lease,
    claims_that_run_together_are_renewed_together,
);

async fn a_handler_longer_than_its_lease_keeps_its_claim(ground: Ground) {
    let (owner, _) = Shop::with(&ground, |engine| engine.lease(SHORT));
    let (other, _) = Shop::with(&ground, |engine| engine.lease(SHORT));
    let held = owner.hold_at(Place::AfterEffect);
    let running = owner.start_to_pay("k", "201");
    held.reached().await;
    in_flight_for(SHORT * 4, &other, "k", "201").await;
    held.open();
    assert_eq!(running.await.expect("an answer").text(), other.pay("k", "201").await.text());
    assert_eq!((owner.effects.count(), other.effects.count()), (1, 0));
    assert_eq!(owner.told(Outcome::LeaseLost), 0);
}

/// The claim is what wakes the keeper of leases, or starts it: it must not wait for the thread.
async fn a_handler_that_blocks_its_thread_keeps_its_claim_and_those_of_others(ground: Ground) {
    for begin_with_a_long_lease in [false, true] {
        let (owner, _) = Shop::with(&ground, |engine| engine.lease(SHORT));
        let (other, _) = Shop::with(&ground, |engine| engine.lease(SHORT));
        let held = owner.hold_at(Place::BeforeEffect);
        let earlier = format!("earlier-{begin_with_a_long_lease}");
        let blocked = format!("blocked-{begin_with_a_long_lease}");
        let running = begin_with_a_long_lease.then(|| owner.start_to_pay(&earlier, "201"));
        if begin_with_a_long_lease {
            held.reached().await;
        }
        let blocking = owner.start_to_pay(&blocked, "block");
        sleep(Duration::from_millis(50)).await;
        in_flight_for(SHORT * 3, &other, &blocked, "block").await;
        if begin_with_a_long_lease {
            in_flight_for(Duration::from_millis(1), &other, &earlier, "201").await;
        }
        held.open();
        assert_eq!(blocking.await.expect("an answer").status, 201);
        if let Some(running) = running {
            assert_eq!(running.await.expect("an answer").status, 201);
        }
        assert_eq!(owner.told(Outcome::LeaseLost), 0);
        assert_eq!(other.effects.count(), 0);
    }
}

async fn renewals_that_fail_are_tried_again_and_lose_no_claim(ground: Ground) {
    let lease = Duration::from_millis(600);
    for fault in [
        Fault::Fail(StoreErrorKind::Unreachable),
        Fault::Fail(StoreErrorKind::Refused),
        Fault::LoseAnswer,
        Fault::Hang,
        Fault::Panic,
    ] {
        let key = format!("{fault:?}");
        let (owner, faults) = Shop::with(&ground, |engine| engine.lease(lease));
        let (other, _) = Shop::over(&ground);
        faults.once(Call::Renew, fault);
        let held = owner.hold_at(Place::BeforeEffect);
        let running = owner.start_to_pay(&key, "201");
        held.reached().await;
        in_flight_for(lease * 3 / 2, &other, &key, "201").await;
        assert!(faults.calls(Call::Renew) >= 2, "{key}");
        assert_eq!(owner.told(Outcome::RenewalFailed), 1, "{key}");
        assert_eq!(owner.told(Outcome::LeaseLost), 0, "{key}");
        held.open();
        assert_eq!(running.await.expect("an answer").status, 201, "{key}");
    }
}

async fn a_sweep_that_never_ends_keeps_no_renewal_waiting(ground: Ground) {
    let (owner, faults) =
        Shop::with(&ground, |engine| engine.lease(SHORT).sweep_interval(Duration::from_millis(10)));
    let (other, _) = Shop::over(&ground);
    faults.always(Call::Sweep, Fault::Hang);
    let held = owner.hold_at(Place::BeforeEffect);
    let running = owner.start_to_pay("k", "201");
    held.reached().await;
    eventually("a sweep", || faults.calls(Call::Sweep) == 1).await;
    in_flight_for(SHORT * 3, &other, "k", "201").await;
    held.open();
    assert_eq!(running.await.expect("an answer").status, 201);
}

async fn an_answer_that_waits_to_be_recorded_keeps_its_claim(ground: Ground) {
    let (owner, faults) = Shop::with(&ground, |engine| engine.lease(SHORT).record_wait(SHORT));
    let (other, _) = Shop::over(&ground);
    faults.always(Call::Complete, Fault::Fail(StoreErrorKind::Unreachable));
    let answer = owner.pay("k", "201").await;
    in_flight_for(SHORT * 4, &other, "k", "201").await;
    faults.mend(Call::Complete);
    assert!(owner.engine.drain(PATIENCE).await);
    assert_eq!(other.pay("k", "201").await.text(), answer.text());
    assert_eq!((owner.effects.count(), other.effects.count()), (1, 0));
}

/// The store says of its claim that it is over, since it is completed.
async fn an_owner_whose_completion_is_not_answered_yet_has_not_lost_its_lease(ground: Ground) {
    let (owner, faults) = Shop::with(&ground, |engine| engine.lease(SHORT));
    let late = faults.hold_after(Call::Complete);
    let running = owner.start_to_pay("k", "201");
    late.reached().await;
    eventually("it is renewed", || faults.answers(Call::Renew) > 0).await;
    late.open();
    let answer = running.await.expect("an answer");
    assert_eq!((answer.status, answer.is_replay()), (201, false));
    assert_eq!((owner.told(Outcome::LeaseLost), owner.told(Outcome::Recorded)), (0, 1));
    assert!(!owner.operation().is_lease_lost());
}

async fn claims_that_run_together_are_renewed_together(ground: Ground) {
    const CLAIMS: usize = 500;
    let lease = Duration::from_millis(900);
    let (owner, faults) = Shop::with(&ground, |engine| engine.lease(lease));
    let (other, _) = Shop::over(&ground);
    let mut running = Vec::new();
    let mut gates = Vec::new();
    for number in 0..CLAIMS {
        let held = owner.hold_at(Place::BeforeEffect);
        running.push(owner.start_to_pay(&number.to_string(), "201"));
        held.reached().await;
        gates.push(held);
    }
    let before = faults.calls(Call::Renew);
    sleep(lease * 2).await;
    let rounds = faults.calls(Call::Renew) - before;
    // Six rounds in theory; alone, each of the claims would have made as many.
    assert!((4..=24).contains(&rounds), "{rounds} calls for {CLAIMS} claims in two leases");
    for number in 0..CLAIMS {
        assert!(is_in_flight(&other.pay(&number.to_string(), "201").await), "{number}");
    }
    gates.iter().for_each(Gate::open);
    for answer in running {
        assert_eq!(answer.await.expect("an answer").status, 201);
    }
    assert_eq!((owner.effects.count(), other.effects.count()), (CLAIMS, 0));
}

with_faults_on_both_stores!(
    an_owner_that_was_replaced_answers_from_its_successors_record,
    an_owner_whose_successor_has_no_answer_says_that_it_lost_its_lease,
    an_owner_that_is_late_and_not_replaced_completes,
    an_owner_whose_record_has_expired_gives_its_own_answer,
    a_handler_hears_that_its_lease_is_lost,
    an_owner_that_gives_up_after_its_successor_did_not_run_keeps_the_operation,
    a_claim_that_is_answered_after_its_lease_is_asked_for_again,
    duplicates_that_race_across_two_processes_have_one_effect,
);

/// A handler that has had its effect, over whose claim the lease has ended.
async fn overdue(ground: &Ground, key: &str, body: &str) -> (Shop, Gate, JoinHandle<Answer>) {
    let (owner, _) = Shop::over(ground);
    let held = owner.hold_at(Place::AfterEffect);
    let running = owner.start_to_pay(key, body);
    held.reached().await;
    ground.clock.advance(LAPSE);
    (owner, held, running)
}

async fn an_owner_that_was_replaced_answers_from_its_successors_record(ground: Ground) {
    // However the late owner would end its claim.
    for ending in ["201", "500", "422", "panic after"] {
        let (owner, held, running) = overdue(&ground, ending, ending).await;
        let (successor, _) = Shop::over(&ground);
        // Another body would be a mismatch: what differs is what the successor's handler does.
        let before = successor.hold_at(Place::BeforeEffect);
        let theirs = successor.start_to_pay(ending, ending);
        before.reached().await;
        assert_eq!(successor.operation().id(), owner.operation().id(), "{ending}");
        assert_eq!(successor.operation().attempt(), 2, "{ending}");
        if ending != "201" {
            // It does not answer either.
            before.open();
            theirs.await.expect("an answer");
            held.open();
            let late = running.await.expect("an answer");
            assert_eq!((late.status, late.code().as_str()), (409, "lease_lost"), "{ending}");
            continue;
        }
        before.open();
        let theirs = theirs.await.expect("an answer");
        assert!(theirs.text().starts_with("attempt 2 of"), "{}", theirs.text());
        held.open();
        let late = running.await.expect("an answer");
        assert_eq!((late.status, late.text(), late.is_replay()), (201, theirs.text(), true));
        assert!(owner.operation().is_lease_lost());
        assert_eq!(successor.pay(ending, ending).await.text(), theirs.text());
    }
}

async fn an_owner_whose_successor_has_no_answer_says_that_it_lost_its_lease(ground: Ground) {
    let (_owner, held, running) = overdue(&ground, "k", "201").await;
    let (successor, _) = Shop::over(&ground);
    let before = successor.hold_at(Place::BeforeEffect);
    let theirs = successor.start_to_pay("k", "201");
    before.reached().await;
    held.open();
    let late = running.await.expect("an answer");
    assert_eq!((late.status, late.code().as_str()), (409, "lease_lost"));
    assert!(late.headers.contains_key("retry-after"));
    assert!(is_in_flight(&successor.pay("k", "201").await), "the successor's claim is untouched");
    before.open();
    let theirs = theirs.await.expect("an answer");
    assert_eq!(successor.pay("k", "201").await.text(), theirs.text());
}

async fn an_owner_that_is_late_and_not_replaced_completes(ground: Ground) {
    let (owner, held, running) = overdue(&ground, "k", "201").await;
    held.open();
    let answer = running.await.expect("an answer");
    assert!(!answer.is_replay());
    let (other, _) = Shop::over(&ground);
    let replay = other.pay("k", "201").await;
    assert_eq!((replay.text(), replay.is_replay()), (answer.text(), true));
    assert_eq!((owner.effects.count(), other.effects.count()), (1, 0));
}

/// To send the client away would have it repeat what was done.
async fn an_owner_whose_record_has_expired_gives_its_own_answer(ground: Ground) {
    let (owner, held, running) = overdue(&ground, "k", "201").await;
    ground.clock.advance(Duration::from_secs(25 * 60 * 60));
    held.open();
    let answer = running.await.expect("an answer");
    assert_eq!((answer.status, answer.is_replay()), (201, false));
    assert_eq!(owner.told(Outcome::RecordLost), 1);
}

async fn a_handler_hears_that_its_lease_is_lost(ground: Ground) {
    let (owner, faults) = Shop::with(&ground, |engine| engine.lease(SHORT));
    faults.always(Call::Renew, Fault::Fail(StoreErrorKind::Unreachable));
    let held = owner.hold_at(Place::BeforeEffect);
    let running = owner.start_to_pay("k", "201");
    held.reached().await;
    ground.clock.advance(LAPSE);
    let (successor, _) = Shop::over(&ground);
    assert_eq!(successor.pay("k", "201").await.status, 201);
    assert!(!owner.operation().is_lease_lost(), "errors say nothing");
    faults.mend(Call::Renew);
    assert!(timeout(PATIENCE, owner.operation().lease_lost()).await.is_ok());
    eventually("it is told", || owner.told(Outcome::LeaseLost) == 1).await;
    held.open();
    assert!(running.await.expect("an answer").is_replay());
}

/// The second attempt did nothing, which says nothing of the first: a third must be able to call
/// downstream under the same operation id.
async fn an_owner_that_gives_up_after_its_successor_did_not_run_keeps_the_operation(
    ground: Ground,
) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(shop.pay("k", "reject").await.status, 422);
    let held = shop.hold_at(Place::AfterEffect);
    let running = shop.start_to_pay("new", "422");
    held.reached().await;
    let first = shop.operation().id();
    ground.clock.advance(LAPSE);
    assert_eq!(shop.pay("new", "422").await.status, 422);
    assert_eq!((shop.operation().id(), shop.operation().attempt()), (first, 2));
    assert_eq!(shop.pay("new", "422").await.status, 422);
    assert_eq!((shop.operation().id(), shop.operation().attempt()), (first, 3));
    held.open();
    assert_eq!(running.await.expect("an answer").code(), "lease_lost");
}

async fn a_claim_that_is_answered_after_its_lease_is_asked_for_again(ground: Ground) {
    let (slow, faults) = Shop::with(&ground, |engine| engine.lease(SHORT));
    let late = faults.hold_after(Call::Claim);
    let running = slow.start_to_pay("k", "201");
    late.reached().await;
    ground.clock.advance(LAPSE);
    let (quick, _) = Shop::over(&ground);
    let answer = quick.pay("k", "201").await;
    sleep(SHORT).await;
    late.open();
    assert_eq!(running.await.expect("an answer").text(), answer.text());
    assert_eq!((slow.effects.count(), quick.effects.count()), (0, 1));
}

async fn duplicates_that_race_across_two_processes_have_one_effect(ground: Ground) {
    for key in 0..5 {
        let shops = [Shop::over(&ground).0, Shop::over(&ground).0];
        let calls: Vec<_> =
            (0..200).map(|call| shops[call % 2].start_to_pay(&key.to_string(), "201")).collect();
        let mut answers = Vec::new();
        for call in calls {
            let answer = call.await.expect("an answer");
            if !is_in_flight(&answer) {
                answers.push((answer.status, answer.text()));
            }
        }
        assert_eq!(shops.iter().map(|shop| shop.effects.count()).sum::<usize>(), 1);
        answers.dedup();
        assert_eq!(answers.len(), 1, "all who got an answer got the same");
    }
}

/// An engine may outlive a runtime, or be used from several: some programs have one for each core.
#[test]
fn a_runtime_that_ended_or_stands_still_keeps_no_other_from_renewing() {
    let new_runtime = || runtime::Builder::new_current_thread().enable_all().build().expect("one");
    for ends in [true, false] {
        let first = new_runtime();
        let (ground, shop) = first.block_on(async {
            let ground = Ground::memory_in_real_time().await;
            let (shop, _) = Shop::with(&ground, |engine| engine.lease(SHORT));
            assert_eq!(shop.pay("first", "201").await.status, 201);
            (ground, shop)
        });
        // The second one's claim begins while the first runtime is still there.
        let second = new_runtime();
        let held = shop.hold_at(Place::BeforeEffect);
        let entered = second.enter();
        let running = shop.start_to_pay("second", "201");
        drop(entered);
        second.block_on(held.reached());
        let _first = (!ends).then_some(first);
        second.block_on(async {
            let (other, _) = Shop::over(&ground);
            in_flight_for(SHORT * 4, &other, "second", "201").await;
            held.open();
            assert_eq!(running.await.expect("an answer").status, 201);
        });
    }
}
