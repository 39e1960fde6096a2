use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Mistakes that have nothing to do with each other are reported together, each at its own word.
#[idempotent(anchor = heder("Idempotency-Key"), ttl = "0s", mode = enforced)]
async fn pay(body: &str) -> String {
    body.to_owned()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| pay("")));
}
