//! Steps of an operation: each taken once, however often the operation is tried.

#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{future::poll_fn, task::Poll, time::Duration};

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use idem_runtime::{Operation, Settle, StepError, idempotent, store::StoreErrorKind};
use serde::{Serialize, de::DeserializeOwned};
use tests::{
    faults::{Call, Fault, Ground},
    shop::{Place, Shop, payment},
    with_faults_on_both_stores,
};
use tokio::runtime;

/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

with_faults_on_both_stores!(
    a_rerun_takes_up_where_it_was,
    a_step_that_fails_is_taken_again,
    an_owner_that_was_replaced_records_no_step,
    a_step_of_another_type_is_refused,
    steps_that_are_taken_at_once_are_all_recorded,
    one_step_that_is_asked_for_twice_at_once_is_taken_once,
    a_forgotten_operation_leaves_no_steps,
    a_4xx_after_a_step_frees_no_key,
    nor_does_one_after_a_step_without_a_recorded_result,
    a_store_that_fails_at_a_step_says_so,
    an_answer_that_is_lost_at_a_step_is_asked_for_again,
    a_handler_without_protection_takes_each_step_each_time,
    a_name_is_any_text,
);

/// A step with an effect; its result says how many there were.
async fn step<T>(shop: &Shop, operation: &Operation, name: &str, result: T) -> Result<T, Response>
where
    T: Serialize + DeserializeOwned,
{
    let work = async {
        shop.effects.happen();
        tokio::task::yield_now().await;
        Ok::<_, std::convert::Infallible>(result)
    };
    operation.step(name, work).await.map_err(|error| refused(&error))
}

fn refused<E>(error: &StepError<E>) -> Response {
    let code = match error {
        StepError::Failed(_) => "failed",
        StepError::LeaseLost => "lease lost",
        StepError::Store(_) => "store",
        StepError::TypeChanged { .. } => "type changed",
        _ => "other",
    };
    (StatusCode::INTERNAL_SERVER_ERROR, code).into_response()
}

async fn steps(shop: &Shop, operation: &Operation, body: &str) -> Result<Response, Response> {
    let first = operation.attempt() == 1;
    match body {
        "two" => {
            let one: u32 = step(shop, operation, "one", operation.attempt()).await?;
            shop.come_to(Place::BeforeEffect).await;
            if first {
                return Err(StatusCode::BAD_GATEWAY.into_response());
            }
            let two: u32 = step(shop, operation, "two", operation.attempt()).await?;
            shop.come_to(Place::AfterEffect).await;
            Ok(format!("{one} {two}").into_response())
        }
        "changed" if first => {
            step(shop, operation, "one", 7).await?;
            Err(StatusCode::BAD_GATEWAY.into_response())
        }
        "changed" => step(shop, operation, "one", vec![true]).await.map(|_| "no".into_response()),
        "at once" => {
            let names: Vec<_> = (0..20).map(|number| format!("step {number}")).collect();
            let steps = names.iter().map(|name| step(shop, operation, name, name.clone()));
            let results = futures_util::future::try_join_all(steps).await?;
            assert_eq!(results, names);
            match first {
                true => Err(StatusCode::BAD_GATEWAY.into_response()),
                false => Ok("done".into_response()),
            }
        }
        "twice at once" => {
            let steps = (0..20).map(|number| step(shop, operation, "one", number));
            let results = futures_util::future::try_join_all(steps).await?;
            assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
            Ok("done".into_response())
        }
        "forgotten" | "refused" => {
            let one: String = step(shop, operation, "one", operation.id().to_string()).await?;
            assert_eq!(one, operation.id().to_string());
            match body {
                "forgotten" => {
                    Ok((StatusCode::UNPROCESSABLE_ENTITY, Settle::forgotten(), "no")
                        .into_response())
                }
                _ => Ok(StatusCode::UNPROCESSABLE_ENTITY.into_response()),
            }
        }
        "names" => {
            for name in ["", "\0", "ü", "a\nb", &"x".repeat(10_000)] {
                step(shop, operation, name, name.len()).await?;
            }
            match first {
                true => Err(StatusCode::BAD_GATEWAY.into_response()),
                false => Ok("done".into_response()),
            }
        }
        "not JSON" if first => {
            let result = std::collections::HashMap::from([((1, 2), 3)]);
            let refused = step(shop, operation, "one", result).await.map(|_| ());
            assert!(refused.is_err());
            Ok(StatusCode::CONFLICT.into_response())
        }
        "half-way" if first => {
            let work = async {
                shop.effects.happen();
                std::future::pending::<Result<(), ()>>().await
            };
            let in_time = tokio::time::timeout(Duration::ZERO, operation.step("one", work)).await;
            assert!(in_time.is_err());
            Ok(StatusCode::CONFLICT.into_response())
        }
        "not JSON" | "half-way" => Ok(operation.attempt().to_string().into_response()),
        "fails" => {
            let work = async {
                shop.effects.happen();
                if first { Err("no") } else { Ok(1) }
            };
            let result: u32 = operation.step("one", work).await.map_err(|error| refused(&error))?;
            Ok(result.to_string().into_response())
        }
        _ => {
            step(shop, operation, "one", 1).await?;
            shop.come_to(Place::BeforeEffect).await;
            step(shop, operation, "two", 2).await?;
            Ok((StatusCode::CREATED, "done").into_response())
        }
    }
}

#[idempotent(anchor = header("Idempotency-Key"), optional)]
async fn stepwise(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    steps(&shop, &operation, &body).await.unwrap_or_else(|refused| refused)
}

async fn a_rerun_takes_up_where_it_was(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(shop.call(stepwise, payment("k", "two")).await.status, 502);
    shop.call(stepwise, payment("k", "two")).await.assert_is(200, "1 2", false);
    shop.call(stepwise, payment("k", "two")).await.assert_is(200, "1 2", true);
    assert_eq!(shop.effects.count(), 2);
}

async fn a_step_that_fails_is_taken_again(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    shop.call(stepwise, payment("k", "fails")).await.assert_is(500, "failed", false);
    assert_eq!(faults.calls(Call::Checkpoint), 0);
    shop.call(stepwise, payment("k", "fails")).await.assert_is(200, "1", false);
    assert_eq!(shop.effects.count(), 2);
}

async fn an_owner_that_was_replaced_records_no_step(ground: Ground) {
    let (owner, _) = Shop::over(&ground);
    let held = owner.hold_at(Place::BeforeEffect);
    let late = owner.clone();
    let running = tokio::spawn(async move { late.call(stepwise, payment("k", "plain")).await });
    held.reached().await;
    ground.clock.advance(LAPSE);
    let (successor, faults) = Shop::over(&ground);
    let answer = successor.call(stepwise, payment("k", "plain")).await;
    answer.assert_is(201, "done", false);
    assert_eq!((successor.effects.count(), faults.calls(Call::Checkpoint)), (1, 1));
    held.open();
    running.await.expect("an answer").assert_is(201, "done", true);
    assert_eq!(owner.effects.count(), 2, "it had not heard; its step was not recorded");
}

async fn a_step_of_another_type_is_refused(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(shop.call(stepwise, payment("k", "changed")).await.status, 502);
    for _ in 0..2 {
        shop.call(stepwise, payment("k", "changed")).await.assert_is(500, "type changed", false);
    }
    assert_eq!(shop.effects.count(), 1);
}

async fn steps_that_are_taken_at_once_are_all_recorded(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(shop.call(stepwise, payment("k", "at once")).await.status, 502);
    shop.call(stepwise, payment("k", "at once")).await.assert_is(200, "done", false);
    assert_eq!(shop.effects.count(), 20);
}

async fn one_step_that_is_asked_for_twice_at_once_is_taken_once(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    shop.call(stepwise, payment("k", "twice at once")).await.assert_is(200, "done", false);
    assert_eq!(shop.effects.count(), 1);
}

async fn a_forgotten_operation_leaves_no_steps(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    for effects in 1..=2 {
        assert_eq!(shop.call(stepwise, payment("k", "forgotten")).await.status, 422);
        assert_eq!(shop.effects.count(), effects);
    }
}

async fn a_4xx_after_a_step_frees_no_key(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    for _ in 0..3 {
        assert_eq!(shop.call(stepwise, payment("k", "refused")).await.status, 422);
        assert_eq!(shop.effects.count(), 1, "the step was taken once, under one operation id");
    }
    assert_eq!(shop.call(stepwise, payment("k", "plain")).await.status, 422);
    assert_eq!(shop.effects.count(), 1, "another body is a mismatch and runs nothing");
}

async fn nor_does_one_after_a_step_without_a_recorded_result(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    for body in ["not JSON", "half-way"] {
        assert_eq!(shop.call(stepwise, payment(body, body)).await.status, 409);
        let rerun = shop.call(stepwise, payment(body, body)).await;
        assert_eq!((rerun.status, rerun.text().as_ref()), (200, "2"), "{body}");
    }
}

async fn a_store_that_fails_at_a_step_says_so(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    faults.always(Call::Checkpoint, Fault::Fail(StoreErrorKind::Unreachable));
    shop.call(stepwise, payment("k", "plain")).await.assert_is(500, "store", false);
    assert_eq!(shop.effects.count(), 1);
    faults.mend(Call::Checkpoint);
    shop.call(stepwise, payment("k", "plain")).await.assert_is(201, "done", false);
    assert_eq!(shop.effects.count(), 3, "the step whose result was not recorded, and the second");
}

async fn an_answer_that_is_lost_at_a_step_is_asked_for_again(ground: Ground) {
    for fault in [Fault::LoseAnswer, Fault::Fail(StoreErrorKind::TimedOut), Fault::Panic] {
        let (shop, faults) = Shop::over(&ground);
        faults.once(Call::Checkpoint, fault.clone());
        let key = format!("{fault:?}");
        shop.call(stepwise, payment(&key, "plain")).await.assert_is(201, "done", false);
        assert_eq!((shop.effects.count(), faults.calls(Call::Checkpoint)), (2, 3));
    }
}

async fn a_handler_without_protection_takes_each_step_each_time(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    for effects in [2, 4] {
        let mut request = payment("k", "plain");
        request.headers_mut().remove("idempotency-key");
        shop.call(stepwise, request).await.assert_is(201, "done", false);
        assert_eq!(shop.effects.count(), effects);
    }
    assert_eq!(faults.calls(Call::Checkpoint), 0);
}

async fn a_name_is_any_text(ground: Ground) {
    let (shop, _) = Shop::over(&ground);
    assert_eq!(shop.call(stepwise, payment("k", "names")).await.status, 502);
    shop.call(stepwise, payment("k", "names")).await.assert_is(200, "done", false);
    assert_eq!(shop.effects.count(), 5);
}

fn new_runtime() -> runtime::Runtime {
    runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Whatever the await at which a process dies, the next one takes up where it was, and at most the
/// step in whose middle it died is taken twice.
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
                Box::pin(async move { owner.call(stepwise, payment("k", "plain")).await });
            let mut left = polls;
            let finished = dies.block_on(poll_fn(|context| {
                if left == 0 {
                    return Poll::Ready(false);
                }
                left -= 1;
                running.as_mut().poll(context).map(|answer| answer.status == 201)
            }));
            // Nothing of the process goes on after its runtime.
            dies.shutdown_background();
            drop(running);
            if finished {
                break;
            }
            crashes += 1;
            ground.clock.advance(LAPSE);
            let (second, _) = Shop::over(&ground);
            let answer = machine.block_on(second.call(stepwise, payment("k", "plain")));
            assert_eq!((answer.status, answer.text().as_str()), (201, "done"), "{polls} polls");
            let effects = first.effects.count() + second.effects.count();
            assert!((2..=3).contains(&effects), "{effects} effects after {polls} polls");
            repeated += usize::from(effects == 3);
        }
        assert!(crashes >= 10 && repeated >= 4, "{crashes} crashes, {repeated} repeated a step");
    }
}
