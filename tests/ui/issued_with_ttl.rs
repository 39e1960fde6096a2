use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Validity was promised when the key was issued, and using it does not change it.
#[idempotent(anchor = header("Idempotency-Key"), space = "enrolment", issued, ttl = "10m")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
