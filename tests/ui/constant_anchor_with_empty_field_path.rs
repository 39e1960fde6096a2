use axum::{Router, routing::post};
use idem_runtime::{Anchor, Idempotency, idempotent};

// Every part of a declared anchor is checked.
const RECEIPT: Anchor = Anchor::all(&[Anchor::body_field("network"), Anchor::body_field("")]);

#[idempotent(anchor = RECEIPT)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
