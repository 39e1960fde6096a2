use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Keys that the server hands out are not built yet.
#[idempotent(anchor = header("Idempotency-Key"), issued)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
