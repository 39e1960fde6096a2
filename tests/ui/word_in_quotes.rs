use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Words are not strings.
#[idempotent(anchor = header("Idempotency-Key"), record = "final")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
