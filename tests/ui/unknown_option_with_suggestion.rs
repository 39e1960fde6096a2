use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An option that idem does not know would otherwise be one that silently does nothing.
#[idempotent(anchor = header("Idempotency-Key"), tll = "24h")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
