use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Arguments are taken apart elsewhere: an attribute that meant something there would be lost.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(#[cfg(all())] body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
