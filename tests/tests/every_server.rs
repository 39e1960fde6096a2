//! Look-up, operators, steps, issued keys, sealing and waiting across processes, on every server.

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
    extract::{FromRef, State},
    http::{self, Method, Request, StatusCode},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use http_body_util::BodyExt;
use idem_runtime::{
    Anchor, Became, Builder, Idempotency, Issued, KeyName, KeyRing, Operation, Scope, Scoped,
    idempotent,
    store::{Clock, Kind, Listing, MySqlStore, PostgresStore, RedisStore, ReplayCache, Store},
};
use tests::{
    servers::{
        mariadb::MariaDb,
        postgres::Postgres,
        redis::{Cluster, Redis},
    },
    stores::TestStore,
};
use tokio::sync::Semaphore;
use tower::ServiceExt;

const KEY: Anchor = Anchor::header("Idempotency-Key");
const VOUCHER: Anchor = KEY.space("vouchers").ttl(Duration::from_secs(600));

/// An application in one process: an engine with its own connections.
#[derive(Clone, Debug)]
struct App {
    engine: Idempotency,
    taken: Arc<AtomicUsize>,
    go_on: Arc<Semaphore>,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

/// Takes one step, and fails after it the first time.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn stepwise(State(app): State<App>, operation: Operation, body: String) -> Response {
    let step = operation.step("one", async {
        app.taken.fetch_add(1, Ordering::SeqCst);
        Ok::<_, std::io::Error>(format!("secret of {body}"))
    });
    let said = step.await.expect("a step");
    let status = match operation.attempt() {
        1 => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::CREATED,
    };
    answer(status, said)
}

#[idempotent(anchor = VOUCHER, issued)]
async fn redeem(voucher: Issued<String>, body: String) -> Response {
    answer(StatusCode::CREATED, format!("{body} for {}", voucher.payload().expect("a payload")))
}

/// Fails for good: what it did is unknown.
#[idempotent(anchor = header("Idempotency-Key"), on_unknown = refuse)]
async fn vague(_: String) -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}

#[idempotent(anchor = header("Idempotency-Key"), in_flight = wait("20s"))]
async fn slow(State(app): State<App>, body: String) -> String {
    app.go_on.acquire().await.expect("open").forget();
    format!("slow {body}")
}

fn answer(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response
}

fn app(store: impl Store, build: fn(Builder<Scoped>) -> Builder<Scoped>) -> (App, Router) {
    let builder = Idempotency::builder(store).scope(Scope::header("X-API-Key"));
    app_of(build(builder).build())
}

fn app_of(engine: Idempotency) -> (App, Router) {
    let app = App { engine, taken: Arc::default(), go_on: Arc::new(Semaphore::new(0)) };
    let router = Router::new()
        .route("/stepwise", post(stepwise))
        .route("/redeem", post(redeem))
        .route("/vague", post(vague))
        .route("/slow", post(slow))
        .with_state(app.clone());
    (app, router)
}

async fn send(router: &Router, path: &str, key: &str, body: &str) -> (u16, bool, String) {
    let request = Request::post(path)
        .header("X-API-Key", "alice")
        .header("Idempotency-Key", key)
        .body(Body::from(body.to_owned()));
    let answer = router.clone().oneshot(request.expect("a request")).await.expect("an answer");
    let (status, replayed) =
        (answer.status().as_u16(), answer.headers().contains_key("idempotent-replayed"));
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    (status, replayed, String::from_utf8_lossy(&body).into_owned())
}

fn name(path: &str, key: &str) -> KeyName {
    KeyName::of(&KEY, key).operation(&Method::POST, path, [""; 0])
}

fn sealed(builder: Builder<Scoped>) -> Builder<Scoped> {
    builder.secret(b"a secret of at least thirty-two bytes").seal(KeyRing::new(1, &[7; 32]))
}

/// All of it, in two processes over one store, sealed.
async fn everything(here: impl Store, there: impl Store, bare: impl Store) {
    let ((here, at_here), (there, at_there)) = (app(here, sealed), app(there, sealed));

    // Steps outlive an attempt that failed in another process.
    assert_eq!(send(&at_here, "/stepwise", "s", "a").await.0, 500);
    let done = send(&at_there, "/stepwise", "s", "a").await;
    assert_eq!(done, (201, false, "secret of a".into()));
    assert_eq!(here.taken.load(Ordering::SeqCst) + there.taken.load(Ordering::SeqCst), 1);
    assert_eq!(send(&at_here, "/stepwise", "s", "a").await, (201, true, "secret of a".into()));
    assert_eq!(send(&at_here, "/stepwise", "s", "b").await.0, 422);

    // Issued keys, with what is bound to them.
    here.engine.issue(&VOUCHER, "alice", "v-1", "ten euros".to_owned()).await.expect("issued");
    assert_eq!(send(&at_there, "/redeem", "v-2", "x").await.0, 400, "nobody issued it");
    let redeemed = send(&at_there, "/redeem", "v-1", "x").await;
    assert_eq!(redeemed, (201, false, "x for ten euros".into()));
    assert!(send(&at_here, "/redeem", "v-1", "x").await.1);

    // Look-up, only for whose it is.
    let look_up = there.engine.look_up("alice");
    let found = look_up.key(&name("/stepwise", "s")).await.expect("an answer").expect("a record");
    assert!(matches!(found.became, Became::Completed(_)), "{found:?}");
    let id = found.record.operation_id;
    assert!(look_up.operation(id).await.expect("an answer").is_some());
    let strangers = there.engine.look_up("bob");
    assert!(strangers.operation(id).await.expect("an answer").is_none());

    // Operators.
    assert_eq!(send(&at_here, "/vague", "u", "a").await.0, 500);
    assert!(send(&at_there, "/vague", "u", "a").await.2.contains("unknown_outcome"));
    let admin = there.engine.admin();
    let scope = Some(admin.scope("alice"));
    let listing = Listing { kind: Kind::Unsettled, scope, after: None, limit: 10 };
    let page = admin.list(&listing).await.expect("a listing");
    let [record] = &page.records[..] else { panic!("one is unsettled: {page:?}") };
    let told = http::Response::builder().status(202).body(Bytes::from_static(b"it was done"));
    let told = told.expect("a response");
    let ttl = Duration::from_secs(600);
    admin.settle_done(record.operation_id, &told, ttl).await.expect("settled");
    assert_eq!(send(&at_here, "/vague", "u", "a").await, (202, true, "it was done".into()));

    // Without the ring, nothing that was stored can be read.
    let (bare, at_bare) =
        app(bare, |builder| builder.secret(b"a secret of at least thirty-two bytes"));
    let (status, _, body) = send(&at_bare, "/stepwise", "s", "a").await;
    assert_eq!((status, body.contains("record_unreadable")), (503, true), "{body}");
    let record = bare.engine.store().read(&found.record.key).await.expect("a store");
    let payload = record.expect("a record").payload;
    assert!(!payload.windows(6).any(|window| window == b"secret"));

    // Who waits in one process hears of the owner in the other.
    let router = at_here.clone();
    let owner = tokio::spawn(async move { send(&router, "/slow", "w", "a").await });
    while here.engine.look_up("alice").key(&name("/slow", "w")).await.expect("asked").is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let router = at_there.clone();
    let waiter = tokio::spawn(async move { send(&router, "/slow", "w", "a").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    here.go_on.add_permits(1);
    assert_eq!(owner.await.expect("an owner"), (200, false, "slow a".into()));
    assert_eq!(waiter.await.expect("a waiter"), (200, true, "slow a".into()));

    // A tenant leaves.
    let purged = here.engine.admin().purge_scope("alice").await.expect("purged");
    assert_eq!((purged.removed, purged.running), (4, 0));
    assert!(look_up.operation(id).await.expect("an answer").is_none());
}

/// What two processes have at hand, of what is sealed.
async fn at_hand(here: impl Store, there: impl Store) {
    let clock = Clock::manual();
    let (here, there) = (TestStore::new(here), TestStore::new(there));
    let process = |store: &TestStore| {
        let cache = ReplayCache::new().clock(clock.clone());
        let builder = Idempotency::builder(store.clone()).scope(Scope::header("X-API-Key"));
        app_of(sealed(builder).replay_cache(cache).build())
    };
    let ((one, at_one), (other, at_other)) = (process(&here), process(&there));
    for app in [&one, &other] {
        app.go_on.add_permits(10);
    }
    let asked = || (here.claims().len(), there.claims().len());
    let slow = |replayed, number| (200, replayed, format!("slow {number}"));

    for (replayed, claims) in [(false, 1), (true, 2), (true, 2)] {
        assert_eq!(send(&at_one, "/slow", "h", "1").await, slow(replayed, 1));
        assert_eq!(asked(), (claims, 0));
    }
    for claims in [1, 1] {
        assert_eq!(send(&at_other, "/slow", "h", "1").await, slow(true, 1));
        assert_eq!(asked(), (2, claims));
    }
    for claims in [3, 4] {
        assert_eq!(send(&at_one, "/slow", "h", "2").await.0, 422);
        assert_eq!(asked().0, claims);
    }

    // Purged in the one, it is known in the other for a while.
    let purged = one.engine.admin().purge(&"alice", &name("/slow", "h")).await.expect("purged");
    assert_eq!(purged.removed, 1);
    assert_eq!(send(&at_one, "/slow", "h", "2").await, slow(false, 2));
    clock.advance(Duration::from_millis(9_999));
    assert_eq!(send(&at_other, "/slow", "h", "1").await, slow(true, 1));
    clock.advance(Duration::from_millis(1));
    assert_eq!(send(&at_other, "/slow", "h", "1").await.0, 422);
    assert_eq!(send(&at_other, "/slow", "h", "2").await, slow(true, 2));
}

#[tokio::test]
async fn on_postgres() {
    let database = Postgres::shared().database().await;
    let open = async || PostgresStore::connect(database.url()).await.expect("a store");
    open().await.create_schema().await.expect("tables");
    everything(open().await, open().await, open().await).await;
    at_hand(open().await, open().await).await;
}

#[tokio::test]
async fn on_mariadb() {
    let database = MariaDb::shared().database().await;
    let open = async || MySqlStore::connect(database.url()).await.expect("a store");
    open().await.create_schema().await.expect("tables");
    everything(open().await, open().await, open().await).await;
    at_hand(open().await, open().await).await;
}

#[tokio::test]
async fn on_redis() {
    let url = Redis::shared().url();
    let open = async || RedisStore::builder().prefix("every:").connect(url).await.expect("a store");
    everything(open().await, open().await, open().await).await;
    at_hand(open().await, open().await).await;
}

#[tokio::test]
async fn on_a_redis_cluster() {
    let urls = Cluster::shared().urls();
    let open = async || {
        RedisStore::builder().prefix("every:").cluster(urls.clone()).await.expect("a store")
    };
    everything(open().await, open().await, open().await).await;
    at_hand(open().await, open().await).await;
}
