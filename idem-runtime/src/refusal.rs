//! Refusals: what a client is told when its request neither ran nor was replayed.
//!
//! By default a refusal is a problem document (RFC 9457) with a stable `code`, and `Retry-After`
//! where waiting helps. [`Refusals`] gives them the shape of an application's own errors.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

use crate::{anchor::AnchorError, key::OperationId};

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalKind {
    /// The operation needs a key and the request has none.
    KeyMissing,
    /// The key cannot be one.
    KeyMalformed,
    /// The body, or an argument of a function, cannot be fingerprinted: an object has one name twice,
    /// or it broke off, or it cannot be written as JSON.
    BodyMalformed,
    /// The request does not say whose it is.
    ScopeMissing,
    /// The key was used with another request.
    Mismatch,
    /// The same request is running.
    InFlight,
    /// An earlier attempt ended without saying whether its effect happened.
    UnknownOutcome,
    /// Another attempt took this one's claim over while it was running.
    LeaseLost,
    /// The request was done, but its answer was too large to keep, or a stream.
    NotReplayable,
    /// The server never handed this key out.
    UnknownKey,
    /// The time in which this key could be used is over.
    ExpiredKey,
    /// The body is larger than the limit.
    BodyTooLarge,
    /// The store cannot be asked. Nothing ran.
    StoreUnavailable,
    /// The store takes no new records. Nothing ran.
    StoreFull,
    /// The key's record is damaged, or from a newer release. Nothing ran.
    RecordUnreadable,
    /// Too many requests whose clients hung up are still running, or too many claims wait for the
    /// store. Nothing ran.
    Busy,
    /// The server is shutting down while the request waits for the answer of a running one.
    ShuttingDown,
    /// The handler, or the function, panicked. Not a refusal, but told in the same shape.
    HandlerPanicked,
    /// The handler's transaction could not be committed, so nothing was done; or the engine's store
    /// has none for it, so nothing ran.
    TransactionFailed,
    /// The connection was lost at the commit, and the store could not say in time whether it
    /// happened. It did so once or not at all.
    CommitUnknown,
}

impl RefusalKind {
    /// The code in the problem document; it never changes.
    pub const fn code(self) -> &'static str {
        match self {
            Self::KeyMissing => "key_missing",
            Self::KeyMalformed => "key_malformed",
            Self::BodyMalformed => "body_malformed",
            Self::ScopeMissing => "scope_missing",
            Self::Mismatch => "mismatch",
            Self::InFlight => "in_flight",
            Self::UnknownOutcome => "unknown_outcome",
            Self::LeaseLost => "lease_lost",
            Self::NotReplayable => "not_replayable",
            Self::UnknownKey => "unknown_key",
            Self::ExpiredKey => "expired_key",
            Self::BodyTooLarge => "body_too_large",
            Self::StoreUnavailable => "store_unavailable",
            Self::StoreFull => "store_full",
            Self::RecordUnreadable => "record_unreadable",
            Self::Busy => "busy",
            Self::ShuttingDown => "shutting_down",
            Self::HandlerPanicked => "handler_panicked",
            Self::TransactionFailed => "transaction_failed",
            Self::CommitUnknown => "commit_unknown",
        }
    }

    /// The status of the problem document.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::KeyMissing
            | Self::KeyMalformed
            | Self::BodyMalformed
            | Self::UnknownKey
            | Self::ExpiredKey => StatusCode::BAD_REQUEST,
            Self::ScopeMissing => StatusCode::UNAUTHORIZED,
            Self::Mismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Self::InFlight | Self::UnknownOutcome | Self::LeaseLost => StatusCode::CONFLICT,
            Self::NotReplayable => StatusCode::GONE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::StoreUnavailable
            | Self::StoreFull
            | Self::RecordUnreadable
            | Self::Busy
            | Self::ShuttingDown
            | Self::CommitUnknown => StatusCode::SERVICE_UNAVAILABLE,
            Self::HandlerPanicked | Self::TransactionFailed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::KeyMissing => "The idempotency key is missing",
            Self::KeyMalformed => "The idempotency key is malformed",
            Self::BodyMalformed => "The body is malformed",
            Self::ScopeMissing => "The request does not say whose it is",
            Self::Mismatch => "The idempotency key was used with another request",
            Self::InFlight => "The request with this idempotency key is still running",
            Self::UnknownOutcome => "The outcome of the request is unknown",
            Self::LeaseLost => "Another attempt of this request took over",
            Self::NotReplayable => "The request was done, but its answer was not kept",
            Self::UnknownKey => "The idempotency key was never issued",
            Self::ExpiredKey => "The idempotency key has expired",
            Self::BodyTooLarge => "The body is too large",
            Self::StoreUnavailable => "The idempotency store is unavailable",
            Self::StoreFull => "The idempotency store is full",
            Self::RecordUnreadable => "The record of this idempotency key cannot be read",
            Self::Busy => "The server is busy",
            Self::ShuttingDown => "The server is shutting down",
            Self::HandlerPanicked | Self::TransactionFailed => "The request failed",
            Self::CommitUnknown => "It is not yet known whether the request was done",
        }
    }

    /// What the client can do about it.
    const fn detail(self) -> &'static str {
        match self {
            Self::KeyMissing => "Send the key that this operation documents.",
            Self::KeyMalformed => "Send a key in the documented form.",
            Self::BodyMalformed => "Send a whole body in which no object has one name twice.",
            Self::ScopeMissing => "Send the credentials that this operation documents.",
            Self::Mismatch => "Repeat the original request exactly, or use a new key.",
            Self::InFlight => "Repeat the same request after the time in Retry-After.",
            Self::UnknownOutcome => {
                "An earlier attempt ended without an answer. Ask for the outcome before trying again."
            }
            Self::LeaseLost => "Repeat the same request to get the answer of the other attempt.",
            Self::NotReplayable => "The effect happened once and will not be repeated.",
            Self::UnknownKey => "Ask the server for a key first.",
            Self::ExpiredKey => "Ask the server for a new key.",
            Self::BodyTooLarge => "Send a smaller body.",
            Self::StoreUnavailable | Self::StoreFull | Self::Busy => {
                "Nothing was done. Repeat the same request later."
            }
            Self::RecordUnreadable => {
                "Nothing ran now; an earlier request with this key may have. Repeat the same request later, or tell the operator."
            }
            Self::ShuttingDown => "Repeat the same request to get the answer of the running one.",
            Self::HandlerPanicked => "Repeat the same request with the same key.",
            Self::TransactionFailed => {
                "Nothing was done. Repeat the same request with the same key."
            }
            Self::CommitUnknown => {
                "Repeat the same request with the same key: it is done once at most."
            }
        }
    }

    /// How long a client should wait before it repeats the request, where that helps.
    pub(crate) const fn retry_after(self) -> Option<Duration> {
        match self {
            Self::InFlight | Self::LeaseLost | Self::ShuttingDown | Self::CommitUnknown => {
                Some(Duration::from_secs(1))
            }
            Self::StoreUnavailable | Self::StoreFull | Self::RecordUnreadable | Self::Busy => {
                Some(Duration::from_secs(5))
            }
            _ => None,
        }
    }
}

/// A refusal, before it has a shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    kind: RefusalKind,
    detail: Cow<'static, str>,
    operation_id: Option<OperationId>,
    documentation: Option<Arc<str>>,
}

impl Refusal {
    /// A refusal of a kind, with the kind's own words.
    pub const fn new(kind: RefusalKind) -> Self {
        let detail = Cow::Borrowed(kind.detail());
        Self { kind, detail, operation_id: None, documentation: None }
    }

    pub(crate) fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = detail.into();
        self
    }

    pub(crate) const fn about(mut self, operation_id: OperationId) -> Self {
        self.operation_id = Some(operation_id);
        self
    }

    pub(crate) fn documented_at(mut self, url: Option<&Arc<str>>) -> Self {
        self.documentation = url.cloned();
        self
    }

    /// A key that is missing or malformed.
    pub(crate) fn of_key(error: &AnchorError) -> Self {
        let kind = match error {
            AnchorError::Missing { .. } | AnchorError::Incomplete { .. } => RefusalKind::KeyMissing,
            AnchorError::Malformed { .. } => RefusalKind::KeyMalformed,
        };
        Self::new(kind).with_detail(format!("{error}. {}", kind.detail()))
    }

    /// A scope that is missing, or as good as that.
    pub(crate) fn of_scope(error: &AnchorError) -> Self {
        let kind = RefusalKind::ScopeMissing;
        Self::new(kind).with_detail(format!("{error}. {}", kind.detail()))
    }

    /// Why.
    pub const fn kind(&self) -> RefusalKind {
        self.kind
    }

    /// What is wrong and what to do about it, for people. It repeats no key, credential or body.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// How long to wait before repeating the request, where that helps.
    pub const fn retry_after(&self) -> Option<Duration> {
        self.kind.retry_after()
    }

    /// The operation that stands in the way, if there is one.
    pub const fn operation_id(&self) -> Option<OperationId> {
        self.operation_id
    }

    /// The refusal as the default problem document.
    pub fn problem(&self) -> Response<Bytes> {
        let mut document = serde_json::json!({
            "type": self.documentation.as_deref().unwrap_or("about:blank"),
            "title": self.kind.title(),
            "status": self.kind.status().as_u16(),
            "detail": self.detail,
            "code": self.kind.code(),
        });
        if let (Some(id), Some(members)) = (self.operation_id, document.as_object_mut()) {
            members.insert("operation_id".to_owned(), id.to_string().into());
        }
        let mut response = self.respond(self.kind.status(), document.to_string());
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }

    /// The refusal as JSON of the application's own, with `Retry-After` where waiting helps.
    pub fn json(&self, status: StatusCode, document: &serde_json::Value) -> Response<Bytes> {
        let mut response = self.respond(status, document.to_string());
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    fn respond(&self, status: StatusCode, body: String) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        if let Some(url) = &self.documentation {
            let link = format!("<{url}>; rel=\"describedby\"; type=\"text/html\"");
            if let Ok(link) = HeaderValue::from_str(&link) {
                headers.insert(header::LINK, link);
            }
        }
        response
    }
}

/// Gives refusals their shape, status and code.
///
/// Functions from a [`Refusal`] to a response implement it:
///
/// ```
/// use bytes::Bytes;
/// use http::{Response, StatusCode};
/// use idem_runtime::{Refusal, RefusalKind};
///
/// fn our_errors(refusal: &Refusal) -> Response<Bytes> {
///     match refusal.kind() {
///         RefusalKind::Mismatch => refusal.json(
///             StatusCode::CONFLICT,
///             &serde_json::json!({ "error": "idempotency-conflict" }),
///         ),
///         _ => refusal.problem(),
///     }
/// }
/// # let _: &'static dyn idem_runtime::Refusals = &our_errors;
/// ```
pub trait Refusals: Send + Sync {
    /// The response that the client gets.
    fn render(&self, refusal: &Refusal) -> Response<Bytes>;
}

impl<F: Fn(&Refusal) -> Response<Bytes> + Send + Sync> Refusals for F {
    fn render(&self, refusal: &Refusal) -> Response<Bytes> {
        self(refusal)
    }
}

/// The default shape: [`Refusal::problem`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ProblemDocuments;

impl Refusals for ProblemDocuments {
    fn render(&self, refusal: &Refusal) -> Response<Bytes> {
        refusal.problem()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.code(), self.detail)
    }
}
