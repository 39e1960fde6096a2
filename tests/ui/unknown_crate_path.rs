use axum::{Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// `crate = …` says where idem is re-exported; rustc looks there.
#[idempotent(anchor = header("Idempotency-Key"), crate = my_framework::idem)]
async fn pay(body: String) -> String {
    body
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(|| async {}));
    let _ = pay;
}
