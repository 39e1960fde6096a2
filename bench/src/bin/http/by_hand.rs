//! What a careful team writes without a library, on PostgreSQL: keys of a tenant, a fingerprint of
//! the body, a token against owners that are late, refusals, and the answer byte for byte.

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use bench::{databases::postgres_pool, order::Order};
use sha2::{Digest as _, Sha256};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use crate::{
    contenders::{EFFECT, EFFECTS},
    server,
};

const TABLE: &str = "CREATE TABLE IF NOT EXISTS idempotency (
    key bytea PRIMARY KEY, fingerprint bytea NOT NULL, token bigint NOT NULL,
    expires_at timestamptz NOT NULL, status smallint, response bytea)";

/// What goes wrong is a 500, or a 400 where the request is to blame.
struct Failure(StatusCode);

impl From<sqlx::Error> for Failure {
    fn from(_: sqlx::Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(_: serde_json::Error) -> Self {
        Self(StatusCode::BAD_REQUEST)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

/// What a request is known by.
struct Asked {
    key: [u8; 32],
    fingerprint: [u8; 32],
}

impl Asked {
    fn by(headers: &HeaderMap, body: &[u8]) -> Result<Self, Failure> {
        let header = |name| headers.get(name).ok_or(Failure(StatusCode::BAD_REQUEST));
        let (tenant, key) = (header("x-api-key")?, header("idempotency-key")?);
        let key = Sha256::new().chain_update(Sha256::digest(tenant)).chain_update(key);
        Ok(Self { key: key.finalize().into(), fingerprint: Sha256::digest(body).into() })
    }

    /// What a repeated request gets.
    fn answer(&self, row: &PgRow) -> Result<Response, Failure> {
        if row.try_get::<&[u8], _>("fingerprint")? != self.fingerprint {
            return Ok(StatusCode::UNPROCESSABLE_ENTITY.into_response());
        }
        let Some(status) = row.try_get::<Option<i16>, _>("status")? else {
            return Ok(StatusCode::CONFLICT.into_response());
        };
        let status = u16::try_from(status).ok().and_then(|it| StatusCode::from_u16(it).ok());
        let status = status.ok_or(Failure(StatusCode::INTERNAL_SERVER_ERROR))?;
        Ok(answer(status, row.try_get("response")?))
    }
}

fn answer(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

async fn database(url: &str) -> PgPool {
    let pool = postgres_pool(url);
    for table in [TABLE, EFFECTS] {
        sqlx::raw_sql(table).execute(&pool).await.expect("a table");
    }
    pool
}

/// The claim and the answer are two statements, each committed for itself.
pub(crate) async fn two_statements(url: String) -> Router {
    Router::new()
        .route(
            "/orders",
            post(|State(pool): State<PgPool>, headers: HeaderMap, body: Bytes| async move {
                in_two_statements(&pool, &headers, &body, false).await
            }),
        )
        .route(
            "/held",
            post(|State(pool): State<PgPool>, headers: HeaderMap, body: Bytes| async move {
                in_two_statements(&pool, &headers, &body, true).await
            }),
        )
        .with_state(database(&url).await)
}

async fn in_two_statements(
    pool: &PgPool,
    headers: &HeaderMap,
    body: &[u8],
    hold: bool,
) -> Result<Response, Failure> {
    let asked = Asked::by(headers, body)?;
    let token: i64 = rand::random();
    let claimed = sqlx::query(
        "INSERT INTO idempotency (key, fingerprint, token, expires_at) \
         VALUES ($1, $2, $3, now() + interval '24 hours') ON CONFLICT (key) DO NOTHING",
    );
    let claimed = claimed.bind(asked.key).bind(asked.fingerprint).bind(token);
    if claimed.execute(pool).await?.rows_affected() == 0 {
        let found = "SELECT fingerprint, status, response FROM idempotency WHERE key = $1";
        return asked.answer(&sqlx::query(found).bind(asked.key).fetch_one(pool).await?);
    }
    let order: Order = serde_json::from_slice(body)?;
    if hold {
        server::hold().await;
    }
    let response = serde_json::to_vec(&order.take(server::execute()))?;
    let completed = "UPDATE idempotency SET status = 201, response = $3 \
                     WHERE key = $1 AND token = $2";
    let completed = sqlx::query(completed).bind(asked.key).bind(token).bind(&response);
    match completed.execute(pool).await?.rows_affected() {
        1 => Ok(answer(StatusCode::CREATED, response)),
        _ => Ok(StatusCode::CONFLICT.into_response()),
    }
}

/// The effect and the answer are committed together, under a lock of the transaction's on the key.
pub(crate) async fn transaction(url: String) -> Router {
    Router::new()
        .route(
            "/orders",
            post(|State(pool): State<PgPool>, headers: HeaderMap, body: Bytes| async move {
                in_a_transaction(&pool, &headers, &body, false).await
            }),
        )
        .route(
            "/held",
            post(|State(pool): State<PgPool>, headers: HeaderMap, body: Bytes| async move {
                in_a_transaction(&pool, &headers, &body, true).await
            }),
        )
        .with_state(database(&url).await)
}

/// Five round trips: BEGIN, the lock with the record as it is known, the effect, the record,
/// COMMIT. What was committed just before the lock was let go, the second may miss; the fourth
/// finds it.
async fn in_a_transaction(
    pool: &PgPool,
    headers: &HeaderMap,
    body: &[u8],
    hold: bool,
) -> Result<Response, Failure> {
    let asked = Asked::by(headers, body)?;
    let [a, b, c, d, e, f, g, h, ..] = asked.key;
    let mut transaction = pool.begin().await?;
    let begun = sqlx::query(
        "SELECT pg_try_advisory_xact_lock($2) AS held, r.key IS NOT NULL AS there, fingerprint, \
         status, response \
         FROM (VALUES ($1::bytea)) AS asked (key) LEFT JOIN idempotency AS r ON r.key = asked.key",
    );
    let begun = begun.bind(asked.key).bind(i64::from_be_bytes([a, b, c, d, e, f, g, h]));
    let begun = begun.fetch_one(&mut *transaction).await?;
    if !begun.try_get::<bool, _>("held")? {
        transaction.rollback().await?;
        return Ok(StatusCode::CONFLICT.into_response());
    }
    if begun.try_get("there")? {
        transaction.rollback().await?;
        return asked.answer(&begun);
    }
    let order: Order = serde_json::from_slice(body)?;
    if hold {
        server::hold().await;
    }
    let number = server::execute();
    let response = serde_json::to_vec(&order.take(number))?;
    let effect = sqlx::query(EFFECT).bind(number as i64).bind(&b"an effect"[..]);
    effect.execute(&mut *transaction).await?;
    let recorded = sqlx::query(
        "INSERT INTO idempotency (key, fingerprint, token, expires_at, status, response) \
         VALUES ($1, $2, 0, now() + interval '24 hours', 201, $3) ON CONFLICT (key) DO NOTHING",
    );
    let recorded = recorded.bind(asked.key).bind(asked.fingerprint).bind(&response);
    if recorded.execute(&mut *transaction).await?.rows_affected() == 0 {
        transaction.rollback().await?;
        return Ok(StatusCode::CONFLICT.into_response());
    }
    transaction.commit().await?;
    Ok(answer(StatusCode::CREATED, response))
}
