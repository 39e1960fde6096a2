use axum::{Router, http::Method, routing::post};
use idem_runtime::{Idempotency, idempotent};

// axum implements `Handler` for functions of up to sixteen arguments.
#[idempotent(anchor = header("Idempotency-Key"))]
#[allow(clippy::too_many_arguments)]
async fn pay(
    _1: Method,
    _2: Method,
    _3: Method,
    _4: Method,
    _5: Method,
    _6: Method,
    _7: Method,
    _8: Method,
    _9: Method,
    _10: Method,
    _11: Method,
    _12: Method,
    _13: Method,
    _14: Method,
    _15: Method,
    _16: Method,
    _17: Method,
) {
}

fn main() {
    let _ = pay;
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| async {}));
}
