use axum::{Router, routing::post};
use idem_runtime::{Idempotency, Tx, idempotent};
use sqlx::Sqlite;

type Database = Tx<Sqlite>;

// What is done on a `Tx` counts once idem commits it. rustc sees through the alias.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(_tx: Database, body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
