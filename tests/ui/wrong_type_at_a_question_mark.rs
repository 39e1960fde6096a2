use axum::{Router, http::StatusCode, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Errors in the body are rustc's own, where they are.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> Result<String, StatusCode> {
    let amount: u64 = body.parse()?;
    Ok(amount.to_string())
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
