//! Somebody who is told: a receiver of webhooks, which takes each delivery once.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{FromRef, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use examples::{Downstream, webhooks};
use idem_runtime::{Anchor, Idempotency, Operation, idempotent};
use serde::Deserialize;

use crate::{books::Phase, jobs::SIGNATURE};

/// What a delivery is known by, whatever became of the attempts before.
const DELIVERY: Anchor = Anchor::all(&[
    Anchor::body_field("webhook_id"),
    Anchor::body_field("event_id"),
    Anchor::body_field("phase"),
])
.forever();

/// The largest delivery.
const LARGEST: usize = 64 * 1024;

#[idempotent(anchor = DELIVERY)]
async fn take(
    State(books): State<Downstream>,
    operation: Operation,
    Json(Delivery { phase }): Json<Delivery>,
) -> StatusCode {
    // The same key in every attempt: what is booked for a delivery is booked once.
    match books.call(phase.name(), operation.derive("booking")).await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

#[derive(Deserialize)]
struct Delivery {
    phase: Phase,
}

#[derive(Clone, FromRef)]
struct Receiver {
    idem: Idempotency,
    books: Downstream,
    secret: Arc<str>,
}

/// Runs before anything is looked up: whoever did not sign this very body, and lately, learns
/// nothing.
async fn authenticate(
    State(secret): State<Arc<str>>,
    request: Request,
    next: Next,
) -> Result<Response, StatusCode> {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, LARGEST).await.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
    let signature = head.headers.get(SIGNATURE).and_then(|value| value.to_str().ok());
    match signature.is_some_and(|signature| webhooks::is_signed(&secret, signature, &body)) {
        true => Ok(next.run(Request::from_parts(head, Body::from(body))).await.into_response()),
        false => Err(StatusCode::UNAUTHORIZED),
    }
}

pub(crate) fn routes(idem: Idempotency, books: Downstream, secret: &str) -> Router {
    let receiver = Receiver { idem, books, secret: secret.into() };
    Router::new()
        .route("/hooks", post(take))
        .route_layer(middleware::from_fn_with_state(receiver.clone(), authenticate))
        .merge(receiver.books.routes())
        .with_state(receiver)
}
