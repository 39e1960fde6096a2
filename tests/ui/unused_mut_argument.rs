#![deny(unused)]

use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// rustc's lints about what the user wrote are still heard, each once.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(mut body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
