use axum::{Router, http::StatusCode, routing::post};
use idem_runtime::{Idempotency, idempotent};

fn refuse() -> Result<String, &'static str> {
    Err("no body")
}

// Errors in the body are rustc's own, where they are.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> Result<String, StatusCode> {
    if body.is_empty() {
        return refuse();
    }
    Ok(body)
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
