use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

async fn nonce_of(body: &str) -> String {
    body.to_owned()
}

// A key is read from what was sent: nothing is waited for, and nothing is borrowed meanwhile.
#[idempotent(anchor = arg(nonce_of(&body).await))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
