//! Handlers called by unit tests: their bodies run, without an engine.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
    response::IntoResponse,
};
use idem_runtime::{Idempotency, Operation, assert_handler, idempotent};
use tests::server::Effects;

use crate::support::idem;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn create(
    State(effects): State<Effects>,
    Json(amount): Json<u64>,
) -> Result<(StatusCode, String), StatusCode> {
    if amount == 0 {
        return Err(StatusCode::BAD_REQUEST);
    }
    effects.happen();
    Ok((StatusCode::CREATED, amount.to_string()))
}

#[idempotent(anchor = arg(amount))]
async fn keyed_by_argument(Path(id): Path<u64>, Json(amount): Json<u64>) -> String {
    format!("{id} {amount}")
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn nothing() -> &'static str {
    "nothing"
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn opaque(operation: Operation, body: String) -> impl IntoResponse {
    format!("{} {body}", operation.attempt())
}

#[tokio::test]
async fn a_unit_test_calls_the_body_itself() {
    let effects = Effects::default();
    let created = create(State(effects.clone()), Json(7).into()).await.into_inner();
    assert_eq!(created, Some(Ok((StatusCode::CREATED, "7".to_owned()))));
    let refused = create(State(effects.clone()), Json(0).into()).await.into_inner();
    assert_eq!(refused, Some(Err(StatusCode::BAD_REQUEST)));
    // Without an engine there is nothing to replay from.
    let again = create(State(effects.clone()), Json(7).into()).await.into_response();
    assert_eq!((again.status(), effects.count()), (StatusCode::CREATED, 2));

    let keyed = keyed_by_argument(Path(1), Json(2).into()).await.into_inner();
    assert_eq!(keyed.as_deref(), Some("1 2"));
    assert_eq!(nothing(().into()).await.into_inner(), Some("nothing"));
    let opaque = opaque(Operation::default(), "a".to_owned().into()).await.into_response();
    assert_eq!(opaque.status(), StatusCode::OK);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn one(State(_engine): State<Idempotency>) {}

/// What an application writes to keep a refactoring from losing an attribute.
#[test]
fn a_handler_is_asserted_to_be_idempotent() {
    assert_handler::<Idempotency, _, _>(nothing);
    assert_handler::<Idempotency, _, _>(one);
    assert_handler::<Idempotency, _, _>(keyed_by_argument);
    assert_handler::<Idempotency, _, _>(opaque);
    drop(idem());
}
