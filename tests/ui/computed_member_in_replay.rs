use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// What is merged is the same in every replay, and the rest is a function's work.
#[idempotent(anchor = header("Idempotency-Key"), replay(merge = { replayed: true, at: now() }))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
