//! A layer around services of other kinds, and other layers inside of it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    BoxError, Router,
    body::{Body, Bytes},
    error_handling::HandleErrorLayer,
    extract::{Request, State},
    http::{Response, StatusCode},
    response::IntoResponse,
    routing::post,
};
use futures_util::future::BoxFuture;
use http_body_util::Full;
use idem_runtime::{Anchor, Idempotency, Operation, Outcome, Recording, Scope, idempotent};
use reqwest::Method;
use tests::{on_both_stores, server::Server, stores::Bench};
use tower::{Layer, Service, ServiceBuilder, service_fn};

use super::{KEY, WRITES, ask, is_ignored, operation_of};

on_both_stores! {
    a_whole_router_is_protected_from_outside,
    an_error_of_the_service_goes_through_and_is_an_unknown_outcome,
    an_owner_that_was_taken_over_answers_with_the_others_answer_and_not_its_error,
    a_service_is_called_only_when_it_is_ready,
    a_request_that_a_layer_sends_again_is_the_next_attempt_of_the_handler,
}

/// Serves a service for all paths.
async fn serve<S>(service: S) -> Server
where
    S: Service<Request, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Response: IntoResponse,
    S::Future: Send + 'static,
{
    Server::start(Router::new().fallback_service(service)).await
}

async fn a_whole_router_is_protected_from_outside(bench: Bench) {
    let routes = Router::new()
        .route("/orders/{id}", post(bench.numbered()).get(bench.numbered()))
        .route("/login", post(bench.numbered()));
    let layer = bench.engine().build().layer(WRITES).except(["/login"]);
    let server = serve(ServiceBuilder::new().layer(layer).service(routes)).await;
    for replay in [false, true] {
        ask(&server, Method::POST, "/orders/1").await.assert_is(200, "effect 1", replay);
        ask(&server, Method::POST, "/orders/2").await.assert_is(200, "effect 2", replay);
    }
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(&*record.operation, "POST (no route)");
    for (method, path, number) in [(Method::POST, "/login", 3), (Method::GET, "/orders/1", 4)] {
        let answer = ask(&server, method, path).await;
        answer.assert_is(200, &format!("effect {number}"), false);
        assert!(is_ignored(&answer), "{path}");
    }
}

/// A service that is no handler: it fails at first, or after it was held up, and then answers.
type Failing = tower::util::BoxCloneSyncService<Request, Response<Full<Bytes>>, BoxError>;

fn failing(bench: &Bench, holds: Arc<Mutex<Vec<tests::faults::Gate>>>) -> Failing {
    let effects = bench.effects.clone();
    tower::util::BoxCloneSyncService::new(service_fn(move |request: Request<Body>| {
        let (effects, held) = (effects.clone(), holds.lock().unwrap().pop());
        async move {
            let operation = request.extensions().get::<Operation>().unwrap().clone();
            let number = effects.happen();
            if let Some(held) = held {
                held.pass().await;
                return Err("too late".into());
            }
            match number {
                1 => Err("as told".into()),
                _ => Ok(Response::new(Full::from(format!("attempt {}", operation.attempt())))),
            }
        }
    }))
}

async fn serve_failing(bench: &Bench, holds: Arc<Mutex<Vec<tests::faults::Gate>>>) -> Server {
    let handle = async |error: BoxError| (StatusCode::BAD_GATEWAY, error.to_string());
    // Even where everything is recorded, an error is not an answer.
    let layer = bench.engine().build().layer(WRITES.record(Recording::All));
    let service = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(handle))
        .layer(layer)
        .service(failing(bench, holds));
    serve(service).await
}

async fn an_error_of_the_service_goes_through_and_is_an_unknown_outcome(bench: Bench) {
    let server = serve_failing(&bench, Arc::default()).await;
    let failed = ask(&server, Method::POST, "/").await;
    assert_eq!((failed.status, failed.text().as_str()), (502, "as told"));
    assert_eq!(bench.told.outcomes(), [Outcome::Released]);
    ask(&server, Method::POST, "/").await.assert_is(200, "attempt 2", false);
    ask(&server, Method::POST, "/").await.assert_is(200, "attempt 2", true);
}

async fn an_owner_that_was_taken_over_answers_with_the_others_answer_and_not_its_error(
    bench: Bench,
) {
    bench.effects.happen();
    let gate = tests::faults::Gate::default();
    let server = serve_failing(&bench, Arc::new(Mutex::new(vec![gate.clone()]))).await;
    let server = Arc::new(server);
    let slow = tokio::spawn({
        let server = Arc::clone(&server);
        async move { ask(&server, Method::POST, "/").await }
    });
    gate.reached().await;
    bench.pass(Duration::from_secs(31));
    ask(&server, Method::POST, "/").await.assert_is(200, "attempt 2", false);
    gate.open();
    slow.await.unwrap().assert_is(200, "attempt 2", true);
}

/// A service that must be asked whether it is ready before each call.
#[derive(Debug)]
struct Strict<S> {
    inner: S,
    ready: bool,
}

impl<S: Clone> Clone for Strict<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), ready: false }
    }
}

impl<S: Service<Request>> Service<Request> for Strict<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.ready = true;
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> S::Future {
        assert!(std::mem::take(&mut self.ready), "it did not say that it was ready");
        self.inner.call(request)
    }
}

async fn a_service_is_called_only_when_it_is_ready(bench: Bench) {
    let routes = Router::new().route("/", post(bench.numbered()).get(bench.numbered()));
    let service = Strict { inner: routes, ready: false };
    let mut service = bench.engine().build().layer(WRITES).layer(service);
    for (method, body) in [("POST", "effect 1"), ("POST", "effect 1"), ("GET", "effect 2")] {
        let request = Request::builder().method(method).uri("/").header("x-api-key", "a");
        let request = request.header("idempotency-key", "k").body(Body::empty()).unwrap();
        std::future::poll_fn(|cx| Service::<Request>::poll_ready(&mut service, cx)).await.unwrap();
        let answer = service.call(request).await.unwrap();
        let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap();
        assert_eq!(bytes, body);
    }
}

/// Sends a request that fails once more.
#[derive(Clone, Debug)]
struct Again<S>(S);

impl<S> Service<Request> for Again<S>
where
    S: Service<Request, Response = axum::response::Response> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = self.0.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let whole = || Request::from_parts(head.clone(), Body::from(body.clone()));
            let answer = inner.call(whole()).await?;
            match answer.status().is_server_error() {
                true => inner.call(whole()).await,
                false => Ok(answer),
            }
        })
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn flaky(
    State(_): State<Idempotency>,
    operation: Operation,
) -> Result<String, (StatusCode, String)> {
    let said = format!("attempt {} of {}", operation.attempt(), operation.id());
    match operation.attempt() {
        1 => Err((StatusCode::BAD_GATEWAY, said)),
        _ => Ok(said),
    }
}

async fn a_request_that_a_layer_sends_again_is_the_next_attempt_of_the_handler(bench: Bench) {
    let engine = bench.engine().build();
    let routes = Router::new().route("/", post(flaky)).with_state(engine.clone());
    let inside = tower::layer::layer_fn(Again);
    let server = Server::start(routes.layer(inside).layer(engine.layer(WRITES))).await;
    let answer = ask(&server, Method::POST, "/").await;
    assert!(answer.text().starts_with("attempt 2 of "), "{}", answer.text());
    assert!(!answer.text().contains(&operation_of(&answer)), "each has its own");
    let told = [Outcome::Released, Outcome::Recorded, Outcome::Recorded];
    assert_eq!(bench.told.outcomes(), told);
    assert!(ask(&server, Method::POST, "/").await.is_replay());
}

#[test]
#[should_panic(expected = "a layer does not see a handler's arguments")]
fn a_layer_takes_no_anchor_of_a_handlers_arguments() {
    let store = idem_runtime::store::MemoryStore::new();
    let engine = Idempotency::builder(store).scope(Scope::global()).build();
    let _ = engine.layer(Anchor::argument());
}

#[test]
#[should_panic(expected = "a layer does not see a handler's arguments")]
fn a_layer_takes_no_scope_of_a_handlers_arguments() {
    let store = idem_runtime::store::MemoryStore::new();
    let engine = Idempotency::builder(store).scope(Scope::global()).build();
    const OF_ARGUMENTS: Scope = Scope::all(&[Scope::global(), Scope::argument()]);
    let _ = engine.layer(WRITES.scope(OF_ARGUMENTS));
}

#[test]
#[should_panic(expected = "a route begins with a slash")]
fn an_excepted_route_that_would_never_match_is_refused() {
    let store = idem_runtime::store::MemoryStore::new();
    let engine = Idempotency::builder(store).scope(Scope::global()).build();
    let _ = engine.layer(KEY).except(["login"]);
}
