use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Headers are added to a scheme: alone they would leave the body out.
#[idempotent(anchor = header("Idempotency-Key"), fingerprint = header("X-Version"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
