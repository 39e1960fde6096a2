use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// There is nothing to commit: the handler does its work elsewhere.
#[idempotent(anchor = header("Idempotency-Key"), transaction)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
