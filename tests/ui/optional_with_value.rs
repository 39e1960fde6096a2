use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// `optional` is a word by itself: `optional = false` would be read as its opposite.
#[idempotent(anchor = header("Idempotency-Key"), optional = false)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
