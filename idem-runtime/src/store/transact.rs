//! Transactions of the application's that carry the record: what transactional handlers ask of a
//! store.

use std::{any::Any, fmt};

use futures_util::future::BoxFuture;

use super::{Claim, Completion, StoreError, Written};
use crate::{key::Key, record::Record};

/// A store whose records live in the application's own database, so that a handler's effects and
/// its record can be committed together.
///
/// A claim that is made in a transaction is nobody else's to see until the commit: no lease guards
/// it, and the end of its connection ends it. What it holds meanwhile is a lock of the database's
/// that nobody waits for.
pub trait Transact: Send + Sync {
    /// Begins a transaction and claims a key in it.
    ///
    /// The claim is decided as [`Store::claim`](super::Store::claim) decides, on what is committed
    /// at this moment; a key that another transaction holds is [`Held`](Begun::Held) at once.
    /// Nothing of a refused claim stays open.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. Nothing is then claimed.
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>>;

    /// Begins a transaction without a claim, for a handler that runs without protection.
    ///
    /// # Errors
    ///
    /// When the store cannot answer.
    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>>;

    /// Whether a transaction holds this key now. It takes no lock and is asked by those who wait.
    ///
    /// # Errors
    ///
    /// When the store cannot answer.
    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>>;
}

/// A store's answer to a claim in a transaction.
#[derive(Debug)]
pub enum Begun {
    /// It is granted. The record is as it would be committed now: running, under the claimant's
    /// token.
    Granted(Box<dyn Transaction>, Record),
    /// It is not: this is the record that stands in its way.
    Found(Record),
    /// It is not: another transaction holds the key.
    Held,
    /// It is not: the claim asked for a key that the server handed out, and there is no record.
    Unknown,
}

/// An open transaction. Dropped, it is rolled back.
pub trait Transaction: fmt::Debug + Send {
    /// The connection that it is on: the driver's own type.
    fn connection(&self) -> &(dyn Any + Send);

    /// The same, to work on it.
    fn connection_mut(&mut self) -> &mut (dyn Any + Send);

    /// Undoes what was done on the connection since the transaction began.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. The transaction can then only be rolled back.
    fn undo(&mut self) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Writes the answer into the record of the key that was claimed; it counts from the commit on.
    ///
    /// [`Written::Fenced`] and [`Written::Gone`] say that somebody who does not go by this lock has
    /// changed the record meanwhile: the transaction can then only be rolled back.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. The transaction can then only be rolled back.
    fn complete<'a>(
        &'a mut self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Commits, and lets the key go.
    ///
    /// # Errors
    ///
    /// When the commit failed. After a [transient](super::StoreErrorKind::is_transient) failure it
    /// may have happened all the same; after any other it has not.
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Rolls back, and lets the key go.
    ///
    /// # Errors
    ///
    /// When the store cannot answer; the end of the connection then does the same.
    fn roll_back(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>>;
}
