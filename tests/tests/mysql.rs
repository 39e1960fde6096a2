//! The store on MySQL and MariaDB: the laws, and what only such a server can do to it.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use idem_runtime::{
    store::{MySqlStore, Store},
    testing::StoreFixture,
};
use sqlx::{MySqlPool, mysql::MySqlPoolOptions};
use tests::servers::mariadb::{Database, MariaDb};

/// Two stores on one database, as two processes have.
struct Fixture {
    store: MySqlStore,
    second: MySqlStore,
    pool: MySqlPool,
    _database: Database,
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
        Self { store, second, pool, _database: database }
    }
}

impl StoreFixture for Fixture {
    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.store.clone())
    }

    fn second(&self) -> Arc<dyn Store> {
        Arc::new(self.second.clone())
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
}
