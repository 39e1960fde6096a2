//! A bank with one table in a database, and a handler that adds one row for each request that it
//! does.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{FromRef, State},
    http::{Request, StatusCode},
    response::Response,
    routing::post,
};
use http_body_util::BodyExt;
use idem_runtime::{
    Anchor, Builder, Idempotency, IdempotentExt, Operation, Policy, Scope, Scoped, Settle, Ttl, Tx,
    store::Store,
};
use sqlx::Connection as _;
use tokio::sync::{Notify, Semaphore};
use tower::ServiceExt;

pub const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key")).transaction();
pub const DAY: Ttl = Ttl::For(Duration::from_secs(24 * 60 * 60));
/// Beyond this a test has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

type Connection<B> = <<B as Base>::Database as sqlx::Database>::Connection;

/// A database, empty but for idem's tables.
pub trait Base: Clone + fmt::Debug + Send + Sync + 'static {
    type Database: sqlx::Database;
    /// Whether others can write while a transaction is open.
    const SEVERAL_WRITERS: bool = true;

    /// A database with a pool of so many connections.
    fn open(connections: u32) -> impl Future<Output = Self> + Send;
    /// Where another process finds it.
    fn url(&self) -> String;
    /// The same database, as another process has it.
    fn beside(&self) -> impl Future<Output = Self> + Send;
    fn store(&self) -> impl Future<Output = impl Store> + Send;
    fn connection(&self)
    -> impl Future<Output = sqlx::pool::PoolConnection<Self::Database>> + Send;

    fn execute(
        connection: &mut Connection<Self>,
        sql: String,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    fn number(
        connection: &mut Connection<Self>,
        sql: String,
    ) -> impl Future<Output = Result<i64, sqlx::Error>> + Send;
}

/// What is the same in all databases but for the types.
#[macro_export]
macro_rules! statements {
    ($database:ty, $connection:ty) => {
        type Database = $database;

        async fn connection(&self) -> sqlx::pool::PoolConnection<$database> {
            self.pool.acquire().await.expect("a connection")
        }

        async fn execute(connection: &mut $connection, sql: String) -> Result<(), sqlx::Error> {
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await.map(drop)
        }

        async fn number(connection: &mut $connection, sql: String) -> Result<i64, sqlx::Error> {
            let row = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).fetch_one(connection).await?;
            sqlx::Row::try_get(&row, 0)
        }
    };
}

/// What the handlers are told by their requests, and what they can be held at.
#[derive(Debug)]
pub struct Counter<B: Base> {
    runs: AtomicUsize,
    pub reached: Notify,
    pub go_on: Semaphore,
    pub kept: Mutex<Option<Tx<B::Database>>>,
}

#[derive(Clone, Debug)]
pub struct App<B: Base> {
    pub idem: Idempotency,
    pub counter: Arc<Counter<B>>,
    pub base: B,
}

impl<B: Base> FromRef<App<B>> for Idempotency {
    fn from_ref(app: &App<B>) -> Self {
        app.idem.clone()
    }
}

impl<B: Base> App<B> {
    pub async fn wait(&self) {
        self.counter.reached.notify_one();
        self.counter.go_on.acquire().await.expect("open").forget();
    }
}

pub async fn insert<B: Base>(
    connection: &mut Connection<B>,
    what: &str,
) -> Result<(), sqlx::Error> {
    B::execute(connection, format!("INSERT INTO deposits (what) VALUES ('{what}')")).await
}

async fn deposit<B: Base>(
    State(app): State<App<B>>,
    operation: Operation,
    mut tx: Tx<B::Database>,
    body: String,
) -> (StatusCode, Settle, String) {
    let run = app.counter.runs.fetch_add(1, Ordering::SeqCst) + 1;
    let id = operation.id().to_string();
    insert::<B>(&mut tx, &body).await.expect("a row");
    let (made, recorded) = (Settle::for_time(DAY), Settle::recorded());
    let numbered = (StatusCode::CREATED, made.clone(), format!("run {run}"));
    match body.as_str() {
        "fails" => (StatusCode::INTERNAL_SERVER_ERROR, made, "failed".into()),
        "refuses" => (StatusCode::CONFLICT, made, "refused".into()),
        "refuses for good" => (StatusCode::CONFLICT, recorded, "refused".into()),
        "refuses and keeps" => (StatusCode::CONFLICT, recorded.keeping_effects(), id),
        "panics" => panic!("as told"),
        "waits" => {
            app.wait().await;
            numbered
        }
        "waits and goes on" => {
            app.wait().await;
            // Whether it works or not is not what this handler looks at.
            let _ = insert::<B>(&mut tx, "more").await;
            numbered
        }
        "keeps" => {
            *app.counter.kept.lock().expect("a lock") = Some(tx);
            (StatusCode::CREATED, made, "kept".into())
        }
        "breaks" => {
            let broken = B::execute(&mut tx, "INSERT INTO nowhere VALUES (1)".into()).await;
            assert!(broken.is_err());
            (StatusCode::BAD_REQUEST, made, "broken".into())
        }
        "breaks and says nothing" | "breaks and refuses for good" => {
            let broken = B::execute(&mut tx, "INSERT INTO nowhere VALUES (1)".into()).await;
            assert!(broken.is_err());
            match body.as_str() {
                "breaks and says nothing" => numbered,
                _ => (StatusCode::CONFLICT, recorded, "refused".into()),
            }
        }
        "commits" => {
            B::execute(&mut tx, "COMMIT".into()).await.expect("a commit");
            numbered
        }
        "defines a table" => {
            let table = "CREATE TABLE more (n INTEGER)";
            B::execute(&mut tx, table.into()).await.expect("a table");
            numbered
        }
        "rolls back" => {
            B::execute(&mut tx, "ROLLBACK".into()).await.expect("a rollback");
            numbered
        }
        "nests" => {
            let mut inner = tx.begin().await.expect("a savepoint");
            insert::<B>(&mut inner, "inner").await.expect("a row");
            inner.rollback().await.expect("a rollback");
            (StatusCode::CREATED, made, "nested".into())
        }
        "steps" => {
            let step = operation.step("one", async { Ok::<_, std::io::Error>(1) }).await;
            let said = step.expect_err("no steps").to_string();
            (StatusCode::CREATED, made, said)
        }
        _ => numbered,
    }
}

/// The same in a statement of its own, without a transaction.
async fn deposit_at_once<B: Base>(State(app): State<App<B>>, body: String) -> (StatusCode, String) {
    let run = app.counter.runs.fetch_add(1, Ordering::SeqCst) + 1;
    insert::<B>(&mut *app.base.connection().await, &body).await.expect("a row");
    if body == "waits" {
        app.wait().await;
    }
    (StatusCode::CREATED, format!("at once, run {run}"))
}

/// A process of the bank.
pub struct Bank<B: Base> {
    pub base: B,
    pub app: App<B>,
    router: Router,
}

impl<B: Base> Bank<B> {
    pub async fn open() -> Self {
        Self::with(POLICY).await
    }

    pub async fn with(policy: Policy) -> Self {
        Self::on(B::open(5).await, policy).await
    }

    /// In a database that has no tables of the bank's yet.
    pub async fn on(base: B, policy: Policy) -> Self {
        let table = "CREATE TABLE deposits (what VARCHAR(100) NOT NULL)";
        B::execute(&mut *base.connection().await, table.into()).await.expect("a table");
        Self::again(base, policy, |engine| engine).await
    }

    /// Another process of the same bank.
    pub async fn beside(&self, policy: Policy) -> Self {
        Self::again(self.base.beside().await, policy, |engine| engine).await
    }

    pub async fn again(
        base: B,
        policy: Policy,
        build: impl FnOnce(Builder<Scoped>) -> Builder<Scoped>,
    ) -> Self {
        let counter = Arc::new(Counter {
            runs: AtomicUsize::new(0),
            reached: Notify::new(),
            go_on: Semaphore::new(0),
            kept: Mutex::default(),
        });
        let engine = Idempotency::builder(base.store().await).scope(Scope::global());
        let app = App { idem: build(engine).build(), counter, base: base.clone() };
        let at_once = Policy::new(Anchor::header("Idempotency-Key"));
        let router = Router::new()
            .route("/", post(deposit::<B>.idempotent(policy)))
            .route("/at-once", post(deposit_at_once::<B>.idempotent(at_once.space("deposits"))))
            .with_state(app.clone());
        Self { base, app, router }
    }

    pub async fn send(&self, key: &str, body: &str) -> (StatusCode, bool, String) {
        told(self.ask(Some(key), body).await).await
    }

    pub fn ask(
        &self,
        key: Option<&str>,
        body: &str,
    ) -> impl Future<Output = Response> + Send + use<B> {
        self.ask_at("/", key, body)
    }

    pub fn ask_at(
        &self,
        route: &str,
        key: Option<&str>,
        body: &str,
    ) -> impl Future<Output = Response> + Send + use<B> {
        let mut request = Request::post(route);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let request = request.body(Body::from(body.to_owned())).expect("a request");
        let router = self.router.clone();
        async move { router.oneshot(request).await.expect("an answer") }
    }

    async fn count(&self, table: &str) -> i64 {
        let count = format!("SELECT count(*) FROM {table}");
        B::number(&mut *self.base.connection().await, count).await.expect("a count")
    }

    pub async fn deposits(&self) -> i64 {
        self.count("deposits").await
    }

    pub async fn records(&self) -> i64 {
        self.count("idem_records").await
    }

    pub async fn counts(&self) -> (i64, i64) {
        (self.deposits().await, self.records().await)
    }

    pub fn runs(&self) -> usize {
        self.app.counter.runs.load(Ordering::SeqCst)
    }

    /// A request that has got as far as its handler, which waits.
    pub async fn running(&self, key: &str, body: &str) -> tokio::task::JoinHandle<Response> {
        let running = tokio::spawn(self.ask(Some(key), body));
        self.app.counter.reached.notified().await;
        running
    }

    pub fn go_on(&self) {
        self.app.counter.go_on.add_permits(1);
    }
}

pub async fn told(response: Response) -> (StatusCode, bool, String) {
    let status = response.status();
    let replayed = response.headers().contains_key("idempotent-replayed");
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, replayed, String::from_utf8_lossy(&body).into_owned())
}

/// A refusal of this kind.
#[track_caller]
pub fn assert_refused(answer: &(StatusCode, bool, String), status: u16, kind: &str) {
    assert_eq!(answer.0.as_u16(), status, "{answer:?}");
    assert!(answer.2.contains(kind), "{answer:?}");
}

/// All different answers.
pub async fn different(
    answers: impl IntoIterator<Item = tokio::task::JoinHandle<Response>>,
) -> HashSet<(StatusCode, bool, String)> {
    let mut different = HashSet::new();
    for answer in answers {
        different.insert(told(answer.await.expect("an answer")).await);
    }
    different
}
