use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Extractors are values that the handler owns.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(_body: &str) {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| pay("")));
}
