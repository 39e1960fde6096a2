use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

const ONE_DAY: u64 = 86_400;

// A declared duration is a `Duration`.
#[idempotent(anchor = header("Idempotency-Key"), ttl = ONE_DAY)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
