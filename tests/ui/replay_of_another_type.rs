use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A replay is shaped as a whole response.
#[idempotent(anchor = header("Idempotency-Key"), replay = shaped)]
async fn pay(body: String) -> String {
    body
}

fn shaped(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
