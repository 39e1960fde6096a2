use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A space has a name that handlers share, not a variable.
#[idempotent(anchor = header("Idempotency-Key"), space = payments)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
