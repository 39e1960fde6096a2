//! The shapes of replays, admission, and what a handler says of its own response.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{FromRef, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use idem_runtime::{
    Idempotency, Mode, Operation, Outcome, RecordedResponse, RequestContext, Settle,
    State as RecordState, StoreOutage, Ttl, idempotent,
};
use serde_json::json;
use tests::{
    on_both_stores,
    server::{Effects, Server, send},
    stores::Bench,
};

on_both_stores! {
    a_replay_has_its_own_status_and_members_and_the_record_stays,
    a_body_that_is_no_object_is_replayed_as_it_is,
    a_function_shapes_a_replay,
    a_function_that_panics_has_its_replay_refused,
    a_replay_costs_no_admission,
    an_admission_that_panics_leaves_no_trace,
    whoever_is_denied_gets_that_response_and_leaves_no_trace,
    a_denied_rerun_keeps_its_operation,
    a_request_without_its_optional_key_is_admitted_too,
    what_idem_only_observes_is_admitted_too,
    a_handler_settles_its_response,
    a_handler_settles_for_how_long,
    a_later_attempt_that_forgets_keeps_the_operation,
}

#[derive(Clone)]
struct App {
    engine: Idempotency,
    effects: Effects,
    /// What is left of the budget.
    budget: Arc<Mutex<u32>>,
    attempts: Arc<Mutex<Vec<(String, u32)>>>,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

impl App {
    fn left(&self) -> u32 {
        *self.budget.lock().unwrap()
    }
}

#[idempotent(
    anchor = header("Idempotency-Key"),
    replay(status = 200, merge = { replayed: true, "id": 7 }),
)]
async fn shaped(State(app): State<App>, body: String) -> Response {
    app.effects.happen();
    let typed = [(header::CONTENT_TYPE, "application/json"), (header::ETAG, "\"1\"")];
    (StatusCode::CREATED, typed, body).into_response()
}

fn marked(response: http::Response<Bytes>) -> http::Response<Bytes> {
    let (mut head, body) = response.into_parts();
    head.headers.insert("x-shaped", "1".parse().unwrap());
    head.status = StatusCode::ACCEPTED;
    http::Response::from_parts(head, Bytes::from([b"again: ", body.as_ref()].concat()))
}

#[idempotent(anchor = header("Idempotency-Key"), replay = marked)]
async fn remade(State(app): State<App>, body: String) -> (StatusCode, String) {
    app.effects.happen();
    (StatusCode::CREATED, body)
}

/// Takes one from the budget for each request that would run.
async fn budget(request: RequestContext) -> Result<(), (StatusCode, HeaderMap, Json<u32>)> {
    let app = request.state::<App>().unwrap();
    let mut left = app.budget.lock().unwrap();
    if *left == 0 {
        let headers = HeaderMap::from_iter([(header::RETRY_AFTER, "77".parse().unwrap())]);
        return Err((StatusCode::TOO_MANY_REQUESTS, headers, Json(0)));
    }
    *left -= 1;
    Ok(())
}

async fn work(app: &App, operation: &Operation, body: &str) -> Response {
    app.attempts.lock().unwrap().push((operation.id().to_string(), operation.attempt()));
    app.effects.happen();
    let first = operation.attempt() == 1;
    match body {
        "once 500" if first => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "500, forgotten" if first => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "500, forgotten" => (Settle::forgotten(), "done").into_response(),
        "conflict, recorded" => {
            (StatusCode::CONFLICT, Settle::recorded(), body.to_owned()).into_response()
        }
        "error, recorded" => {
            (StatusCode::BAD_GATEWAY, Settle::recorded(), body.to_owned()).into_response()
        }
        "success, forgotten" => (Settle::forgotten(), "done").into_response(),
        "success, uncertain" => (Settle::uncertain(), "done").into_response(),
        "success, secret" => (Settle::tombstone(), "secret").into_response(),
        "short" => (Settle::for_time(Ttl::For(Duration::from_secs(60))), "done").into_response(),
        "long" => (Settle::recorded().ttl(Ttl::Forever), "done").into_response(),
        _ => (StatusCode::CREATED, body.to_owned()).into_response(),
    }
}

#[idempotent(anchor = header("Idempotency-Key"), admit = budget, optional)]
async fn limited(State(app): State<App>, operation: Operation, body: String) -> Response {
    work(&app, &operation, &body).await
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn settling(State(app): State<App>, operation: Operation, body: String) -> Response {
    work(&app, &operation, &body).await
}

fn panics(_: http::Response<Bytes>) -> http::Response<Bytes> {
    panic!("as told")
}

#[idempotent(anchor = header("Idempotency-Key"), replay = panics)]
async fn misshapen(State(app): State<App>, operation: Operation, body: String) -> Response {
    work(&app, &operation, &body).await
}

async fn never_admits(_: RequestContext) -> Result<(), StatusCode> {
    panic!("as told")
}

#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse, admit = never_admits)]
async fn inadmissible(State(app): State<App>, operation: Operation, body: String) -> Response {
    work(&app, &operation, &body).await
}

async fn start(bench: &Bench, mode: Mode) -> (Server, App) {
    let engine = bench.engine().mode(mode).store_outage(StoreOutage::Closed).build();
    let app = App {
        engine,
        effects: bench.effects.clone(),
        budget: Arc::new(Mutex::new(1)),
        attempts: Arc::default(),
    };
    let router = Router::new()
        .route("/shaped", post(shaped))
        .route("/remade", post(remade))
        .route("/misshapen", post(misshapen))
        .route("/limited", post(limited))
        .route("/inadmissible", post(inadmissible))
        .route("/settling", post(settling))
        .with_state(app.clone());
    (Server::start(router).await, app)
}

async fn a_replay_has_its_own_status_and_members_and_the_record_stays(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    let body = r#"{ "id" : 1, "amount": 0.10, "z":1e2 }"#;
    send(server.post("/shaped", "k", body)).await.assert_is(201, body, false);
    let recorded = bench.store.last_record().await.unwrap();
    for _ in 0..2 {
        let replay = send(server.post("/shaped", "k", body)).await;
        assert_eq!((replay.status, replay.is_replay()), (200, true));
        assert_eq!(replay.json(), json!({ "id": 7, "amount": 0.10, "z": 1e2, "replayed": true }));
        assert!(replay.text().contains("0.10"), "numbers stay as they were: {}", replay.text());
        assert_eq!(replay.header("etag"), Some("\"1\""));
        let length = replay.header("content-length").map(str::to_owned);
        assert!(length.is_none_or(|length| length == replay.body.len().to_string()));
    }
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(record.payload, recorded.payload);
    let response = RecordedResponse::decode(&record.payload).unwrap();
    assert_eq!((response.status, response.body.as_ref()), (201, body.as_bytes()));
    assert_eq!(bench.effects.count(), 1);
}

async fn a_body_that_is_no_object_is_replayed_as_it_is(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    for (key, body) in ["[1]", "7", "null", "", "{", "no json", r#"{"a":1,"a":2}"#, "{} {}"]
        .into_iter()
        .enumerate()
    {
        let key = key.to_string();
        send(server.post("/shaped", &key, body)).await.assert_is(201, body, false);
        let replay = send(server.post("/shaped", &key, body)).await;
        assert_eq!((replay.status, replay.is_replay()), (200, true), "{body}");
        assert!(body.starts_with("{\"a\"") || replay.text() == body, "{body}: {}", replay.text());
    }
    send(server.post("/shaped", "empty", "{}")).await.assert_is(201, "{}", false);
    let replay = send(server.post("/shaped", "empty", "{}")).await;
    assert_eq!(replay.json(), json!({ "replayed": true, "id": 7 }));
}

async fn a_function_shapes_a_replay(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    send(server.post("/remade", "k", "body")).await.assert_is(201, "body", false);
    for _ in 0..2 {
        let replay = send(server.post("/remade", "k", "body")).await;
        replay.assert_is(202, "again: body", true);
        assert_eq!(replay.header("x-shaped"), Some("1"));
    }
    send(server.post("/remade", "k", "other")).await.assert_refused(422, "mismatch");
}

async fn a_replay_costs_no_admission(bench: Bench) {
    let (server, app) = start(&bench, Mode::Enforce).await;
    send(server.post("/limited", "k", "a")).await.assert_is(201, "a", false);
    assert_eq!(app.left(), 0);
    for _ in 0..3 {
        send(server.post("/limited", "k", "a")).await.assert_is(201, "a", true);
        send(server.post("/limited", "k", "b")).await.assert_refused(422, "mismatch");
    }
    *app.budget.lock().unwrap() = 5;
    send(server.post("/limited", "k", "a")).await.assert_is(201, "a", true);
    send(server.post("/limited", "k", "b")).await.assert_refused(422, "mismatch");
    assert_eq!((app.left(), bench.effects.count()), (5, 1));
}

async fn a_function_that_panics_has_its_replay_refused(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    send(server.post("/misshapen", "k", "a")).await.assert_is(201, "a", false);
    for _ in 0..2 {
        send(server.post("/misshapen", "k", "a")).await.assert_refused(503, "record_unreadable");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn an_admission_that_panics_leaves_no_trace(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    for _ in 0..2 {
        send(server.post("/inadmissible", "k", "a")).await.assert_refused(500, "handler_panicked");
        assert_eq!(bench.store.last_record().await, None);
    }
    assert_eq!(bench.effects.count(), 0);
}

async fn whoever_is_denied_gets_that_response_and_leaves_no_trace(bench: Bench) {
    let (server, app) = start(&bench, Mode::Enforce).await;
    *app.budget.lock().unwrap() = 0;
    let denied = send(server.post("/limited", "k", "a")).await;
    denied.assert_is(429, "0", false);
    assert_eq!(denied.header("retry-after"), Some("77"));
    assert_eq!(bench.store.last_record().await, None);
    assert_eq!((bench.effects.count(), bench.told.outcomes()), (0, vec![Outcome::Forgotten]));
    *app.budget.lock().unwrap() = 1;
    send(server.post("/limited", "k", "another")).await.assert_is(201, "another", false);
}

async fn a_denied_rerun_keeps_its_operation(bench: Bench) {
    let (server, app) = start(&bench, Mode::Enforce).await;
    assert_eq!(send(server.post("/limited", "k", "once 500")).await.status, 500);
    assert_eq!(send(server.post("/limited", "k", "once 500")).await.status, 429);
    assert_eq!(bench.store.last_record().await.unwrap().state, RecordState::Released);
    send(server.post("/limited", "k", "other")).await.assert_refused(422, "mismatch");
    *app.budget.lock().unwrap() = 1;
    assert_eq!(send(server.post("/limited", "k", "once 500")).await.status, 201);
    let attempts = app.attempts.lock().unwrap().clone();
    assert_eq!(attempts[0].0, attempts[1].0);
    assert_eq!((attempts[0].1, attempts[1].1), (1, 3));
}

async fn a_request_without_its_optional_key_is_admitted_too(bench: Bench) {
    let (server, app) = start(&bench, Mode::Enforce).await;
    send(server.post_without_key("/limited", "a")).await.assert_is(201, "a", false);
    assert_eq!(app.left(), 0);
    send(server.post_without_key("/limited", "a")).await.assert_is(429, "0", false);
    assert_eq!(bench.effects.count(), 1);
    assert_eq!(bench.store.claims().len(), 0);
}

async fn what_idem_only_observes_is_admitted_too(bench: Bench) {
    let (server, app) = start(&bench, Mode::Observe).await;
    *app.budget.lock().unwrap() = 3;
    for _ in 0..3 {
        send(server.post("/limited", "k", "a")).await.assert_is(201, "a", false);
    }
    for body in ["a", "b"] {
        send(server.post("/limited", "k", body)).await.assert_is(429, "0", false);
    }
    assert_eq!(bench.effects.count(), 3);
}

async fn a_handler_settles_its_response(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    for (body, status) in [("conflict, recorded", 409), ("error, recorded", 502)] {
        send(server.post("/settling", body, body)).await.assert_is(status, body, false);
        send(server.post("/settling", body, body)).await.assert_is(status, body, true);
    }
    assert_eq!(bench.effects.count(), 2);
    send(server.post("/settling", "f", "success, forgotten")).await.assert_is(200, "done", false);
    assert_eq!(bench.store.last_record().await, None);
    send(server.post("/settling", "u", "success, uncertain")).await.assert_is(200, "done", false);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!((record.state, record.payload.len()), (RecordState::Released, 0));
    send(server.post("/settling", "u", "success, uncertain")).await.assert_is(200, "done", false);
    let again = bench.store.last_record().await.unwrap();
    assert_eq!((again.operation_id, again.attempt), (record.operation_id, 2));
    send(server.post("/settling", "t", "success, secret")).await.assert_is(200, "secret", false);
    let record = bench.store.last_record().await.unwrap();
    assert!(!record.payload.windows(6).any(|bytes| bytes == b"secret"));
    send(server.post("/settling", "t", "success, secret"))
        .await
        .assert_refused(410, "not_replayable");
    send(server.post("/settling", "t", "other")).await.assert_refused(422, "mismatch");
}

async fn a_handler_settles_for_how_long(bench: Bench) {
    let (server, _) = start(&bench, Mode::Enforce).await;
    send(server.post("/settling", "s", "short")).await.assert_is(200, "done", false);
    send(server.post("/settling", "l", "long")).await.assert_is(200, "done", false);
    bench.pass(Duration::from_millis(59_999));
    send(server.post("/settling", "s", "short")).await.assert_is(200, "done", true);
    bench.pass(Duration::from_millis(1));
    send(server.post("/settling", "s", "short")).await.assert_is(200, "done", false);
    bench.pass(Duration::from_secs(10 * 365 * 24 * 60 * 60));
    send(server.post("/settling", "l", "long")).await.assert_is(200, "done", true);
}

async fn a_later_attempt_that_forgets_keeps_the_operation(bench: Bench) {
    let (server, app) = start(&bench, Mode::Enforce).await;
    assert_eq!(send(server.post("/settling", "k", "500, forgotten")).await.status, 500);
    for _ in 0..2 {
        let answer = send(server.post("/settling", "k", "500, forgotten")).await;
        answer.assert_is(200, "done", false);
        assert_eq!(bench.store.last_record().await.unwrap().state, RecordState::Released);
    }
    send(server.post("/settling", "k", "other")).await.assert_refused(422, "mismatch");
    let attempts = app.attempts.lock().unwrap().clone();
    assert!(attempts.iter().all(|(id, _)| *id == attempts[0].0));
    assert_eq!(attempts.iter().map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [1, 2, 3]);
}
