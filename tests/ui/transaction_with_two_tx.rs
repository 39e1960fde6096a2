use axum::{Router, routing::post};
use idem_runtime::{Idempotency, Tx, idempotent};
use sqlx::Sqlite;

type Accounts = Tx<Sqlite>;

// One transaction carries the record.
#[idempotent(anchor = header("Idempotency-Key"), transaction)]
async fn pay(_accounts: Accounts, _ledger: Tx<Sqlite>, body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
