use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// After `~` a JSON Pointer (RFC 6901) has `0` or `1`.
#[idempotent(anchor = body_field("/message~nonce"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
