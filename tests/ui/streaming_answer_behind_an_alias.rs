use std::convert::Infallible;

use axum::{
    Router,
    response::sse::{Event, Sse},
    routing::post,
};
use idem_runtime::{Idempotency, idempotent};

type Progress = Sse<futures_util::stream::Empty<Result<Event, Infallible>>>;

// A stream is never complete, so it cannot be replayed. rustc sees through the alias.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(_body: String) -> Progress {
    Sse::new(futures_util::stream::empty())
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
