use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Options are separated by commas; the next one is read all the same.
#[idempotent(anchor = header("Idempotency-Key") ttl = "24h")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
