use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

struct Bank;

impl Bank {
    // axum has no `self` to give: what a handler needs is in the state.
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn pay(self) {}
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| Bank.pay()));
}
