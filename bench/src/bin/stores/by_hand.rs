//! What one would write without idem: a claim that inserts, a completion that updates under the
//! claim's token, each committed for itself.

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
};

use ::redis::{aio::MultiplexedConnection, cmd};
use bench::databases::{mariadb_pool, postgres_pool};
use futures_util::future::BoxFuture;
use rusqlite::{Connection, OptionalExtension as _};
use sqlx::{MySqlPool, PgPool};
use tokio::sync::oneshot;

use crate::subjects::{DAY, Result, Subject, response};

/// What a key has: its fingerprint and, once it is done, its response.
type Found = (Vec<u8>, Option<Vec<u8>>);

/// The two statements, and the one that reads what a claim has met.
trait Statements: Send + Sync {
    /// Inserts a record unless there is one; whether there was none.
    fn claim(&self, key: [u8; 32], token: i64) -> impl Future<Output = Result<bool>> + Send;

    /// Writes the response, if the token is still the record's; whether it was.
    fn complete(&self, key: [u8; 32], token: i64) -> impl Future<Output = Result<bool>> + Send;

    /// What a key has.
    fn find(&self, key: [u8; 32]) -> impl Future<Output = Result<Option<Found>>> + Send;
}

struct ByHand<S> {
    statements: S,
    response: Vec<u8>,
}

impl<S: Statements + 'static> ByHand<S> {
    fn subject(statements: S) -> Arc<dyn Subject> {
        Arc::new(Self { statements, response: response() })
    }
}

impl<S: Statements> Subject for ByHand<S> {
    fn first(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let token = rand::random();
            let claimed = self.statements.claim(key, token).await?;
            Ok(claimed && self.statements.complete(key, token).await?)
        })
    }

    fn replay(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            if self.statements.claim(key, rand::random()).await? {
                return Ok(false);
            }
            let found = self.statements.find(key).await?;
            Ok(found.is_some_and(|(fingerprint, response)| {
                fingerprint == key && response.is_some_and(|response| response == self.response)
            }))
        })
    }

    fn hold(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(self.statements.claim(key, 1))
    }

    fn refuse(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let claimed = self.statements.claim(key, rand::random()).await?;
            let found = self.statements.find(key).await?;
            Ok(!claimed && found.is_some_and(|(_, response)| response.is_none()))
        })
    }
}

struct Postgres(PgPool, Vec<u8>);

pub(crate) async fn postgres(url: String) -> Result<Arc<dyn Subject>> {
    let pool = postgres_pool(&url);
    let table = "CREATE TABLE IF NOT EXISTS idempotency (
        key bytea PRIMARY KEY, fingerprint bytea NOT NULL, token bigint NOT NULL,
        expires_at timestamptz NOT NULL, status smallint, response bytea)";
    sqlx::raw_sql(table).execute(&pool).await?;
    Ok(ByHand::subject(Postgres(pool, response())))
}

impl Statements for Postgres {
    async fn claim(&self, key: [u8; 32], token: i64) -> Result<bool> {
        let claim = sqlx::query(
            "INSERT INTO idempotency (key, fingerprint, token, expires_at) \
             VALUES ($1, $1, $2, now() + interval '24 hours') ON CONFLICT (key) DO NOTHING",
        );
        Ok(claim.bind(key).bind(token).execute(&self.0).await?.rows_affected() == 1)
    }

    async fn complete(&self, key: [u8; 32], token: i64) -> Result<bool> {
        let complete = sqlx::query(
            "UPDATE idempotency SET status = 201, response = $3 WHERE key = $1 AND token = $2",
        );
        let complete = complete.bind(key).bind(token).bind(&self.1);
        Ok(complete.execute(&self.0).await?.rows_affected() == 1)
    }

    async fn find(&self, key: [u8; 32]) -> Result<Option<Found>> {
        let find = "SELECT fingerprint, response FROM idempotency WHERE key = $1";
        Ok(sqlx::query_as(find).bind(key).fetch_optional(&self.0).await?)
    }
}

struct MariaDb(MySqlPool, Vec<u8>);

pub(crate) async fn mariadb(url: String) -> Result<Arc<dyn Subject>> {
    let pool = mariadb_pool(&url);
    let table = "CREATE TABLE IF NOT EXISTS idempotency (
        record_key BINARY(32) NOT NULL PRIMARY KEY, fingerprint BINARY(32) NOT NULL,
        token BIGINT NOT NULL, expires_at DATETIME(3) NOT NULL, status SMALLINT,
        response LONGBLOB) ENGINE = InnoDB";
    sqlx::raw_sql(table).execute(&pool).await?;
    Ok(ByHand::subject(MariaDb(pool, response())))
}

impl Statements for MariaDb {
    async fn claim(&self, key: [u8; 32], token: i64) -> Result<bool> {
        let claim = sqlx::query(
            "INSERT IGNORE INTO idempotency (record_key, fingerprint, token, expires_at) \
             VALUES (?, ?, ?, UTC_TIMESTAMP(3) + INTERVAL 24 HOUR)",
        );
        let claim = claim.bind(&key[..]).bind(&key[..]).bind(token);
        Ok(claim.execute(&self.0).await?.rows_affected() == 1)
    }

    async fn complete(&self, key: [u8; 32], token: i64) -> Result<bool> {
        let complete = sqlx::query(
            "UPDATE idempotency SET status = 201, response = ? WHERE record_key = ? AND token = ?",
        );
        let complete = complete.bind(&self.1).bind(&key[..]).bind(token);
        Ok(complete.execute(&self.0).await?.rows_affected() == 1)
    }

    async fn find(&self, key: [u8; 32]) -> Result<Option<Found>> {
        let find = "SELECT fingerprint, response FROM idempotency WHERE record_key = ?";
        Ok(sqlx::query_as(find).bind(&key[..]).fetch_optional(&self.0).await?)
    }
}

/// `SET NX GET` and `SET XX`, which tell a late owner from the present one by nothing; over one
/// connection that all callers share.
struct Redis {
    connection: MultiplexedConnection,
    response: Vec<u8>,
}

pub(crate) async fn redis(url: String) -> Result<Arc<dyn Subject>> {
    let client = ::redis::Client::open(url)?;
    let connection = client.get_multiplexed_async_connection().await?;
    let subject = Redis { connection, response: response() };
    Ok(Arc::new(subject))
}

impl Redis {
    /// What was there; `None` says that the key is claimed.
    async fn claim(&self, key: [u8; 32]) -> Result<Option<Vec<u8>>> {
        let mut claim = cmd("SET");
        claim.arg(name(&key)).arg(&key[..]).arg("NX").arg("GET");
        claim.arg("PX").arg(DAY.as_millis() as u64);
        Ok(claim.query_async(&mut self.connection.clone()).await?)
    }
}

fn name(key: &[u8; 32]) -> String {
    use std::fmt::Write as _;
    key.iter().fold(String::from("by-hand:"), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

impl Subject for Redis {
    fn first(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            if self.claim(key).await?.is_some() {
                return Ok(false);
            }
            let mut complete = cmd("SET");
            complete.arg(name(&key)).arg([&key[..], &self.response].concat()).arg("XX");
            complete.arg("PX").arg(DAY.as_millis() as u64);
            let done: Option<String> = complete.query_async(&mut self.connection.clone()).await?;
            Ok(done.is_some())
        })
    }

    fn replay(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let found = self.claim(key).await?.unwrap_or_default();
            Ok(found.starts_with(&key) && found[key.len()..] == self.response)
        })
    }

    fn hold(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move { Ok(self.claim(key).await?.is_none()) })
    }

    fn refuse(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move { Ok(self.claim(key).await?.is_some_and(|found| found == key)) })
    }
}

/// A thread that has the connection, and makes one statement after the other.
struct Sqlite(mpsc::Sender<Order>);

enum Order {
    Claim([u8; 32], i64, oneshot::Sender<rusqlite::Result<usize>>),
    Complete([u8; 32], i64, oneshot::Sender<rusqlite::Result<usize>>),
    Find([u8; 32], oneshot::Sender<rusqlite::Result<Option<Found>>>),
}

pub(crate) async fn sqlite(directory: String) -> Result<Arc<dyn Subject>> {
    let connection = Connection::open(PathBuf::from(directory).join("by-hand.db"))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute_batch(
        "CREATE TABLE idempotency (key BLOB PRIMARY KEY, fingerprint BLOB NOT NULL, \
         token INTEGER NOT NULL, expires_at INTEGER NOT NULL, status INTEGER, response BLOB) \
         WITHOUT ROWID, STRICT",
    )?;
    let (orders, ordered) = mpsc::channel();
    thread::spawn(move || {
        let response = response();
        for order in ordered {
            // Whoever does not wait for the answer any more does not need it.
            match order {
                Order::Claim(key, token, answer) => {
                    let _ = answer.send(claim_in_sqlite(&connection, &key, token));
                }
                Order::Complete(key, token, answer) => {
                    let _ = answer.send(complete_in_sqlite(&connection, &key, token, &response));
                }
                Order::Find(key, answer) => {
                    let _ = answer.send(find_in_sqlite(&connection, &key));
                }
            }
        }
    });
    Ok(ByHand::subject(Sqlite(orders)))
}

fn claim_in_sqlite(connection: &Connection, key: &[u8], token: i64) -> rusqlite::Result<usize> {
    let mut claim = connection.prepare_cached(
        "INSERT INTO idempotency (key, fingerprint, token, expires_at) \
         VALUES (?1, ?1, ?2, unixepoch() + 86400) ON CONFLICT (key) DO NOTHING",
    )?;
    claim.execute((key, token))
}

fn complete_in_sqlite(
    connection: &Connection,
    key: &[u8],
    token: i64,
    response: &[u8],
) -> rusqlite::Result<usize> {
    let mut complete = connection.prepare_cached(
        "UPDATE idempotency SET status = 201, response = ?3 WHERE key = ?1 AND token = ?2",
    )?;
    complete.execute((key, token, response))
}

fn find_in_sqlite(connection: &Connection, key: &[u8]) -> rusqlite::Result<Option<Found>> {
    let find = "SELECT fingerprint, response FROM idempotency WHERE key = ?1";
    let mut find = connection.prepare_cached(find)?;
    find.query_row((key,), |row| Ok((row.get(0)?, row.get(1)?))).optional()
}

impl Sqlite {
    async fn ask<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<rusqlite::Result<T>>) -> Order,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.0.send(order(answer))?;
        Ok(answered.await??)
    }
}

impl Statements for Sqlite {
    async fn claim(&self, key: [u8; 32], token: i64) -> Result<bool> {
        Ok(self.ask(|answer| Order::Claim(key, token, answer)).await? == 1)
    }

    async fn complete(&self, key: [u8; 32], token: i64) -> Result<bool> {
        Ok(self.ask(|answer| Order::Complete(key, token, answer)).await? == 1)
    }

    async fn find(&self, key: [u8; 32]) -> Result<Option<Found>> {
        self.ask(|answer| Order::Find(key, answer)).await
    }
}
