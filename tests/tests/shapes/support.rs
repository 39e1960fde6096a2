//! Requests sent to a router in this process.

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderName, HeaderValue, Request, header},
    routing::MethodRouter,
};
use idem_runtime::{Idempotency, store::MemoryStore};
use tests::server::{Answer, engine};
use tower::ServiceExt;

/// An engine whose scope is the API key.
pub(crate) fn idem() -> Idempotency {
    engine(MemoryStore::new()).build()
}

/// One route over a state that is the engine itself.
pub(crate) fn at(path: &str, handlers: MethodRouter<Idempotency>) -> Router {
    Router::new().route(path, handlers).with_state(idem())
}

/// A POST of JSON by tenant `a`, under the key `k-1`.
pub(crate) fn post(path: &str, body: &str) -> Request<String> {
    let request = Request::post(path).body(body.to_owned());
    let request = request.unwrap_or_else(|error| panic!("{path}: {error}"));
    let request = with(request, "content-type", "application/json");
    with(with(request, "x-api-key", "a"), "idempotency-key", "k-1")
}

/// The request with one header set to this value.
pub(crate) fn with(
    mut request: Request<String>,
    name: &'static str,
    value: &'static str,
) -> Request<String> {
    let (name, value) = (HeaderName::from_static(name), HeaderValue::from_static(value));
    request.headers_mut().insert(name, value);
    request
}

/// The request under another key.
pub(crate) fn under(key: &'static str, request: Request<String>) -> Request<String> {
    with(request, "idempotency-key", key)
}

/// The request without a key.
pub(crate) fn without_key(mut request: Request<String>) -> Request<String> {
    request.headers_mut().remove("idempotency-key");
    request
}

/// A POST of a form.
pub(crate) fn post_form(path: &str, body: &str) -> Request<String> {
    let mut request = post(path, body);
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    request.headers_mut().insert(header::CONTENT_TYPE, form);
    request
}

/// Sends a request.
pub(crate) async fn ask(app: &Router, request: &Request<String>) -> Answer {
    let response = app.clone().oneshot(request.clone().map(Body::from)).await;
    let response = response.unwrap_or_else(|never| match never {});
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = to_bytes(response.into_body(), usize::MAX).await;
    let body = body.unwrap_or_else(|error| panic!("half a body: {error}")).to_vec();
    Answer { status, headers, body }
}

/// Sends a request and its retry: the handler answers the first and the record the second, with the
/// same status and the same bytes.
pub(crate) async fn answers_and_replays(app: &Router, request: Request<String>) -> Answer {
    let first = ask(app, &request).await;
    assert!((200..300).contains(&first.status), "{}: {}", first.status, first.text());
    assert!(!first.is_replay(), "a fresh request was answered from a record");
    let retry = ask(app, &request).await;
    assert!(retry.is_replay(), "{}: {}", retry.status, retry.text());
    assert_eq!((retry.status, retry.text()), (first.status, first.text()));
    first
}

/// Whether the second of two requests is taken for a retry of the first: it is replayed, or refused
/// as another request under the same key.
pub(crate) async fn share_a_key(
    app: &Router,
    first: &Request<String>,
    second: &Request<String>,
) -> bool {
    let answer = ask(app, first).await;
    assert!(answer.status < 300, "{}: {}", answer.status, answer.text());
    let answer = ask(app, second).await;
    assert!(answer.status < 300 || answer.status == 422, "{}: {}", answer.status, answer.text());
    answer.is_replay() || answer.status == 422 && answer.code() == "mismatch"
}
