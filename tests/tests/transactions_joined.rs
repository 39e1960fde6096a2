//! Transactional handlers together with layers, seals and redaction.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Method, Request, StatusCode},
    response::Response,
    routing::post,
};
use http_body_util::BodyExt;
use idem_runtime::{
    Anchor, Builder, Idempotency, IdempotentExt, InFlight, KeyName, KeyRing, Operation, Policy,
    Scope, Scoped, Settle, Tx, store::SqliteStore,
};
use sqlx::{
    Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tempfile::TempDir;
use tokio::sync::{Notify, Semaphore};
use tower::ServiceExt;

const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key")).transaction();

/// A bank with one table, and a handler that adds one row for each request that it does.
struct Bank {
    pool: SqlitePool,
    idem: Idempotency,
    shop: Arc<Counter>,
    app: Router,
    _directory: TempDir,
}

/// What the handler is told by its requests, and what it can be held at.
#[derive(Debug)]
struct Counter {
    runs: AtomicUsize,
    reached: Notify,
    go_on: Semaphore,
    kept: std::sync::Mutex<Option<Tx<Sqlite>>>,
}

#[derive(Clone, Debug)]
struct App {
    idem: Idempotency,
    counter: Arc<Counter>,
}

impl axum::extract::FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.idem.clone()
    }
}

async fn deposit(
    State(app): State<App>,
    operation: Operation,
    mut tx: Tx<Sqlite>,
    body: String,
) -> (StatusCode, Settle, String) {
    let run = app.counter.runs.fetch_add(1, Ordering::SeqCst) + 1;
    let id = operation.id().to_string();
    sqlx::query("INSERT INTO deposits (what, operation) VALUES (?1, ?2)")
        .bind(&body)
        .bind(&id)
        .execute(&mut *tx)
        .await
        .expect("a row");
    let recorded = Settle::recorded();
    match body.as_str() {
        "fails" => (StatusCode::INTERNAL_SERVER_ERROR, Settle::for_time(DAY), "failed".into()),
        "refuses" => (StatusCode::CONFLICT, Settle::for_time(DAY), "refused".into()),
        "refuses for good" => (StatusCode::CONFLICT, recorded, "refused".into()),
        "refuses and keeps" => (StatusCode::CONFLICT, recorded.keeping_effects(), id),
        "takes it back" => (StatusCode::OK, Settle::forgotten(), "nothing happened".into()),
        "does not know" => (StatusCode::OK, Settle::uncertain(), "who knows".into()),
        "panics" => panic!("as told"),
        "waits" => {
            app.counter.reached.notify_one();
            app.counter.go_on.acquire().await.expect("open").forget();
            (StatusCode::CREATED, Settle::for_time(DAY), format!("run {run}"))
        }
        "keeps" => {
            *app.counter.kept.lock().expect("a lock") = Some(tx);
            (StatusCode::CREATED, Settle::for_time(DAY), "kept".into())
        }
        "breaks" => {
            let broken = sqlx::query("INSERT INTO nowhere VALUES (1)").execute(&mut *tx).await;
            assert!(broken.is_err());
            (StatusCode::BAD_REQUEST, Settle::for_time(DAY), "broken".into())
        }
        "nests" => {
            use sqlx::Connection as _;
            let mut inner = tx.begin().await.expect("a savepoint");
            let more = sqlx::query("INSERT INTO deposits (what) VALUES ('inner')");
            more.execute(&mut *inner).await.expect("a row");
            inner.rollback().await.expect("a rollback");
            (StatusCode::CREATED, Settle::for_time(DAY), "nested".into())
        }
        "steps" => {
            let step = operation.step("one", async { Ok::<_, std::io::Error>(1) }).await;
            let said = step.expect_err("no steps").to_string();
            (StatusCode::CREATED, Settle::for_time(DAY), said)
        }
        _ => (StatusCode::CREATED, Settle::for_time(DAY), format!("run {run}")),
    }
}

const DAY: idem_runtime::Ttl = idem_runtime::Ttl::For(Duration::from_secs(24 * 60 * 60));

impl Bank {
    /// With an engine of the test's own, and a layer around the handler.
    async fn under(
        policy: Policy,
        build: impl FnOnce(Builder<Scoped>) -> Builder<Scoped>,
        layer: Option<Policy>,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let options = SqliteConnectOptions::new()
            .filename(directory.path().join("bank.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePool::connect_with(options).await.expect("a database");
        SqliteStore::create_tables(&pool).await.expect("tables");
        sqlx::raw_sql("CREATE TABLE deposits (what TEXT NOT NULL, operation TEXT)")
            .execute(&pool)
            .await
            .expect("a table");
        let counter = Arc::new(Counter {
            runs: AtomicUsize::new(0),
            reached: Notify::new(),
            go_on: Semaphore::new(0),
            kept: std::sync::Mutex::default(),
        });
        let store = SqliteStore::from_pool(pool.clone()).await.expect("a store");
        let idem = build(Idempotency::builder(store).scope(Scope::global())).build();
        let app = App { idem: idem.clone(), counter: Arc::clone(&counter) };
        let mut app = Router::new().route("/", post(deposit.idempotent(policy))).with_state(app);
        if let Some(layer) = layer {
            app = app.layer(idem.layer(layer));
        }
        Self { pool, idem, shop: counter, app, _directory: directory }
    }

    async fn send(&self, key: &str, body: &str) -> (StatusCode, bool, String) {
        told(self.ask(Some(key), body).await).await
    }

    fn ask(&self, key: Option<&str>, body: &str) -> impl Future<Output = Response> + Send + use<> {
        let mut request = Request::post("/");
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let request = request.body(Body::from(body.to_owned())).expect("a request");
        let app = self.app.clone();
        async move { app.oneshot(request).await.expect("an answer") }
    }

    async fn deposits(&self) -> i64 {
        let count = sqlx::query_scalar("SELECT count(*) FROM deposits");
        count.fetch_one(&self.pool).await.expect("a count")
    }

    async fn records(&self) -> i64 {
        let count = sqlx::query_scalar("SELECT count(*) FROM idem_records");
        count.fetch_one(&self.pool).await.expect("a count")
    }

    fn runs(&self) -> usize {
        self.shop.runs.load(Ordering::SeqCst)
    }
}

async fn told(response: Response) -> (StatusCode, bool, String) {
    let status = response.status();
    let replayed = response.headers().contains_key("idempotent-replayed");
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, replayed, String::from_utf8_lossy(&body).into_owned())
}

const KEY: Anchor = Anchor::header("Idempotency-Key");

#[tokio::test]
async fn behind_a_layer_each_has_a_record_of_its_own() {
    let bank = Bank::under(POLICY, |engine| engine, Some(Policy::new(KEY))).await;
    let first = bank.send("k", "a").await;
    assert_eq!(first, (StatusCode::CREATED, false, "run 1".into()));
    assert_eq!((bank.deposits().await, bank.records().await), (1, 2));
    assert_eq!(bank.send("k", "a").await, (StatusCode::CREATED, true, "run 1".into()));
    // As after a crash between the commit and the layer's record.
    let name = KeyName::of(&KEY, "k").operation(&Method::POST, "/", [""; 0]).of_layer();
    let admin = bank.idem.admin();
    assert_eq!(admin.purge(&(), &name).await.expect("purged").removed, 1);
    assert_eq!(bank.send("k", "a").await, (StatusCode::CREATED, true, "run 1".into()));
    assert_eq!((bank.deposits().await, bank.runs()), (1, 1));

    // What was rolled back leaves the layer's claim free, too: it is run again.
    for _ in 0..2 {
        let (status, _, body) = bank.send("l", "keeps").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(body.contains("transaction_failed"), "{body}");
        drop(bank.shop.kept.lock().expect("a lock").take());
    }
    assert_eq!(bank.send("l", "again").await.0, StatusCode::CREATED);
    assert_eq!(bank.deposits().await, 2);
}

/// Its effects would be committed before the layer's record: a crash in between would repeat them.
#[tokio::test]
async fn under_a_layers_record_a_transaction_does_not_run() {
    let (of_engine, of_both) = (POLICY, POLICY.space("money"));
    for (policy, layer) in [(of_engine, KEY), (of_both, KEY.space("money"))] {
        let bank = Bank::under(policy, |engine| engine.space("api"), Some(layer.into())).await;
        // Where both are in the engine's space, or in one of their own.
        for _ in 0..2 {
            let (status, _, body) = bank.send("k", "a").await;
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
            assert!(body.contains("transaction_failed"), "{body}");
        }
        assert_eq!((bank.runs(), bank.deposits().await, bank.records().await), (0, 0, 0));
    }
    let apart = POLICY.space("deposits");
    let bank = Bank::under(apart, |engine| engine.space("api"), Some(KEY.into())).await;
    assert_eq!(bank.send("k", "a").await.0, StatusCode::CREATED);
    assert_eq!((bank.deposits().await, bank.records().await), (1, 2));
}

#[tokio::test]
async fn what_is_committed_is_sealed_and_redacted() {
    let sealed = |engine: Builder<Scoped>| engine.seal(KeyRing::new(1, &[7; 32]));
    let redacted = |engine: Builder<Scoped>| {
        sealed(engine).redact(|answer| answer.headers.retain(|(name, _)| name != "content-type"))
    };
    let wait = InFlight::Wait(Duration::from_secs(20));
    let bank = Bank::under(POLICY.in_flight(wait), redacted, None).await;
    let running = tokio::spawn(bank.ask(Some("k"), "waits"));
    bank.shop.reached.notified().await;
    let waiter = tokio::spawn(bank.ask(Some("k"), "waits"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    bank.shop.go_on.add_permits(1);
    let first = running.await.expect("an owner");
    assert!(first.headers().contains_key("content-type"));
    for replay in [waiter.await.expect("a waiter"), bank.ask(Some("k"), "waits").await] {
        assert!(!replay.headers().contains_key("content-type"));
        assert_eq!(told(replay).await, (StatusCode::CREATED, true, "run 1".into()));
    }
    bank.send("l", "refuses for good").await;
    assert!(bank.send("l", "refuses for good").await.1, "an error that was recorded alone");
    let payloads: Vec<Vec<u8>> = sqlx::query_scalar("SELECT payload FROM idem_records")
        .fetch_all(&bank.pool)
        .await
        .expect("payloads");
    assert_eq!(payloads.len(), 2);
    for payload in payloads {
        for plain in [&b"run 1"[..], b"refused"] {
            assert!(!payload.windows(plain.len()).any(|window| window == plain));
        }
    }

    // Without the ring, an answer is neither given nor made again.
    let store = SqliteStore::from_pool(bank.pool.clone()).await.expect("a store");
    let idem = Idempotency::builder(store).scope(Scope::global()).build();
    let state = App { idem, counter: Arc::clone(&bank.shop) };
    let app = Router::new().route("/", post(deposit.idempotent(POLICY))).with_state(state);
    let bank = Bank { app, ..bank };
    let (status, _, body) = bank.send("k", "waits").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    assert!(body.contains("record_unreadable"), "{body}");
    assert_eq!((bank.deposits().await, bank.runs()), (1, 2));
}
