use std::borrow::Cow;

use axum::{Extension, Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A handler outlives the request if its client hangs up, so it borrows nothing from it.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay<'a>(_tenant: Extension<Cow<'a, str>>) {}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|| pay(Extension(Cow::Borrowed("a")))));
}
