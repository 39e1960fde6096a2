use axum::{Router, routing::post};
use idem_runtime::{Idempotency, RequestContext, idempotent};

// Who denies says with which response.
#[idempotent(anchor = header("Idempotency-Key"), admit = quota)]
async fn pay(body: String) -> String {
    body
}

async fn quota(_request: RequestContext) -> bool {
    true
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
