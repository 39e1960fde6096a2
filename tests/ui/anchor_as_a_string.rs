use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A string does not say where in the request it stands.
#[idempotent(anchor = "Idempotency-Key")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
