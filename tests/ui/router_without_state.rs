use axum::{Router, routing::post};
use idem_runtime::idempotent;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    // No state, no engine.
    let _: Router = Router::new().route("/payments", post(pay));
}
