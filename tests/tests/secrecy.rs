//! What is stored and logged, and what a store that cannot be trusted leads to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{FromRef, Path, State},
    http::StatusCode,
    routing::post,
};
use idem_runtime::{
    Anchor, FORMAT, Flags, Idempotency, IdempotentExt, Outcome, Policy, RefusalKind, StoreOutage,
    Token, Tracing, idempotent,
    store::{Clock, Completion, MemoryStore, Store, StoreErrorKind, Written},
};
use serde_json::Value;
use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use tests::{
    on_both_stores,
    server::{Effects, Gate, Server, engine, send},
    stores::{Bench, TestStore},
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    neither_logs_nor_store_hold_keys_credentials_or_bodies,
    under_a_secret_all_digests_are_others,
    a_damaged_answer_is_neither_replayed_nor_run_over,
    a_record_of_a_newer_release_is_neither_replayed_nor_run_over,
}

/// All that was logged by this process so far.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn logged() -> MutexGuard<'static, Vec<u8>> {
    LOGGED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to [`LOGGED`].
struct Log;

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        logged().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// From here on everything is logged, whoever says it.
fn log_everything() {
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE);
    // The first test of the process has done it for all.
    let _ = tracing::subscriber::set_global_default(subscriber.with_writer(|| Log).finish());
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
    effects: Effects,
}

#[idempotent(
    anchor = (header("Idempotency-Key"), body_field("id"), path("order")),
    fingerprint = (exclude("at"), header("x-pin")),
)]
async fn pay(
    State(effects): State<Effects>,
    Path(order): Path<String>,
    Json(body): Json<Value>,
) -> Result<String, StatusCode> {
    let _ = order;
    match (body["do"].as_str(), effects.happen()) {
        (Some("fail"), _) => Err(StatusCode::BAD_GATEWAY),
        (Some("panic"), _) => panic!("as told"),
        (Some("refuse"), _) => Err(StatusCode::CONFLICT),
        (Some("much"), _) => Ok("much ".repeat(1_000)),
        _ => Ok("RESPONSE".to_owned()),
    }
}

/// What no log and no store may hold.
const SECRETS: [&str; 8] =
    ["RAWKEY", "APIKEY", "BODYTEXT", "BODYID", "QUERYTEXT", "PATHTEXT", "PINTEXT", "NAMETEXT"];

async fn neither_logs_nor_store_hold_keys_credentials_or_bodies(bench: Bench) {
    log_everything();
    let engine = bench.engine().observer(Tracing).response_body_limit(1_000).build();
    let state = App { engine, effects: bench.effects.clone() };
    let routes = Router::new().route("/orders/{order}", post(pay)).with_state(state);
    let server = Server::start(routes).await;
    let ask = async |key: &str, body: &str| {
        let request = server.request(reqwest::Method::POST, "/orders/PATHTEXT?q=QUERYTEXT");
        let request = request.header("x-api-key", "APIKEY").header("x-pin", "PINTEXT");
        let request = request.header("content-type", "application/json");
        send(request.header("idempotency-key", key).body(body.to_owned())).await.status
    };
    let body = |doing: &str| {
        format!(r#"{{"id":"BODYID","do":"{doing}","NAMETEXT":"BODYTEXT","at":"BODYTEXT"}}"#)
    };
    for (key, doing, status) in [
        ("RAWKEY 1", "pay", 200),
        ("RAWKEY 1", "pay", 200),
        ("RAWKEY 1", "other", 422),
        ("RAWKEY 2", "fail", 502),
        ("RAWKEY 2", "fail", 502),
        ("RAWKEY 3", "panic", 500),
        ("RAWKEY 4", "refuse", 409),
        ("RAWKEY 5", "much", 200),
        ("RAWKEY 5", "much", 410),
        ("\"RAWKEY", "pay", 400),
        ("RAWKEY\tRAWKEY", "pay", 400),
        (&"RAWKEY".repeat(50), "pay", 400),
    ] {
        assert_eq!(ask(key, &body(doing)).await, status, "{key} {doing}");
    }
    for malformed in [
        r#"{"id":"BODYID","x":BODYTEXT"#,
        r#"{"id":"BODYID","id":"BODYTEXT"}"#,
        r#"{"id":{"BODYID":1}}"#,
        r#"{"id":"BODYID","x":{"NAMETEXT":1,"NAMETEXT":2}}"#,
    ] {
        assert_eq!(ask("RAWKEY", malformed).await, 400);
    }
    assert_eq!(bench.effects.count(), 6);
    let engine = bench.engine().secret("APIKEY").build();
    let said = format!("{engine:?} {:?}", bench.store.claims());
    for secret in SECRETS {
        assert!(!said.contains(secret), "{secret} can be printed");
    }
    assert_hidden(&logged(), "the log", "POST /orders/{order}");
    if let Some(file) = bench.file() {
        let options = SqliteConnectOptions::new().filename(&file);
        let mut database = options.connect().await.unwrap();
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut database).await.unwrap();
        database.close().await.unwrap();
        assert_hidden(&std::fs::read(&file).unwrap(), "the file", "RESPONSE");
    }
}

/// Asserts that the bytes have what they may have, so that they are the right ones, and no more.
fn assert_hidden(bytes: &[u8], name: &str, allowed: &str) {
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds(allowed), "{name} is not all there");
    for secret in SECRETS {
        assert!(!holds(secret), "{name} holds {secret}");
    }
}

async fn under_a_secret_all_digests_are_others(bench: Bench) {
    let plain = bench.serve(KEY, bench.numbered()).await;
    let engine = |secret: &str| bench.engine().secret(secret);
    let keyed = bench.serve_with(engine("one"), KEY, bench.numbered()).await;
    let again = bench.serve_with(engine("one"), KEY, bench.numbered()).await;
    let other = bench.serve_with(engine(&"two".repeat(50)), KEY, bench.numbered()).await;
    for (server, answer, replay) in [
        (&plain, "effect 1", false),
        (&keyed, "effect 2", false),
        (&other, "effect 3", false),
        (&plain, "effect 1", true),
        (&keyed, "effect 2", true),
        (&again, "effect 2", true),
        (&other, "effect 3", true),
    ] {
        send(server.post("/", "k", "")).await.assert_is(200, answer, replay);
    }
    let claims = bench.store.claims();
    for (i, one) in claims[..3].iter().enumerate() {
        for other in &claims[i + 1..3] {
            assert_ne!(one.key, other.key);
            assert_ne!(one.scope, other.scope);
            assert_ne!(one.fingerprint.digest, other.fingerprint.digest);
        }
    }
    assert_eq!((claims[1].key, claims[1].scope), (claims[5].key, claims[5].scope));
    assert_eq!(bench.effects.count(), 3);
}

/// Has the answer to a request recorded by somebody else.
async fn record(bench: &Bench, payload: &'static [u8], format: u16) {
    let bad = bench.serve(KEY, async || StatusCode::BAD_REQUEST).await;
    assert_eq!(send(bad.post("/", "k", "")).await.status, 400);
    let mut claim = bench.store.last_claim();
    claim.token = Token::random();
    bench.store.claim(&claim).await.unwrap();
    let completion = Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: payload.into(),
        format,
    };
    assert_eq!(bench.store.complete(&completion).await.unwrap(), Written::Done);
}

/// A server that would rather run without protection than not at all.
async fn open(bench: &Bench) -> Server {
    let policy = Policy::new(KEY).store_outage(StoreOutage::Open);
    bench.serve(policy, bench.numbered()).await
}

async fn assert_unreadable(bench: &Bench) {
    let bench = bench.anew();
    for server in [bench.serve(KEY, bench.numbered()).await, open(&bench).await] {
        for body in ["", "another body"] {
            let refused = send(server.post("/", "k", body)).await;
            if body.is_empty() || refused.status == 503 {
                refused.assert_refused(503, "record_unreadable");
                assert_eq!(refused.header("retry-after"), Some("5"));
            } else {
                refused.assert_refused(422, "mismatch");
            }
        }
        send(server.post("/", "another key", "")).await;
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn a_damaged_answer_is_neither_replayed_nor_run_over(bench: Bench) {
    record(&bench, b"\x01\x00", FORMAT).await;
    let key = bench.store.last_claim().key;
    let before = bench.store.read(&key).await.unwrap();
    assert_unreadable(&bench).await;
    assert_eq!(bench.store.read(&key).await.unwrap(), before);
}

async fn a_record_of_a_newer_release_is_neither_replayed_nor_run_over(bench: Bench) {
    record(&bench, b"whatever", FORMAT + 1).await;
    let key = bench.store.last_claim().key;
    assert_unreadable(&bench).await;
    bench.pass(Duration::from_secs(365 * 24 * 60 * 60));
    bench.store.sweep(100).await.unwrap();
    let newer = bench.store.read(&key).await.unwrap_err();
    assert_eq!(newer.kind(), StoreErrorKind::Newer);
}

#[tokio::test]
async fn a_damaged_row_is_neither_replayed_nor_run_over_nor_removed() {
    for damage in [
        "state = 9",
        "token = x''",
        "payload = x''",
        "payload = x'02'",
        "payload = x'01FFFF'",
        "payload = x'0100C8FFFFFFFF'",
        "attempt = -1",
        "format = 0",
        "fingerprint = x'00'",
        "scheme = 'unheard of'",
        "flags = 70000",
    ] {
        let bench = Bench::in_sqlite().await;
        let server = bench.serve(KEY, bench.numbered()).await;
        send(server.post("/", "k", "")).await.assert_is(200, "effect 1", false);
        let options = SqliteConnectOptions::new().filename(bench.file().unwrap());
        let mut database = options.connect().await.unwrap();
        let update = sqlx::AssertSqlSafe(format!("UPDATE idem_records SET {damage}"));
        assert_eq!(sqlx::query(update).execute(&mut database).await.unwrap().rows_affected(), 1);
        for server in [&server, &open(&bench).await] {
            let refused = send(server.post("/", "k", "")).await;
            assert_eq!(refused.code(), "record_unreadable", "{damage}");
        }
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM idem_records")
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!((bench.effects.count(), rows), (1, 1), "{damage}");
    }
}

fn bounded(records: usize) -> (TestStore, idem_runtime::store::ManualClock) {
    let clock = Clock::manual();
    let store = MemoryStore::builder().max_records(records).clock(clock.clone()).build();
    (TestStore::new(store), clock)
}

#[tokio::test]
async fn a_full_store_refuses_new_keys_and_answers_old_ones() {
    let ((store, clock), effects) = (bounded(2), Effects::default());
    let handler = {
        let effects = effects.clone();
        async move || effects.happen().to_string()
    };
    let app = Router::new().route("/", post(handler.idempotent(KEY)));
    let server = Server::start(app.with_state(engine(store).build())).await;
    send(server.post("/", "one", "")).await.assert_is(200, "1", false);
    send(server.post("/", "two", "")).await.assert_is(200, "2", false);
    let refused = send(server.post("/", "three", "")).await;
    refused.assert_refused(503, "store_full");
    assert_eq!(refused.header("retry-after"), Some("5"));
    send(server.post("/", "one", "")).await.assert_is(200, "1", true);
    send(server.post("/", "two", "x")).await.assert_refused(422, "mismatch");
    assert_eq!(effects.count(), 2);
    clock.advance(Duration::from_secs(24 * 60 * 60));
    send(server.post("/", "three", "")).await.assert_is(200, "3", false);
}

#[tokio::test]
async fn what_was_claimed_before_the_store_was_full_is_recorded() {
    let ((store, _), effects, gate) = (bounded(1), Effects::default(), Gate::default());
    let told = tests::server::Remember::default();
    let handler = gate.handler(&effects).idempotent(Policy::new(KEY).forever());
    let engine = engine(store).observer(told.observer());
    let app = Router::new().route("/", post(handler)).with_state(engine.build());
    let server = Server::start(app).await;
    let first = tokio::spawn(send(server.post("/", "one", "")));
    gate.begun().await;
    send(server.post("/", "two", "")).await.assert_refused(503, "store_full");
    gate.end();
    first.await.unwrap().assert_is(200, "effect 1", false);
    send(server.post("/", "one", "")).await.assert_is(200, "effect 1", true);
    let full = Outcome::Refused(RefusalKind::StoreFull);
    assert_eq!(told.outcomes(), [full, Outcome::Recorded, Outcome::Replayed]);
}
