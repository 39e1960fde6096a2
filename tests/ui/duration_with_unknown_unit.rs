use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Durations have the units of every configuration file.
#[idempotent(anchor = header("Idempotency-Key"), ttl = "24 horas")]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
