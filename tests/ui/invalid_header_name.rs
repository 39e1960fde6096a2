use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Such a header can never arrive.
#[idempotent(anchor = header("Idem potency"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
