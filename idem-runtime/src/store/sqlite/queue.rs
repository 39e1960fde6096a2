//! Calls that wait for the disk, and the task that writes them together.
//!
//! A call is pushed; if no task is at work, one is started. It takes all that waits, writes it in
//! one transaction, answers, and looks again, until nothing waits. Under load, whatever arrives
//! while one transaction is flushed to the disk shares the next; without load, a call goes at once.
//!
//! The callers only wait for answers, so that one who goes away takes nobody else's call along.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, MutexGuard, PoisonError},
};

use sqlx::sqlite::SqliteConnection;
use tokio::{runtime::Handle, sync::oneshot};

use super::{Failure, NAME, Shared, batch::Batch, failure};
use crate::{
    key::{Key, ScopeDigest, Token},
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, Purged, Renewal, StoreError,
        StoreErrorKind, Written,
    },
};

/// How many calls go into one transaction. More than that gain little from sharing a flush, and
/// keep other processes waiting for the lock.
const CALLS_A_TRANSACTION: usize = 512;

/// What waits, and whether a task is at work.
#[derive(Default)]
pub(super) struct Queue {
    waiting: VecDeque<Op>,
    draining: bool,
}

/// Where a call's answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// A call that writes.
pub(super) enum Op {
    Claim(Box<Claim>, Reply<Claimed>),
    Issue(Box<Issue>, Reply<Written>),
    Checkpoint(Box<Checkpoint>, Reply<Written>),
    Complete(Box<Completion>, Reply<Written>),
    Release(Key, Token, Reply<Written>),
    Forget(Key, Token, Reply<Written>),
    Renew(Vec<Renewal>, Reply<Vec<bool>>),
    Sweep(usize, Reply<usize>),
    Purge(Doomed, Reply<Purged>),
}

/// Rows to be removed, unless their lease is alive.
pub(super) struct Doomed {
    /// At least one.
    pub(super) keys: Vec<Key>,
    /// Those of other scopes stay: a key that was found may have been forgotten and used again.
    pub(super) scope: Option<ScopeDigest>,
}

impl Op {
    /// Whether nobody waits for it and leaving it out is what the caller would want. What has
    /// happened under a claim is written even if its caller gave up waiting.
    fn is_abandoned(&self) -> bool {
        match self {
            Self::Claim(_, reply) => reply.is_closed(),
            Self::Issue(_, reply) => reply.is_closed(),
            Self::Renew(_, reply) => reply.is_closed(),
            Self::Sweep(_, reply) => reply.is_closed(),
            Self::Purge(_, reply) => reply.is_closed(),
            Self::Checkpoint(..) | Self::Complete(..) | Self::Release(..) | Self::Forget(..) => {
                false
            }
        }
    }

    /// The keys whose rows it needs.
    pub(super) fn keys(&self, keys: &mut Vec<Key>) {
        match self {
            Self::Claim(claim, _) => keys.push(claim.key),
            Self::Issue(issue, _) => keys.push(issue.key),
            Self::Checkpoint(checkpoint, _) => keys.push(checkpoint.key),
            Self::Complete(completion, _) => keys.push(completion.key),
            Self::Release(key, ..) | Self::Forget(key, ..) => keys.push(*key),
            Self::Renew(renewals, _) => keys.extend(renewals.iter().map(|renewal| renewal.key)),
            // Nothing is decided on these, and a payload may be large.
            Self::Sweep(..) | Self::Purge(..) => {}
        }
    }

    fn fail(self, failure: &Failure) {
        let error = failure.error();
        // Whoever no longer waits needs no answer.
        match self {
            Self::Claim(_, reply) => drop(reply.send(Err(error))),
            Self::Issue(_, reply)
            | Self::Checkpoint(_, reply)
            | Self::Complete(_, reply)
            | Self::Release(_, _, reply)
            | Self::Forget(_, _, reply) => drop(reply.send(Err(error))),
            Self::Renew(_, reply) => drop(reply.send(Err(error))),
            Self::Sweep(_, reply) => drop(reply.send(Err(error))),
            Self::Purge(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Has a call written; its answer goes to its reply.
pub(super) fn push(shared: &Arc<Shared>, op: Op) -> Result<(), StoreError> {
    let runtime = Handle::try_current()
        .map_err(|none| StoreError::caused_by(NAME, StoreErrorKind::Unreachable, none))?;
    let mut queue = lock(shared);
    queue.waiting.push_back(op);
    if mem::replace(&mut queue.draining, true) {
        return Ok(());
    }
    drop(queue);
    mark!("sqlite.queue.pushed");
    // Made before the task: a runtime that is shutting down drops the task without running it.
    let duty = Duty { shared: Arc::clone(shared), done: false };
    runtime.spawn(drain(duty));
    Ok(())
}

/// The task's duty to write all that waits, which it hands back however it ends.
struct Duty {
    shared: Arc<Shared>,
    /// Whether it ended because nothing waited. Another task may have taken over since.
    done: bool,
}

impl Drop for Duty {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut queue = lock(&self.shared);
        queue.draining = false;
        // Whoever waits in vain is told so: the next call may be a long time away.
        let abandoned = mem::take(&mut queue.waiting);
        drop(queue);
        drop(abandoned);
    }
}

async fn drain(mut duty: Duty) {
    while let Some(ops) = next_batch(&duty.shared) {
        write(&duty.shared, ops).await;
    }
    duty.done = true;
}

/// Takes what waits; when that is nothing, the task is no longer at work.
fn next_batch(shared: &Shared) -> Option<Vec<Op>> {
    let mut queue = lock(shared);
    let count = queue.waiting.len().min(CALLS_A_TRANSACTION);
    queue.draining = count > 0;
    (count > 0).then(|| queue.waiting.drain(..count).collect())
}

/// Writes calls in one transaction and answers them.
async fn write(shared: &Shared, mut ops: Vec<Op>) {
    ops.retain(|op| !op.is_abandoned());
    if ops.is_empty() {
        return;
    }
    mark!("sqlite.queue.taken");
    let mut connection = match shared.pool.acquire().await {
        Ok(connection) => connection,
        Err(error) => return fail_all(ops, &failure(error)),
    };
    if !write_on(&mut connection, &shared.clock, ops).await {
        connection.close_on_drop();
    }
}

/// Writes calls in one transaction on a connection, answers them, and says whether the connection
/// is still good.
///
/// After some failures SQLite rolls back by itself. The driver does not notice, believes ever after
/// that a transaction is open, and can begin none on that connection again.
async fn write_on(connection: &mut SqliteConnection, clock: &Clock, ops: Vec<Op>) -> bool {
    let mut batch = match Batch::begin(connection, clock, &ops).await {
        Ok(batch) => batch,
        Err(failure) => {
            fail_all(ops, &failure);
            // Whoever holds the lock that was waited for, this connection does not.
            return failure.kind == StoreErrorKind::TimedOut;
        }
    };
    mark!("sqlite.batch.begun");
    let mut answers = Vec::with_capacity(ops.len());
    let mut ops = ops.into_iter();
    let mut applied = Ok(());
    while applied.is_ok()
        && let Some(op) = ops.next()
    {
        applied = batch.apply(op).await.map(|answer| answers.push(answer));
    }
    let (written, good) = match applied {
        Ok(()) => {
            mark!("sqlite.batch.applied");
            let written = batch.commit().await;
            mark!("sqlite.batch.committed");
            let good = written.is_ok();
            (written, good)
        }
        Err(failure) => (Err(failure), batch.rollback().await.is_ok()),
    };
    for answer in answers {
        answer.settle(written.as_ref().err());
    }
    if let Err(failure) = &written {
        fail_all(ops, failure);
    }
    mark!("sqlite.batch.answered");
    good
}

fn fail_all(ops: impl IntoIterator<Item = Op>, failure: &Failure) {
    ops.into_iter().for_each(|op| op.fail(failure));
}

/// No code that runs under the lock can panic in the middle of a change.
fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}
