use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// What identifies the operation is never guessed.
#[idempotent(ttl = "24h")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
