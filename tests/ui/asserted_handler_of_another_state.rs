use axum::{
    Router,
    extract::{FromRef, State},
    routing::post,
};
use idem_runtime::{Idempotency, assert_handler, idempotent};

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    ledger: String,
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(State(ledger): State<String>, body: String) -> String {
    ledger + &body
}

// The assertion speaks of one router state, and this one has no ledger.
const _: fn() = || assert_handler::<Idempotency, _, _>(pay);

fn main() {
    let _: Router<App> = Router::new().route("/payments", post(pay));
}
