use axum::{Json, Router, http::HeaderMap, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Only the last extractor may take the body.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(Json(_amount): Json<u64>, _headers: HeaderMap) {}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|headers: HeaderMap| pay(Json(1), headers)));
}
