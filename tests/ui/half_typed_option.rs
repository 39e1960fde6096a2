use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// While somebody types an option, the message shows one, and the router still finds the handler.
#[idempotent(anchor = header("Idempotency-Key"), ttl =)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
