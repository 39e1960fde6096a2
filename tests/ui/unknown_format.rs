use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A format checks the key and brings it into one spelling; there are three.
#[idempotent(anchor = header("Idempotency-Key"), format = guid)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
