use axum::{Router, routing::post};
use idem_runtime::{Idempotency, Recovered, RequestContext, idempotent};

// To find out what happened takes a call to somewhere: it is awaited.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = find_out)]
async fn pay(body: String) -> String {
    body
}

fn find_out(_request: RequestContext) -> Recovered {
    Recovered::unknown()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
