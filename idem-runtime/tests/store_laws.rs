//! The laws of a store, on each store that comes with idem.

#![expect(clippy::unwrap_used, reason = "a fixture that cannot be made is a failed test")]

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use idem_runtime::{
    store::{Clock, ManualClock, MemoryStore, SqliteStore, Store},
    testing::StoreFixture,
};

/// Two handles to one store, on a clock that the law moves.
struct Fixture<S> {
    store: S,
    second: S,
    clock: ManualClock,
    /// Holds the file, if there is one.
    _directory: Option<tempfile::TempDir>,
}

impl<S: Store + Clone> StoreFixture for Fixture<S> {
    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.store.clone())
    }

    fn second(&self) -> Arc<dyn Store> {
        Arc::new(self.second.clone())
    }

    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.clock.advance(by) })
    }
}

mod memory {
    use super::*;

    fn fixture() -> Fixture<MemoryStore> {
        let clock = Clock::manual();
        let store = MemoryStore::builder().clock(clock.clone()).build();
        Fixture { second: store.clone(), store, clock, _directory: None }
    }

    idem_runtime::store_laws!(fixture());
    idem_runtime::manage_laws!(fixture());
}

mod sqlite_file {
    use super::*;

    /// Two pools on one file, as two processes have.
    async fn fixture() -> Fixture<SqliteStore> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("idem.db");
        let clock = Clock::manual();
        let store = SqliteStore::open(&path).await.unwrap().with_clock(clock.clone());
        let second = SqliteStore::open(&path).await.unwrap().with_clock(clock.clone());
        Fixture { store, second, clock, _directory: Some(directory) }
    }

    idem_runtime::store_laws!(fixture().await);
    idem_runtime::manage_laws!(fixture().await);
}

mod sqlite_in_memory {
    use super::*;

    async fn fixture() -> Fixture<SqliteStore> {
        let clock = Clock::manual();
        let store = SqliteStore::in_memory().await.unwrap().with_clock(clock.clone());
        Fixture { second: store.clone(), store, clock, _directory: None }
    }

    idem_runtime::store_laws!(fixture().await);
    idem_runtime::manage_laws!(fixture().await);
}
