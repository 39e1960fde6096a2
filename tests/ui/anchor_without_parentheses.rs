use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A word alone does not say which header.
#[idempotent(anchor = header)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
