use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An attribute without options shows what to write.
#[idempotent()]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
