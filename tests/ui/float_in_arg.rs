use axum::{Json, Router, routing::post};
use idem_runtime::{Idempotency, idempotent};
use serde::Deserialize;

#[derive(Deserialize)]
struct Payment {
    amount: f64,
}

// The text of a floating-point number is not stable: it cannot be a key.
#[idempotent(anchor = arg(payment.amount))]
async fn pay(Json(payment): Json<Payment>) -> String {
    payment.amount.to_string()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
