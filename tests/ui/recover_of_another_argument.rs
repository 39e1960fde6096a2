use axum::{Router, routing::post};
use idem_runtime::{Idempotency, Recovered, idempotent};

// Who is asked what happened gets the request.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = recover = find_out)]
async fn pay(body: String) -> String {
    body
}

async fn find_out(_body: String) -> Recovered {
    Recovered::unknown()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
