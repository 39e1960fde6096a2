#![deny(unused)]

use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// rustc's lints about the body are still heard.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    return body;
    String::new()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
