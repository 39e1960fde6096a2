//! Handlers in routers: nested, merged, layered, bound to a state.

use std::time::Duration;

use axum::{
    Router,
    extract::{Path, Request, State},
    handler::Handler,
    http::{HeaderMap, HeaderValue},
    middleware::{self, Next},
    response::Response,
    routing,
};
use idem_runtime::{Idempotency, idempotent};

use crate::support::{answers_and_replays, ask, at, idem, post};

#[idempotent(anchor = header("Idempotency-Key"))]
async fn create(body: String) -> String {
    body
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn confirm(State(_engine): State<Idempotency>, Path(id): Path<u64>) -> String {
    id.to_string()
}

#[tokio::test]
async fn routers_are_nested_and_merged() {
    let payments = Router::new()
        .route("/", routing::post(create))
        .route("/{id}/confirm", routing::put(confirm).post(confirm));
    let notes = Router::new().route("/notes", routing::any(create));
    let api = Router::new().nest("/payments", payments).merge(notes);
    let app = Router::new().nest("/api/v1", api).with_state(idem());
    answers_and_replays(&app, post("/api/v1/payments", "a")).await;
    answers_and_replays(&app, post("/api/v1/notes", "a")).await;
    let confirmed = answers_and_replays(&app, post("/api/v1/payments/7/confirm", "")).await;
    assert_eq!(confirmed.text(), "7");
}

#[tokio::test]
async fn a_handler_is_a_fallback() {
    let app = Router::new().fallback(create).with_state(idem());
    answers_and_replays(&app, post("/anything", "a")).await;
    let app = Router::new().route("/", routing::get(create).fallback(create)).with_state(idem());
    answers_and_replays(&app, post("/", "a")).await;
}

async fn stamp(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert("stamp", HeaderValue::from_static("outside"));
    response
}

#[tokio::test]
async fn layers_lie_over_a_handler_its_method_router_and_its_router() {
    let layer = middleware::from_fn(stamp);
    let routers = [
        at("/", routing::post(create.layer(layer.clone()))),
        at("/", routing::post(create).layer(layer.clone())),
        at("/", routing::post(create).route_layer(layer.clone())),
        at("/", routing::post(create)).layer(layer),
    ];
    for app in routers {
        let first = answers_and_replays(&app, post("/", "a")).await;
        let replay = ask(&app, &post("/", "a")).await;
        assert!(first.headers.contains_key("stamp") && replay.headers.contains_key("stamp"));
    }
}

#[tokio::test]
async fn a_handler_is_bound_to_a_state_by_itself() {
    let service = create.with_state(idem());
    let app: Router = Router::new().route_service("/", service);
    answers_and_replays(&app, post("/", "a")).await;
    let app: Router = Router::new().route("/", routing::post(create).with_state(idem()));
    answers_and_replays(&app, post("/", "a")).await;
}

#[tokio::test]
async fn one_handler_on_two_routes_is_two_operations() {
    let app = Router::new()
        .route("/a", routing::post(create))
        .route("/b", routing::post(create))
        .with_state(idem());
    answers_and_replays(&app, post("/a", "x")).await;
    answers_and_replays(&app, post("/b", "y")).await;
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn slow(headers: HeaderMap) -> String {
    tokio::time::sleep(Duration::from_millis(1)).await;
    headers.len().to_string()
}

#[tokio::test]
async fn a_handler_can_be_spawned_onto_other_tasks() {
    let app = at("/", routing::post(slow));
    tokio::spawn(async move { answers_and_replays(&app, post("/", "a")).await }).await.unwrap();
}
