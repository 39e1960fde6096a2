use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A part that repeats another adds nothing to the key: it was meant to be another.
#[idempotent(anchor = (header("X-Order"), header("x-order")))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
