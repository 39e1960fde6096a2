use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A duplicate that waits for no time is one that is refused.
#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("0s"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
