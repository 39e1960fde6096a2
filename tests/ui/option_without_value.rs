use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Every option but `optional` has a value.
#[idempotent(anchor = header("Idempotency-Key"), ttl)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
