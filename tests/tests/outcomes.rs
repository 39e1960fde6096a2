//! What becomes of an answer: recorded, forgotten, released; and what the handler knows of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{FromRef, Path, State},
    http::StatusCode,
    routing::post,
};
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, OnUnknown, Operation, Outcome, Policy, Recording,
    RefusalKind, State as RecordState, Token, idempotent,
    store::{Claimed, Store},
};
use serde::Deserialize;
use tests::{
    on_both_stores,
    server::{Effects, Gate, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    each_status_is_recorded_forgotten_or_released_as_the_policy_says,
    after_a_client_error_a_corrected_body_runs_under_the_same_key,
    after_a_server_error_the_same_request_runs_again_as_the_same_operation,
    after_a_panic_the_same_request_runs_again_as_the_same_operation,
    an_interim_answer_is_never_replayed,
    a_released_key_is_free_after_its_time_to_live,
    a_released_key_that_must_not_rerun_is_refused,
    an_attempt_that_died_frees_its_key_when_its_lease_is_over,
    an_attempt_whose_lease_is_over_can_still_end_unless_another_has_begun,
    what_the_last_extractor_turns_away_leaves_no_trace,
    what_an_extractor_before_it_turns_away_claims_nothing,
    a_server_error_of_an_extractor_leaves_no_trace,
    derived_keys_stay_the_same_through_every_attempt,
    an_unprotected_handler_has_an_operation_of_its_own,
    an_operation_that_an_extractor_took_is_the_handlers,
}

/// Answers with the status that the path says, and counts.
async fn answer_with(Path(status): Path<u16>, State(app): State<App>) -> (StatusCode, String) {
    let number = app.effects.happen();
    (StatusCode::from_u16(status).unwrap(), number.to_string())
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

fn app(bench: &Bench) -> App {
    App { engine: bench.engine().build(), effects: bench.effects.clone() }
}

async fn each_status_is_recorded_forgotten_or_released_as_the_policy_says(bench: Bench) {
    use Outcome::{Forgotten, Recorded, Released};
    let statuses = [
        200, 201, 202, 204, 206, 299, 300, 301, 303, 304, 307, 308, 400, 401, 402, 403, 404, 405,
        408, 409, 410, 412, 413, 415, 418, 422, 423, 425, 428, 429, 451, 499, 500, 501, 502, 503,
        504, 507, 511, 599,
    ];
    let trying_again_may_help = [401, 403, 425, 429];
    let expected = |recording, status: u16| match (recording, status) {
        (Recording::All, _) | (_, 200..400) => Recorded,
        (_, 408 | 500..) => Released,
        (Recording::Final, _) if !trying_again_may_help.contains(&status) => Recorded,
        _ => Forgotten,
    };
    let route = |recording| {
        let policy = Policy::new(KEY).record(recording);
        post(answer_with.idempotent(policy))
    };
    let routes = Router::new()
        .route("/success/{status}", route(Recording::Success))
        .route("/final/{status}", route(Recording::Final))
        .route("/all/{status}", route(Recording::All));
    let server = Server::start(routes.with_state(app(&bench))).await;
    let mut ran = 0;
    for (name, recording) in
        [("success", Recording::Success), ("final", Recording::Final), ("all", Recording::All)]
    {
        for status in statuses {
            let path = format!("/{name}/{status}");
            let first = send(server.post(&path, "k", "")).await;
            assert_eq!((first.status, first.is_replay()), (status, false), "{path}");
            let outcome = *bench.told.outcomes().last().unwrap();
            assert_eq!(outcome, expected(recording, status), "{path}");
            ran += 1;
            let retry = send(server.post(&path, "k", "")).await;
            let replay = outcome == Recorded;
            ran += usize::from(!replay);
            assert_eq!((retry.status, retry.is_replay()), (status, replay), "{path}");
            assert_eq!(retry.body == first.body, replay || first.body.is_empty(), "{path}");
            assert_eq!(bench.effects.count(), ran, "{path}");
            let other = send(server.post(&path, "k", "other")).await;
            match outcome {
                Forgotten => ran += 1,
                _ => other.assert_refused(422, "mismatch"),
            }
            assert_eq!(bench.effects.count(), ran, "{path}");
        }
    }
}

/// What a handler saw of each of its runs.
type Runs = Arc<Mutex<Vec<Operation>>>;

/// A handler that remembers its operations and does with a body what it says.
fn as_told(runs: &Runs) -> impl Fn(Operation, String) -> Answer + Clone + Send + Sync + use<> {
    let runs = Arc::clone(runs);
    move |operation, body| {
        let runs = Arc::clone(&runs);
        Box::pin(async move {
            let number = {
                let mut runs = runs.lock().unwrap();
                runs.push(operation);
                runs.len()
            };
            match body.as_str() {
                "panic" if number == 1 => panic!("as told"),
                "once 500" if number == 1 => StatusCode::INTERNAL_SERVER_ERROR,
                "once 408" if number == 1 => StatusCode::REQUEST_TIMEOUT,
                "bad" => StatusCode::BAD_REQUEST,
                _ => StatusCode::CREATED,
            }
        })
    }
}

type Answer = std::pin::Pin<Box<dyn Future<Output = StatusCode> + Send>>;

fn ids(runs: &Runs) -> Vec<String> {
    runs.lock().unwrap().iter().map(|operation| operation.id().to_string()).collect()
}

fn attempts(runs: &Runs) -> Vec<u32> {
    runs.lock().unwrap().iter().map(Operation::attempt).collect()
}

async fn after_a_client_error_a_corrected_body_runs_under_the_same_key(bench: Bench) {
    let runs = Runs::default();
    let server = bench.serve(KEY, as_told(&runs)).await;
    assert_eq!(send(server.post("/", "k", "bad")).await.status, 400);
    assert_eq!(bench.store.last_record().await, None);
    send(server.post("/", "k", "good")).await.assert_is(201, "", false);
    send(server.post("/", "k", "good")).await.assert_is(201, "", true);
    assert_eq!(attempts(&runs), [1, 1]);
    assert_ne!(ids(&runs)[0], ids(&runs)[1]);
    assert_eq!(bench.told.outcomes(), [Outcome::Forgotten, Outcome::Recorded, Outcome::Replayed]);
}

async fn reruns_as_the_same_operation(bench: Bench, body: &str, first: u16) {
    let runs = Runs::default();
    let server = bench.serve(KEY, as_told(&runs)).await;
    assert_eq!(send(server.post("/", "k", body)).await.status, first);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!((record.state, record.attempt), (RecordState::Released, 1));
    send(server.post("/", "k", "another body")).await.assert_refused(422, "mismatch");
    send(server.post("/", "k", body)).await.assert_is(201, "", false);
    send(server.post("/", "k", body)).await.assert_is(201, "", true);
    assert_eq!(attempts(&runs), [1, 2]);
    assert_eq!(ids(&runs)[0], ids(&runs)[1]);
    assert_eq!(ids(&runs)[0], record.operation_id.to_string());
    let refused = Outcome::Refused(RefusalKind::Mismatch);
    let told = [Outcome::Released, refused, Outcome::Recorded, Outcome::Replayed];
    assert_eq!(bench.told.outcomes(), told);
}

async fn after_a_server_error_the_same_request_runs_again_as_the_same_operation(bench: Bench) {
    reruns_as_the_same_operation(bench.clone(), "once 500", 500).await;
}

async fn after_a_panic_the_same_request_runs_again_as_the_same_operation(bench: Bench) {
    reruns_as_the_same_operation(bench.clone(), "panic", 500).await;
}

async fn an_interim_answer_is_never_replayed(bench: Bench) {
    for recording in [Recording::Success, Recording::Final, Recording::All] {
        let bench = bench.anew();
        let effects = bench.effects.clone();
        let handler = async move || {
            effects.happen();
            StatusCode::SWITCHING_PROTOCOLS
        };
        let server = bench.serve(Policy::new(KEY).record(recording), handler).await;
        let request = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-api-key: a\r\n\
            idempotency-key: k\r\ncontent-length: 0\r\n\r\n";
        for attempt in 1..=2 {
            server.send_raw(request.as_bytes()).await;
            assert_eq!((bench.effects.count(), bench.told.outcomes().len()), (attempt, attempt));
        }
        assert_eq!(bench.told.outcomes(), [Outcome::Released; 2]);
    }
}

async fn a_released_key_is_free_after_its_time_to_live(bench: Bench) {
    let runs = Runs::default();
    let server = bench.serve(KEY.ttl(Duration::from_secs(60)), as_told(&runs)).await;
    assert_eq!(send(server.post("/", "k", "once 408")).await.status, 408);
    bench.pass(Duration::from_secs(60) - Duration::from_millis(1));
    send(server.post("/", "k", "another body")).await.assert_refused(422, "mismatch");
    bench.pass(Duration::from_millis(1));
    send(server.post("/", "k", "another body")).await.assert_is(201, "", false);
    assert_eq!(attempts(&runs), [1, 1]);
    assert_ne!(ids(&runs)[0], ids(&runs)[1]);
}

async fn a_released_key_that_must_not_rerun_is_refused(bench: Bench) {
    let runs = Runs::default();
    let policy = Policy::new(KEY).on_unknown(OnUnknown::Refuse);
    let server = bench.serve(policy, as_told(&runs)).await;
    assert_eq!(send(server.post("/", "k", "once 500")).await.status, 500);
    for _ in 0..2 {
        let refused = send(server.post("/", "k", "once 500")).await;
        refused.assert_refused(409, "unknown_outcome");
        assert_eq!(refused.json()["operation_id"], ids(&runs)[0]);
        assert_eq!(refused.header("retry-after"), None);
    }
    send(server.post("/", "k", "another body")).await.assert_refused(422, "mismatch");
    assert_eq!(attempts(&runs), [1]);
}

/// Claims a key as a process that then dies.
async fn die(bench: &Bench, server: &Server, body: &str) -> idem_runtime::store::Claim {
    assert_eq!(send(server.post("/", "k", "bad")).await.status, 400);
    let bad = bench.store.last_claim();
    send(server.post("/", "other", body)).await.assert_is(201, "", false);
    let fingerprint = bench.store.last_claim().fingerprint;
    let claim = idem_runtime::store::Claim { token: Token::random(), fingerprint, ..bad };
    assert!(matches!(bench.store.claim(&claim).await.unwrap(), Claimed::Granted(_)));
    claim
}

async fn an_attempt_that_died_frees_its_key_when_its_lease_is_over(bench: Bench) {
    let runs = Runs::default();
    let server = bench.serve(KEY, as_told(&runs)).await;
    let dead = die(&bench, &server, "100").await;
    bench.pass(Duration::from_millis(29_999));
    send(server.post("/", "k", "100")).await.assert_refused(409, "in_flight");
    assert_eq!(runs.lock().unwrap().len(), 2);
    bench.pass(Duration::from_millis(1));
    send(server.post("/", "k", "200")).await.assert_refused(422, "mismatch");
    send(server.post("/", "k", "100")).await.assert_is(201, "", false);
    send(server.post("/", "k", "100")).await.assert_is(201, "", true);
    assert_eq!(attempts(&runs), [1, 1, 2]);
    assert_eq!(ids(&runs)[2], dead.operation_id.to_string());
}

async fn an_attempt_whose_lease_is_over_can_still_end_unless_another_has_begun(bench: Bench) {
    let gate = Gate::default();
    let policy = Policy::new(KEY).on_unknown(OnUnknown::Refuse);
    let server = bench.serve(policy, gate.handler(&bench.effects)).await;
    let first = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    send(server.post("/", "k", "100")).await.assert_refused(409, "in_flight");
    bench.pass(Duration::from_secs(30));
    send(server.post("/", "k", "100")).await.assert_refused(409, "unknown_outcome");
    send(server.post("/", "k", "200")).await.assert_refused(422, "mismatch");
    gate.end();
    first.await.unwrap().assert_is(200, "effect 1", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

#[derive(Deserialize)]
struct Payment {
    amount: u32,
}

#[idempotent(anchor = header("Idempotency-Key"), record = all)]
async fn pay(State(effects): State<Effects>, Json(payment): Json<Payment>) -> String {
    format!("{} {}", effects.happen(), payment.amount)
}

async fn what_the_last_extractor_turns_away_leaves_no_trace(bench: Bench) {
    let routes = Router::new().route("/", post(pay)).with_state(app(&bench));
    let server = Server::start(routes).await;
    for body in ["", "{", "[]", "{}", r#"{"amount":-1}"#, r#"{"amount":"1"}"#] {
        let rejected = send(server.post("/", "k", body)).await;
        assert!((400..500).contains(&rejected.status), "{body} {}", rejected.status);
        assert_eq!(bench.store.last_record().await, None, "{body}");
    }
    let no_json = server.request(reqwest::Method::POST, "/").header("x-api-key", "a");
    let no_json = no_json.header("idempotency-key", "k").body(r#"{"amount":1}"#);
    assert_eq!(send(no_json).await.status, 415);
    let told = [Outcome::Forgotten; 7];
    assert_eq!((bench.effects.count(), bench.told.outcomes()), (0, told.to_vec()));
    send(server.post("/", "k", r#"{"amount":1}"#)).await.assert_is(200, "1 1", false);
    // A replay parses nothing, but a body that is not the same is a mismatch as ever.
    send(server.post("/", "k", "{")).await.assert_refused(422, "mismatch");
    send(server.post("/", "k", r#"{"amount":1}"#)).await.assert_is(200, "1 1", true);
    assert_eq!(bench.effects.count(), 1);
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay_order(
    State(effects): State<Effects>,
    Path(order): Path<u32>,
    Json(payment): Json<Payment>,
) -> String {
    format!("{order} {} {}", payment.amount, effects.happen())
}

async fn what_an_extractor_before_it_turns_away_claims_nothing(bench: Bench) {
    let routes = Router::new().route("/{order}", post(pay_order)).with_state(app(&bench));
    let server = Server::start(routes).await;
    assert_eq!(send(server.post("/seven", "k", r#"{"amount":1}"#)).await.status, 400);
    assert_eq!(bench.store.claims().len(), 0);
    send(server.post("/7", "k", r#"{"amount":1}"#)).await.assert_is(200, "7 1 1", false);
    assert_eq!(bench.effects.count(), 1);
}

/// An extractor that finds its service down.
struct Unavailable;

impl<S: Sync> axum::extract::FromRequest<S> for Unavailable {
    type Rejection = StatusCode;

    async fn from_request(_: axum::extract::Request, _: &S) -> Result<Self, StatusCode> {
        Err(StatusCode::SERVICE_UNAVAILABLE)
    }
}

#[idempotent(anchor = header("Idempotency-Key"), record = all)]
async fn never(State(effects): State<Effects>, _: Unavailable) -> String {
    effects.happen().to_string()
}

async fn a_server_error_of_an_extractor_leaves_no_trace(bench: Bench) {
    let routes = Router::new().route("/", post(never)).with_state(app(&bench));
    let server = Server::start(routes).await;
    for body in ["one", "another"] {
        assert_eq!(send(server.post("/", "k", body)).await.status, 503);
        assert_eq!(bench.store.last_record().await, None);
    }
    assert_eq!((bench.effects.count(), bench.told.outcomes()), (0, vec![Outcome::Forgotten; 2]));
}

async fn derived_keys_stay_the_same_through_every_attempt(bench: Bench) {
    let runs = Runs::default();
    let server = bench.serve(KEY, as_told(&runs)).await;
    assert_eq!(send(server.post("/", "k", "once 500")).await.status, 500);
    assert_eq!(send(server.post("/", "k", "once 500")).await.status, 201);
    assert_eq!(send(server.post("/", "other", "once 500")).await.status, 201);
    let runs = runs.lock().unwrap();
    let [first, second, other] = &runs[..] else { panic!("{runs:?}") };
    assert_eq!(first.derive("psp"), second.derive("psp"));
    assert_ne!(first.derive("psp"), first.derive("ledger"));
    assert_ne!(first.derive("psp"), other.derive("psp"));
}

async fn an_unprotected_handler_has_an_operation_of_its_own(bench: Bench) {
    let runs = Runs::default();
    let routes = Router::new()
        .route("/plain", post(as_told(&runs)))
        .route("/optional", post(as_told(&runs).idempotent(KEY.optional())))
        .with_state(bench.engine().build());
    let server = Server::start(routes).await;
    for path in ["/plain", "/optional"] {
        for _ in 0..2 {
            assert_eq!(send(server.post_without_key(path, "")).await.status, 201);
        }
    }
    let mut ids = ids(&runs);
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), attempts(&runs)), (4, vec![1; 4]));
}

/// The operation as an extractor takes it, before the claim is granted.
struct Early(Operation);

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Early {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(
        parts: &mut http::request::Parts,
        state: &S,
    ) -> Result<Self, Self::Rejection> {
        Operation::from_request_parts(parts, state).await.map(Self)
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn by_header(early: Early, operation: Operation) -> String {
    format!("{} {}", early.0.id(), operation.id())
}

#[idempotent(anchor = arg(body))]
async fn by_argument(early: Early, body: String) -> String {
    format!("{} {}", early.0.id(), body.len())
}

async fn an_operation_that_an_extractor_took_is_the_handlers(bench: Bench) {
    let routes = Router::new()
        .route("/header", post(by_header))
        .route("/argument", post(by_argument))
        .with_state(app(&bench));
    let server = Server::start(routes).await;
    let answer = send(server.post("/header", "k", "")).await.text();
    let id = bench.store.last_record().await.unwrap().operation_id;
    assert_eq!(answer, format!("{id} {id}"));
    let answer = send(server.post_without_key("/argument", "abc")).await.text();
    let id = bench.store.last_record().await.unwrap().operation_id;
    assert_eq!(answer, format!("{id} 3"));
}
