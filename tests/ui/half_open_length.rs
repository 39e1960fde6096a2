use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Lengths include both of their ends, as `..=` says.
#[idempotent(anchor = header("Idempotency-Key"), format = text(1..64))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
