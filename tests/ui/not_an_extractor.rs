use axum::{Router, extract::State, routing::post};
use idem_runtime::{Idempotency, idempotent};

struct Amount(u64);

// With `state = …` rustc names the argument that does not fit.
#[idempotent(anchor = header("Idempotency-Key"), state = Idempotency)]
async fn pay(State(_): State<Idempotency>, amount: Amount) -> String {
    amount.0.to_string()
}

fn main() {
    let _: Router<Idempotency> = Router::new()
        .route("/payments", post(|state| async { pay(state, Amount(1).into()).await }));
}
