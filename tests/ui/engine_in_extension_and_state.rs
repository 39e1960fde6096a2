use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// The engine is in one place: what is proved of the state says nothing of an extension.
#[idempotent(anchor = header("Idempotency-Key"), engine = extension, state = Idempotency)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
