use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An option with a few words takes one of those.
#[idempotent(anchor = header("Idempotency-Key"), mode = enforced)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
