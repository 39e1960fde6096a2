use axum::{Router, extract::State, routing::post};
use idem_runtime::{Idempotency, assert_handler};

// Somebody removed `#[idempotent(…)]` here, and everything else still compiles.
async fn pay(State(_): State<Idempotency>, body: String) -> String {
    body
}

// The line that an application writes beside a handler that must be idempotent.
const _: fn() = || assert_handler::<Idempotency, _, _>(pay);

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
