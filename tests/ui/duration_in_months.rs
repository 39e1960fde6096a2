use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A month has no fixed length, and `M` is one slip away from `m`.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "1M")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
