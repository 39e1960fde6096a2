use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Where no option is close, the message lists them and guesses none.
#[idempotent(anchor = header("Idempotency-Key"), deduplicate = yes)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
