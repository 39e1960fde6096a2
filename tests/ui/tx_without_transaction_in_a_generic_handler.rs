use axum::{Router, extract::State, routing::post};
use idem_runtime::{Idempotency, Tx, idempotent};
use sqlx::{Database, Sqlite};

// Of a generic handler, too.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay<DB: Database>(_tx: Tx<DB>, State(_idem): State<Idempotency>) -> String {
    String::new()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay::<Sqlite>));
}
