use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Of two values for one option, neither wins.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h", ttl = "48h")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
