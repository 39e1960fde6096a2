use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Changing a replay is not built yet.
#[idempotent(anchor = header("Idempotency-Key"), replay(status = 200, merge = { replayed: true }))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
