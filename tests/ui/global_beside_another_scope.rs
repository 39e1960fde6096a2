use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// `global` is the scope of everybody, so nothing can narrow it.
#[idempotent(anchor = header("Idempotency-Key"), scope = (global, header("X-Tenant")))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
