use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// What is always there cannot be optional.
#[idempotent(anchor = arg(body), optional)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
