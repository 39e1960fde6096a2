use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A scope without parts would be everybody's; that is said by `global`.
#[idempotent(anchor = header("Idempotency-Key"), scope = ())]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
