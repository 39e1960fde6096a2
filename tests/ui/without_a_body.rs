use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

trait Payments {
    // A declaration does nothing that could be protected.
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn pay(body: String) -> String;
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| async {}));
}
