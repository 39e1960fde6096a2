//! Sealed records: the whole life of a key goes on, whoever reads the store learns nothing, and
//! what cannot be opened is refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    error::Error as StdError,
    fmt::Write,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, State},
    http::{HeaderName, StatusCode},
    response::{AppendHeaders, IntoResponse, Response},
    routing::post,
};
use idem_runtime::{
    Anchor, Event, Flags, Format, Idempotency, IssueError, Issued, KeyRing, Operation, Outcome,
    RefusalKind, SealError, Settle, State as RecordState, idempotent,
    store::{Store, StoreErrorKind},
};
use sqlx::{ConnectOptions, SqliteConnection, sqlite::SqliteConnectOptions};
use tests::{
    on_both_stores,
    server::{Answer, Effects, Gate, Remember, Server, send},
    stores::Bench,
};

on_both_stores! {
    an_answer_is_replayed_byte_for_byte,
    a_rerun_finds_its_steps_and_what_was_issued,
    duplicates_wait_for_the_answer,
    a_late_owner_finds_the_answer_of_its_successor,
    of_what_is_too_large_or_settled_otherwise_the_fact_is_sealed,
    keys_are_rotated_while_processes_are_replaced,
    an_answer_that_cannot_be_opened_is_refused_and_kept,
    an_attempt_whose_steps_cannot_be_opened_is_refused_and_they_are_kept,
    an_issued_key_whose_payload_cannot_be_opened_is_refused_and_kept,
    records_from_before_the_seal_are_read_only_where_that_is_said,
    a_retry_gets_the_redacted_answer,
    a_redaction_that_panics_leaves_a_tombstone,
}

const OLD: [u8; 32] = [1; 32];
const NEW: [u8; 32] = [2; 32];

/// Longer than the default lease.
const LAPSE: Duration = Duration::from_secs(31);

const NONCE: Anchor = Anchor::header("Idempotency-Key")
    .format(Format::Hex(4))
    .space("withdrawals")
    .ttl(Duration::from_secs(600));

fn ring() -> KeyRing {
    KeyRing::new(1, &OLD)
}

#[derive(Clone)]
struct App {
    engine: Idempotency,
    effects: Effects,
    gate: Gate,
    remember: Remember,
    /// The chain of each error that was told.
    errors: Arc<Mutex<Vec<String>>>,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

/// Takes a step and then does what its body says.
async fn work(app: &App, operation: &Operation, body: &str) -> Response {
    let step = async {
        app.effects.happen();
        Ok::<_, std::convert::Infallible>("STEPRESULT".to_owned())
    };
    assert_eq!(operation.step("one", step).await.unwrap(), "STEPRESULT");
    let first = operation.attempt() == 1;
    let headers = [("x-set", "HEADERVALUE 1"), ("x-set", "HEADERVALUE 2")]
        .map(|(name, value)| (HeaderName::from_static(name), value));
    match body {
        "fail" if first => return StatusCode::BAD_GATEWAY.into_response(),
        "slow" if first => app.gate.pass().await,
        "much" => return "RESPONSEBODY".repeat(200).into_response(),
        "settle" => return (Settle::tombstone(), "RESPONSEBODY").into_response(),
        "die" if first => std::future::pending().await,
        _ => {}
    }
    (StatusCode::CREATED, AppendHeaders(headers), b"RESPONSEBODY\0\xff".to_vec()).into_response()
}

#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("20s"))]
async fn pay(State(app): State<App>, operation: Operation, body: String) -> Response {
    work(&app, &operation, &body).await
}

#[idempotent(anchor = NONCE, issued)]
async fn withdraw(
    State(app): State<App>,
    operation: Operation,
    issued: Issued<String>,
    body: String,
) -> Response {
    assert_eq!(issued.payload().unwrap(), "ISSUEDPAYLOAD");
    work(&app, &operation, &body).await
}

/// One process, over the bench's store.
async fn process(bench: &Bench, ring: impl Into<Option<KeyRing>>) -> (Server, App) {
    let (remember, errors) = (Remember::default(), Arc::<Mutex<Vec<String>>>::default());
    let (remembers, chains) = (remember.observer(), Arc::clone(&errors));
    let observer = move |event: &Event<'_>| {
        if let Some(error) = event.error {
            chains.lock().unwrap().push(chain(error));
        }
        remembers(event);
    };
    let mut engine = bench.engine().observer(observer).response_body_limit(1_000).secret("secret");
    if let Some(ring) = ring.into() {
        engine = engine.seal(ring);
    }
    serve(bench, engine.build(), remember, errors).await
}

async fn serve(
    bench: &Bench,
    engine: Idempotency,
    remember: Remember,
    errors: Arc<Mutex<Vec<String>>>,
) -> (Server, App) {
    let (effects, gate) = (bench.effects.clone(), Gate::default());
    let app = App { engine, effects, gate, remember, errors };
    let routes = Router::new()
        .route("/pay", post(pay))
        .route("/withdraw", post(withdraw))
        .with_state(app.clone());
    (Server::start(routes).await, app)
}

/// An error with its causes, as a log shows it.
fn chain(error: &dyn StdError) -> String {
    let mut said = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        write!(said, ": {cause}").unwrap();
        next = cause.source();
    }
    said
}

#[track_caller]
fn assert_paid(answer: &Answer, replay: bool) {
    assert_eq!((answer.status, answer.is_replay()), (201, replay), "{}", answer.text());
    assert_eq!(answer.body, b"RESPONSEBODY\0\xff");
    let lines: Vec<_> = answer.headers.get_all("x-set").iter().collect();
    assert_eq!(lines, ["HEADERVALUE 1", "HEADERVALUE 2"]);
}

/// What the store has for the last key that was asked for, as whoever reads the store sees it.
async fn assert_sealed(bench: &Bench) {
    let record = bench.store.last_record().await.unwrap();
    assert_hidden(&record.payload);
    assert_eq!(record.payload.first(), Some(&3), "{record:?}");
}

#[track_caller]
fn assert_hidden(bytes: &[u8]) {
    for secret in ["RESPONSEBODY", "HEADERVALUE", "STEPRESULT", "ISSUEDPAYLOAD", "RAWKEY"] {
        let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{secret} can be read");
    }
}

async fn an_answer_is_replayed_byte_for_byte(bench: Bench) {
    let (server, _) = process(&bench, ring()).await;
    assert_paid(&send(server.post("/pay", "k", "")).await, false);
    assert_sealed(&bench).await;
    let (another, _) = process(&bench, ring()).await;
    for server in [server, another] {
        assert_paid(&send(server.post("/pay", "k", "")).await, true);
        send(server.post("/pay", "k", "other")).await.assert_refused(422, "mismatch");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn a_rerun_finds_its_steps_and_what_was_issued(bench: Bench) {
    let (server, app) = process(&bench, ring()).await;
    let issue = async |engine: &Idempotency| {
        engine.issue(&NONCE, "a", "0a0b0c0d", "ISSUEDPAYLOAD".to_owned()).await.unwrap()
    };
    issue(&app.engine).await;
    assert_eq!(send(server.post("/withdraw", "0a0b0c0d", "fail")).await.status, 502);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(record.state, RecordState::Released);
    assert_sealed(&bench).await;
    let (server, app) = process(&bench, ring()).await;
    assert_eq!(issue(&app.engine).await, "ISSUEDPAYLOAD", "issuing again finds what was bound");
    assert_paid(&send(server.post("/withdraw", "0a0b0c0d", "fail")).await, false);
    assert_sealed(&bench).await;
    assert_paid(&send(server.post("/withdraw", "0a0b0c0d", "fail")).await, true);
    assert_eq!(bench.effects.count(), 1, "the step was taken once");
}

async fn duplicates_wait_for_the_answer(bench: Bench) {
    let (server, app) = process(&bench, ring()).await;
    let ask = |server: &Server| tokio::spawn(send(server.post("/pay", "k", "slow")));
    let owner = ask(&server);
    app.gate.begun().await;
    assert_sealed(&bench).await;
    let waiter = ask(&server);
    while bench.store.claims().len() < 2 {
        tokio::task::yield_now().await;
    }
    app.gate.end();
    assert_paid(&owner.await.unwrap(), false);
    assert_paid(&waiter.await.unwrap(), true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_late_owner_finds_the_answer_of_its_successor(bench: Bench) {
    let (server, app) = process(&bench, ring()).await;
    let owner = tokio::spawn(send(server.post("/pay", "k", "slow")));
    app.gate.begun().await;
    bench.pass(LAPSE);
    let (successor, _) = process(&bench, ring()).await;
    assert_paid(&send(successor.post("/pay", "k", "slow")).await, false);
    app.gate.end();
    assert_paid(&owner.await.unwrap(), true);
    assert_eq!(bench.effects.count(), 1, "the step was taken once");
}

async fn of_what_is_too_large_or_settled_otherwise_the_fact_is_sealed(bench: Bench) {
    let (server, _) = process(&bench, ring()).await;
    for body in ["much", "settle"] {
        assert_eq!(send(server.post("/pay", body, body)).await.status, 200);
        let record = bench.store.last_record().await.unwrap();
        assert!(record.flags.contains(Flags::TOMBSTONE));
        assert_sealed(&bench).await;
        send(server.post("/pay", body, body)).await.assert_refused(410, "not_replayable");
    }
    assert_eq!(bench.effects.count(), 2);
}

async fn keys_are_rotated_while_processes_are_replaced(bench: Bench) {
    let rings = [
        || KeyRing::new(1, &OLD),
        || KeyRing::new(1, &OLD).reads(2, &NEW),
        || KeyRing::new(2, &NEW).reads(1, &OLD),
        || KeyRing::new(2, &NEW),
    ];
    // While one deployment replaces the one before, each reads what the other writes.
    for pair in [[0, 1], [1, 2], [2, 3]] {
        let mut servers = Vec::new();
        for ring in pair {
            servers.push(process(&bench, rings[ring]()).await.0);
        }
        for (writer, reader) in [(0, 1), (1, 0)] {
            // The last ring has forgotten the old key: it reads what was sealed since.
            let key = format!("{pair:?} {writer}");
            assert_paid(&send(servers[writer].post("/pay", &key, "")).await, false);
            assert_paid(&send(servers[reader].post("/pay", &key, "")).await, true);
        }
    }
    assert_eq!(bench.effects.count(), 6);
}

/// Rings that cannot open what [`ring`] sealed, and what they say to that.
fn strangers() -> [(Option<KeyRing>, SealError); 3] {
    [
        (Some(KeyRing::new(2, &NEW)), SealError::UnknownKey(1)),
        (Some(KeyRing::new(1, &NEW)), SealError::Broken),
        (None, SealError::NoSeal),
    ]
}

/// Asserts that a request was refused because of its record, and that the observer knows why.
#[track_caller]
fn assert_unreadable(answer: &Answer, app: &App, why: &SealError) {
    answer.assert_refused(503, "record_unreadable");
    let told = app.remember.outcomes().pop();
    assert_eq!(told, Some(Outcome::Refused(RefusalKind::RecordUnreadable)));
    let error = app.errors.lock().unwrap().pop().unwrap();
    let expected = format!("idem: the record is damaged: the record's payload is damaged: {why}");
    assert_eq!(error, expected);
}

async fn an_answer_that_cannot_be_opened_is_refused_and_kept(bench: Bench) {
    let (server, _) = process(&bench, ring()).await;
    assert_paid(&send(server.post("/pay", "k", "")).await, false);
    let before = bench.store.last_record().await;
    for (ring, why) in strangers() {
        let (stranger, app) = process(&bench, ring).await;
        for _ in 0..2 {
            let refused = send(stranger.post("/pay", "k", "")).await;
            assert_unreadable(&refused, &app, &why);
        }
        // What needs no payload is told without it.
        send(stranger.post("/pay", "k", "other")).await.assert_refused(422, "mismatch");
    }
    assert_eq!(bench.store.last_record().await, before);
    assert_paid(&send(server.post("/pay", "k", "")).await, true);
    assert_eq!(bench.effects.count(), 1);
}

async fn an_attempt_whose_steps_cannot_be_opened_is_refused_and_they_are_kept(bench: Bench) {
    let (server, owner) = process(&bench, ring()).await;
    assert_eq!(send(server.post("/pay", "failed", "fail")).await.status, 502);
    let running = tokio::spawn(send(server.post("/pay", "running", "slow")));
    owner.gate.begun().await;
    for (ring, why) in strangers() {
        let (stranger, app) = process(&bench, ring).await;
        send(stranger.post("/pay", "failed", "other")).await.assert_refused(422, "mismatch");
        send(stranger.post("/pay", "running", "other")).await.assert_refused(422, "mismatch");
        let hasty = stranger.post("/pay", "running", "slow").header("prefer", "wait=0");
        send(hasty).await.assert_refused(409, "in_flight");
        for _ in 0..2 {
            let before = bench.store.claims().len();
            let refused = send(stranger.post("/pay", "failed", "fail")).await;
            assert_unreadable(&refused, &app, &why);
            assert!(bench.store.claims().len() > before);
            // The claim that was granted is given back, and nobody has to wait for its lease.
            assert!(app.engine.drain(Duration::from_secs(20)).await);
            assert_eq!(bench.store.last_record().await.unwrap().state, RecordState::Released);
            assert_sealed(&bench).await;
        }
    }
    owner.gate.end();
    assert_paid(&running.await.unwrap(), false);
    assert_paid(&send(server.post("/pay", "failed", "fail")).await, false);
    assert_eq!(bench.effects.count(), 2, "each step was taken once");
}

async fn an_issued_key_whose_payload_cannot_be_opened_is_refused_and_kept(bench: Bench) {
    let (server, app) = process(&bench, ring()).await;
    let issue = |engine: Idempotency| async move {
        engine.issue(&NONCE, "a", "0a0b0c0d", "ISSUEDPAYLOAD".to_owned()).await
    };
    issue(app.engine.clone()).await.unwrap();
    for (ring, why) in strangers() {
        let (stranger, app) = process(&bench, ring).await;
        let refused = send(stranger.post("/withdraw", "0a0b0c0d", "")).await;
        assert_unreadable(&refused, &app, &why);
        assert!(app.engine.drain(Duration::from_secs(20)).await);
        assert_eq!(bench.store.last_record().await.unwrap().state, RecordState::Issued);
        assert_sealed(&bench).await;
        match issue(app.engine.clone()).await {
            Err(IssueError::Store(error)) => {
                assert_eq!(error.kind(), StoreErrorKind::Corrupt);
                assert!(chain(&error).ends_with(&why.to_string()), "{}", chain(&error));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bench.effects.count(), 0);
    assert_paid(&send(server.post("/withdraw", "0a0b0c0d", "")).await, false);
}

async fn records_from_before_the_seal_are_read_only_where_that_is_said(bench: Bench) {
    let (before, _) = process(&bench, None).await;
    assert_paid(&send(before.post("/pay", "k", "")).await, false);
    assert_eq!(send(before.post("/pay", "failed", "fail")).await.status, 502);
    let (strict, app) = process(&bench, ring()).await;
    for (key, body) in [("k", ""), ("failed", "fail")] {
        let refused = send(strict.post("/pay", key, body)).await;
        assert_unreadable(&refused, &app, &SealError::Unsealed);
        assert!(app.engine.drain(Duration::from_secs(20)).await);
    }
    let (migrating, _) = process(&bench, ring().accept_unsealed()).await;
    assert_paid(&send(migrating.post("/pay", "k", "")).await, true);
    assert_paid(&send(migrating.post("/pay", "failed", "fail")).await, false);
    assert_sealed(&bench).await;
    assert_paid(&send(strict.post("/pay", "failed", "fail")).await, true);
    assert_eq!(bench.effects.count(), 2);
}

async fn a_retry_gets_the_redacted_answer(bench: Bench) {
    let redacting = || {
        bench.engine().redact(|answer| {
            answer.headers.retain(|(name, _)| name != "x-set");
            answer.body = "(redacted)".into();
        })
    };
    for (key, engine) in
        [("plain", redacting().build()), ("both", redacting().seal(ring()).build())]
    {
        let (server, _) = serve(&bench, engine, Remember::default(), Arc::default()).await;
        assert_paid(&send(server.post("/pay", key, "")).await, false);
        assert_hidden(&bench.store.last_record().await.unwrap().payload);
        let retry = send(server.post("/pay", key, "")).await;
        retry.assert_is(201, "(redacted)", true);
        assert_eq!(retry.header("x-set"), None);
    }
    assert_eq!(bench.effects.count(), 2);
}

async fn a_redaction_that_panics_leaves_a_tombstone(bench: Bench) {
    let engine = bench.engine().redact(|_| panic!("on purpose")).build();
    let (server, _) = serve(&bench, engine, Remember::default(), Arc::default()).await;
    assert_paid(&send(server.post("/pay", "k", "")).await, false);
    assert_hidden(&bench.store.last_record().await.unwrap().payload);
    send(server.post("/pay", "k", "")).await.assert_refused(410, "not_replayable");
    assert_eq!(bench.effects.count(), 1);
}

async fn open_database(file: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(file).connect().await.unwrap()
}

/// Everything that is on the disk: the file, its log, its index.
fn on_disk(file: &Path) -> Vec<u8> {
    let entries = std::fs::read_dir(file.parent().unwrap()).unwrap();
    entries.flat_map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
}

#[tokio::test]
async fn a_dump_of_the_database_shows_no_payload_and_no_key() {
    for is_sealed in [false, true] {
        let bench = Bench::in_sqlite().await;
        let (server, app) = process(&bench, is_sealed.then(ring)).await;
        let file = bench.file().unwrap();
        let mut dumps = Vec::new();
        app.engine.issue(&NONCE, "a", "0a0b0c0d", "ISSUEDPAYLOAD".to_owned()).await.unwrap();
        dumps.push(on_disk(&file));
        for (path, key, body) in [
            ("/pay", "RAWKEY 1", ""),
            ("/pay", "RAWKEY 2", "fail"),
            ("/pay", "RAWKEY 3", "much"),
            ("/pay", "RAWKEY 4", "settle"),
            ("/withdraw", "0a0b0c0d", "fail"),
            ("/withdraw", "0a0b0c0d", "fail"),
        ] {
            send(server.post(path, key, body)).await;
            dumps.push(on_disk(&file));
        }
        let running = tokio::spawn(send(server.post("/pay", "RAWKEY 5", "die")));
        while bench.effects.count() < 6 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        running.abort();
        let mut database = open_database(&file).await;
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut database).await.unwrap();
        dumps.push(on_disk(&file));
        let dump = dumps.concat();
        let holds = |text: &str| dump.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(holds("POST /withdraw"), "the dump is not all there");
        // Without a seal the same search finds it all, so it searches in the right place.
        for secret in ["RESPONSEBODY", "HEADERVALUE", "STEPRESULT", "ISSUEDPAYLOAD"] {
            assert_eq!(holds(secret), !is_sealed, "{secret}");
        }
        for secret in ["RAWKEY", "0a0b0c0d", "x-api-key"] {
            assert!(!holds(secret), "{secret}");
        }
    }
}

#[tokio::test]
async fn what_was_changed_in_the_database_is_refused_and_kept() {
    for (damage, why) in [
        // The answer of another key, which the other had for the same request.
        ("payload = (SELECT payload FROM idem_records WHERE key <> ?1)", SealError::Broken),
        ("payload = substr(payload, 1, length(payload) - 1)", SealError::Broken),
        ("payload = CAST(payload || x'00' AS BLOB)", SealError::Broken),
        ("payload = substr(payload, 1, 40)", SealError::Broken),
        ("payload = x'03'", SealError::Broken),
        ("payload = x'030100000001'", SealError::Broken),
        ("payload = x'030200000001'", SealError::UnknownScheme),
        ("payload = x'030100000009'", SealError::UnknownKey(9)),
        ("payload = x'0100C800000000'", SealError::Unsealed),
        ("payload = x''", SealError::Unsealed),
    ] {
        let bench = Bench::in_sqlite().await;
        let (server, app) = process(&bench, ring()).await;
        for key in ["other", "k"] {
            assert_paid(&send(server.post("/pay", key, "")).await, false);
        }
        let mut database = open_database(&bench.file().unwrap()).await;
        let key = bench.store.last_claim().key;
        let update = format!("UPDATE idem_records SET {damage} WHERE key = ?1");
        let update = sqlx::query(sqlx::AssertSqlSafe(update)).bind(key.as_bytes().to_vec());
        assert_eq!(update.execute(&mut database).await.unwrap().rows_affected(), 1, "{damage}");
        let damaged = bench.store.read(&key).await.unwrap();
        for _ in 0..2 {
            assert_unreadable(&send(server.post("/pay", "k", "")).await, &app, &why);
        }
        assert_eq!(bench.store.read(&key).await.unwrap(), damaged, "{damage}");
        assert_paid(&send(server.post("/pay", "other", "")).await, true);
        assert_eq!(bench.effects.count(), 2, "{damage}");
    }
}
