//! Claims that a transaction of the application's carries.
//!
//! The record appears with the effects or not at all, so there is no lease, no heartbeat and no
//! unknown outcome: what did not commit did not happen. The one thing that can be unknown is whether
//! a commit arrived, and the record itself answers that.

use std::{
    any::{TypeId, type_name},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Admission, Call, Came, Comparable, End, Ended, Hold, Run, Shared, judge, later, refusal_of,
    theirs,
};
use crate::{
    decision::Decision,
    key::{Key, OperationId, Token},
    observer::Outcome,
    operation::Attempt,
    policy::Mode,
    record::{FORMAT, Flags, Progress, Record, RecordedResponse, State},
    refusal::{Refusal, RefusalKind},
    store::{Begun, Claim, Completion, StoreError, StoreErrorKind, Transact, Transaction, Written},
};

/// How soon, after a commit whose answer was lost, the record is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Where the engine and a handler's `Tx` hand the transaction to each other.
#[derive(Clone, Default)]
pub(crate) struct Slot(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    /// The connection that the handler's `Tx` asks for, once it was extracted.
    asked: Option<(TypeId, &'static str)>,
    transaction: Option<Box<dyn Transaction>>,
    /// Whether the handler has returned: whoever still holds the transaction may not give it back.
    closed: bool,
}

impl Inside {
    /// It cannot be told at compile time which store an engine has.
    fn check(&self) -> Result<(), WrongTransaction> {
        match (self.asked, &self.transaction) {
            (Some((asked, name)), Some(transaction))
                if transaction.connection().type_id() != asked =>
            {
                Err(WrongTransaction::OtherDatabase(name))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").field(&self.lock().transaction).finish()
    }
}

#[cfg_attr(
    not(any(feature = "mysql", feature = "postgres", feature = "sqlite")),
    expect(dead_code, reason = "without a driver nobody can take a `Tx`")
)]
impl Slot {
    /// Says which connection the handler asks for, before or after the claim.
    pub(crate) fn ask<C: 'static>(&self) -> Result<(), WrongTransaction> {
        let mut inside = self.lock();
        if inside.asked.replace((TypeId::of::<C>(), type_name::<C>())).is_some() {
            return Err(WrongTransaction::Twice);
        }
        inside.check()
    }

    /// Puts the transaction in.
    fn fill(&self, transaction: Box<dyn Transaction>) -> Result<(), WrongTransaction> {
        let mut inside = self.lock();
        inside.transaction = Some(transaction);
        // Whoever cannot use it must not keep its locks either.
        inside.check().inspect_err(|_| drop(inside.transaction.take()))
    }

    /// Takes the transaction out, to use it.
    pub(crate) fn take(&self) -> Option<Box<dyn Transaction>> {
        self.lock().transaction.take()
    }

    /// Gives it back, unless the handler has returned: it is then rolled back.
    pub(crate) fn give_back(&self, transaction: Box<dyn Transaction>) {
        let mut inside = self.lock();
        if !inside.closed {
            inside.transaction = Some(transaction);
        }
    }

    /// Takes it out for good; `None` if somebody holds it.
    fn close(&self) -> Option<Box<dyn Transaction>> {
        let mut inside = self.lock();
        inside.closed = true;
        inside.transaction.take()
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a handler cannot have the store's transaction.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum WrongTransaction {
    #[error("the engine's store has no transactions: use the store of the application's database")]
    NoTransactions,
    #[error("the handler takes two `Tx`: there is one transaction")]
    Twice,
    #[error("the handler takes a `Tx` of {0}, which is not the database of the engine's store")]
    OtherDatabase(&'static str),
    #[error(
        "a layer has claimed the handler's key, and would record its answer after the commit: give \
         the handler a space of its own"
    )]
    ClaimedFurtherOut,
    #[error("the handler kept its `Tx` beyond its return: the transaction was not committed")]
    Kept,
}

/// The transaction of a run.
#[derive(Debug)]
pub(crate) struct InTransaction {
    shared: Arc<Shared>,
    key: Key,
    token: Token,
    slot: Slot,
    /// Whether what a handler did stays although its answer is an error.
    keeps_effects: AtomicBool,
    claim: Box<Claim>,
    /// Others hear that it is over, however it ends.
    _held: HeldKey,
}

/// A key that a transaction of this process holds.
#[derive(Debug)]
struct HeldKey {
    shared: Arc<Shared>,
    key: Key,
}

impl HeldKey {
    fn new(shared: &Arc<Shared>, key: Key) -> Self {
        shared.hold_in_transaction(key);
        Self { shared: Arc::clone(shared), key }
    }
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        self.shared.let_go_of_transaction(&self.key);
        self.shared.waits.ended(&self.key);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("store", &self.store).finish_non_exhaustive()
    }
}

impl InTransaction {
    /// What the handler did stays although its answer is an error.
    pub(crate) fn keep_effects(&self) {
        self.keeps_effects.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    /// The store's transactions.
    fn transact(&self) -> Result<&dyn Transact, WrongTransaction> {
        self.store.transact().ok_or(WrongTransaction::NoTransactions)
    }

    /// Begins a transaction that claims the key for a request, or says what stands in its way.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        mut call: Call,
        slot: &Slot,
        request: &mut dyn Comparable,
    ) -> Admission {
        if self.background.len() >= self.limits.detached {
            return self.refuse(&call, Refusal::new(RefusalKind::Busy), None);
        }
        let transact = match self.transact() {
            Ok(transact) => transact,
            Err(wrong) => return self.wrong(&call, wrong),
        };
        let claim = &mut call.claim;
        claim.operation_id = OperationId::derived(&claim.key, &claim.fingerprint);
        if let Some((decision, record)) = self.at_hand(&call.claim) {
            return self.answer(&call, decision, &record);
        }
        for _ in 0..4 {
            mark!("transaction.begin.before");
            // Its duplicates must not queue for connections, which owners may hold all of.
            let begun = match self.holds_in_transaction(&call.claim.key) {
                true => Ok(Begun::Held),
                false => {
                    let begun =
                        self.ask(mark!("transaction.begin.sent" => transact.begin(&call.claim)));
                    match begun.await {
                        // Another process may only be reading it: what is completed is replayed to
                        // both.
                        Ok(Begun::Held) => {
                            let completed = self.completed(&call.claim.key).await;
                            Ok(completed.map_or(Begun::Held, Begun::Found))
                        }
                        begun => begun,
                    }
                }
            };
            mark!("transaction.begin.answered");
            let record = match begun {
                Ok(Begun::Granted(transaction, record)) => {
                    return self.begun(call, slot, transaction, &record).await;
                }
                Ok(Begun::Held) if call.policy.waits() => return Admission::Wait(call),
                Ok(Begun::Held) => {
                    return self.refuse(&call, Refusal::new(RefusalKind::InFlight), None);
                }
                Ok(Begun::Unknown) => {
                    return self.refuse(&call, Refusal::new(RefusalKind::UnknownKey), None);
                }
                Ok(Begun::Found(record)) => record,
                // Without its database the handler could do nothing: `open` does not help.
                Err(error) => {
                    let refusal = Refusal::new(refusal_of(&error));
                    return self.refuse(&call, refusal, Some(error));
                }
            };
            let (decision, ours) = match judge(&call.claim, &record, request).await {
                Ok(judged) => judged,
                Err(kind) => return self.refuse_about(&call, kind, &record),
            };
            match decision {
                Decision::Run => call.claim.fingerprint = ours.unwrap_or(call.claim.fingerprint),
                Decision::InFlight if call.policy.waits() => return Admission::Wait(call),
                decision => return self.answer(&call, decision, &record),
            }
        }
        self.refuse(&call, Refusal::new(RefusalKind::InFlight), None)
    }

    /// The record of a key, if its answer is committed.
    async fn completed(&self, key: &Key) -> Option<Record> {
        let record = self.ask(self.store.read(key)).await.ok().flatten();
        record.filter(|record| record.state == State::Completed)
    }

    async fn begun(
        self: &Arc<Self>,
        call: Call,
        slot: &Slot,
        transaction: Box<dyn Transaction>,
        record: &Record,
    ) -> Admission {
        let issued = match Progress::decode(&record.payload) {
            Ok(progress) => progress.issued,
            Err(corrupt) => {
                let _ = self.ask(transaction.roll_back()).await;
                let error = StoreError::caused_by("idem", StoreErrorKind::Corrupt, corrupt);
                let refusal = Refusal::new(RefusalKind::RecordUnreadable);
                return self.refuse(&call, refusal.about(record.operation_id), Some(error));
            }
        };
        if let Err(wrong) = slot.fill(transaction) {
            return self.wrong(&call, wrong);
        }
        let Call { claim, policy } = call;
        let attempt = Attempt::in_transaction(record.operation_id, record.attempt, issued);
        let (key, token, operation) = (claim.key, claim.token, Arc::clone(&claim.operation));
        let held = InTransaction {
            shared: Arc::clone(self),
            key,
            token,
            slot: slot.clone(),
            keeps_effects: AtomicBool::new(false),
            claim,
            _held: HeldKey::new(self, key),
        };
        // Who waits for it elsewhere must be heard.
        if policy.waits() {
            self.listen();
        }
        mark!("transaction.held");
        Admission::Run(Run {
            hold: Hold::Transaction(Box::new(held)),
            operation,
            enforced: policy.mode == Mode::Enforce,
            attempt,
            must_yield: false,
        })
    }

    /// A handler that cannot have the transaction that it asks for does not run.
    pub(crate) fn wrong(&self, call: &Call, wrong: WrongTransaction) -> Admission {
        let error = StoreError::caused_by("idem", StoreErrorKind::Refused, wrong);
        self.refuse(call, Refusal::new(RefusalKind::TransactionFailed), Some(error))
    }

    /// Runs a handler without a claim in a transaction, which is committed with what it did or
    /// rolled back.
    pub(crate) async fn unclaimed_transaction(
        &self,
        slot: &Slot,
    ) -> Result<Unclaimed, (RefusalKind, StoreError)> {
        let failed = |wrong| {
            let error = StoreError::caused_by("idem", StoreErrorKind::Refused, wrong);
            (RefusalKind::TransactionFailed, error)
        };
        let transact = self.transact().map_err(failed)?;
        let transaction = self
            .ask(transact.begin_unclaimed())
            .await
            .map_err(|error| (refusal_of(&error), error))?;
        slot.fill(transaction).map_err(failed)?;
        Ok(Unclaimed(slot.clone()))
    }
}

/// The transaction of a handler that runs without a claim.
pub(crate) struct Unclaimed(Slot);

impl Unclaimed {
    /// Commits what the handler did, or rolls it back.
    pub(crate) async fn end(
        self,
        shared: &Shared,
        keep: bool,
    ) -> Result<(), (RefusalKind, StoreError)> {
        let Some(transaction) = self.0.close() else {
            let error =
                StoreError::caused_by("idem", StoreErrorKind::Refused, WrongTransaction::Kept);
            return Err((RefusalKind::TransactionFailed, error));
        };
        if !keep {
            // The end of its connection does the same.
            let _ = shared.ask(transaction.roll_back()).await;
            return Ok(());
        }
        // Without a record, nobody can say whether a commit whose answer was lost has happened.
        shared.ask(transaction.commit()).await.map_err(|error| {
            let unknown = error.kind().is_transient();
            let kind = match unknown {
                true => RefusalKind::UnknownOutcome,
                false => RefusalKind::TransactionFailed,
            };
            (kind, error)
        })
    }
}

impl InTransaction {
    pub(super) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Commits the answer with the effects, or rolls both back.
    pub(super) async fn end(self, end: End, enforced: bool) -> Came {
        match self.commit(end).await {
            // What the handler says is not true even where idem only observes.
            (Ended::Theirs(..) | Ended::Lost, outcome, error) if !enforced => {
                (Ended::TransactionFailed, outcome, error)
            }
            came => came,
        }
    }

    async fn commit(self, end: End) -> Came {
        let shared = Arc::clone(&self.shared);
        let Some(mut transaction) = self.slot.close() else {
            let error =
                StoreError::caused_by("idem", StoreErrorKind::Refused, WrongTransaction::Kept);
            return failed(error);
        };
        let (flags, payload, ttl) = match end {
            End::Complete(payload, ttl) => (Flags::NONE, payload, ttl),
            End::Tombstone(payload, ttl) => (Flags::TOMBSTONE, payload, ttl),
            // What did not commit did not happen.
            End::Release | End::Forget => {
                mark!("transaction.roll_back.before");
                let sent = mark!("transaction.roll_back.sent" => transaction.roll_back());
                let rolled_back = shared.ask(sent).await;
                mark!("transaction.roll_back.answered");
                return (Ended::Own, Outcome::Forgotten, rolled_back.err());
            }
        };
        let is_error = RecordedResponse::decode(&payload).is_ok_and(|answer| answer.status >= 400);
        if is_error
            && !self.keeps_effects.load(Ordering::Relaxed)
            && let Err(error) = shared.ask(transaction.undo()).await
        {
            return failed(error);
        }
        mark!("transaction.complete.before");
        let completion = Completion {
            key: self.key,
            token: self.token,
            ttl: ttl.unwrap_or(self.claim.ttl),
            flags,
            payload,
            format: FORMAT,
        };
        let sent = mark!("transaction.complete.sent" => transaction.complete(&completion));
        match shared.ask(sent).await {
            Ok(Written::Done) => {
                mark!("transaction.complete.answered");
            }
            Ok(Written::Fenced(record)) => {
                let _ = shared.ask(transaction.roll_back()).await;
                return self.overtaken(&record);
            }
            Ok(Written::Gone) => {
                let _ = shared.ask(transaction.roll_back()).await;
                return (Ended::Lost, Outcome::Refused(RefusalKind::LeaseLost), None);
            }
            Err(error) => return failed(error),
        }
        let outcome = match flags {
            Flags::TOMBSTONE => Outcome::Tombstoned,
            _ => Outcome::Recorded,
        };
        let committed = shared.ask(mark!("transaction.commit.sent" => transaction.commit())).await;
        mark!("transaction.commit.answered");
        match committed {
            Ok(()) => (Ended::Own, outcome, None),
            Err(error) if error.kind().is_transient() => {
                self.after_a_lost_commit(outcome, error).await
            }
            Err(error) => failed(error),
        }
    }

    /// Finds out from the record whether a commit whose answer was lost has happened: once the key
    /// can be claimed, its connection has ended, and the commit has happened or never will.
    async fn after_a_lost_commit(&self, outcome: Outcome, lost: StoreError) -> Came {
        let shared = &self.shared;
        let give_up = later(Instant::now(), shared.limits.store_timeout.saturating_mul(2));
        let claim = Claim { token: Token::random(), ..(*self.claim).clone() };
        while Instant::now() < give_up {
            if let Ok(transact) = shared.transact() {
                match shared.ask(transact.begin(&claim)).await {
                    Ok(Begun::Granted(transaction, _)) => {
                        let _ = shared.ask(transaction.roll_back()).await;
                        return failed(lost);
                    }
                    Ok(Begun::Found(record))
                        if record.token == self.token && record.state == State::Completed =>
                    {
                        return (Ended::Own, outcome, None);
                    }
                    Ok(Begun::Found(record)) => return self.overtaken(&record),
                    Ok(Begun::Unknown) => return failed(lost),
                    Ok(Begun::Held) | Err(_) => {}
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        (Ended::CommitUnknown, Outcome::Refused(RefusalKind::CommitUnknown), Some(lost))
    }

    /// The answer of whoever completed the key meanwhile, without going by the lock.
    fn overtaken(&self, record: &Record) -> Came {
        match theirs(record, &self.claim.fingerprint) {
            ended @ Ended::Theirs(..) => (ended, Outcome::Replayed, None),
            ended => (ended, Outcome::Refused(RefusalKind::LeaseLost), None),
        }
    }
}

fn failed(error: StoreError) -> Came {
    let kind = RefusalKind::TransactionFailed;
    (Ended::TransactionFailed, Outcome::Refused(kind), Some(error))
}
