use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// There is nothing to commit, nor anything that it could be.
#[idempotent(anchor = header("Idempotency-Key"), transaction)]
async fn pay() -> String {
    String::new()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
