use axum::{Router, routing::post};
use idem_runtime::{Idempotency, Tx, idempotent};
use sqlx::Sqlite;

// The record appears with the effects or not at all: nothing is unknown, and nothing lapses.
#[idempotent(
    anchor = header("Idempotency-Key"),
    transaction,
    on_unknown = refuse,
    lease = "30s",
    store_outage = open,
    mode = off,
)]
async fn pay(_tx: Tx<Sqlite>, body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
