//! Handlers' transactions in MySQL and MariaDB.
//!
//! A key is held by a lock of the session's (`GET_LOCK`), which a claim that does not get it knows
//! at once. Lock and record come before the transaction: under REPEATABLE READ, which is what these
//! servers do unless told otherwise, a transaction goes on seeing what was committed at its first
//! reading; and under SERIALIZABLE to look for a record that is not there would lock the place where
//! it would be, and that of other keys with it. Nothing is written before the answer is: a handler that shares its keys
//! without a transaction goes by the record alone, and whoever of the two comes second finds that
//! the record has changed.
//!
//! The lock outlives the transaction: a connection whose lock is not known to be let go is not used
//! again.

use std::{any::Any, fmt, fmt::Write as _, sync::atomic::Ordering};

use futures_util::{FutureExt, StreamExt as _, future::BoxFuture};
use sha2::{Digest as _, Sha224};
use sqlx::{MySql, MySqlConnection, Row as _};
use tokio::{
    runtime::Handle,
    time::{error::Elapsed, timeout},
};

use super::{
    MySqlStore, NAME,
    calls::Call,
    failure::{Failure, Remedy},
    row::{Loaded, Stamp, insert, load, now, replace},
};
use crate::{
    key::Key,
    store::{
        Begun, Claim, Claimed, Completion, StoreError, StoreErrorKind, Transact, Transaction,
        Written,
        clock::Millis,
        row::{Ended, Opening, Row, found},
    },
};

/// The name of a key's lock: of up to 64 characters. The server has one space of names for all its
/// databases.
fn lock_of(store: &MySqlStore, key: &Key) -> String {
    let options = store.0.pool.connect_options();
    let database = options.get_database().unwrap_or_default();
    let digest = Sha224::new().chain_update(key.as_bytes()).chain_update(database).finalize();
    digest.iter().fold("idem.".to_owned(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// A transaction of a handler. Dropped, it is rolled back, and its lock is let go.
struct Handlers {
    /// `None` once it has ended.
    open: Option<Open>,
    claimed: Option<Claimant>,
}

struct Open {
    transaction: sqlx::Transaction<'static, MySql>,
    /// The lock that the session has, or may have.
    lock: Option<String>,
}

/// What was claimed.
struct Claimant {
    /// As it would be committed now. Its times are spans if it was not there.
    row: Row,
    /// How it was found, if it was there.
    seen: Option<Stamp>,
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.claimed.as_ref().map(|claimed| &claimed.row.key);
        f.debug_struct("MySqlTransaction").field("key", &key).finish_non_exhaustive()
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        let Some(open) = self.open.take() else { return };
        // Without a runtime, the pool cannot take the connection back either.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(open.end(End::RollBack));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Commit,
    RollBack,
}

impl Open {
    /// Ends the transaction, and lets the lock go, in one round trip.
    async fn end(mut self, end: End) -> Result<(), sqlx::Error> {
        let end = match end {
            End::Commit => "COMMIT",
            End::RollBack => "ROLLBACK",
        };
        let statements = match &self.lock {
            Some(lock) => format!("{end}; DO RELEASE_LOCK('{lock}')"),
            None => end.to_owned(),
        };
        let (ended, all_well) = {
            let statements = sqlx::raw_sql(sqlx::AssertSqlSafe(statements));
            let mut results = statements.execute_many(&mut *self.transaction);
            let ended = results.next().await.unwrap_or(Err(sqlx::Error::WorkerCrashed));
            let mut all_well = ended.is_ok();
            while let Some(result) = results.next().await {
                all_well &= result.is_ok();
            }
            (ended, all_well)
        };
        mark!("mysql.transaction.ended");
        if !all_well && self.lock.is_some() {
            // The pool tries whatever comes back, and closes what is broken.
            let kill = sqlx::raw_sql("KILL CONNECTION CONNECTION_ID()");
            let _ = kill.execute(&mut *self.transaction).await;
        }
        ended.map(drop)
    }
}

fn failed(error: sqlx::Error) -> StoreError {
    Failure::from(error).into_error()
}

fn too_late(elapsed: Elapsed) -> StoreError {
    StoreError::caused_by(NAME, StoreErrorKind::TimedOut, elapsed)
}

impl Handlers {
    /// Begins, on a connection that will let this lock go at the end.
    async fn begin(store: &MySqlStore, lock: Option<String>) -> Result<Self, StoreError> {
        if !store.0.ready.load(Ordering::Relaxed) {
            store.check().await?;
            store.0.ready.store(true, Ordering::Relaxed);
        }
        let mut stale = store.0.pool.num_idle();
        loop {
            let failure = match store.0.pool.begin_with("START TRANSACTION").await {
                Ok(transaction) => {
                    let open = Some(Open { transaction, lock });
                    return Ok(Self { open, claimed: None });
                }
                Err(error) => Failure::from(error),
            };
            // The server has closed an idle connection: nothing has happened yet.
            if stale == 0 || failure.remedy() != Remedy::Elsewhere {
                return Err(failure.into_error());
            }
            stale -= 1;
        }
    }

    async fn claim(store: &MySqlStore, claim: &Claim) -> Result<Begun, StoreError> {
        let lock = lock_of(store, &claim.key);
        // For sqlx it goes on, so that what the handler begins in it is a savepoint.
        let statements = format!("ROLLBACK; SELECT GET_LOCK('{lock}', 0)");
        let mut begun = Self::begin(store, Some(lock)).await?;
        mark!("mysql.transaction.begun");
        let answered = sqlx::raw_sql(sqlx::AssertSqlSafe(statements))
            .fetch_all(begun.session()?)
            .await
            .map_err(failed)?;
        mark!("mysql.transaction.locked");
        let got: Option<i64> = match answered.first() {
            Some(row) => row.try_get(0).map_err(failed)?,
            None => None,
        };
        match got {
            Some(1) => {}
            Some(_) => {
                begun.end(End::RollBack).await?;
                return Ok(Begun::Held);
            }
            None => return Err(StoreError::new(NAME, StoreErrorKind::Unreachable)),
        }
        let loaded = load(begun.session()?, &claim.key).await.map_err(Failure::into_error)?;
        let (row, claimed, seen) = match loaded {
            Some(Loaded { row, now, stamp }) => {
                let known = found(Some(&row), claim.format, now);
                let known = known.map_err(|kind| StoreError::new(NAME, kind))?;
                let (row, claimed) = match known.cloned() {
                    Some(mut row) => {
                        let (changed, claimed) = claim.on_row(&mut row, now);
                        (changed.then_some(row), claimed)
                    }
                    None => claim.on_nothing(now),
                };
                (row, claimed, Some(stamp))
            }
            None => {
                // From an instant 0 its times are spans.
                let (row, claimed) = claim.on_nothing(0);
                (row, claimed, None)
            }
        };
        match (row, claimed) {
            (Some(row), Claimed::Granted(record)) => {
                begun.execute("START TRANSACTION; SAVEPOINT idem_effects").await?;
                begun.claimed = Some(Claimant { row, seen });
                Ok(Begun::Granted(Box::new(begun), record))
            }
            (_, Claimed::Found(record) | Claimed::Granted(record)) => {
                begun.end(End::RollBack).await?;
                Ok(Begun::Found(record))
            }
            (_, Claimed::Unknown) => {
                begun.end(End::RollBack).await?;
                Ok(Begun::Unknown)
            }
        }
    }

    fn session(&mut self) -> Result<&mut MySqlConnection, StoreError> {
        let open = self.open.as_mut();
        // Whoever ends it has it no longer.
        let ended = || StoreError::new(NAME, StoreErrorKind::Refused);
        open.map(|open| &mut *open.transaction).ok_or_else(ended)
    }

    async fn execute(&mut self, sql: &'static str) -> Result<(), StoreError> {
        sqlx::raw_sql(sql).execute(self.session()?).await.map(drop).map_err(failed)
    }

    /// Finds out that the transaction is still the one that began, which has this savepoint: a
    /// handler may have ended it, and so may the server, after a deadlock or for a statement that
    /// defines tables. What time it is.
    async fn check(&mut self) -> Result<Millis, StoreError> {
        let statements = concat!("RELEASE SAVEPOINT idem_effects; SELECT ", now!());
        let answered = sqlx::raw_sql(statements).fetch_all(self.session()?).await;
        let answered = answered.map_err(failed)?;
        let now = answered.first().ok_or(sqlx::Error::RowNotFound);
        now.and_then(|row| row.try_get(0)).map_err(failed)
    }

    /// Writes the record, if it is as it was found; whether it was.
    async fn write(&mut self, completion: &Completion) -> Result<bool, StoreError> {
        let now = self.check().await?;
        mark!("mysql.transaction.checked");
        let Some(Claimant { row, seen }) = &mut self.claimed else { return Ok(false) };
        let (mut row, seen) = (row.clone(), *seen);
        let from = if seen.is_some() { now } else { 0 };
        match row.complete(completion, from) {
            Ended::Fenced => return Ok(false),
            Ended::Changed | Ended::Already | Ended::Removed => {}
        }
        let session = self.session()?;
        let written = match seen {
            Some(seen) => replace(session, seen, &row).await,
            None => insert(session, &row).await,
        };
        written.map_err(Failure::into_error)
    }

    /// Ends it. Whoever no longer waits for that has ended it all the same.
    async fn end(&mut self, end: End) -> Result<(), StoreError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let ended = tokio::spawn(open.end(end)).await.unwrap_or(Err(sqlx::Error::WorkerCrashed));
        ended.map_err(failed)
    }

    async fn commit(mut self) -> Result<(), StoreError> {
        if self.claimed.is_none() {
            // With a claim, its completion has done so.
            self.check()
                .await
                .map_err(|error| StoreError::caused_by(NAME, StoreErrorKind::Refused, error))?;
        }
        let Some(open) = self.open.take() else { return Ok(()) };
        let ended = tokio::spawn(open.end(End::Commit)).await;
        ended.unwrap_or(Err(sqlx::Error::WorkerCrashed)).map_err(|error| {
            let rolled_back = is_rolled_back(&error);
            let failure = failed(error);
            match failure.kind() {
                _ if rolled_back => StoreError::caused_by(NAME, StoreErrorKind::Refused, failure),
                kind if kind.is_transient() => failure,
                _ => StoreError::caused_by(NAME, StoreErrorKind::Unreachable, failure),
            }
        })
    }
}

/// Whether a COMMIT that has failed has certainly come to nothing, by the class of its SQLSTATE:
/// the server has refused the data, or gave the transaction up for another one's sake.
fn is_rolled_back(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|state| ["22", "23", "40"].iter().any(|class| state.starts_with(class)))
}

/// Whether a session has the lock of this name.
struct IsHeld(String);

impl Call for IsHeld {
    type Answer = bool;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        let held = sqlx::query_scalar::<_, i64>("SELECT IS_USED_LOCK(?) IS NOT NULL");
        Ok(held.bind(&self.0).fetch_one(connection).await? != 0)
    }
}

impl Transact for MySqlStore {
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>> {
        Box::pin(async move {
            let begun = timeout(self.0.patience, Handlers::claim(self, claim)).await;
            begun.unwrap_or_else(|elapsed| Err(too_late(elapsed)))
        })
    }

    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>> {
        Box::pin(async move {
            let begin = async {
                let mut begun = Handlers::begin(self, None).await?;
                begun.execute("SAVEPOINT idem_effects").await?;
                Ok(Box::new(begun) as Box<dyn Transaction>)
            };
            let begun = timeout(self.0.patience, begin).await;
            begun.unwrap_or_else(|elapsed| Err(too_late(elapsed)))
        })
    }

    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>> {
        let asked = IsHeld(lock_of(self, key));
        Box::pin(async move { self.call(&asked).await })
    }
}

impl Transaction for Handlers {
    fn connection(&self) -> &(dyn Any + Send) {
        match &self.open {
            Some(open) => {
                let connection: &MySqlConnection = &open.transaction;
                connection
            }
            // It has ended, and nobody has it any longer.
            None => &self.claimed,
        }
    }

    fn connection_mut(&mut self) -> &mut (dyn Any + Send) {
        match &mut self.open {
            Some(open) => {
                let connection: &mut MySqlConnection = &mut open.transaction;
                connection
            }
            None => &mut self.claimed,
        }
    }

    fn undo(&mut self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.execute("ROLLBACK TO SAVEPOINT idem_effects").boxed()
    }

    fn complete<'a>(
        &'a mut self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            if self.write(completion).await? {
                return Ok(Written::Done);
            }
            // The transaction may not see what was committed since it began to read.
            self.execute("ROLLBACK").await?;
            let loaded =
                load(self.session()?, &completion.key).await.map_err(Failure::into_error)?;
            let Some(Loaded { row, now, .. }) = loaded else { return Ok(Written::Gone) };
            let found = found(Some(&row), completion.format, now);
            let found = found.map_err(|kind| StoreError::new(NAME, kind))?;
            Ok(found.map_or(Written::Gone, |row| Written::Fenced(row.record(now))))
        })
    }

    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Handlers::commit(*self).boxed()
    }

    fn roll_back(mut self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Box::pin(async move { self.end(End::RollBack).await })
    }
}
