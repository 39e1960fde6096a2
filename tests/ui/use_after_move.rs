use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Errors in the body are rustc's own, where they are.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    drop(body);
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
