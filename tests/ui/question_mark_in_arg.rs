use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A key that can be missing or malformed is an anchor of the request's own, or code.
#[idempotent(anchor = arg(body.parse::<u64>()?))]
async fn pay(body: String) -> Result<String, String> {
    Ok(body)
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| async {}));
    let _ = pay;
}
