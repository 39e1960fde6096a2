use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A record that expires at once protects nothing.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "0s")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
