use axum::{Router, extract::State, routing::post};
use idem_runtime::idempotent;

#[derive(Clone)]
struct Bare;

// With `state = …` the missing engine is found here, in words, whether or not the handler is routed.
#[idempotent(anchor = header("Idempotency-Key"), state = Bare)]
async fn pay(State(_): State<Bare>, body: String) -> String {
    body
}

fn main() {
    let _: Router = Router::new().route("/payments", post(|| async {})).with_state(Bare);
    let _ = pay;
}
