use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Waiting for the original is not built yet; until it is, saying so must not be ignored.
#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("5s"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
