use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Refusing to rerun after an unknown outcome is not built yet.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
