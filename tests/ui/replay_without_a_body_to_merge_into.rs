use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A response without a body has no members.
#[idempotent(anchor = header("Idempotency-Key"), replay(status = 204, merge = { replayed: true }))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
