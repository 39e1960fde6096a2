use axum::{Router, extract::State, routing::post};
use idem_runtime::{Idempotency, idempotent};

#[derive(Clone)]
struct Ledger;

// A part of the state that the state does not have.
#[idempotent(anchor = header("Idempotency-Key"), state = Idempotency)]
async fn pay(State(_ledger): State<Ledger>, body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|body: String| pay(State(Ledger), body.into())));
}
