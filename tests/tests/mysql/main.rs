//! The store on MySQL and MariaDB: the laws, and what only such a server can do to it.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod connections;
mod contention;
mod schema;
mod settings;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, Record, ScopeDigest, Token, Ttl,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, MySqlStore, Renewal, Store, StoreError,
        StoreErrorKind, Written,
    },
    testing::StoreFixture,
};
use sqlx::{MySqlPool, mysql::MySqlPoolOptions};
use tests::{
    crowd::Crowd,
    servers::mariadb::{Database, MariaDb},
};

/// How long claims hold and records live.
const HOUR: Duration = Duration::from_secs(3600);
/// Beyond this a test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two stores on one database, as two processes have.
struct Fixture {
    store: MySqlStore,
    second: MySqlStore,
    pool: MySqlPool,
    /// Whether calls travel with others.
    crowded: bool,
    database: Database,
}

impl Fixture {
    async fn start() -> Self {
        Self::on(MariaDb::shared()).await
    }

    async fn on(server: &MariaDb) -> Self {
        let database = server.database().await;
        let store = MySqlStore::connect(database.url()).await.expect("a store");
        store.create_schema().await.expect("tables");
        let pool = MySqlPoolOptions::new().max_connections(8).connect_lazy_with(database.options());
        let second = MySqlStore::new(pool.clone());
        Self { store, second, pool, crowded: false, database }
    }

    /// Every claim and every completion travels with others.
    async fn crowded() -> Self {
        let fixture = Self::start().await;
        let [store, second] = [&fixture.store, &fixture.second].map(|s| s.clone().with_lanes(1));
        Self { store, second, crowded: true, ..fixture }
    }

    fn open(&self, store: &MySqlStore) -> Arc<dyn Store> {
        match self.crowded {
            true => Arc::new(Crowd(store.clone())),
            false => Arc::new(store.clone()),
        }
    }
}

impl StoreFixture for Fixture {
    fn store(&self) -> Arc<dyn Store> {
        self.open(&self.store)
    }

    fn second(&self) -> Arc<dyn Store> {
        self.open(&self.second)
    }

    /// Brings all that is stored forward.
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let by = i64::try_from(by.as_millis()).expect("a span");
            sqlx::query(
                "UPDATE idem_records SET
                     lease_end = IF(lease_end = 9223372036854775807, lease_end, lease_end - ?),
                     valid_until =
                         IF(valid_until = 9223372036854775807, valid_until, valid_until - ?),
                     kept_until = IF(kept_until = 9223372036854775807, kept_until, kept_until - ?),
                     created = created - ?",
            )
            .bind(by)
            .bind(by)
            .bind(by)
            .bind(by)
            .execute(&self.pool)
            .await
            .expect("all times");
        })
    }
}

mod laws {
    use super::Fixture;

    idem_runtime::store_laws!(Fixture::start().await);
    idem_runtime::manage_laws!(Fixture::start().await);

    mod in_a_crowd {
        use super::Fixture;

        idem_runtime::store_laws!(Fixture::crowded().await);
    }
}

fn any_claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

/// A claim by a claimant of its own.
fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([7; 32]),
        operation: Arc::from("POST /tests"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test/1".into(), digest: [1; 32] },
        token: Token::random(),
        lease: HOUR,
        ttl: Ttl::For(HOUR),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn issue_on(key: Key) -> Issue {
    Issue {
        key,
        scope: ScopeDigest::from_bytes([7; 32]),
        operation: Arc::from("POST /tests"),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(HOUR),
        kept_for: Ttl::For(HOUR),
        payload: Bytes::from_static(b"bound"),
        format: FORMAT,
    }
}

fn completion(claim: &Claim, payload: impl Into<Bytes>) -> Completion {
    Completion {
        key: claim.key,
        token: claim.token,
        ttl: Ttl::For(HOUR),
        flags: Flags::NONE,
        payload: payload.into(),
        format: FORMAT,
    }
}

fn checkpoint(claim: &Claim, payload: &'static str) -> Checkpoint {
    let payload = Bytes::from_static(payload.as_bytes());
    Checkpoint { key: claim.key, token: claim.token, payload, format: FORMAT }
}

fn renewal(claim: &Claim) -> Renewal {
    Renewal { key: claim.key, token: claim.token, lease: HOUR }
}

async fn granted(store: &MySqlStore, claim: &Claim) -> Record {
    match store.claim(claim).await {
        Ok(Claimed::Granted(record)) => record,
        answer => panic!("must be granted; got {answer:?}"),
    }
}

async fn kept(store: &MySqlStore, key: &Key) -> Record {
    store.read(key).await.expect("an answer").expect("a record")
}

#[track_caller]
fn assert_done(answer: &Result<Written, StoreError>) {
    assert!(matches!(answer, Ok(Written::Done)), "must be done; got {answer:?}");
}

#[track_caller]
fn assert_fails<T: std::fmt::Debug>(answer: Result<T, StoreError>, kind: StoreErrorKind) {
    let error = answer.expect_err("a failure");
    assert_eq!(error.kind(), kind, "{error:?}");
    assert_eq!(error.store(), "mysql");
}

/// Makes a statement of the test's own.
async fn run(pool: &MySqlPool, statement: impl Into<String>) {
    let statement = sqlx::AssertSqlSafe(statement.into());
    sqlx::raw_sql(statement).execute(pool).await.expect("a statement");
}

/// A transaction that holds the row of a key, or the place where it would be, until it ends.
async fn lock(pool: &MySqlPool, key: &Key) -> sqlx::Transaction<'static, sqlx::MySql> {
    let mut transaction = pool.begin().await.expect("a transaction");
    sqlx::query("SELECT token FROM idem_records WHERE record_key = ? FOR UPDATE")
        .bind(&key.as_bytes()[..])
        .fetch_optional(&mut *transaction)
        .await
        .expect("a lock");
    transaction
}
