//! Hooks: where an application has a say in what becomes of a request.

use std::{
    any::Any,
    error::Error,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header, request::Parts};
use http_body_util::combinators::UnsyncBoxBody;

use crate::{json, operation::Operation, record::Ttl};

/// A response of the application's, whatever made it.
pub(crate) type AnyResponse = Response<UnsyncBoxBody<Bytes, Box<dyn Error + Send + Sync>>>;

/// Decides whether a request that would run may run.
pub(crate) type AdmitFn = fn(RequestContext) -> BoxFuture<'static, Result<(), Denied>>;
/// Finds out what became of an operation whose last attempt did not say.
pub(crate) type RecoverFn = fn(RequestContext) -> BoxFuture<'static, Recovered>;

/// A request as `admit` and `recover` functions see it: after its claim, if it has a key, and
/// before its handler.
pub struct RequestContext {
    pub(crate) operation: Operation,
    pub(crate) head: Parts,
    pub(crate) body: Bytes,
    pub(crate) state: Arc<dyn Any + Send + Sync>,
}

impl RequestContext {
    /// The operation: the same that the handler gets.
    pub const fn operation(&self) -> &Operation {
        &self.operation
    }

    /// The method.
    pub const fn method(&self) -> &Method {
        &self.head.method
    }

    /// The URI, as the handler sees it.
    pub const fn uri(&self) -> &Uri {
        &self.head.uri
    }

    /// All headers.
    pub const fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// What layers and earlier extractors left.
    pub const fn extensions(&self) -> &http::Extensions {
        &self.head.extensions
    }

    /// The whole body; empty if neither the anchor nor the fingerprint needs it, or an optional key
    /// is absent.
    pub const fn body(&self) -> &Bytes {
        &self.body
    }

    /// The router's state, if `S` is its type. A [layer](crate::Idempotency::layer) has none.
    pub fn state<S: 'static>(&self) -> Option<&S> {
        self.state.downcast_ref()
    }
}

/// The head may hold credentials and the body anything: neither is shown.
impl fmt::Debug for RequestContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestContext").field("operation", &self.operation).finish_non_exhaustive()
    }
}

/// Why a request may not run: the response that it gets. Nothing happened.
#[derive(Debug)]
pub struct Denied(pub(crate) AnyResponse);

/// What became of an operation whose last attempt ended without saying.
#[derive(Debug)]
#[must_use]
pub struct Recovered(pub(crate) Recovery);

#[derive(Debug)]
pub(crate) enum Recovery {
    Answered(AnyResponse),
    NeverHappened,
    Unknown,
}

impl Recovered {
    /// It never happened, and no call of an earlier attempt is still under way: the handler runs, as
    /// the next attempt of the same operation.
    pub const fn never_happened() -> Self {
        Self(Recovery::NeverHappened)
    }

    /// It cannot be said: the request is refused as an unknown outcome, and the next one asks
    /// again.
    pub const fn unknown() -> Self {
        Self(Recovery::Unknown)
    }
}

/// How a replay differs from what was recorded. The record itself never changes.
///
/// ```
/// use http::StatusCode;
/// use idem_runtime::ReplayShape;
///
/// const MARKED: ReplayShape =
///     ReplayShape::new().status(StatusCode::OK).merge(r#"{"replayed":true}"#);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[must_use = "a shape does nothing until a policy has it"]
pub struct ReplayShape {
    status: Option<StatusCode>,
    merge: Option<&'static str>,
    with: Option<fn(Response<Bytes>) -> Response<Bytes>>,
}

impl ReplayShape {
    /// As it was recorded.
    pub const fn new() -> Self {
        Self { status: None, merge: None, with: None }
    }

    /// Another status.
    pub const fn status(mut self, status: StatusCode) -> Self {
        self.status = Some(status);
        self
    }

    /// The members of this JSON object over those of the recorded one. A recorded body that is not
    /// a JSON object stays as it is.
    pub const fn merge(mut self, members: &'static str) -> Self {
        self.merge = Some(members);
        self
    }

    /// Whatever a function makes of the response that would be sent. If it panics, the request is
    /// refused as `record_unreadable`: what it was to hide is not sent. A `Content-Length` that is not
    /// that of the body is left out.
    pub const fn with(mut self, shape: fn(Response<Bytes>) -> Response<Bytes>) -> Self {
        self.with = Some(shape);
        self
    }

    /// `None` if the application's function panicked.
    pub(crate) fn apply(&self, mut response: Response<Bytes>) -> Option<Response<Bytes>> {
        let recorded = response.body().len();
        if let Some(status) = self.status {
            *response.status_mut() = status;
        }
        if let Some(members) = self.merge {
            match json::merge(response.body(), members.as_bytes()) {
                Ok(merged) => *response.body_mut() = Bytes::from(merged),
                Err(error) => {
                    let error = &error as &dyn Error;
                    tracing::warn!(error, "a recorded body is no JSON object: replayed as it is");
                }
            }
        }
        if let Some(shape) = self.with {
            let Ok(shaped) = catch_unwind(AssertUnwindSafe(|| shape(response))) else {
                tracing::error!("the function that shapes replays panicked");
                return None;
            };
            response = shaped;
        }
        if matches!(response.status().as_u16(), 204 | 205 | 304) {
            response.body_mut().clear();
        }
        // The server believes it: with a wrong one, the next answer on the connection would be read
        // as part of this one. That of a HEAD request, whose body is not there, stays.
        let length = response.body().len();
        let wrong = |told: &HeaderValue| {
            told.to_str().ok().and_then(|told| told.parse().ok()) != Some(length)
        };
        let told = response.headers().get(header::CONTENT_LENGTH);
        if (length, recorded) != (0, 0) && told.is_some_and(wrong) {
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
        Some(response)
    }
}

/// What becomes of one response, whatever the policy says of its status: return it before the
/// parts of a response. It holds for the policies of the handler and of a
/// [layer](crate::Idempotency::layer) around it.
///
/// ```
/// use axum::http::StatusCode;
/// use idem_runtime::{Settle, idempotent};
///
/// #[idempotent(anchor = header("Idempotency-Key"))]
/// async fn transfer(body: String) -> (StatusCode, Settle, &'static str) {
///     // Final: the same request gets this answer again.
///     (StatusCode::CONFLICT, Settle::recorded(), "the account is closed")
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it does nothing until it is part of a response"]
pub struct Settle {
    pub(crate) fate: Fate,
    pub(crate) ttl: Option<Ttl>,
    pub(crate) keeps_effects: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// As the policy says.
    ByPolicy,
    Record,
    Tombstone,
    Forget,
    Release,
}

impl Settle {
    pub(crate) const BY_POLICY: Self = Self::to(Fate::ByPolicy);

    /// Recorded and replayed.
    pub const fn recorded() -> Self {
        Self::to(Fate::Record)
    }

    /// Not kept, but the fact is: a retry is refused as not replayable. For answers that carry what
    /// must not be stored.
    pub const fn tombstone() -> Self {
        Self::to(Fate::Tombstone)
    }

    /// Nothing happened: the key is free again, also where steps of this attempt were recorded. From
    /// the second attempt on it is [uncertain](Self::uncertain) all the same: what an earlier one did
    /// still counts.
    pub const fn forgotten() -> Self {
        Self::to(Fate::Forget)
    }

    /// Nobody knows whether it happened: what the policy says of unknown outcomes holds.
    pub const fn uncertain() -> Self {
        Self::to(Fate::Release)
    }

    /// As the policy says, but kept for another time.
    ///
    /// # Panics
    ///
    /// When the time is zero: a record that expires at once protects nothing.
    pub const fn for_time(ttl: Ttl) -> Self {
        Self::BY_POLICY.ttl(ttl)
    }

    /// Kept for another time than the policy's. The time of an issued key counts from when it was
    /// issued, and nothing moves it.
    ///
    /// # Panics
    ///
    /// When the time is zero: a record that expires at once protects nothing.
    pub const fn ttl(mut self, ttl: Ttl) -> Self {
        assert!(!ttl.is_over(), "Settle: a record that expires at once protects nothing");
        self.ttl = Some(ttl);
        self
    }

    /// What a transactional handler did stays although its answer is an error. Otherwise an error that
    /// is recorded undoes it and is committed alone.
    ///
    /// Of an answer that is not recorded it says nothing: without a record, a retry would do it again,
    /// so all of it is undone. An error that the policy does not record needs
    /// `Settle::recorded().keeping_effects()`.
    pub const fn keeping_effects(mut self) -> Self {
        self.keeps_effects = true;
        self
    }

    const fn to(fate: Fate) -> Self {
        Self { fate, ttl: None, keeps_effects: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(length: &'static str) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from_static(br#"{"a":1}"#));
        let length = HeaderValue::from_static(length);
        response.headers_mut().insert(header::CONTENT_LENGTH, length);
        response
    }

    /// What is left of the length that was recorded, and the body.
    fn shaped(shape: ReplayShape, recorded: Response<Bytes>) -> (bool, Bytes) {
        let response = shape.apply(recorded).unwrap();
        (response.headers().contains_key(header::CONTENT_LENGTH), response.into_body())
    }

    /// A server believes a length that is said.
    #[test]
    fn a_length_that_became_wrong_is_left_out() {
        let other = ReplayShape::new().with(|response| response.map(|_| Bytes::from_static(b"b")));
        assert_eq!(shaped(other, recorded("7")), (false, Bytes::from_static(b"b")));
        let merged = ReplayShape::new().merge(r#"{"b":2}"#);
        assert!(!shaped(merged, recorded("7")).0);
        let without_body = ReplayShape::new().status(StatusCode::NO_CONTENT);
        assert_eq!(shaped(without_body, recorded("7")), (false, Bytes::new()));
        assert!(shaped(ReplayShape::new().status(StatusCode::OK), recorded("7")).0);
        let head = recorded("7").map(|_| Bytes::new());
        assert!(shaped(ReplayShape::new().status(StatusCode::OK), head).0);
    }

    #[test]
    fn a_shape_that_panics_is_none() {
        let panics = ReplayShape::new().with(|_| panic!("as told"));
        assert!(panics.apply(recorded("7")).is_none());
    }
}
