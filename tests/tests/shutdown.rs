//! Shutting down: what runs can be waited for, what is not waited for ends as in a crash, and more
//! than was allowed does not pile up.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{future::poll_fn, thread, time::Duration};

use idem_runtime::{Outcome, store::StoreErrorKind};
use tests::{
    faults::{Call, Fault, Faults, Gate, Ground, PATIENCE, eventually},
    server::{Answer, Server, send},
    shop::{Place, Shop},
    with_faults_on_both_stores,
};
use tokio::runtime::{Builder, Runtime};

/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);
const SOON: Duration = Duration::from_millis(20);

fn refused(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

/// Pays and hangs up while the handler stands after its effect.
async fn detached(shop: &Shop, key: &str) -> Gate {
    let held = shop.hold_at(Place::AfterEffect);
    let calling = shop.start_to_pay(key, "201");
    held.reached().await;
    let before = shop.told(Outcome::Detached);
    calling.abort();
    eventually("it goes on", || shop.told(Outcome::Detached) > before).await;
    held
}

with_faults_on_both_stores!(
    a_graceful_shutdown_finishes_what_runs_and_drain_what_nobody_waits_for,
    drain_gives_up_after_the_time_that_it_was_given,
    beyond_the_limit_of_detached_handlers_new_requests_are_refused,
    answers_that_wait_to_be_recorded_count_towards_the_limit,
);

async fn a_graceful_shutdown_finishes_what_runs_and_drain_what_nobody_waits_for(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    let server = Server::start(shop.router()).await;
    let gone = detached(&shop, "gone").await;
    let held = shop.hold_at(Place::AfterEffect);
    let waiting = tokio::spawn(send(server.post("/pay", "waiting", "201")));
    held.reached().await;
    let stopping = tokio::spawn(server.stop());
    assert!(!shop.engine.drain(SOON).await);
    assert!(!stopping.is_finished());
    held.open();
    stopping.await.expect("no panic");
    assert_eq!(waiting.await.expect("an answer").status, 201);
    gone.open();
    assert!(shop.engine.drain(PATIENCE).await);
    // The next process over the store has both answers.
    let (next, _) = Shop::over(&ground);
    assert!(next.pay("gone", "201").await.is_replay());
    let server = Server::start(next.router()).await;
    assert!(send(server.post("/pay", "waiting", "201")).await.is_replay());
    assert_eq!((shop.effects.count(), next.effects.count()), (2, 0));
}

async fn drain_gives_up_after_the_time_that_it_was_given(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert!(shop.engine.drain(Duration::ZERO).await, "there is nothing to wait for");
    let held = detached(&shop, "k").await;
    assert!(!shop.engine.drain(Duration::ZERO).await);
    // Whoever gives up takes nobody along who is still waiting.
    let patient = tokio::spawn({
        let engine = shop.engine.clone();
        async move { engine.drain(PATIENCE).await }
    });
    assert!(!shop.engine.drain(SOON).await);
    held.open();
    assert!(patient.await.expect("no panic"));
    assert!(shop.engine.drain(Duration::ZERO).await);
    assert!(shop.pay("k", "201").await.is_replay());
}

async fn beyond_the_limit_of_detached_handlers_new_requests_are_refused(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.detached_limit(2));
    let held = [detached(&shop, "0").await, detached(&shop, "1").await];
    let claims = faults.calls(Call::Claim);
    let answer = shop.pay("2", "201").await;
    assert_eq!(refused(&answer), (503, "busy".to_owned()));
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!((shop.effects.count(), faults.calls(Call::Claim)), (2, claims));
    held.iter().for_each(Gate::open);
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(shop.pay("2", "201").await.status, 201);
    assert!(shop.pay("0", "201").await.is_replay());
    assert!(shop.pay("1", "201").await.is_replay());
    assert_eq!(shop.effects.count(), 3);
}

async fn answers_that_wait_to_be_recorded_count_towards_the_limit(ground: Ground) {
    let (shop, faults) = Shop::with(&ground, |engine| engine.detached_limit(2).record_wait(SOON));
    faults.always(Call::Complete, Fault::Fail(StoreErrorKind::Full));
    for key in ["0", "1"] {
        assert_eq!(shop.pay(key, "201").await.status, 201);
    }
    assert_eq!(refused(&shop.pay("2", "201").await), (503, "busy".to_owned()));
    faults.mend(Call::Complete);
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(shop.pay("2", "201").await.status, 201);
    assert!(shop.pay("0", "201").await.is_replay());
}

fn runtimes() -> [Runtime; 2] {
    let several = Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let one = Builder::new_current_thread().enable_all().build();
    [several.expect("a runtime"), one.expect("a runtime")]
}

/// What a request is doing when its runtime ends.
#[derive(Clone, Copy, Debug)]
enum Doing {
    /// It runs in a task.
    Inline,
    /// It runs although its client hung up.
    Detached,
    /// Its future is outside, and dropped after the runtime.
    Outside,
    /// The end of its claim is being written.
    Recording,
}

/// Ends a runtime; says whether that took no longer than it may.
fn end(runtime: Runtime) -> bool {
    let ending = thread::spawn(move || drop(runtime));
    let start = std::time::Instant::now();
    while !ending.is_finished() && start.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(1));
    }
    ending.is_finished() && ending.join().is_ok()
}

#[test]
fn a_runtime_that_ends_ends_its_handlers_as_a_crash_does() {
    let outer = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("one");
    for doing in [Doing::Inline, Doing::Detached, Doing::Outside, Doing::Recording] {
        for sqlite in [false, true] {
            for runtime in runtimes() {
                let ground = outer.block_on(async {
                    if sqlite { Ground::sqlite().await } else { Ground::memory().await }
                });
                let (shop, faults) = Shop::over(&ground);
                let outside = runtime.block_on(run_until(doing, &shop, &faults));
                assert!(end(runtime), "{doing:?}: it hangs or panics");
                drop(outside);
                outer.block_on(takes_over_after_the_lease(doing, &ground, &shop));
            }
        }
    }
}

/// Brings a request so far.
async fn run_until(doing: Doing, shop: &Shop, faults: &Faults) -> Option<impl Send + use<>> {
    match doing {
        Doing::Inline => {
            let held = shop.hold_at(Place::AfterEffect);
            let running = shop.start_to_pay("k", "201");
            held.reached().await;
            drop(running);
            None
        }
        Doing::Detached => {
            detached(shop, "k").await;
            None
        }
        Doing::Recording => {
            let held = faults.hold_before(Call::Complete);
            let running = shop.start_to_pay("k", "201");
            held.reached().await;
            drop(running);
            None
        }
        Doing::Outside => {
            let held = shop.hold_at(Place::AfterEffect);
            let inside = shop.clone();
            let mut paying = Box::pin(async move { inside.pay("k", "201").await });
            // Polled until it stands in the handler.
            let reached = held.reached();
            tokio::pin!(reached);
            poll_fn(|cx| {
                let _ = paying.as_mut().poll(cx).is_ready();
                reached.as_mut().poll(cx)
            })
            .await;
            Some(paying)
        }
    }
}

async fn takes_over_after_the_lease(doing: Doing, ground: &Ground, ended: &Shop) {
    let (next, _) = Shop::over(ground);
    assert_eq!(refused(&next.pay("k", "201").await), (409, "in_flight".to_owned()), "{doing:?}");
    ground.clock.advance(LAPSE);
    let again = next.pay("k", "201").await;
    assert!(again.text().starts_with("attempt 2 of"), "{doing:?}: {}", again.text());
    assert_eq!(next.operation().id(), ended.operation().id(), "{doing:?}");
    assert_eq!((ended.effects.count(), next.effects.count()), (1, 1), "{doing:?}");
    assert!(ended.engine.drain(PATIENCE).await, "{doing:?}: nothing is counted that is gone");
    // The engine itself is as good as new on another runtime.
    assert!(ended.pay("k", "201").await.is_replay(), "{doing:?}");
    assert_eq!(ended.pay("new", "201").await.status, 201, "{doing:?}");
}
