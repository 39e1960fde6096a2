use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An anchor is one of five words, a tuple of these, or a constant.
#[idempotent(anchor = heder("Idempotency-Key"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
