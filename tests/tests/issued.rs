//! Keys that the server hands out.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{FromRef, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use idem_runtime::{
    Anchor, Flags, Format, Idempotency, IssueError, Issued, IssuedError, Operation, Outcome,
    State as RecordState, idempotent,
    store::{Claimed, Store},
};
use serde::{Deserialize, Serialize};
use tests::{
    on_both_stores,
    server::{Answer, Effects, Gate, Server, send},
    stores::Bench,
};

const VALID: Duration = Duration::from_secs(600);
const KNOWN: Duration = Duration::from_secs(24 * 60 * 60);

const NONCE: Anchor =
    Anchor::header("Idempotency-Key").format(Format::Hex(4)).space("withdrawals").ttl(VALID);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Bound {
    portfolio: String,
    amount: u64,
}

fn bound(amount: u64) -> Bound {
    Bound { portfolio: "p".to_owned(), amount }
}

on_both_stores! {
    a_key_that_was_never_issued_is_unknown,
    an_issued_key_is_used_once_and_replayed_while_it_is_valid,
    an_expired_key_never_runs_and_is_unknown_at_last,
    validity_counts_from_issuance_through_everything,
    a_run_that_began_in_time_finishes,
    what_is_forgotten_is_issued_again,
    an_uncertain_end_binds_the_key_to_its_request,
    a_payload_of_another_type_is_told_from_none,
    issuing_twice_is_issuing_once,
    issuing_in_an_idempotent_handler_is_safe_to_retry,
    another_tenant_cannot_use_the_key,
    a_key_is_issued_in_its_canonical_form,
    a_composite_key_is_issued_part_by_part,
    what_cannot_be_issued_is_refused,
    an_owner_that_died_leaves_the_key_to_its_request,
    of_many_users_at_once_one_runs,
}

#[derive(Clone)]
struct App {
    engine: Idempotency,
    effects: Effects,
    gate: Gate,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

#[idempotent(anchor = NONCE, issued)]
async fn withdraw(
    State(app): State<App>,
    operation: Operation,
    issued: Issued<Bound>,
    body: String,
) -> Response {
    let bound = issued.payload().unwrap();
    app.effects.happen();
    if body == "slow" {
        app.gate.pass().await;
    }
    let status = match body.as_str() {
        "bad" => StatusCode::UNPROCESSABLE_ENTITY,
        "down" if operation.attempt() == 1 => StatusCode::BAD_GATEWAY,
        _ => StatusCode::CREATED,
    };
    (status, bound.amount.to_string()).into_response()
}

#[idempotent(anchor = NONCE, issued)]
async fn mistyped(issued: Issued<Vec<u8>>, _body: String) -> String {
    match issued.payload() {
        Err(IssuedError::Type(_)) => "another type".to_owned(),
        other => format!("{other:?}"),
    }
}

#[idempotent(anchor = NONCE)]
async fn open_to_all(issued: Issued<Bound>, _body: String) -> String {
    match issued.payload() {
        Err(IssuedError::Missing) => "missing".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Stage one: the nonce is the operation's own, so that a retry hands out the same one.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn prepare(
    State(app): State<App>,
    operation: Operation,
    headers: HeaderMap,
    Json(bound): Json<Bound>,
) -> Response {
    let id = operation.derive("nonce").as_uuid();
    let nonce = format!("0x{:08x}", id.as_fields().0);
    let tenant = headers["x-api-key"].to_str().unwrap();
    app.engine.issue(&NONCE, tenant, &nonce, bound).await.unwrap();
    match app.effects.happen() {
        1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => nonce.into_response(),
    }
}

async fn start(bench: &Bench) -> (Server, App) {
    let engine = bench.engine().build();
    let app = App { engine, effects: bench.effects.clone(), gate: Gate::default() };
    let router = Router::new()
        .route("/withdraw", post(withdraw))
        .route("/mistyped", post(mistyped))
        .route("/open", post(open_to_all))
        .route("/prepare", post(prepare))
        .with_state(app.clone());
    (Server::start(router).await, app)
}

impl App {
    async fn issue(&self, key: &str, amount: u64) -> Bound {
        self.engine.issue(&NONCE, "a", key, bound(amount)).await.unwrap()
    }
}

async fn withdraw_with(server: &Server, key: &str, body: &str) -> Answer {
    send(server.post("/withdraw", key, body)).await
}

async fn a_key_that_was_never_issued_is_unknown(bench: Bench) {
    let (server, _) = start(&bench).await;
    for _ in 0..2 {
        withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "unknown_key");
    }
    assert_eq!((bench.store.last_record().await, bench.effects.count()), (None, 0));
}

async fn an_issued_key_is_used_once_and_replayed_while_it_is_valid(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    withdraw_with(&server, "0a0b0c0d", "").await.assert_is(201, "7", false);
    bench.pass(VALID - Duration::from_millis(1));
    withdraw_with(&server, "0a0b0c0d", "").await.assert_is(201, "7", true);
    withdraw_with(&server, "0a0b0c0d", "other").await.assert_refused(422, "mismatch");
    bench.pass(Duration::from_millis(1));
    for body in ["", "other"] {
        withdraw_with(&server, "0a0b0c0d", body).await.assert_refused(400, "expired_key");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn an_expired_key_never_runs_and_is_unknown_at_last(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    bench.pass(VALID);
    withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "expired_key");
    bench.pass(KNOWN - Duration::from_millis(1));
    withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "expired_key");
    bench.pass(Duration::from_millis(1));
    withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "unknown_key");
    assert_eq!(bench.effects.count(), 0);
}

async fn validity_counts_from_issuance_through_everything(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    bench.pass(VALID / 3);
    withdraw_with(&server, "0a0b0c0d", "bad").await.assert_is(422, "7", false);
    bench.pass(VALID / 3);
    withdraw_with(&server, "0a0b0c0d", "down").await.assert_is(502, "7", false);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(record.valid_left, (VALID / 3).into());
    withdraw_with(&server, "0a0b0c0d", "down").await.assert_is(201, "7", false);
    assert_eq!(bench.store.last_record().await.unwrap().valid_left, (VALID / 3).into());
    app.issue("0a0b0c0e", 8).await;
    withdraw_with(&server, "0a0b0c0e", "down").await.assert_is(502, "8", false);
    bench.pass(VALID / 3);
    withdraw_with(&server, "0a0b0c0d", "down").await.assert_refused(400, "expired_key");
    bench.pass(VALID);
    withdraw_with(&server, "0a0b0c0e", "down").await.assert_refused(400, "expired_key");
    assert_eq!(bench.effects.count(), 4);
}

async fn a_run_that_began_in_time_finishes(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    bench.pass(VALID - Duration::from_secs(1));
    let running = tokio::spawn(send(server.post("/withdraw", "0a0b0c0d", "slow")));
    app.gate.begun().await;
    bench.pass(Duration::from_secs(2));
    withdraw_with(&server, "0a0b0c0d", "slow").await.assert_refused(409, "in_flight");
    app.gate.end();
    running.await.unwrap().assert_is(201, "7", false);
    assert_eq!(*bench.told.outcomes().last().unwrap(), Outcome::Recorded);
    withdraw_with(&server, "0a0b0c0d", "slow").await.assert_refused(400, "expired_key");
    assert_eq!(bench.effects.count(), 1);
}

async fn what_is_forgotten_is_issued_again(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    for _ in 0..2 {
        withdraw_with(&server, "0a0b0c0d", "bad").await.assert_is(422, "7", false);
        let record = bench.store.last_record().await.unwrap();
        assert_eq!((record.state, record.attempt), (RecordState::Issued, 0));
        assert!(record.flags.contains(Flags::ISSUED));
    }
    withdraw_with(&server, "0a0b0c0d", "corrected").await.assert_is(201, "7", false);
    withdraw_with(&server, "0a0b0c0d", "corrected").await.assert_is(201, "7", true);
}

async fn an_uncertain_end_binds_the_key_to_its_request(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    withdraw_with(&server, "0a0b0c0d", "down").await.assert_is(502, "7", false);
    let released = bench.store.last_record().await.unwrap();
    withdraw_with(&server, "0a0b0c0d", "other").await.assert_refused(422, "mismatch");
    withdraw_with(&server, "0a0b0c0d", "down").await.assert_is(201, "7", false);
    let completed = bench.store.last_record().await.unwrap();
    assert_eq!((completed.operation_id, completed.attempt), (released.operation_id, 2));
    assert_eq!(bench.effects.count(), 2);
}

async fn a_payload_of_another_type_is_told_from_none(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    send(server.post("/mistyped", "0a0b0c0d", "")).await.assert_is(200, "another type", false);
    send(server.post("/open", "0a0b0c0f", "")).await.assert_is(200, "missing", false);
    // Handed out by nobody, though it is there: it was used, and the answer is not this handler's.
    withdraw_with(&server, "0a0b0c0f", "").await.assert_refused(422, "mismatch");
}

async fn issuing_twice_is_issuing_once(bench: Bench) {
    let (server, app) = start(&bench).await;
    assert_eq!(app.issue("0a0b0c0d", 7).await, bound(7));
    bench.pass(VALID / 2);
    assert_eq!(app.issue("0a0b0c0d", 8).await, bound(7), "what was bound first");
    let as_other: Result<u32, _> = app.engine.issue(&NONCE, "a", "0a0b0c0d", 9).await;
    assert!(matches!(as_other, Err(IssueError::Payload(_))), "{as_other:?}");
    withdraw_with(&server, "0a0b0c0d", "").await.assert_is(201, "7", false);
    let used = app.engine.issue(&NONCE, "a", "0a0b0c0d", bound(8)).await;
    assert!(matches!(used, Err(IssueError::AlreadyUsed)), "{used:?}");
    bench.pass(VALID / 2);
    withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "expired_key");
    app.issue("0a0b0c0e", 7).await;
    bench.pass(VALID);
    let over = app.engine.issue(&NONCE, "a", "0a0b0c0e", bound(8)).await;
    assert!(matches!(over, Err(IssueError::Expired)), "{over:?}");
}

async fn issuing_in_an_idempotent_handler_is_safe_to_retry(bench: Bench) {
    let (server, _) = start(&bench).await;
    let body = serde_json::to_string(&bound(9)).unwrap();
    // The answer to the first attempt says nothing of the nonce that it issued.
    assert_eq!(send(server.post("/prepare", "k", &body)).await.status, 503);
    let issued = send(server.post("/prepare", "k", &body)).await;
    assert_eq!((issued.status, issued.is_replay()), (200, false));
    let again = send(server.post("/prepare", "k", &body)).await;
    assert_eq!((again.text(), again.is_replay()), (issued.text(), true));
    let another = send(server.post("/prepare", "other", &body)).await;
    assert_ne!(another.text(), issued.text());
    withdraw_with(&server, &issued.text(), "").await.assert_is(201, "9", false);
    withdraw_with(&server, &issued.text(), "").await.assert_is(201, "9", true);
    withdraw_with(&server, &another.text(), "").await.assert_is(201, "9", false);
}

async fn another_tenant_cannot_use_the_key(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.engine.issue(&NONCE, "b", "0a0b0c0d", bound(7)).await.unwrap();
    withdraw_with(&server, "0a0b0c0d", "").await.assert_refused(400, "unknown_key");
    assert_eq!(bench.effects.count(), 0);
    let of_b = server.request(reqwest::Method::POST, "/withdraw");
    let of_b = of_b.header("x-api-key", "b").header("idempotency-key", "0a0b0c0d");
    send(of_b).await.assert_is(201, "7", false);
}

async fn a_key_is_issued_in_its_canonical_form(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0xABCDEF01", 7).await;
    withdraw_with(&server, "abcdef01", "").await.assert_is(201, "7", false);
    withdraw_with(&server, "0xAbCdEf01", "").await.assert_is(201, "7", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn what_cannot_be_issued_is_refused(bench: Bench) {
    let (_, app) = start(&bench).await;
    for value in ["", "0x", "zz", "0a0b0c", "0a0b0c0d0e", "0a0b0c0d "] {
        let refused = app.engine.issue(&NONCE, "a", value, 1_u8).await;
        assert!(matches!(refused, Err(IssueError::Value(_))), "{value}: {refused:?}");
    }
    let spaceless = Anchor::header("Idempotency-Key");
    let refused = app.engine.issue(&spaceless, "a", "k", 1_u8).await;
    assert!(matches!(refused, Err(IssueError::NoSpace)), "{refused:?}");
    let two = (String::from("0a0b0c0d"), String::from("0a0b0c0d"));
    let refused = app.engine.issue(&NONCE, "a", &two, 1_u8).await;
    assert!(matches!(refused, Err(IssueError::Value(_))), "{refused:?}");
}

async fn a_composite_key_is_issued_part_by_part(bench: Bench) {
    const INNER: &[Anchor] =
        &[Anchor::body_field("a"), Anchor::body_field("b").format(Format::Uuid)];
    const CODE: Anchor = Anchor::custom(|_| Ok(idem_runtime::Values::from_iter(["x", "y"])));
    const WHOLE: Anchor =
        Anchor::all(&[Anchor::all(INNER).format(Format::Hex(1)), CODE, Anchor::query("c")])
            .space("composite");
    let engine = bench.engine().build();
    let uuid = uuid_text();
    let issue = async |values: (&str, &str, &str, &str, &str), payload: u8| {
        engine.issue(&WHOLE, "a", &values, payload).await
    };
    assert_eq!(issue(("0xAB", &uuid, "x", "y", "z"), 1).await.unwrap(), 1);
    assert_eq!(issue(("0xab", &uuid.to_uppercase(), "x", "y", "z"), 2).await.unwrap(), 1);
    let refused = issue(("no hex", &uuid, "x", "y", "z"), 3).await;
    assert!(matches!(refused, Err(IssueError::Value(_))), "{refused:?}");
    let few = engine.issue(&WHOLE, "a", &("ab", &uuid, "x"), 4_u8).await;
    assert!(matches!(few, Err(IssueError::Value(_))), "{few:?}");
}

fn uuid_text() -> String {
    String::from("0190f5a1-7c3b-7def-8a01-23456789abcd")
}

async fn an_owner_that_died_leaves_the_key_to_its_request(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    withdraw_with(&server, "0a0b0c0d", "bad").await.assert_is(422, "7", false);
    let claim = bench.store.last_claim();
    let dying = idem_runtime::store::Claim { token: idem_runtime::Token::random(), ..claim };
    assert!(matches!(bench.store.claim(&dying).await.unwrap(), Claimed::Granted(_)));
    withdraw_with(&server, "0a0b0c0d", "bad").await.assert_refused(409, "in_flight");
    bench.pass(Duration::from_secs(31));
    withdraw_with(&server, "0a0b0c0d", "other").await.assert_refused(422, "mismatch");
    withdraw_with(&server, "0a0b0c0d", "bad").await.assert_is(422, "7", false);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!((record.state, record.attempt), (RecordState::Released, 2));
}

async fn of_many_users_at_once_one_runs(bench: Bench) {
    let (server, app) = start(&bench).await;
    app.issue("0a0b0c0d", 7).await;
    let requests = (0..50).map(|_| withdraw_with(&server, "0a0b0c0d", "slow"));
    let all = futures_util::future::join_all(requests);
    let open = async {
        app.gate.begun().await;
        app.gate.end();
    };
    let (answers, ()) = tokio::join!(all, open);
    assert!(answers.iter().all(|answer| matches!(answer.status, 201 | 409)));
    assert_eq!(
        answers.iter().filter(|answer| answer.status == 201 && !answer.is_replay()).count(),
        1
    );
    assert_eq!(bench.effects.count(), 1);
}
