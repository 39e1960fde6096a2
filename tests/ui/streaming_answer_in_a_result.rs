use std::convert::Infallible;

use axum::{
    Router,
    http::StatusCode,
    response::sse::{Event, Sse},
    routing::post,
};
use idem_runtime::{Idempotency, idempotent};

type Progress = Sse<futures_util::stream::Empty<Result<Event, Infallible>>>;

// A stream is never complete, so it cannot be replayed.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> Result<(StatusCode, Progress), StatusCode> {
    if body.is_empty() {
        return Err(StatusCode::BAD_REQUEST);
    }
    Ok((StatusCode::ACCEPTED, Sse::new(futures_util::stream::empty())))
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
