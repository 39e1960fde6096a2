#![deny(unused)]

use axum::{Router, http::Method, routing::post};
use idem_runtime::{Idempotency, idempotent};

// rustc's lints about what the user wrote are still heard, each once; what a key is made of is used.
#[idempotent(anchor = arg(body), state = Idempotency)]
async fn pay(method: Method, body: String) {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
