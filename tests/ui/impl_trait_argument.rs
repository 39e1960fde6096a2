use axum::{Router, extract::FromRequest, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A router has to know which extractor that is.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(_body: impl FromRequest<()>) {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|body: String| pay(body)));
}
