use axum::{Router, extract::State, routing::post};
use idem_runtime::idempotent;

#[derive(Clone)]
struct Bare;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(State(_): State<Bare>, body: String) -> String {
    body
}

fn main() {
    // The engine lives in the router's state; `EngineInRouterState` in the message says so.
    let _: Router = Router::new().route("/payments", post(pay)).with_state(Bare);
}
