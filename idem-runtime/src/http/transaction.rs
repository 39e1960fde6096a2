//! `Tx`: the transaction that idem commits with the record.

use std::{
    cell::OnceCell,
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use axum::{
    extract::FromRequestParts,
    response::{IntoResponse, Response},
};
use http::{StatusCode, request::Parts};
use sqlx::Database;

use crate::{
    engine::transaction::{Slot, WrongTransaction},
    store::Transaction,
};

/// The transaction of a handler that says `transaction`; take it as an argument.
///
/// Use it as a sqlx transaction: `&mut *tx` is the connection. idem begins it with the claim and
/// commits it with the record: what the handler does on it happens exactly once, through a crash at
/// any point. It is committed when the answer is a success or a redirect. An error that is recorded
/// undoes it first, unless the answer says [`Settle::keeping_effects`](crate::Settle); any other
/// answer, a panic and a lost connection undo all of it, and the key is free again.
///
/// It is nobody else's: do not send `COMMIT` or `ROLLBACK` on it (savepoints are fine), and do not
/// keep it beyond the handler's return. A handler that does so is answered for with 500
/// `transaction_failed`, and its transaction is rolled back.
///
/// What is done elsewhere, a call of another service say, is not part of it: give such calls a key
/// [derived](crate::Operation::derive) from the operation, which is the same in every attempt.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// use axum::{Router, http::StatusCode, routing::post};
/// use idem_runtime::{Idempotency, Tx, idempotent};
/// use sqlx::Sqlite;
///
/// #[idempotent(anchor = header("Idempotency-Key"), transaction)]
/// async fn deposit(mut tx: Tx<Sqlite>, body: String) -> Result<StatusCode, StatusCode> {
///     sqlx::query("UPDATE accounts SET balance = balance + 1 WHERE owner = ?1")
///         .bind(body)
///         .execute(&mut *tx)
///         .await
///         .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
///     Ok(StatusCode::CREATED)
/// }
///
/// let app: Router<Idempotency> = Router::new().route("/deposits", post(deposit));
/// # let _ = app;
/// # }
/// ```
///
/// # What a database holds meanwhile
///
/// | | PostgreSQL | MySQL, MariaDB | SQLite |
/// |---|---|---|---|
/// | a connection of the pool | from claim to commit | from claim to commit | from claim to commit |
/// | for the key | an advisory lock of the transaction's | a lock of the session's (`GET_LOCK`) | the only write lock |
/// | others who write | go on | go on | wait |
/// | a duplicate | is in flight at once | is in flight at once | of this process is in flight at once; of another one waits for the write lock |
/// | a claim | two round trips | four round trips | no network |
/// | record and commit | two round trips | three round trips | no network |
///
/// Size the pool for the handlers that run at once: each has a connection for as long as it runs. A
/// handler that needs another connection beside its `Tx` can wait for one that the others hold. On
/// SQLite it holds the lock that every other write of the engine needs: within it, do not issue keys,
/// call a plain function of the same engine or a service with claims of its own, which would wait for
/// it in vain; and keep it shorter than the shortest lease, since no lease is renewed meanwhile.
///
/// **Isolation.** The transaction has the level that the connection has by default; it begins after
/// the claim has been decided, so it cannot be changed for one handler by `SET TRANSACTION`, but for
/// a pool. Where the database gives a transaction up for another one's sake (a deadlock, a
/// serialization failure), nothing was done: 500 `transaction_failed`, and a retry runs. On
/// PostgreSQL above READ COMMITTED a claim may miss what another one under the same key has
/// committed in the same moment; its own completion then fails in that way.
///
/// **A failed statement** ends a PostgreSQL transaction. A handler that ignores it and answers with
/// a success is answered for with 500 `transaction_failed`; one that means to go on wraps the
/// statement in a savepoint (`tx.begin()`). In MySQL and SQLite the other statements stand.
///
/// **MySQL and MariaDB commit by themselves** before and after each statement that defines something
/// (`CREATE`, `ALTER`, `DROP`, `TRUNCATE`, among
/// [others](https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html)). What the handler did
/// before is then done, without a record: 500 `transaction_failed`, and a retry does it again. Leave
/// such statements to migrations.
///
/// **Handlers that share the keys without `transaction`** see no claim of a transaction. Whoever of
/// the two records second finds the other's record: the transaction is rolled back, and its request
/// gets that answer or 409 `lease_lost`. On a cluster of MySQL servers that all take writes, the
/// lock is that server's only, and the same rule decides between two transactions.
///
/// **A pooler in transaction mode** before PostgreSQL works; before MySQL it must keep a session for
/// as long as it holds a lock.
///
/// # Panics
///
/// When it is used where there is no transaction: in a handler that does not say `transaction`
/// (which does not compile where the macro sees it), in an extractor or layer, or after the handler
/// has returned.
#[must_use]
pub struct Tx<DB: Database> {
    slot: Slot,
    /// Taken out of the slot at the first use, and given back at the end.
    taken: OnceCell<Option<Box<dyn Transaction>>>,
    database: PhantomData<fn() -> DB>,
}

impl<DB: Database> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx").field("database", &DB::NAME).finish_non_exhaustive()
    }
}

impl<DB: Database, S: Send + Sync> FromRequestParts<S> for Tx<DB> {
    type Rejection = TxRejection;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let slot = parts.extensions.get_or_insert_default::<Slot>().clone();
        slot.ask::<DB::Connection>().map_err(TxRejection)?;
        Ok(Self { slot, taken: OnceCell::new(), database: PhantomData })
    }
}

/// A handler cannot have the transaction that it asks for: it takes two, or one of another database
/// than the engine's store is in. Nothing ran.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(transparent)]
pub struct TxRejection(WrongTransaction);

impl IntoResponse for TxRejection {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}

impl<DB: Database> Deref for Tx<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        let taken = self.taken.get_or_init(|| self.slot.take());
        taken.as_ref().and_then(|taken| taken.connection().downcast_ref()).unwrap_or_else(missing)
    }
}

impl<DB: Database> DerefMut for Tx<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.taken.get_or_init(|| self.slot.take());
        let taken = self.taken.get_mut().and_then(Option::as_mut);
        taken.and_then(|taken| taken.connection_mut().downcast_mut()).unwrap_or_else(missing)
    }
}

/// The engine has put a transaction of the right type there before the handler's body starts.
#[expect(clippy::panic, reason = "a dereference cannot fail in another way")]
fn missing<T>() -> T {
    panic!(
        "`Tx` is used where it has no transaction: only the body of a handler that says \
         `transaction` has one"
    )
}

impl<DB: Database> Drop for Tx<DB> {
    fn drop(&mut self) {
        if let Some(transaction) = self.taken.take().flatten() {
            self.slot.give_back(transaction);
        }
    }
}
