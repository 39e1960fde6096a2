use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Recovery asks the application, so it is told what to ask.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
