use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// While somebody types, rustc speaks of what they type and the router still finds the handler.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    let amount =
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
