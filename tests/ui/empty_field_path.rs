use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An empty path would be the whole body, which is no key.
#[idempotent(anchor = body_field(""))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
