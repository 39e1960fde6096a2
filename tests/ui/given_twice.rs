use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// One handler has one policy.
#[idempotent(anchor = header("Idempotency-Key"))]
#[idempotent(anchor = header("X-Request-Id"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
