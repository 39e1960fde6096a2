//! What applications see and say: modes, observation, the shape of refusals, who may ask.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, FromRequestParts},
    middleware::{self, Next},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, request::Parts};
use idem_runtime::{
    Anchor, Handled, Idempotency, IdempotentExt, Mode, Outcome, Policy, Recording, Refusal,
    RefusalKind, State as RecordState, idempotent,
};
use serde_json::json;
use tests::{
    on_both_stores,
    server::{Effects, Gate, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    an_engine_that_observes_runs_everything_and_tells_what_it_would_have_done,
    an_engine_that_observes_lets_every_body_through,
    an_engine_that_observes_leaves_panics_to_the_server,
    what_was_observed_protects_once_it_is_enforced,
    an_engine_that_is_off_asks_nothing,
    a_handlers_mode_wins_over_the_engines,
    a_response_carries_what_became_of_its_request,
    a_refusal_is_a_problem_document,
    a_documented_api_is_linked_from_every_refusal,
    an_application_gives_refusals_its_own_shape,
    a_handlers_own_refusals_win_over_the_engines,
    who_may_not_call_any_more_gets_no_replay,
    what_a_layer_refuses_never_reaches_the_store,
    a_layers_changes_to_a_replay_are_the_layers_own,
    a_handler_that_goes_on_alone_keeps_what_was_carried_along,
    an_event_names_operation_and_attempt,
}

async fn an_engine_that_observes_runs_everything_and_tells_what_it_would_have_done(bench: Bench) {
    let gate = Gate::default();
    let engine = bench.engine().mode(Mode::Observe);
    let server = bench.serve_with(engine, KEY, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    for _ in 0..6 {
        gate.end();
    }
    first.await.unwrap().assert_is(200, "effect 1", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 2", false);
    send(server.post("/", "k", "200")).await.assert_is(200, "effect 3", false);
    send(server.post_without_key("/", "100")).await.assert_is(200, "effect 4", false);
    send(server.post("/", "\"", "100")).await.assert_is(200, "effect 5", false);
    let nobodys = server.request(reqwest::Method::POST, "/").header("idempotency-key", "k");
    send(nobodys).await.assert_is(200, "effect 6", false);
    let would_have = [
        Outcome::Replayed,
        Outcome::Refused(RefusalKind::Mismatch),
        Outcome::Refused(RefusalKind::KeyMissing),
        Outcome::Refused(RefusalKind::KeyMalformed),
        Outcome::Refused(RefusalKind::ScopeMissing),
    ];
    assert_eq!(bench.told.unenforced(), would_have);
    assert_eq!(bench.told.outcomes()[0], Outcome::Recorded);
}

async fn an_engine_that_observes_lets_every_body_through(bench: Bench) {
    let effects = bench.effects.clone();
    let handler = async move |body: Bytes| format!("{} {}", effects.happen(), body.len());
    let engine = bench.engine().mode(Mode::Observe).request_body_limit(10);
    let server = bench.serve_with(engine, KEY, handler).await;
    send(server.post("/", "k", &"x".repeat(1_000))).await.assert_is(200, "1 1000", false);
    send(server.post("/", "k", "x")).await.assert_is(200, "2 1", false);
    send(server.post("/", "k", &"x".repeat(1_000))).await.assert_is(200, "3 1000", false);
    send(server.post("/", "k", "y")).await.assert_is(200, "4 1", false);
    let unenforced = [
        Outcome::Refused(RefusalKind::BodyTooLarge),
        Outcome::Refused(RefusalKind::BodyTooLarge),
        Outcome::Refused(RefusalKind::Mismatch),
    ];
    assert_eq!(bench.told.unenforced(), unenforced);
}

async fn an_engine_that_observes_leaves_panics_to_the_server(bench: Bench) {
    let effects = bench.effects.clone();
    let handler = async move || match effects.happen() {
        1 => panic!("as told"),
        number => number.to_string(),
    };
    let engine = bench.engine().mode(Mode::Observe);
    let server = bench.serve_with(engine, KEY, handler).await;
    assert!(server.post("/", "k", "").send().await.is_err());
    assert_eq!(bench.told.outcomes(), [Outcome::Released]);
    send(server.post("/", "k", "")).await.assert_is(200, "2", false);
    assert_eq!(bench.store.last_record().await.unwrap().attempt, 2);
}

async fn what_was_observed_protects_once_it_is_enforced(bench: Bench) {
    let engine = bench.engine().mode(Mode::Observe);
    let observing = bench.serve_with(engine, KEY, bench.numbered()).await;
    let enforcing = bench.serve(KEY, bench.numbered()).await;
    send(observing.post("/", "k", "100")).await.assert_is(200, "effect 1", false);
    send(enforcing.post("/", "k", "100")).await.assert_is(200, "effect 1", true);
    send(enforcing.post("/", "k", "200")).await.assert_refused(422, "mismatch");
    assert_eq!(bench.effects.count(), 1);
}

async fn an_engine_that_is_off_asks_nothing(bench: Bench) {
    let engine = bench.engine().mode(Mode::Off).request_body_limit(1);
    let server = bench.serve_with(engine, KEY, bench.numbered()).await;
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 2", false);
    send(server.post_without_key("/", "100")).await.assert_is(200, "effect 3", false);
    assert_eq!((bench.store.claims().len(), bench.told.outcomes()), (0, Vec::new()));
}

async fn a_handlers_mode_wins_over_the_engines(bench: Bench) {
    let engine = bench.engine().mode(Mode::Off);
    let policy = Policy::new(KEY).mode(Mode::Enforce);
    let server = bench.serve_with(engine, policy, bench.numbered()).await;
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", false);
    send(server.post("/", "k", "")).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

/// A layer that shows what became of a request in headers.
async fn show(mut response: Response) -> Response {
    if let Some(handled) = response.extensions().get::<Handled>().copied() {
        let shown = HeaderValue::from_static(handled.outcome.name());
        response.headers_mut().insert("x-outcome", shown);
        if let Some(id) = handled.operation_id {
            let shown = HeaderValue::from_str(&id.to_string()).unwrap();
            response.headers_mut().insert("x-operation", shown);
        }
    }
    response
}

async fn a_response_carries_what_became_of_its_request(bench: Bench) {
    let handler = async |body: String| match body.as_str() {
        "good" => (StatusCode::OK, "x".repeat(10)),
        "large" => (StatusCode::OK, "x".repeat(11)),
        "bad" => (StatusCode::BAD_REQUEST, String::new()),
        "panic" => panic!("as told"),
        _ => (StatusCode::BAD_GATEWAY, String::new()),
    };
    let routes = Router::new()
        .route("/", post(handler.idempotent(KEY.optional())))
        .layer(middleware::map_response(show))
        .with_state(bench.engine().response_body_limit(10).build());
    let server = Server::start(routes).await;
    let outcome = async |request| {
        let answer = send(request).await;
        let [outcome, operation] = ["x-outcome", "x-operation"].map(|name| answer.header(name));
        (outcome.unwrap_or_default().to_owned(), operation.map(str::to_owned))
    };
    for (key, body, expected) in [
        ("1", "good", "recorded"),
        ("1", "good", "replayed"),
        ("1", "bad", "mismatch"),
        ("2", "large", "tombstoned"),
        ("2", "large", "not_replayable"),
        ("3", "uncertain", "released"),
        ("4", "panic", "released"),
    ] {
        let (outcome, operation) = outcome(server.post("/", key, body)).await;
        let id = bench.store.last_record().await.unwrap().operation_id.to_string();
        assert_eq!((outcome.as_str(), operation), (expected, Some(id)), "{key} {body}");
    }
    assert_eq!(outcome(server.post("/", "5", "bad")).await.0, "forgotten");
    assert_eq!(outcome(server.post("/", "\"", "")).await, ("key_malformed".into(), None));
    assert_eq!(outcome(server.post_without_key("/", "")).await, ("unprotected".into(), None));
}

async fn a_refusal_is_a_problem_document(bench: Bench) {
    let server = bench.serve(KEY, bench.numbered()).await;
    let refused = send(server.post_without_key("/", "100")).await;
    assert_eq!(
        refused.json(),
        json!({
            "type": "about:blank",
            "title": "The idempotency key is missing",
            "status": 400,
            "detail": "Idempotency-Key is missing. Send the key that this operation documents.",
            "code": "key_missing",
        })
    );
    assert_eq!(refused.header("link"), None);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", false);
    let refused = send(server.post("/", "k", "200")).await;
    let id = bench.store.last_record().await.unwrap().operation_id;
    assert_eq!(
        refused.json(),
        json!({
            "type": "about:blank",
            "title": "The idempotency key was used with another request",
            "status": 422,
            "detail": "Repeat the original request exactly, or use a new key.",
            "code": "mismatch",
            "operation_id": id.to_string(),
        })
    );
    assert_eq!(bench.effects.count(), 1);
}

async fn a_documented_api_is_linked_from_every_refusal(bench: Bench) {
    let engine = bench.engine().documentation("https://example.com/idempotency");
    let server = bench.serve_with(engine, KEY, bench.numbered()).await;
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", false);
    for refused in [server.post_without_key("/", ""), server.post("/", "k", "200")] {
        let refused = send(refused).await;
        assert_eq!(refused.json()["type"], "https://example.com/idempotency");
        let link = r#"<https://example.com/idempotency>; rel="describedby"; type="text/html""#;
        assert_eq!(refused.header("link"), Some(link));
    }
    assert_eq!(bench.effects.count(), 1);
}

fn teapots(refusal: &Refusal) -> http::Response<Bytes> {
    refusal.json(StatusCode::IM_A_TEAPOT, &json!({ "reason": refusal.kind().code() }))
}

fn in_words(refusal: &Refusal) -> http::Response<Bytes> {
    match refusal.kind() {
        RefusalKind::Mismatch => http::Response::new(Bytes::from_static(b"another request")),
        _ => refusal.problem(),
    }
}

async fn an_application_gives_refusals_its_own_shape(bench: Bench) {
    let gate = Gate::default();
    let engine = bench.engine().refusals(teapots);
    let server = bench.serve_with(engine, KEY, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    let refused = send(server.post("/", "k", "100")).await;
    refused.assert_is(418, r#"{"reason":"in_flight"}"#, false);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.header("content-type"), Some("application/json"));
    gate.end();
    first.await.unwrap().assert_is(200, "effect 1", false);
    let refused = send(server.post("/", "k", "200")).await;
    refused.assert_is(418, r#"{"reason":"mismatch"}"#, false);
    assert_eq!(refused.header("retry-after"), None);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_handlers_own_refusals_win_over_the_engines(bench: Bench) {
    let engine = bench.engine().refusals(teapots);
    let policy = Policy::new(KEY).refusals(&in_words);
    let server = bench.serve_with(engine, policy, bench.numbered()).await;
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", false);
    send(server.post("/", "k", "200")).await.assert_is(200, "another request", false);
    send(server.post_without_key("/", "")).await.assert_refused(400, "key_missing");
    assert_eq!(bench.effects.count(), 1);
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

/// An extractor that turns away whom it does not know.
struct Staff;

impl<S: Sync> FromRequestParts<S> for Staff {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        match parts.headers.get("x-staff") {
            Some(name) if name == "yes" => Ok(Self),
            _ => Err(StatusCode::FORBIDDEN),
        }
    }
}

#[idempotent(anchor = header("Idempotency-Key"), record = all)]
async fn pay(
    _: Staff,
    axum::extract::State(effects): axum::extract::State<Effects>,
    _body: String,
) -> String {
    effects.happen().to_string()
}

#[idempotent(anchor = arg(body), record = all)]
async fn pay_by_body(
    _: Staff,
    axum::extract::State(effects): axum::extract::State<Effects>,
    body: String,
) -> String {
    format!("{} {body}", effects.happen())
}

async fn who_may_not_call_any_more_gets_no_replay(bench: Bench) {
    let state = App { engine: bench.engine().build(), effects: bench.effects.clone() };
    let routes = Router::new().route("/", post(pay)).route("/by-body", post(pay_by_body));
    let server = Server::start(routes.with_state(state)).await;
    for (path, answers) in [("/", ["1", "2"]), ("/by-body", ["3 a", "4 b"])] {
        let by = |staff: &str, body: &str| {
            server.post(path, body, body).header("x-staff", staff.to_owned())
        };
        assert_eq!(send(by("no", "a")).await.status, 403);
        send(by("yes", "a")).await.assert_is(200, answers[0], false);
        let claims = bench.store.claims().len();
        send(by("no", "a")).await.assert_is(403, "", false);
        assert_eq!(bench.store.claims().len(), claims);
        send(by("yes", "a")).await.assert_is(200, answers[0], true);
        send(by("yes", "b")).await.assert_is(200, answers[1], false);
    }
    assert_eq!(bench.effects.count(), 4);
}

async fn what_a_layer_refuses_never_reaches_the_store(bench: Bench) {
    let authenticate = async |request: axum::extract::Request, next: Next| match request
        .headers()
        .contains_key("x-staff")
    {
        true => Ok(next.run(request).await),
        false => Err(StatusCode::UNAUTHORIZED),
    };
    let routes = Router::new()
        .route("/", post(bench.numbered().idempotent(Policy::new(KEY).record(Recording::All))))
        .layer(middleware::from_fn(authenticate))
        .with_state(bench.engine().build());
    let server = Server::start(routes).await;
    assert_eq!(send(server.post("/", "k", "")).await.status, 401);
    assert_eq!(bench.store.claims().len(), 0);
    let staff = || server.post("/", "k", "").header("x-staff", "yes");
    send(staff()).await.assert_is(200, "effect 1", false);
    send(server.post("/", "k", "")).await.assert_is(401, "", false);
    send(staff()).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_layers_changes_to_a_replay_are_the_layers_own(bench: Bench) {
    let requests = Effects::default();
    let number = move |mut response: Response| {
        let number = HeaderValue::from(requests.happen());
        response.headers_mut().insert("x-request-id", number);
        std::future::ready(response)
    };
    let routes = Router::new()
        .route("/", post(bench.numbered().idempotent(KEY)))
        .layer(middleware::map_response(number))
        .with_state(bench.engine().build());
    let server = Server::start(routes).await;
    for request in 1..=3 {
        let answer = send(server.post("/", "k", "")).await;
        answer.assert_is(200, "effect 1", request > 1);
        assert_eq!(answer.header("x-request-id"), Some(request.to_string().as_str()));
    }
}

tokio::task_local! { static REQUEST: u32; }

async fn a_handler_that_goes_on_alone_keeps_what_was_carried_along(bench: Bench) {
    let (gate, seen) = (Gate::default(), Arc::new(Mutex::new(Vec::new())));
    let handler = {
        let (gate, seen) = (gate.clone(), Arc::clone(&seen));
        async move || {
            seen.lock().unwrap().push(REQUEST.try_with(|request| *request).ok());
            gate.pass().await;
            seen.lock().unwrap().push(REQUEST.try_with(|request| *request).ok());
        }
    };
    let engine = bench.engine().carry(|handler| match REQUEST.try_with(|request| *request) {
        Ok(request) => Box::pin(REQUEST.scope(request, handler)),
        Err(_) => handler,
    });
    let within = async |request, next: Next| REQUEST.scope(7, next.run(request)).await;
    let routes = Router::new()
        .route("/", post(handler.idempotent(KEY)))
        .layer(middleware::from_fn(within))
        .with_state(engine.build());
    let server = Server::start(routes).await;
    let client = tokio::spawn(send(server.post("/", "k", "")));
    gate.begun().await;
    client.abort();
    bench.told.hear(Outcome::Detached).await;
    gate.end();
    bench.told.hear(Outcome::Recorded).await;
    assert_eq!(*seen.lock().unwrap(), [Some(7), Some(7)]);
    send(server.post("/", "k", "")).await.assert_is(200, "", true);
    assert_eq!(seen.lock().unwrap().len(), 2);
}

async fn an_event_names_operation_and_attempt(bench: Bench) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let engine = bench.engine().observer({
        let told = Arc::clone(&told);
        move |event: &idem_runtime::Event<'_>| {
            let event = (event.outcome.name(), event.operation.to_owned(), event.attempt);
            told.lock().unwrap().push(event);
        }
    });
    let effects = bench.effects.clone();
    let handler = async move || match effects.happen() {
        1 => StatusCode::BAD_GATEWAY,
        _ => StatusCode::OK,
    };
    let routes = Router::new().route("/orders/{id}", post(handler.idempotent(KEY)));
    let server = Server::start(routes.with_state(engine.build())).await;
    for _ in 0..3 {
        send(server.post("/orders/7", "k", "")).await;
    }
    send(server.post("/orders/7", "", "")).await;
    let operation = "POST /orders/{id}".to_owned();
    let expected = [
        ("released", operation.clone(), Some(1)),
        ("recorded", operation.clone(), Some(2)),
        ("replayed", operation.clone(), None),
        ("key_malformed", operation, None),
    ];
    assert_eq!(*told.lock().unwrap(), expected);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!((record.state, record.attempt), (RecordState::Completed, 2));
    assert_eq!(record.age, Duration::ZERO);
}
