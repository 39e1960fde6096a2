//! What holds for every database.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use idem_runtime::{Anchor, Builder, InFlight, KeyRing, Policy, Recording, Scoped};

use crate::bank::{Bank, Base, POLICY, assert_refused, different, told};

/// Makes a test of each promise, on one database.
#[macro_export]
macro_rules! on {
    ($base:ty) => {
        $crate::on!($base:
            effect_and_record_are_there_together_once,
            whatever_is_not_recorded_is_undone_and_the_key_is_free,
            a_recorded_error_is_committed_without_its_effects_unless_they_are_kept,
            duplicates_of_a_running_one_are_refused_at_once,
            duplicates_may_wait_for_the_commit,
            a_client_that_hangs_up_changes_nothing,
            a_transaction_that_is_kept_beyond_the_return_is_not_committed,
            savepoints_of_the_handlers_own_are_its_own,
            steps_are_refused_with_a_reason,
            the_operation_is_the_same_after_a_rollback_and_another_one_for_another_request,
            without_a_key_the_handler_has_its_transaction_all_the_same,
            fifty_at_once_have_one_effect,
            duplicates_need_no_connection,
            a_handler_that_ends_the_transaction_itself_is_answered_for,
            a_statement_that_failed_is_undone_with_a_recorded_error,
            an_issued_key_is_taken_with_the_effects_or_not_at_all,
            a_handler_without_a_transaction_may_share_the_keys,
            records_are_sealed,
        );
    };
    ($base:ty: $($promise:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $promise() {
            $crate::promises::$promise::<$base>().await;
        })*

        #[tokio::test(flavor = "multi_thread")]
        async fn exactly_one_effect_through_a_kill_at_any_point() {
            $crate::kills::exactly_one_effect_through_a_kill_at_any_point::<$base>().await;
        }
    };
}

pub async fn effect_and_record_are_there_together_once<B: Base>() {
    let bank = Bank::<B>::open().await;
    let first = bank.send("k", "a").await;
    assert_eq!(first, (StatusCode::CREATED, false, "run 1".into()));
    assert_eq!(bank.counts().await, (1, 1));
    assert_eq!(bank.send("k", "a").await, (StatusCode::CREATED, true, "run 1".into()));
    assert_eq!(bank.send("k", "b").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!((bank.deposits().await, bank.runs()), (1, 1));
}

pub async fn whatever_is_not_recorded_is_undone_and_the_key_is_free<B: Base>() {
    let bank = Bank::<B>::open().await;
    for (body, status) in [("fails", 500), ("refuses", 409), ("panics", 500), ("breaks", 400)] {
        let runs = bank.runs();
        for again in 1..=2 {
            assert_eq!(bank.send(body, body).await.0.as_u16(), status, "{body}");
            assert_eq!(bank.runs(), runs + again, "{body}");
            assert_eq!(bank.counts().await, (0, 0), "{body}");
        }
    }
    assert_eq!(bank.send("fails", "now it works").await.0, StatusCode::CREATED);
    assert_eq!(bank.deposits().await, 1);
}

pub async fn a_recorded_error_is_committed_without_its_effects_unless_they_are_kept<B: Base>() {
    let bank = Bank::<B>::open().await;
    let (status, _, _) = bank.send("k", "refuses for good").await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(bank.counts().await, (0, 1));
    assert!(bank.send("k", "refuses for good").await.1);
    let (status, _, _) = bank.send("l", "refuses and keeps").await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(bank.counts().await, (1, 2));
    let bank = Bank::<B>::with(POLICY.record(Recording::Final)).await;
    bank.send("k", "refuses").await;
    assert_eq!(bank.counts().await, (0, 1));
    assert!(bank.send("k", "refuses").await.1);
}

pub async fn duplicates_of_a_running_one_are_refused_at_once<B: Base>() {
    let bank = Bank::<B>::open().await;
    let running = bank.running("k", "waits").await;
    for _ in 0..10 {
        let (status, _, body) = bank.send("k", "waits").await;
        assert_eq!(status, StatusCode::CONFLICT);
        assert!(body.contains("in_flight"), "{body}");
    }
    // Its fingerprint is nobody's to see before the commit.
    assert!(bank.send("k", "another").await.2.contains("in_flight"));
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status(), StatusCode::CREATED);
    assert_eq!(bank.send("k", "waits").await, (StatusCode::CREATED, true, "run 1".into()));
    assert_eq!(bank.send("k", "another").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!((bank.deposits().await, bank.runs()), (1, 1));
}

pub async fn duplicates_may_wait_for_the_commit<B: Base>() {
    let wait = InFlight::Wait(Duration::from_secs(20));
    let bank = Bank::<B>::with(POLICY.in_flight(wait)).await;
    let running = bank.running("k", "waits").await;
    let waiting: Vec<_> = (0..20).map(|_| tokio::spawn(bank.ask(Some("k"), "waits"))).collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status(), StatusCode::CREATED);
    for waiter in waiting {
        let answer = told(waiter.await.expect("a waiter")).await;
        assert_eq!(answer, (StatusCode::CREATED, true, "run 1".into()));
    }
    assert_eq!((bank.deposits().await, bank.runs()), (1, 1));
}

pub async fn a_client_that_hangs_up_changes_nothing<B: Base>() {
    let bank = Bank::<B>::open().await;
    let running = bank.running("k", "waits").await;
    running.abort();
    assert!(running.await.is_err());
    bank.go_on();
    loop {
        let (status, replayed, body) = bank.send("k", "waits").await;
        if replayed {
            assert_eq!((status, &*body), (StatusCode::CREATED, "run 1"));
            break;
        }
        assert!(body.contains("in_flight"), "{body}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((bank.deposits().await, bank.runs()), (1, 1));
}

pub async fn a_transaction_that_is_kept_beyond_the_return_is_not_committed<B: Base>() {
    let bank = Bank::<B>::open().await;
    let (status, _, body) = bank.send("k", "keeps").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(body.contains("transaction_failed"), "{body}");
    drop(bank.app.counter.kept.lock().expect("a lock").take());
    assert_eq!(bank.counts().await, (0, 0));
    assert_eq!(bank.send("k", "again").await.0, StatusCode::CREATED);
}

pub async fn savepoints_of_the_handlers_own_are_its_own<B: Base>() {
    let bank = Bank::<B>::open().await;
    assert_eq!(bank.send("k", "nests").await.0, StatusCode::CREATED);
    assert_eq!(bank.counts().await, (1, 1));
}

pub async fn steps_are_refused_with_a_reason<B: Base>() {
    let bank = Bank::<B>::open().await;
    let (_, _, body) = bank.send("k", "steps").await;
    assert_eq!(body, "a transactional handler has no steps");
}

pub async fn the_operation_is_the_same_after_a_rollback_and_another_one_for_another_request<
    B: Base,
>() {
    let bank = Bank::<B>::open().await;
    let (_, _, first) = bank.send("k", "refuses and keeps").await;
    let delete = "DELETE FROM idem_records".to_owned();
    B::execute(&mut *bank.base.connection().await, delete).await.expect("deleted");
    assert_eq!(bank.send("k", "refuses and keeps").await.2, first);
    assert_ne!(bank.send("l", "refuses and keeps").await.2, first);
}

pub async fn without_a_key_the_handler_has_its_transaction_all_the_same<B: Base>() {
    let bank = Bank::<B>::with(POLICY.optional()).await;
    assert_eq!(bank.ask(None, "a").await.status(), StatusCode::CREATED);
    assert_eq!(bank.counts().await, (1, 0));
    assert_eq!(bank.ask(None, "refuses").await.status(), StatusCode::CONFLICT);
    assert_eq!(bank.ask(None, "fails").await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(bank.counts().await, (1, 0));
}

pub async fn fifty_at_once_have_one_effect<B: Base>() {
    let bank = Bank::<B>::open().await;
    let answers = (0..50).map(|_| tokio::spawn(bank.ask(Some("k"), "a")));
    for answer in different(answers.collect::<Vec<_>>()).await {
        match answer.0 {
            StatusCode::CREATED => assert_eq!(answer.2, "run 1"),
            _ => assert_refused(&answer, 409, "in_flight"),
        }
    }
    assert_eq!(bank.counts().await, (1, 1));
    assert_eq!(bank.send("k", "a").await, (StatusCode::CREATED, true, "run 1".into()));
}

/// Owners of other keys may hold all connections there are: nobody queues behind them.
pub async fn duplicates_need_no_connection<B: Base>() {
    let bank = Bank::<B>::open().await;
    let running = bank.running("k", "waits").await;
    let all = futures_util::future::join_all((0..4).map(|_| bank.base.connection())).await;
    let start = Instant::now();
    let duplicates: Vec<_> = (0..50).map(|_| tokio::spawn(bank.ask(Some("k"), "waits"))).collect();
    for answer in different(duplicates).await {
        assert_refused(&answer, 409, "in_flight");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    drop(all);
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status(), StatusCode::CREATED);
    assert_eq!(bank.counts().await, (1, 1));
}

/// Nobody can take back what a handler has committed, and nobody says that it was done.
pub async fn a_handler_that_ends_the_transaction_itself_is_answered_for<B: Base>() {
    let bank = Bank::<B>::open().await;
    assert_refused(&bank.send("k", "commits").await, 500, "transaction_failed");
    assert_eq!(bank.counts().await, (1, 0));
    assert_refused(&bank.send("l", "rolls back").await, 500, "transaction_failed");
    assert_eq!(bank.counts().await, (1, 0));
    // Neither connection nor lock is left behind.
    for key in ["k", "l"] {
        assert_eq!(bank.send(key, "a").await.0, StatusCode::CREATED);
    }
    let bank = Bank::<B>::with(POLICY.optional()).await;
    for body in ["commits", "rolls back"] {
        assert_refused(&told(bank.ask(None, body).await).await, 500, "transaction_failed");
    }
    assert_eq!(bank.counts().await, (1, 0));
}

pub async fn a_statement_that_failed_is_undone_with_a_recorded_error<B: Base>() {
    let bank = Bank::<B>::open().await;
    let (status, _, _) = bank.send("k", "breaks and refuses for good").await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(bank.counts().await, (0, 1));
    assert!(bank.send("k", "breaks and refuses for good").await.1);
}

const ISSUED: Policy = Policy::new(NONCE).transaction().issued();
const NONCE: Anchor = Anchor::header("Idempotency-Key").space("deposits");

pub async fn an_issued_key_is_taken_with_the_effects_or_not_at_all<B: Base>() {
    let bank = Bank::<B>::with(ISSUED).await;
    assert_refused(&bank.send("k", "a").await, 400, "unknown_key");
    bank.app.idem.issue(&NONCE, &(), "k", 7).await.expect("a key");
    for body in ["fails", "panics", "refuses"] {
        assert!(!bank.send("k", body).await.1);
        assert_eq!(bank.counts().await, (0, 1), "{body}");
    }
    let (status, replayed, first) = bank.send("k", "a").await;
    assert_eq!((status, replayed), (StatusCode::CREATED, false));
    assert_eq!(bank.send("k", "a").await, (StatusCode::CREATED, true, first));
    assert_eq!(bank.counts().await, (1, 1));
}

const SHARED: Policy = POLICY.space("deposits");

pub async fn a_handler_without_a_transaction_may_share_the_keys<B: Base>() {
    let bank = Bank::<B>::with(SHARED).await;
    // It comes second, and is first to record its answer.
    let running = bank.running("k", "waits").await;
    if B::SEVERAL_WRITERS {
        let other = told(bank.ask_at("/at-once", Some("k"), "at once").await).await;
        assert_eq!(other, (StatusCode::CREATED, false, "at once, run 2".into()));
        bank.go_on();
        let first = told(running.await.expect("an owner")).await;
        // Another body: what is on record is no answer to it.
        assert_eq!(first.0.as_u16(), 409, "{first:?}");
        assert_eq!(bank.counts().await, (1, 1), "the transaction was rolled back");
        assert_eq!(bank.send("k", "waits").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    } else {
        bank.go_on();
        assert_eq!(running.await.expect("an owner").status(), StatusCode::CREATED);
    }
    // It comes first: its claim is on record, and another handler's request is another one.
    let running = tokio::spawn(bank.ask_at("/at-once", Some("l"), "waits"));
    bank.app.counter.reached.notified().await;
    assert_refused(&bank.send("l", "waits").await, 422, "mismatch");
    bank.go_on();
    assert_eq!(running.await.expect("an owner").status(), StatusCode::CREATED);
    assert_eq!(bank.counts().await, (2, 2));
}

pub async fn records_are_sealed<B: Base>() {
    let bank = Bank::<B>::open().await;
    let seal = |engine: Builder<Scoped>| engine.seal(KeyRing::new(1, &[7; 32]));
    let sealed = Bank::again(bank.base.clone(), POLICY, seal).await;
    let first = sealed.send("k", "a").await;
    assert_eq!(first, (StatusCode::CREATED, false, "run 1".into()));
    assert_eq!(sealed.send("k", "a").await, (StatusCode::CREATED, true, "run 1".into()));
    assert_eq!(bank.counts().await, (1, 1));
    // Whoever has no key cannot read the answer, and does not do it again.
    assert_refused(&bank.send("k", "a").await, 503, "record_unreadable");
    assert_eq!((bank.deposits().await, bank.runs()), (1, 0));
}
