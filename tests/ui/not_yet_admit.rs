use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Admission of fresh operations is not built yet.
#[idempotent(anchor = header("Idempotency-Key"), admit = within_quota)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
