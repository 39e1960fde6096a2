use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A path parameter is named without the punctuation of the route.
#[idempotent(anchor = path("{id}"))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
