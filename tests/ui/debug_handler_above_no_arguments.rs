use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// `debug_handler` calls the handler as it finds it. Above ours it finds one without arguments and
// calls it with none: it goes below.
#[axum::debug_handler(state = Idempotency)]
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay() -> &'static str {
    "paid"
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
