use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// axum does not know what an unsafe function asks of its callers.
#[idempotent(anchor = header("Idempotency-Key"))]
async unsafe fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|body| async { unsafe { pay(body).await } }));
}
