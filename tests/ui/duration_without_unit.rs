use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Seconds or hours? A number alone does not say.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "24")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
