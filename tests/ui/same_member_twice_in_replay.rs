use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// JSON does not say which of two members of one name counts.
#[idempotent(anchor = header("Idempotency-Key"), replay(merge = { replayed: true, "replayed": 1 }))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
