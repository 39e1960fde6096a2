use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Between two dots stands a name.
#[idempotent(anchor = body_field("message..nonce"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
