use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

trait Payments {
    fn pay(body: String) -> impl Future<Output = String> + Send;
}

struct Bank;

impl Payments for Bank {
    // The signature changes, and a trait holds its implementations to its own: the handler is a
    // function beside it that calls the method.
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn pay(body: String) -> String {
        body
    }
}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|body: String| Bank::pay(body)));
}
