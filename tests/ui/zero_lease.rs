use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A lease that ends at once lets every retry run.
#[idempotent(anchor = header("Idempotency-Key"), lease = "0s")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
