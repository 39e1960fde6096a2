use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// An expression sees the handler's own bindings.
#[idempotent(anchor = arg(bodi))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
