use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// Asking a function about an unknown outcome is not built yet.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = ask_the_bank)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
