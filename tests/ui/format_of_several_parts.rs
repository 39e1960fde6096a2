use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A format describes one value.
#[idempotent(anchor = (body_field("network"), body_field("hash")), format = uuid)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
