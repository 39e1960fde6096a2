use axum::{Json, Router, routing::post};
use idem_runtime::{Idempotency, idempotent};
use serde::Deserialize;

#[derive(Deserialize)]
struct Payment {
    nonce: String,
}

// rustc judges the expression, at its own tokens.
#[idempotent(anchor = arg(payment.nonc))]
async fn pay(Json(payment): Json<Payment>) -> String {
    payment.nonce
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
