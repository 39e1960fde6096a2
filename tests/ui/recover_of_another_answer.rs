use axum::{Router, routing::post};
use idem_runtime::{Idempotency, RequestContext, idempotent};

// Whether it happened has three answers.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = find_out)]
async fn pay(body: String) -> String {
    body
}

async fn find_out(_request: RequestContext) -> bool {
    true
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
