//! The laws of a store, on PostgreSQL.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use idem_runtime::{
    store::{PostgresStore, Store},
    testing::StoreFixture,
};
use sqlx::PgPool;
use tests::{
    crowd::Crowd,
    servers::postgres::{Database, Postgres},
};

/// Two stores on one database, as two processes have.
struct Fixture {
    store: PostgresStore,
    second: PostgresStore,
    pool: PgPool,
    /// Whether calls travel with others.
    crowded: bool,
    _database: Database,
}

impl Fixture {
    async fn start() -> Self {
        let database = Postgres::shared().database().await;
        let store = PostgresStore::connect(database.url()).await.expect("a connection");
        store.create_schema().await.expect("tables");
        let pool = PgPool::connect_lazy_with(database.options());
        Self {
            store,
            second: PostgresStore::new(pool.clone()),
            pool,
            crowded: false,
            _database: database,
        }
    }

    /// As it is used behind a pooler.
    async fn unprepared() -> Self {
        let fixture = Self::start().await;
        let [store, second] =
            [&fixture.store, &fixture.second].map(|s| s.clone().through_transaction_pooler());
        Self { store, second, ..fixture }
    }

    /// Every claim and every completion travels with others.
    async fn crowded() -> Self {
        let fixture = Self::start().await;
        let [store, second] = [&fixture.store, &fixture.second].map(|s| s.clone().with_lanes(1));
        Self { store, second, crowded: true, ..fixture }
    }

    fn on(&self, store: &PostgresStore) -> Arc<dyn Store> {
        match self.crowded {
            true => Arc::new(Crowd(store.clone())),
            false => Arc::new(store.clone()),
        }
    }
}

impl StoreFixture for Fixture {
    fn store(&self) -> Arc<dyn Store> {
        self.on(&self.store)
    }

    fn second(&self) -> Arc<dyn Store> {
        self.on(&self.second)
    }

    /// The server's clock cannot be moved: all that is stored is brought forward.
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            sqlx::query(
                "UPDATE idem_records SET
                     lease_end = CASE lease_end WHEN $2 THEN $2 ELSE lease_end - $1 END,
                     valid_until = CASE valid_until WHEN $2 THEN $2 ELSE valid_until - $1 END,
                     kept_until = CASE kept_until WHEN $2 THEN $2 ELSE kept_until - $1 END,
                     created = created - $1",
            )
            .bind(i64::try_from(by.as_millis()).expect("centuries at the most"))
            .bind(i64::MAX)
            .execute(&self.pool)
            .await
            .expect("a passage of time");
        })
    }
}

idem_runtime::store_laws!(Fixture::start().await);
idem_runtime::manage_laws!(Fixture::start().await);

mod behind_a_pooler {
    use super::Fixture;

    idem_runtime::store_laws!(Fixture::unprepared().await);
    idem_runtime::manage_laws!(Fixture::unprepared().await);
}

mod in_a_crowd {
    use super::Fixture;

    idem_runtime::store_laws!(Fixture::crowded().await);
}
