//! What `assert_idempotent` finds: nothing in handlers that keep their promises, and in others each
//! promise that they break, in words.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{FromRef, Path, Request, State},
    http::{HeaderMap, HeaderName, StatusCode},
    middleware::{self, Next},
    response::{AppendHeaders, IntoResponse, Response},
    routing::post,
};
use idem_runtime::{
    Anchor, Format, Idempotency, IdempotentExt, Issued, Operation, Policy, Scope, Settle,
    idempotent,
    store::{MemoryStore, SqliteStore, Store},
    testing::{BrokenPromises, Check, Phase, Promise, assert_idempotent},
};
use serde::{Deserialize, Serialize};
use tests::server::{Effects, engine};
use tokio::task::yield_now;

const KEY: Anchor = Anchor::header("Idempotency-Key");

/// A payment of tenant `a`.
fn payment(key: &str) -> Request {
    of_tenant("a", key)
}

fn of_tenant(tenant: &str, key: &str) -> Request {
    let request = Request::post("/").header("x-api-key", tenant).header("idempotency-key", key);
    let request = request.header("content-type", "application/json");
    request.body(Body::from(r#"{"amount":7}"#)).unwrap()
}

fn without_key() -> Request {
    let mut request = payment("k");
    request.headers_mut().remove("idempotency-key");
    request
}

/// Everything that can be said of a handler at `/`.
fn check(app: Router, effects: &Effects) -> Check {
    let effects = effects.clone();
    Check::new(app, payment)
        .effects(move || effects.count())
        .without_key(without_key)
        .other_scope(|key| of_tenant("b", key))
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

impl App {
    fn over(store: impl Store) -> Self {
        Self { engine: engine(store).build(), effects: Effects::default() }
    }

    fn in_memory() -> Self {
        Self::over(MemoryStore::new())
    }
}

#[derive(Deserialize)]
struct Payment {
    amount: u64,
}

/// Awaits before and after the effect, and answers with what differs from run to run.
async fn work(effects: &Effects, payment: &Payment) -> impl IntoResponse + use<> {
    yield_now().await;
    let number = effects.happen();
    yield_now().await;
    let headers = [("x-set", "1"), ("x-set", "2")].map(|(k, v)| (HeaderName::from_static(k), v));
    let body = format!("payment {number} of {}", payment.amount);
    (StatusCode::CREATED, AppendHeaders(headers), body)
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(State(effects): State<Effects>, Json(payment): Json<Payment>) -> Response {
    work(&effects, &payment).await.into_response()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handler_under_the_macro_keeps_its_promises_over_both_stores() {
    let directory = tempfile::tempdir().unwrap();
    let file = SqliteStore::open(directory.path().join("idem.db")).await.unwrap();
    for state in [App::in_memory(), App::over(file)] {
        let app = Router::new().route("/", post(pay)).with_state(state.clone());
        check(app.clone(), &state.effects).assert().await;
        // The store need not be empty.
        check(app.clone(), &state.effects).assert().await;
        assert_idempotent(app, payment).await;
    }
}

#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("20s"))]
async fn pay_or_wait(State(effects): State<Effects>, Json(payment): Json<Payment>) -> Response {
    work(&effects, &payment).await.into_response()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_does_one_whose_duplicates_wait() {
    let state = App::in_memory();
    let app = Router::new().route("/", post(pay_or_wait)).with_state(state.clone());
    check(app, &state.effects).assert().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_does_one_under_the_combinator_and_under_layers() {
    let state = App::in_memory();
    let handler = async |State(effects): State<Effects>, Json(payment): Json<Payment>| {
        work(&effects, &payment).await.into_response()
    };
    let numbers = Effects::default();
    let layer = middleware::from_fn(move |request: Request, next: Next| {
        let number = numbers.happen().to_string();
        async move {
            yield_now().await;
            let mut response = next.run(request).await;
            response.headers_mut().insert("x-request-id", number.parse().unwrap());
            response
        }
    });
    let route = post(handler.idempotent(Policy::new(KEY))).layer(layer);
    let app = Router::new().route("/", route).with_state(state.clone());
    let broken = check(app.clone(), &state.effects).run().await.unwrap_err();
    assert_eq!(
        broken.iter().next().unwrap().to_string(),
        "on a retry, every later request must get the recorded answer: \
         header `x-request-id` is [\"2\"] after [\"1\"]",
    );
    let id = HeaderName::from_static("x-request-id");
    check(app, &state.effects).except_header(id).assert().await;
}

#[derive(Serialize, Deserialize)]
struct Receipt {
    number: usize,
}

#[idempotent(
    anchor = body_field("id"),
    fingerprint = body_field("amount"),
    replay(status = 200, merge = { replayed: true }),
)]
async fn register(State(effects): State<Effects>, _body: String) -> (StatusCode, Json<Receipt>) {
    yield_now().await;
    (StatusCode::ACCEPTED, Json(Receipt { number: effects.happen() }))
}

fn registration(id: &str, amount: u64) -> Request {
    let body = format!(r#"{{"id":"{id}","amount":{amount}}}"#);
    Request::post("/").header("x-api-key", "a").body(Body::from(body)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_does_one_with_a_key_in_its_body_a_part_for_a_fingerprint_and_replays_of_a_shape() {
    let state = App::in_memory();
    let app = Router::new().route("/", post(register)).with_state(state.clone());
    let check = || {
        let effects = state.effects.clone();
        Check::new(app.clone(), |id| registration(id, 7)).effects(move || effects.count())
    };
    check().other_request(|id| registration(id, 8)).shaped_replays().assert().await;
    // Each of the two is needed.
    let broken = check().shaped_replays().run().await.unwrap_err();
    assert_broken(&broken, &[(Phase::OtherRequest, Promise::NoWrongAnswer)]);
    let broken = check().other_request(|id| registration(id, 8)).run().await.unwrap_err();
    assert!(broken.iter().all(|broken| broken.promise == Promise::OneAnswer), "{broken}");
}

#[idempotent(anchor = path("id"), fingerprint = none)]
async fn confirm(State(effects): State<Effects>, Path(id): Path<String>, _body: String) -> String {
    yield_now().await;
    format!("{id}: {}", effects.happen())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_does_one_without_a_fingerprint() {
    let state = App::in_memory();
    let app = Router::new().route("/{id}", post(confirm)).with_state(state.clone());
    let request = |id: &str| {
        Request::post(format!("/{id}")).header("x-api-key", "a").body(Body::empty()).unwrap()
    };
    let effects = state.effects.clone();
    let check = Check::new(app, request).effects(move || effects.count());
    check.any_body_is_the_same().assert().await;
}

const NONCE: Anchor = Anchor::header("Idempotency-Key").format(Format::Uuid).space("withdrawals");

#[idempotent(anchor = NONCE, issued)]
async fn withdraw(
    State(effects): State<Effects>,
    operation: Operation,
    issued: Issued<u32>,
    _body: String,
) -> String {
    yield_now().await;
    effects.happen();
    format!("{} {}", issued.payload().unwrap(), operation.id())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_does_one_that_takes_only_issued_keys() {
    let state = App::in_memory();
    let app = Router::new().route("/", post(withdraw)).with_state(state.clone());
    let (engine, effects) = (state.engine.clone(), state.effects.clone());
    let issue = move || {
        let (engine, id) = (engine.clone(), state.effects.count());
        async move {
            let key = format!("00000000-0000-4000-8000-{:012x}", rand::random::<u32>());
            engine.issue(&NONCE, "a", &key, id as u32).await.unwrap();
            key
        }
    };
    Check::new(app, payment).keys(issue).effects(move || effects.count()).assert().await;
}

#[track_caller]
fn assert_broken(broken: &BrokenPromises, expected: &[(Phase, Promise)]) {
    let seen: Vec<_> = broken.iter().map(|broken| (broken.phase, broken.promise)).collect();
    assert_eq!(seen, expected, "{broken}");
}

/// A handler that remembers nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handler_without_protection_breaks_all_of_them() {
    let effects = Effects::default();
    let counted = effects.clone();
    let pay = async move || format!("payment {}", counted.happen());
    let broken = check(Router::new().route("/", post(pay)), &effects).run().await.unwrap_err();
    let words = broken.to_string();
    let lines: Vec<_> = words.lines().collect();
    assert_eq!(
        lines[..6],
        [
            "the handler is not safe to retry:",
            "- on a retry, every later request must get the recorded answer: \
         200 \"payment 2\" after 200 \"payment 1\"",
            "- on a retry, a replay must say `Idempotent-Replayed: true`: \
         200 \"payment 2\" without the header",
            "- on a retry, the effect must happen once: it happened 3 times",
            "- on another request, a key that was used must be refused: 200 \"payment 5\"",
            "- on another request, every later request must get the recorded \
         answer: 200 \"payment 6\" after 200 \"payment 4\"",
        ]
    );
    for line in [
        "- on fifty duplicates at once, the effect must happen once: it happened 50 times",
        "- on fifty duplicates at once, a replay must say `Idempotent-Replayed: true`: \
         50 of 50 answers do not say so",
        "- when the client hangs up, the effect must happen once: \
         before the first poll, it happened 2 times",
        "- without a key, a request must be refused: 200 \"payment ",
    ] {
        assert!(lines.iter().any(|seen| seen.starts_with(line)), "{line}\n{words}");
    }
}

/// An answer of an idempotency layer that somebody wrote at home.
#[derive(Clone)]
enum Kept {
    Running,
    Answer(u16, String),
}

/// What somebody wrote at home, each time with another mistake.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    None,
    /// Looks, and then acts.
    ChecksThenActs,
    /// Says on each answer what time it is.
    AnswersWithTheTime,
    /// Gives its claim back when it is cancelled.
    FreesTheKeyAtHangUp,
    /// Keeps its claim when it is cancelled.
    KeepsTheKeyAtHangUp,
    /// Compares nothing but keys.
    TakesAnyBody,
    /// Knows no tenants.
    SharesKeys,
    /// Does not say what a replay is.
    SaysNothing,
    /// Forgets the headers.
    LosesHeaders,
    /// Replays under another status.
    ChangesTheStatus,
    /// Runs without a key.
    NeedsNoKey,
}

type Memory = Arc<Mutex<HashMap<String, (String, Kept)>>>;

#[derive(Clone)]
struct HomeMade {
    mistake: Mistake,
    memory: Memory,
    effects: Effects,
    clock: Effects,
}

/// A claim that is given back unless it is kept.
struct Claim {
    memory: Memory,
    key: String,
    kept: bool,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            self.memory.lock().unwrap().remove(&self.key);
        }
    }
}

impl HomeMade {
    fn with(mistake: Mistake) -> Self {
        let (memory, effects, clock) = <_>::default();
        Self { mistake, memory, effects, clock }
    }

    async fn broken(mistake: Mistake) -> Result<(), BrokenPromises> {
        let home_made = Self::with(mistake);
        let app = Router::new().route("/", post(serve)).with_state(home_made.clone());
        check(app, &home_made.effects).run().await
    }

    async fn work(&self) -> (u16, String) {
        yield_now().await;
        let number = self.effects.happen();
        yield_now().await;
        (201, format!("payment {number}"))
    }

    fn answer(&self, (status, body): (u16, String), replay: bool) -> Response {
        let body = match self.mistake {
            Mistake::AnswersWithTheTime => format!("{body} at {}", self.clock.happen()),
            _ => body,
        };
        let status = match self.mistake {
            Mistake::ChangesTheStatus if replay => 200,
            _ => status,
        };
        let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
        if !(replay && self.mistake == Mistake::LosesHeaders) {
            response.headers_mut().insert("x-receipt", "7".parse().unwrap());
        }
        if replay && self.mistake != Mistake::SaysNothing {
            response.headers_mut().insert("idempotent-replayed", "true".parse().unwrap());
        }
        response
    }

    async fn claim_and_run(self, key: String, body: String) -> Response {
        let known = {
            let mut memory = self.memory.lock().unwrap();
            let known = memory.get(&key).cloned();
            if known.is_none() && self.mistake != Mistake::ChecksThenActs {
                memory.insert(key.clone(), (body.clone(), Kept::Running));
            }
            known
        };
        match known {
            Some((first, _)) if first != body && self.mistake != Mistake::TakesAnyBody => {
                StatusCode::UNPROCESSABLE_ENTITY.into_response()
            }
            Some((_, Kept::Answer(status, body))) => self.answer((status, body), true),
            Some((_, Kept::Running)) => StatusCode::CONFLICT.into_response(),
            None => {
                let kept = self.mistake != Mistake::FreesTheKeyAtHangUp;
                let memory = Arc::clone(&self.memory);
                let mut claim = Claim { memory, key, kept };
                let (status, said) = self.work().await;
                claim.kept = true;
                let answer = (body, Kept::Answer(status, said.clone()));
                self.memory.lock().unwrap().insert(claim.key.clone(), answer);
                self.answer((status, said), false)
            }
        }
    }
}

async fn serve(State(home_made): State<HomeMade>, headers: HeaderMap, body: String) -> Response {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let Some(key) = header("idempotency-key") else {
        return match home_made.mistake {
            Mistake::NeedsNoKey => home_made.answer(home_made.work().await, false),
            _ => StatusCode::BAD_REQUEST.into_response(),
        };
    };
    let tenant = match home_made.mistake {
        Mistake::SharesKeys => "all".to_owned(),
        _ => header("x-api-key").unwrap(),
    };
    let (key, mistake) = (format!("{tenant} {key}"), home_made.mistake);
    let running = home_made.claim_and_run(key, body);
    match mistake {
        Mistake::ChecksThenActs | Mistake::FreesTheKeyAtHangUp | Mistake::KeepsTheKeyAtHangUp => {
            running.await
        }
        // The others know at least that a client may hang up.
        _ => tokio::spawn(running).await.unwrap(),
    }
}

/// Where replays are looked at.
const EVERYWHERE: [Phase; 5] =
    [Phase::Retry, Phase::OtherRequest, Phase::Duplicates, Phase::HangUp, Phase::OtherScope];

/// Asserts which promises a mistake breaks, and what is said of the first.
async fn assert_caught(mistake: Mistake, expected: &[(Phase, Promise)], words: &str) {
    let broken = HomeMade::broken(mistake).await.unwrap_err();
    assert_broken(&broken, expected);
    let first = broken.iter().next().unwrap().to_string();
    assert!(first.starts_with(words), "{first}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_written_at_home_without_a_mistake_keeps_its_promises() {
    HomeMade::broken(Mistake::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_look_before_an_act_is_caught() {
    let broken = HomeMade::broken(Mistake::ChecksThenActs).await.unwrap_err();
    for promise in [Promise::OneEffect, Promise::OneAnswer, Promise::MarkedReplays] {
        assert!(broken.contains(Phase::Duplicates, promise), "{broken}");
    }
    assert!(broken.contains(Phase::HangUp, Promise::OneEffect), "{broken}");
    let sequential = [Phase::Retry, Phase::OtherRequest];
    assert!(broken.iter().all(|broken| !sequential.contains(&broken.phase)), "{broken}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_answer_that_is_made_anew_is_caught() {
    assert_caught(
        Mistake::AnswersWithTheTime,
        &EVERYWHERE.map(|phase| (phase, Promise::OneAnswer)),
        "on a retry, every later request must get the recorded answer: \
         201 \"payment 1 at 2\" after 201 \"payment 1 at 1\"",
    )
    .await;
}

#[tokio::test]
async fn a_handler_that_is_cancelled_and_frees_its_key_is_caught() {
    assert_caught(
        Mistake::FreesTheKeyAtHangUp,
        &[(Phase::HangUp, Promise::OneEffect)],
        "when the client hangs up, the effect must happen once: after 2 polls, it happened 2 times",
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_is_cancelled_and_keeps_its_key_is_caught() {
    assert_caught(
        Mistake::KeepsTheKeyAtHangUp,
        &[(Phase::HangUp, Promise::NoWedge)],
        "when the client hangs up, a key must not stay in flight: after the first poll, 409 \"\" for 20s",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_key_that_is_taken_with_any_body_is_caught() {
    assert_caught(
        Mistake::TakesAnyBody,
        &[(Phase::OtherRequest, Promise::NoWrongAnswer)],
        "on another request, a key that was used must be refused: \
         201 \"payment 2\", the first one's answer",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_key_that_tenants_share_is_caught() {
    let broken = HomeMade::broken(Mistake::SharesKeys).await.unwrap_err();
    assert_broken(&broken, &[(Phase::OtherScope, Promise::OwnKeys)]);
    // As it is in idem, where somebody says so.
    let (store, effects) = (MemoryStore::new(), Effects::default());
    let state = App {
        engine: Idempotency::builder(store).scope(Scope::global()).build(),
        effects: effects.clone(),
    };
    let app = Router::new().route("/", post(pay)).with_state(state);
    let broken = check(app, &effects).run().await.unwrap_err();
    assert_broken(&broken, &[(Phase::OtherScope, Promise::OwnKeys)]);
    let words = broken.to_string();
    assert!(
        words.contains("in another scope, the same key must be another key: 201 \""),
        "{words}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replays_that_are_not_marked_or_not_the_whole_answer_are_caught() {
    for (mistake, promise, words) in [
        (
            Mistake::SaysNothing,
            Promise::MarkedReplays,
            "on a retry, a replay must say `Idempotent-Replayed: true`: \
             201 \"payment 1\" without the header",
        ),
        (
            Mistake::LosesHeaders,
            Promise::OneAnswer,
            "on a retry, every later request must get the recorded answer: \
             header `x-receipt` is nothing after [\"7\"]",
        ),
        (
            Mistake::ChangesTheStatus,
            Promise::OneAnswer,
            "on a retry, every later request must get the recorded answer: \
             200 \"payment 1\" after 201 \"payment 1\"",
        ),
    ] {
        assert_caught(mistake, &EVERYWHERE.map(|phase| (phase, promise)), words).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handler_that_needs_no_key_is_caught() {
    assert_caught(
        Mistake::NeedsNoKey,
        &[(Phase::WithoutKey, Promise::NoKeyNoRun)],
        "without a key, a request must be refused: 201 \"payment ",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_answer_that_is_not_kept_is_caught() {
    let state = App::in_memory();
    let handler = async |State(effects): State<Effects>| {
        effects.happen();
        (Settle::tombstone(), "much")
    };
    let route = post(handler.idempotent(Policy::new(KEY)));
    let app = Router::new().route("/", route).with_state(state.clone());
    let broken = check(app, &state.effects).run().await.unwrap_err();
    assert!(broken.contains(Phase::Retry, Promise::OneAnswer), "{broken}");
    assert!(broken.iter().all(|broken| broken.promise != Promise::OneEffect), "{broken}");
    assert!(broken.to_string().contains("must get the recorded answer: 410 "), "{broken}");
}

#[tokio::test]
async fn an_application_of_which_nothing_can_be_said_is_told_apart() {
    let effects = Effects::default();
    let app = |handler| Router::new().route("/", handler);
    for (app, words) in [
        (app(post(async || StatusCode::NOT_FOUND)), "404 \"\""),
        (app(post(async || (StatusCode::BAD_GATEWAY, "ä".repeat(200)))), "502 \"ääää"),
        (app(post(async || -> String { panic!("on purpose") })), "no answer, but a panic"),
    ] {
        let broken = check(app, &effects).run().await.unwrap_err();
        assert_broken(&broken, &[(Phase::Retry, Promise::Success)]);
        let said = broken.to_string();
        assert!(said.contains(&format!("the first request must succeed: {words}")), "{said}");
        assert!(said.chars().count() < 200, "{said}");
    }
    // A request that ignores the key that it is given, and a counter that counts something else.
    let state = App::in_memory();
    let app = Router::new().route("/", post(pay)).with_state(state.clone());
    let broken = Check::new(app.clone(), |_| payment("always")).run().await.unwrap_err();
    assert!(broken.contains(Phase::OtherRequest, Promise::NewKeysRun), "{broken}");
    assert!(broken.to_string().contains("is the key where it belongs?"), "{broken}");
    let broken = check(app, &effects).run().await.unwrap_err();
    assert_broken(&broken, &[(Phase::Retry, Promise::NewKeysRun)]);
    assert!(broken.to_string().ends_with("and no effect was counted"), "{broken}");
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_answer_is_told_apart() {
    let app = Router::new().route("/", post(async || std::future::pending::<String>().await));
    let broken = Check::new(app, payment).run().await.unwrap_err();
    let words = "on a retry, the first request must succeed: no answer within 20s";
    assert_eq!(broken.iter().next().unwrap().to_string(), words);
}

#[tokio::test]
#[should_panic(expected = "the handler is not safe to retry:\n- on a retry, a replay must say")]
async fn the_assertion_panics_with_the_whole_report() {
    let app = Router::new().route("/", post(async || "paid"));
    tokio::time::timeout(Duration::from_secs(60), assert_idempotent(app, payment)).await.unwrap();
}
