//! Other attribute macros on the same handler, above ours and below: each sees the handler that its
//! author wrote.

use axum::{Json, extract::Path, extract::State, http::StatusCode, routing};
use idem_runtime::{Idempotency, idempotent};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use crate::support::{answers_and_replays, at, post};

#[derive(Deserialize, ToSchema)]
struct Payment {
    amount: u64,
}

#[derive(Serialize, ToSchema)]
struct Receipt {
    id: u64,
    amount: u64,
}

#[derive(Serialize, ToSchema)]
struct Problem {
    code: &'static str,
}

type Answer = Result<(StatusCode, Json<Receipt>), (StatusCode, Json<Problem>)>;

fn receipt(id: u64, payment: &Payment) -> Answer {
    if payment.amount == 0 {
        return Err((StatusCode::UNPROCESSABLE_ENTITY, Json(Problem { code: "nothing" })));
    }
    Ok((StatusCode::CREATED, Json(Receipt { id, amount: payment.amount })))
}

#[axum::debug_handler(state = Idempotency)]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn debug_above(
    State(_engine): State<Idempotency>,
    Path(id): Path<u64>,
    Json(payment): Json<Payment>,
) -> Answer {
    receipt(id, &payment)
}

#[idempotent(anchor = header("Idempotency-Key"))]
#[axum::debug_handler(state = Idempotency)]
async fn debug_below(
    State(_engine): State<Idempotency>,
    Path(id): Path<u64>,
    Json(payment): Json<Payment>,
) -> Answer {
    receipt(id, &payment)
}

#[idempotent(anchor = header("Idempotency-Key"))]
#[axum::debug_handler(state = Idempotency)]
async fn debug_below_no_arguments() -> (StatusCode, Json<Receipt>) {
    (StatusCode::CREATED, Json(Receipt { id: 7, amount: 5 }))
}

#[tracing::instrument]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn instrument_above(Path(id): Path<u64>, body: String) -> Answer {
    let payment = serde_json::from_str(&body)
        .map_err(|_| (StatusCode::BAD_REQUEST, Json(Problem { code: "not_json" })))?;
    receipt(id, &payment)
}

#[idempotent(anchor = header("Idempotency-Key"))]
#[tracing::instrument(skip_all, fields(payment.amount, %id), err(Debug), ret)]
async fn instrument_below(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answers {
    tracing::Span::current().record("payment.amount", payment.amount);
    receipt(id, &payment).map_err(|(status, _)| status).map(|(status, _)| {
        (status, Json(serde_json::json!({ "id": id, "amount": payment.amount })))
    })
}

type Answers = Result<(StatusCode, Json<serde_json::Value>), StatusCode>;

/// Pays.
///
/// It pays once.
#[utoipa::path(
    post,
    path = "/above/{id}",
    responses((status = 201, body = Receipt), (status = 422, body = Problem))
)]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn path_above(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answer {
    receipt(id, &payment)
}

/// Pays.
///
/// It pays once.
#[idempotent(anchor = body_field("amount"))]
#[utoipa::path(
    post,
    path = "/below/{id}",
    responses((status = 201, body = Receipt), (status = 422, body = Problem))
)]
async fn path_below(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answer {
    receipt(id, &payment)
}

/// Pays.
///
/// It pays once.
#[utoipa::path(
    post,
    path = "/all/above/{id}",
    responses((status = 201, body = Receipt), (status = 422, body = Problem))
)]
#[axum::debug_handler(state = Idempotency)]
#[tracing::instrument(skip_all)]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn all_above(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answer {
    receipt(id, &payment)
}

/// Pays.
///
/// It pays once.
#[idempotent(anchor = arg(payment.amount), state = Idempotency)]
#[allow(clippy::unused_async, reason = "an inert attribute among the others")]
#[utoipa::path(
    post,
    path = "/all/below/{id}",
    responses((status = 201, body = Receipt), (status = 422, body = Problem))
)]
#[axum::debug_handler(state = Idempotency)]
#[tracing::instrument(skip(payment))]
async fn all_below(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answer {
    receipt(id, &payment)
}

#[cfg_attr(all(), tracing::instrument(skip_all))]
#[cfg_attr(all(), idempotent(anchor = header("Idempotency-Key")))]
#[cfg_attr(all(), axum::debug_handler(state = Idempotency))]
async fn conditional(Path(id): Path<u64>, Json(payment): Json<Payment>) -> Answer {
    receipt(id, &payment)
}

#[tokio::test]
async fn other_attributes_may_stand_above_and_below() {
    let handlers = [
        routing::post(debug_above),
        routing::post(debug_below),
        routing::post(debug_below_no_arguments),
        routing::post(instrument_above),
        routing::post(instrument_below),
        routing::post(path_above),
        routing::post(path_below),
        routing::post(all_above),
        routing::post(all_below),
        routing::post(conditional),
    ];
    for (index, handler) in handlers.into_iter().enumerate() {
        let answer =
            answers_and_replays(&at("/{id}", handler), post("/7", r#"{"amount":5}"#)).await;
        assert_eq!(answer.status, 201, "{index}");
        assert_eq!(answer.json(), serde_json::json!({ "id": 7, "amount": 5 }), "{index}");
    }
}

#[derive(OpenApi)]
#[openapi(paths(path_above, path_below, all_above, all_below))]
struct Api;

#[test]
fn openapi_describes_the_handler_that_was_written() {
    let api = serde_json::to_value(Api::openapi()).unwrap();
    for path in ["/above/{id}", "/below/{id}", "/all/above/{id}", "/all/below/{id}"] {
        let operation = &api["paths"][path]["post"];
        assert_eq!(operation["summary"], "Pays.", "{path}: {operation:#}");
        assert_eq!(operation["description"], "It pays once.", "{path}");
        assert_eq!(operation["parameters"][0]["name"], "id", "{path}: {operation:#}");
        let schema = |of: &serde_json::Value| of["content"]["application/json"]["schema"].clone();
        assert_eq!(
            schema(&operation["requestBody"])["$ref"],
            "#/components/schemas/Payment",
            "{path}: {operation:#}"
        );
        assert_eq!(
            schema(&operation["responses"]["201"])["$ref"],
            "#/components/schemas/Receipt",
            "{path}"
        );
        assert_eq!(
            schema(&operation["responses"]["422"])["$ref"],
            "#/components/schemas/Problem",
            "{path}"
        );
    }
}
