//! Who is compared: the same small handler, each time made safe to retry by somebody else. A
//! contender is one entry of [`CONTENDERS`] and the function that makes its router.

use axum::{Json, Router, http::StatusCode, routing::post};
use bench::{
    databases::{Kind, mariadb_pool, postgres_pool},
    order::{Order, Receipt},
};
use futures_util::future::BoxFuture;
use idem_runtime::{
    Builder, Idempotency, Scope, Scoped, Tx, idempotent,
    store::{MemoryStore, MySqlStore, PostgresStore, RedisStore, SqliteStore, Store},
};
use sqlx::Postgres;

use crate::{by_hand, server};

/// A contender, and what is expected of it.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// What it needs.
    pub(crate) database: Option<Kind>,
    /// Its routes, over a database of this URL; over files in this directory, if it needs none.
    pub(crate) app: fn(String) -> BoxFuture<'static, Router>,
    /// What becomes of a repeated request.
    pub(crate) repeated: Repeated,
    /// The status for another request under the same key, and for one that is still running; `None`
    /// where it does not notice.
    pub(crate) mismatch: Option<u16>,
    pub(crate) in_flight: Option<u16>,
    /// Whether its records belong to sessions.
    pub(crate) sessions: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeated {
    /// It runs again.
    Runs,
    /// It gets the recorded answer.
    Replayed,
}

const IDEM: Contender = Contender {
    name: "",
    database: None,
    app: |_| Box::pin(async { bare() }),
    repeated: Repeated::Replayed,
    mismatch: Some(422),
    in_flight: Some(409),
    sessions: false,
};

pub(crate) const CONTENDERS: &[Contender] = &[
    Contender {
        name: "bare axum",
        repeated: Repeated::Runs,
        mismatch: None,
        in_flight: None,
        ..IDEM
    },
    Contender { name: "memory", app: |_| Box::pin(memory()), ..IDEM },
    #[cfg(feature = "peers")]
    Contender {
        name: "idempotent",
        app: |_| Box::pin(async { crate::peers::idempotent() }),
        mismatch: Some(400),
        ..IDEM
    },
    #[cfg(feature = "peers")]
    Contender {
        name: "axum-idempotent",
        app: |_| Box::pin(async { crate::peers::axum_idempotent() }),
        mismatch: None,
        in_flight: None,
        sessions: true,
        ..IDEM
    },
    Contender { name: "sqlite", app: |directory| Box::pin(sqlite(directory)), ..IDEM },
    Contender {
        name: "redis",
        database: Some(Kind::Redis),
        app: |url| Box::pin(redis(url)),
        ..IDEM
    },
    Contender {
        name: "mariadb",
        database: Some(Kind::MariaDb),
        app: |url| Box::pin(mariadb(url)),
        ..IDEM
    },
    Contender {
        name: "postgres",
        database: Some(Kind::Postgres),
        app: |url| Box::pin(postgres(url)),
        ..IDEM
    },
    Contender {
        name: "postgres uncached",
        database: Some(Kind::Postgres),
        app: |url| Box::pin(postgres_uncached(url)),
        ..IDEM
    },
    Contender {
        name: "postgres by hand",
        database: Some(Kind::Postgres),
        app: |url| Box::pin(by_hand::two_statements(url)),
        ..IDEM
    },
    Contender {
        name: "transactional",
        database: Some(Kind::Postgres),
        app: |url| Box::pin(transactional(url)),
        ..IDEM
    },
    Contender {
        name: "transactional by hand",
        database: Some(Kind::Postgres),
        app: |url| Box::pin(by_hand::transaction(url)),
        ..IDEM
    },
];

/// Does the work of all handlers.
pub(crate) fn take(order: Order) -> (StatusCode, Json<Receipt>) {
    (StatusCode::CREATED, Json(order.take(server::execute())))
}

async fn order(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    take(order)
}

/// One that goes on until it is told to end.
async fn held(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    server::hold().await;
    take(order)
}

/// The handlers, protected by nobody.
pub(crate) fn bare() -> Router {
    Router::new().route("/orders", post(order)).route("/held", post(held))
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h")]
async fn idempotent_order(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    take(order)
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h")]
async fn idempotent_held(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    server::hold().await;
    take(order)
}

fn builder(store: impl Store) -> Builder<Scoped> {
    Idempotency::builder(store).scope(Scope::header("X-API-Key"))
}

fn routes(engine: Idempotency) -> Router {
    Router::new()
        .route("/orders", post(idempotent_order))
        .route("/held", post(idempotent_held))
        .with_state(engine)
}

fn idem(store: impl Store) -> Router {
    routes(builder(store).build())
}

async fn memory() -> Router {
    idem(MemoryStore::new())
}

async fn sqlite(directory: String) -> Router {
    idem(SqliteStore::open(format!("{directory}/records.db")).await.expect("a database"))
}

async fn redis(url: String) -> Router {
    idem(RedisStore::connect(url).await.expect("a server"))
}

async fn mariadb(url: String) -> Router {
    let store = MySqlStore::new(mariadb_pool(&url));
    store.create_schema().await.expect("tables");
    idem(store)
}

async fn postgres_store(url: &str) -> PostgresStore {
    let store = PostgresStore::new(postgres_pool(url));
    store.create_schema().await.expect("tables");
    store
}

async fn postgres(url: String) -> Router {
    idem(postgres_store(&url).await)
}

/// With no record at hand: each repetition asks the database.
async fn postgres_uncached(url: String) -> Router {
    routes(builder(postgres_store(&url).await).replay_cache(None).build())
}

/// The effect of the handlers that have one in the database.
pub(crate) const EFFECTS: &str = "CREATE TABLE IF NOT EXISTS effects (\
                                  number bigint NOT NULL, receipt bytea NOT NULL)";
pub(crate) const EFFECT: &str = "INSERT INTO effects (number, receipt) VALUES ($1, $2)";

async fn transactional(url: String) -> Router {
    let store = postgres_store(&url).await;
    sqlx::raw_sql(EFFECTS).execute(&postgres_pool(&url)).await.expect("a table");
    Router::new()
        .route("/orders", post(transactional_order))
        .route("/held", post(transactional_held))
        .with_state(builder(store).build())
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h", transaction)]
async fn transactional_order(
    mut tx: Tx<Postgres>,
    Json(order): Json<Order>,
) -> Result<(StatusCode, Json<Receipt>), StatusCode> {
    effect(&mut tx, order).await
}

#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h", transaction)]
async fn transactional_held(
    mut tx: Tx<Postgres>,
    Json(order): Json<Order>,
) -> Result<(StatusCode, Json<Receipt>), StatusCode> {
    server::hold().await;
    effect(&mut tx, order).await
}

async fn effect(
    connection: &mut sqlx::PgConnection,
    order: Order,
) -> Result<(StatusCode, Json<Receipt>), StatusCode> {
    let number = server::execute();
    let receipt = order.take(number);
    sqlx::query(EFFECT)
        .bind(number as i64)
        .bind(&b"an effect"[..])
        .execute(connection)
        .await
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok((StatusCode::CREATED, Json(receipt)))
}
