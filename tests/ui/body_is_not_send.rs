use std::rc::Rc;

use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// The handler may go on in another task, so what it holds across an await is `Send`. rustc says so
// here, and names the value.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    let shared = Rc::new(body);
    tokio::task::yield_now().await;
    shared.to_string()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
