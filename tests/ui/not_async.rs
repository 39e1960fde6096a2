use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// axum takes functions that return futures, and so does the engine.
#[idempotent(anchor = header("Idempotency-Key"))]
fn pay() -> String {
    String::new()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| async { pay() }));
}
