use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A function has a name that rustc can point at, and other handlers can share it.
#[idempotent(anchor = header("Idempotency-Key"), admit = |request| within_quota(request))]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
