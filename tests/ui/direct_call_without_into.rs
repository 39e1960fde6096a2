use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    body
}

async fn a_test() -> Option<String> {
    // The last argument of a direct call is wrapped; rustc suggests how.
    pay("1 EUR".to_owned()).await.into_inner()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay)).route(
        "/test",
        post(|| async {
            a_test().await;
        }),
    );
}
