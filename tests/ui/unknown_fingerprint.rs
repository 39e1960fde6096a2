use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// What makes two requests the same is one of five schemes, or a constant.
#[idempotent(anchor = header("Idempotency-Key"), fingerprint = jsn)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
