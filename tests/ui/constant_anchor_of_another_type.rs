use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

const KEY: &str = "Idempotency-Key";

// A declared anchor is an `Anchor`: a name alone does not say where it stands.
#[idempotent(anchor = KEY)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
