use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

struct Receipt;

// What the handler returns is recorded as a response, so it has to be one.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(_body: String) -> Receipt {
    Receipt
}

fn main() {
    let _: Router<Idempotency> = Router::new().route(
        "/payments",
        post(|body: String| async {
            pay(body.into()).await;
        }),
    );
}
