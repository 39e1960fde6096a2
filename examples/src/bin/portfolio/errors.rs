//! Errors, as this API tells them: the handlers' and idem's in the same words.

use std::borrow::Cow;

use axum::{
    Json,
    body::Bytes,
    extract::rejection::{JsonRejection, PathRejection},
    http::{self, StatusCode},
    response::{IntoResponse, Response},
};
use examples::Failure;
use idem_runtime::{IssueError, IssuedError, Refusal, RefusalKind, Settle};
use serde_json::json;

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
    pub(crate) const FORBIDDEN: Self =
        Self::new(StatusCode::FORBIDDEN, "forbidden", "this X-API-Key may only read");
    pub(crate) const NO_PORTFOLIO: Self =
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is no such portfolio");
    pub(crate) const BAD_SIGNATURE: Self = Self::new(
        StatusCode::BAD_REQUEST,
        "bad_signature",
        "`signature` is not the owner's, or not of this message",
    );
    pub(crate) const ENROLLED: Self = Self::new(
        StatusCode::CONFLICT,
        "API_202",
        "the user has a portfolio in this strategy: there is nothing to repeat",
    );
    pub(crate) const TROUBLE: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "API_600",
        "something failed here; send the same request again",
    );

    pub(crate) const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self { status, code, message: Cow::Borrowed(message) }
    }

    pub(crate) const fn invalid(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    pub(crate) fn of_verifier(failure: Failure) -> Self {
        if failure.is_refusal() {
            return Self::BAD_SIGNATURE;
        }
        let message = "the verifier failed; send the same request again";
        Self::new(StatusCode::BAD_GATEWAY, "API_506", message)
    }

    pub(crate) fn of_chain(failure: Failure) -> Self {
        match failure {
            _ if failure.is_conflict() => {
                let message = "the chain has seen this nonce: the transfer was made";
                Self::new(StatusCode::CONFLICT, "nonce_used", message)
            }
            _ if failure.is_refusal() => Self::invalid("the chain refuses this"),
            _ => Self::TROUBLE,
        }
    }
}

impl From<IssueError> for Error {
    fn from(error: IssueError) -> Self {
        eprintln!("no key could be issued: {error}");
        Self::TROUBLE
    }
}

impl From<IssuedError> for Error {
    fn from(error: IssuedError) -> Self {
        eprintln!("what was issued cannot be read: {error}");
        Self::TROUBLE
    }
}

impl From<JsonRejection> for Error {
    fn from(rejection: JsonRejection) -> Self {
        let message = rejection.body_text().into();
        Self { status: StatusCode::BAD_REQUEST, code: "invalid", message }
    }
}

impl From<PathRejection> for Error {
    fn from(_: PathRejection) -> Self {
        Self::NO_PORTFOLIO
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let body = Json(json!({ "error": { "code": self.code, "message": self.message } }));
        match self.code {
            // Terminal: whoever repeats it is told the same.
            "API_202" => (self.status, Settle::recorded(), body).into_response(),
            _ => (self.status, body).into_response(),
        }
    }
}

/// What idem refuses, in the same words.
pub(crate) fn refusals(refusal: &Refusal) -> http::Response<Bytes> {
    refuse(refusal, "expired_flow", "this flowId has expired: begin a new enrolment")
}

/// The same, where the key is a nonce.
pub(crate) fn withdrawal_refusals(refusal: &Refusal) -> http::Response<Bytes> {
    refuse(refusal, "API_216", "this nonce has expired: ask for a new one")
}

pub(crate) fn refuse(refusal: &Refusal, expired: &str, advice: &str) -> http::Response<Bytes> {
    let kind = refusal.kind();
    let (status, code, message) = match kind {
        RefusalKind::ExpiredKey => (kind.status(), expired, advice),
        RefusalKind::UnknownKey => {
            (kind.status(), "unknown_key", "no such key was issued for this request")
        }
        RefusalKind::InFlight | RefusalKind::LeaseLost => {
            (kind.status(), "API_007", "the same request is still running; send it again later")
        }
        RefusalKind::Mismatch => (
            StatusCode::CONFLICT,
            "API_008",
            "this key was used with another body: send that one, or begin anew",
        ),
        RefusalKind::ScopeMissing => (kind.status(), "unauthorized", refusal.detail()),
        _ if kind.status().is_server_error() => (kind.status(), "API_600", refusal.detail()),
        _ => (kind.status(), "invalid", refusal.detail()),
    };
    refusal.json(status, &json!({ "error": { "code": code, "message": message } }))
}
