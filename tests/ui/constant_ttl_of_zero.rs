use std::time::Duration;

use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

const NO_TIME: Duration = Duration::from_secs(0);

// A record that expires at once protects nothing, whoever says so.
#[idempotent(anchor = header("Idempotency-Key"), ttl = NO_TIME)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
