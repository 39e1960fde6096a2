use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An interim response is never the last.
#[idempotent(anchor = header("Idempotency-Key"), replay(status = 100))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
