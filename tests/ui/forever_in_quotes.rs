use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// `forever` is a word; in quotes it would be a duration.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "forever")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
