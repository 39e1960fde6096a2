//! Errors, as this API tells them: the handlers' and idem's in the same words.

use std::borrow::Cow;

use axum::{
    Json,
    body::Bytes,
    extract::rejection::{JsonRejection, PathRejection, QueryRejection},
    http::{self, StatusCode},
    response::{IntoResponse, Response},
};
use examples::Failure;
use idem_runtime::{Refusal, RefusalKind};
use serde_json::{Value, json};

/// An error, as this API tells it.
#[derive(Debug)]
pub(crate) struct Error {
    status: StatusCode,
    code: &'static str,
    message: Cow<'static, str>,
}

impl Error {
    pub(crate) const UNAUTHORIZED: Self =
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "send an X-API-Key that is known here");
    pub(crate) const NO_EVENT: Self =
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is no such event");
    pub(crate) const ALREADY_SUBMITTED: Self = Self::new(
        StatusCode::CONFLICT,
        "event_already_submitted",
        "another signed transaction was submitted for this event",
    );

    const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message: Cow::Borrowed(message) }
    }

    pub(crate) const fn invalid(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }
}

/// The chain's: a 4xx frees the event for another transaction, a 5xx does not.
impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        if failure.is_refusal() {
            let message = "the chain refuses this transaction; sign another one";
            return Self::new(StatusCode::UNPROCESSABLE_ENTITY, "transaction_refused", message);
        }
        let message = "nobody knows whether the chain has it; submit the same transaction again";
        Self::new(StatusCode::BAD_GATEWAY, "chain_unavailable", message)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        eprintln!("the books: {error}");
        let message = "something failed here; send the same request again";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
    }
}

impl From<JsonRejection> for Error {
    fn from(rejection: JsonRejection) -> Self {
        let message = rejection.body_text().into();
        Self { status: StatusCode::BAD_REQUEST, code: "invalid", message }
    }
}

impl From<QueryRejection> for Error {
    fn from(rejection: QueryRejection) -> Self {
        let message = rejection.body_text().into();
        Self { status: StatusCode::BAD_REQUEST, code: "invalid", message }
    }
}

impl From<PathRejection> for Error {
    fn from(_: PathRejection) -> Self {
        Self::NO_EVENT
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.status, Json(document(self.code, &self.message))).into_response()
    }
}

fn document(code: &str, message: &str) -> Value {
    json!({ "error": { "code": code, "message": message } })
}

/// What idem refuses, in the same words.
pub(crate) fn refusals(refusal: &Refusal) -> http::Response<Bytes> {
    let kind = refusal.kind();
    let (status, code, message) = match kind {
        RefusalKind::KeyMalformed => {
            (kind.status(), "invalid_idempotency_key", "the Idempotency-Key has 1 to 64 characters")
        }
        RefusalKind::Mismatch => (
            StatusCode::CONFLICT,
            "idempotency_body_mismatch",
            "this Idempotency-Key was used with another body",
        ),
        RefusalKind::ScopeMissing => (kind.status(), "unauthorized", refusal.detail()),
        // Worth another attempt, so by this API's rules no 409.
        RefusalKind::InFlight | RefusalKind::LeaseLost => (
            StatusCode::TOO_MANY_REQUESTS,
            "in_progress",
            "the same request is still running; send it again later",
        ),
        _ if kind.status().is_server_error() => (kind.status(), "unavailable", refusal.detail()),
        _ => (kind.status(), "invalid", refusal.detail()),
    };
    refusal.json(status, &document(code, message))
}

/// The same, where the key is an event or a receipt in the body.
pub(crate) fn body_refusals(refusal: &Refusal) -> http::Response<Bytes> {
    match refusal.kind() {
        kind @ RefusalKind::KeyMalformed => {
            refusal.json(kind.status(), &document("invalid", refusal.detail()))
        }
        RefusalKind::Mismatch => {
            let Error { status, code, message } = Error::ALREADY_SUBMITTED;
            refusal.json(status, &document(code, &message))
        }
        _ => refusals(refusal),
    }
}
