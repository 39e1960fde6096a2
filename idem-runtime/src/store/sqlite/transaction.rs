//! Handlers' transactions in SQLite.
//!
//! A transaction begins as `IMMEDIATE`: it holds the database's only write lock from its claim to
//! its end. One that began as a reader could not become a writer once somebody else has written
//! ([`SQLITE_BUSY_SNAPSHOT`](https://sqlite.org/rescode.html#busy_snapshot)), and a handler reads
//! the balance before it moves it.

use std::{
    any::Any,
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{FutureExt, future::BoxFuture};
use sqlx::{Connection as _, Sqlite, SqliteConnection, SqlitePool};

use super::{NAME, Shared, SqliteStore, batch, failure};
use crate::{
    key::Key,
    store::{
        Begun, Claim, Claimed, Completion, StoreError, Transact, Transaction, Written,
        clock::Millis,
        row::{Ended, Opening, Row, found},
    },
};

/// The keys that transactions of this process hold: their duplicates need not wait for the lock to
/// be told so. Those of another process wait for it, as every writer does.
pub(super) type HeldKeys = Mutex<HashSet<Key>>;

/// A key in the set, until it is dropped.
struct HeldKey {
    store: Arc<Shared>,
    key: Key,
}

impl HeldKey {
    /// `None` if another transaction holds it.
    fn new(store: &Arc<Shared>, key: Key) -> Option<Self> {
        let is_new = store.held.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        is_new.then(|| Self { store: Arc::clone(store), key })
    }
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        self.store.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// A transaction of a handler.
struct Handlers {
    store: Arc<Shared>,
    open: sqlx::Transaction<'static, Sqlite>,
    /// What was claimed, as it would be committed now.
    claimed: Option<(Row, HeldKey)>,
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.claimed.as_ref().map(|(row, _)| &row.key);
        f.debug_struct("SqliteTransaction").field("key", &key).finish_non_exhaustive()
    }
}

impl Handlers {
    async fn begin(store: &Arc<Shared>) -> Result<Self, StoreError> {
        let open = match store.pool.begin_with("BEGIN IMMEDIATE").await {
            Err(sqlx::Error::BeginFailed | sqlx::Error::InvalidSavePointStatement) => {
                weed_out(&store.pool);
                store.pool.begin_with("BEGIN IMMEDIATE").await
            }
            begun => begun,
        };
        let open = open.map_err(|error| failure(error).error())?;
        let mut begun = Self { store: Arc::clone(store), open, claimed: None };
        mark!("sqlite.transaction.locked");
        begun.execute("SAVEPOINT idem_effects").await?;
        Ok(begun)
    }

    async fn execute(&mut self, sql: &'static str) -> Result<(), StoreError> {
        let done = sqlx::raw_sql(sql).execute(&mut *self.open).await;
        done.map(drop).map_err(|error| failure(error).error())
    }

    /// Finds out that the transaction is still the one that began, which has this savepoint: a
    /// handler may have ended it, which nobody else may.
    async fn check(&mut self) -> Result<(), StoreError> {
        self.execute("RELEASE idem_effects").await
    }

    async fn roll_back(self) -> Result<(), StoreError> {
        self.open.rollback().await.map_err(|error| failure(error).error())
    }

    /// The row that is committed for a key, unless it is over.
    async fn row(&mut self, claim: &Claim, now: Millis) -> Result<Option<Row>, StoreError> {
        let rows = batch::load(&mut self.open, &[claim.key]).await;
        let mut rows = rows.map_err(|error| failure(error).error())?;
        let row = rows.remove(&claim.key).transpose();
        let row = row.and_then(|row| Ok(found(row.as_ref(), claim.format, now)?.cloned()));
        row.map_err(|kind| StoreError::new(NAME, kind))
    }
}

/// Closes connections that believe that a transaction is open, see `queue::write_on`: no other can
/// begin on them.
fn weed_out(pool: &SqlitePool) {
    let idle: Vec<_> = std::iter::from_fn(|| pool.try_acquire()).collect();
    for mut connection in idle {
        if connection.is_in_transaction() {
            connection.close_on_drop();
        }
    }
}

impl Transact for SqliteStore {
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>> {
        Box::pin(async move {
            let Some(held) = HeldKey::new(&self.0, claim.key) else { return Ok(Begun::Held) };
            let mut begun = Handlers::begin(&self.0).await?;
            let now = self.0.clock.now();
            let row = begun.row(claim, now).await?;
            mark!("sqlite.transaction.read");
            let (row, claimed) = match row {
                Some(mut row) => {
                    let (changed, claimed) = claim.on_row(&mut row, now);
                    (changed.then_some(row), claimed)
                }
                None => claim.on_nothing(now),
            };
            match (row, claimed) {
                (Some(row), Claimed::Granted(record)) => {
                    begun.claimed = Some((row, held));
                    Ok(Begun::Granted(Box::new(begun), record))
                }
                (_, Claimed::Found(record) | Claimed::Granted(record)) => {
                    begun.roll_back().await?;
                    Ok(Begun::Found(record))
                }
                (_, Claimed::Unknown) => {
                    begun.roll_back().await?;
                    Ok(Begun::Unknown)
                }
            }
        })
    }

    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>> {
        Box::pin(async move {
            let begun = Handlers::begin(&self.0).await?;
            Ok(Box::new(begun) as Box<dyn Transaction>)
        })
    }

    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>> {
        let held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner).contains(key);
        async move { Ok(held) }.boxed()
    }
}

impl Transaction for Handlers {
    fn connection(&self) -> &(dyn Any + Send) {
        let connection: &SqliteConnection = &self.open;
        connection
    }

    fn connection_mut(&mut self) -> &mut (dyn Any + Send) {
        let connection: &mut SqliteConnection = &mut self.open;
        connection
    }

    fn undo(&mut self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.execute("ROLLBACK TO idem_effects").boxed()
    }

    fn complete<'a>(
        &'a mut self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            self.check().await?;
            let now = self.store.clock.now();
            let Some((row, _)) = &mut self.claimed else { return Ok(Written::Gone) };
            match row.complete(completion, now) {
                Ended::Fenced => Ok(Written::Fenced(row.record(now))),
                Ended::Changed | Ended::Already | Ended::Removed => {
                    let put = batch::put(&mut self.open, row).await;
                    put.map_err(|error| failure(error).error())?;
                    mark!("sqlite.transaction.put");
                    Ok(Written::Done)
                }
            }
        })
    }

    fn commit(mut self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Box::pin(async move {
            // With a claim, its completion has done so.
            if self.claimed.is_none() {
                self.check().await?;
            }
            self.open.commit().await.map_err(|error| failure(error).error())
        })
    }

    fn roll_back(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Handlers::roll_back(*self).boxed()
    }
}
