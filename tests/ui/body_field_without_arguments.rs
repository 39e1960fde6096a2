use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A field of the body needs a handler that takes the body.
#[idempotent(anchor = body_field("nonce"))]
async fn pay() {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
