use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A request without a key would run, although only issued keys may.
#[idempotent(anchor = header("Idempotency-Key"), space = "enrolment", issued, optional)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
