use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// The key was issued by another operation, in whose space it is known.
#[idempotent(anchor = header("Idempotency-Key"), issued)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
