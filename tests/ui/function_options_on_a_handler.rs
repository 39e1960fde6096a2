use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A handler takes its operation as an argument, and says what happened by its status.
#[idempotent(
    anchor = header("Idempotency-Key"),
    operation = operation,
    nothing_happened = is_refusal,
)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
