//! Operators: finding, listing, settling and purging records.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::Serialize;

use crate::{
    anchor::AnchorValue,
    decision::{OnUnknown, Seen},
    engine::{Idempotency, Shared},
    key::{KeyName, OperationId, ScopeDigest, Token},
    look_up::{Found, LookUpError, found, values_of},
    observer::{Event, Outcome},
    policy::DEFAULT_LEASE,
    record::{FORMAT, Flags, Record, RecordedResponse, RecordedValue, Ttl},
    store::{
        Claim, Claimed, Completion, Listing, Page, Purge, Purged, Signal, StoreError, Written,
    },
};

/// How long one call may take that looks through all records.
pub(crate) const SEARCH_TIMEOUT: Duration = Duration::from_secs(60);
/// How many records a purge removes in one call.
const PURGED_AT_ONCE: usize = 1_000;

impl Idempotency {
    /// What operators do with records: find and list them, settle unknown outcomes, purge.
    ///
    /// It asks nobody whether they may: put it behind whatever protects the rest of your operators'
    /// tools. Build the engine as the application's is built, with its secret and its seal: what is
    /// settled through another one is not found, or not opened, by the application.
    pub const fn admin(&self) -> Admin<'_> {
        Admin { shared: &self.shared }
    }
}

/// What operators do with records; made by [`Idempotency::admin`].
///
/// A support ticket names an operation id: it is in refusals, in spans, and in what the application
/// made of it.
///
/// ```
/// use http::Response;
/// use idem_runtime::{
///     Became, Idempotency, OperationId, Scope,
///     store::{Kind, Listing, MemoryStore},
/// };
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
/// let admin = idem.admin();
///
/// // What nobody has settled yet, the oldest first.
/// let unsettled = Listing { kind: Kind::Unsettled, scope: None, after: None, limit: 100 };
/// for record in admin.list(&unsettled).await?.records {
///     // The bank's books say that the charge was made: from now on, retries get this answer.
///     let answer = Response::builder().status(201).body("{\"paid\":true}".into())?;
///     admin.settle_done(record.operation_id, &answer, Duration::from_secs(24 * 60 * 60)).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy)]
pub struct Admin<'e> {
    shared: &'e Arc<Shared>,
}

impl fmt::Debug for Admin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

impl Admin<'_> {
    /// The operation of this id, whosever it is.
    ///
    /// # Errors
    ///
    /// As for [`LookUp::operation`](crate::LookUp::operation).
    pub async fn find_operation(&self, id: OperationId) -> Result<Option<Found>, LookUpError> {
        self.shared.find(id, None).await
    }

    /// The record of a key in a scope. The scope is what the handlers' scope sees, `()` where that
    /// is global.
    ///
    /// # Errors
    ///
    /// As for [`LookUp::key`](crate::LookUp::key).
    pub async fn find(
        &self,
        scope: &(impl AnchorValue + ?Sized),
        name: &KeyName,
    ) -> Result<Option<Found>, LookUpError> {
        let key = self.shared.named(name, &values_of(scope))?;
        let record = self.shared.ask(self.shared.store.read(&key)).await?;
        Ok(record.map(found).transpose()?)
    }

    /// The digest by which the records of a scope are listed.
    pub fn scope(&self, scope: &(impl AnchorValue + ?Sized)) -> ScopeDigest {
        self.shared.digester.scope(&values_of(scope))
    }

    /// The oldest records of a kind, page by page and without their payloads. What is running and
    /// oldest is first of [`Kind::Running`](crate::store::Kind::Running).
    ///
    /// A store may have to look through all its records for each page: this is not for the way of a
    /// request.
    ///
    /// # Errors
    ///
    /// When the store cannot be searched or cannot be asked.
    pub async fn list(&self, listing: &Listing) -> Result<Page, LookUpError> {
        let manage = self.shared.manage()?;
        Ok(self.shared.ask_for(SEARCH_TIMEOUT, manage.list(listing)).await?)
    }

    /// Settles an unknown outcome: it was done. From now on, and for this time, every retry gets
    /// this answer. Of a key that the server handed out, the time is the one that it was issued
    /// for.
    ///
    /// Headers that the engine leaves out of recorded answers are left out of this one, too. A
    /// settlement counts as an attempt, and the record stays under its operation id. What a plain
    /// function did is settled by [`settle_done_with_value`](Self::settle_done_with_value).
    ///
    /// A record that was settled meanwhile, or that a retry has taken over, is refused: of an
    /// operator and a retry, or of two operators at once, one wins. Should this process die in the
    /// middle, the outcome is unknown again once a lease is over.
    ///
    /// # Errors
    ///
    /// [`SettleError`] says why the record is not one to settle. After
    /// [`SettleError::LookUp`] with an error of the store's, look again: it may be settled.
    pub async fn settle_done(
        &self,
        id: OperationId,
        answer: &http::Response<Bytes>,
        ttl: impl Into<Ttl>,
    ) -> Result<(), SettleError> {
        if answer.status().is_informational() {
            return Err(SettleError::NotAnAnswer("an interim status is none"));
        }
        let headers = answer.headers().iter();
        let headers: Vec<_> = headers
            .filter(|(name, _)| !self.shared.leaves_out(name.as_str()))
            .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
            .collect();
        let payload = RecordedResponse::encode(answer.status().as_u16(), &headers, answer.body());
        self.complete(id, payload, ttl.into(), |record| match record.is_of_function() {
            true => Err(SettleError::NotAnAnswer("a plain function gives a value, not a response")),
            false => Ok(()),
        })
        .await
    }

    /// Settles the unknown outcome of a plain function: it was done, and this is what it returned.
    /// From now on, and for this time, every call with the key gets `Ok` of this value.
    ///
    /// It must be of the type that the function returns: a record of another one is refused as
    /// unreadable, and nothing runs.
    ///
    /// # Errors
    ///
    /// As for [`settle_done`](Self::settle_done), and when the value cannot be written as JSON.
    pub async fn settle_done_with_value(
        &self,
        id: OperationId,
        value: &(impl Serialize + ?Sized),
        ttl: impl Into<Ttl>,
    ) -> Result<(), SettleError> {
        let payload = RecordedValue::encode(&serde_json::to_vec(value).map_err(SettleError::Json)?);
        self.complete(id, payload, ttl.into(), |record| match record.is_of_function() {
            true => Ok(()),
            false => Err(SettleError::NotAnAnswer("a handler gives a response, not a value")),
        })
        .await
    }

    async fn complete(
        &self,
        id: OperationId,
        payload: Bytes,
        ttl: Ttl,
        check: fn(&Record) -> Result<(), SettleError>,
    ) -> Result<(), SettleError> {
        if ttl.is_over() {
            return Err(SettleError::NotAnAnswer("a record that expires at once protects nothing"));
        }
        let claimed = self.claim(id, check).await?;
        let completion = Completion {
            key: claimed.key,
            token: claimed.token,
            ttl,
            flags: Flags::NONE,
            payload,
            format: FORMAT,
        };
        let written = self.shared.ask(self.shared.store.complete(&completion)).await;
        self.settled(&claimed, written, Outcome::SettledDone).await
    }

    /// Settles an unknown outcome: it was not done. The record is removed, and the next request with
    /// the key runs afresh; a key that the server handed out can be used again.
    ///
    /// Be sure of it, of *every* attempt: the next request is another operation, with other
    /// [derived](crate::Operation::derive) keys and without the recorded steps, so that nothing
    /// downstream knows it for a repetition. Where the only doubt is whether the last attempt got
    /// through, let a retry run under the same operation id instead (`on_unknown = rerun`).
    ///
    /// # Errors
    ///
    /// As for [`settle_done`](Self::settle_done).
    pub async fn settle_not_done(&self, id: OperationId) -> Result<(), SettleError> {
        let claimed = self.claim(id, |_| Ok(())).await?;
        let forgotten = self.shared.store.forget(&claimed.key, &claimed.token);
        let written = self.shared.ask(forgotten).await;
        self.settled(&claimed, written, Outcome::SettledNotDone).await
    }

    /// Removes the record of an operation, whatever has become of it, unless it is running: the key
    /// was never used. Nothing stops a repetition of what was done.
    ///
    /// Through this engine it takes effect at once. Another one that has replayed the record may go
    /// on to do so for some seconds, over a remote store: see `Builder::replay_cache`.
    ///
    /// It finds the operation's key and then purges that: should the key be forgotten and used anew
    /// between the two, it is the new record that goes.
    ///
    /// # Errors
    ///
    /// When the store cannot be searched or cannot be asked, or the record cannot be read; one that
    /// cannot be read is purged [by its key](Self::purge).
    pub async fn purge_operation(&self, id: OperationId) -> Result<Purged, LookUpError> {
        let manage = self.shared.manage()?;
        let Some(record) = self.shared.ask_for(SEARCH_TIMEOUT, manage.find(&id)).await? else {
            return Ok(Purged::default());
        };
        let purged = self.shared.ask(manage.purge(&Purge::Key(record.key))).await?;
        if purged.removed > 0 {
            self.tell(Outcome::Purged, &record.operation, Some(&record));
        }
        Ok(purged)
    }

    /// Removes the record of a key, as [`purge_operation`](Self::purge_operation) does, also one
    /// that cannot be read.
    ///
    /// # Errors
    ///
    /// When the name is not that of a key, or the store cannot be searched or cannot be asked.
    pub async fn purge(
        &self,
        scope: &(impl AnchorValue + ?Sized),
        name: &KeyName,
    ) -> Result<Purged, LookUpError> {
        let manage = self.shared.manage()?;
        let key = self.shared.named(name, &values_of(scope))?;
        // For the observer; what cannot be read can be removed all the same.
        let record = self.shared.ask(self.shared.store.read(&key)).await.ok().flatten();
        let purged = self.shared.ask(manage.purge(&Purge::Key(key))).await?;
        if purged.removed > 0 {
            let operation = record.as_ref().map_or("unreadable", |record| &record.operation);
            self.tell(Outcome::Purged, operation, record.as_ref());
        }
        Ok(purged)
    }

    /// Removes all records of a scope, as a data-protection request may ask, and says how many it
    /// removed and how many it left since they are running: for those, purge again once they have
    /// ended. Requests that arrive meanwhile leave records of their own.
    ///
    /// What a database has deleted may stay in its files, write-ahead log and backups for a while:
    /// SQLite overwrites it at once under `PRAGMA secure_delete`.
    ///
    /// # Errors
    ///
    /// When the store cannot be searched, or fails in the middle; what was removed until then stays
    /// so, and purging again goes on.
    pub async fn purge_scope(
        &self,
        scope: &(impl AnchorValue + ?Sized),
    ) -> Result<Purged, LookUpError> {
        let manage = self.shared.manage()?;
        let purge = Purge::Scope { scope: self.scope(scope), limit: PURGED_AT_ONCE };
        let mut purged = Purged::default();
        loop {
            let call = self.shared.ask_for(SEARCH_TIMEOUT, manage.purge(&purge));
            let Purged { removed, running } = call.await?;
            purged = Purged { removed: purged.removed + removed, running };
            if removed == 0 {
                break;
            }
        }
        if purged.removed > 0 {
            self.tell(Outcome::Purged, "all of a scope", None);
        }
        Ok(purged)
    }

    /// Claims a record whose outcome is unknown, so that nobody runs or settles it meanwhile.
    async fn claim(
        &self,
        id: OperationId,
        check: fn(&Record) -> Result<(), SettleError>,
    ) -> Result<Record, SettleError> {
        let found = self.shared.manage()?.find(&id);
        let record = self.shared.ask_for(SEARCH_TIMEOUT, found).await;
        let record = record.map_err(LookUpError::from)?.ok_or(SettleError::NotFound)?;
        unsettled(&record)?;
        check(&record)?;
        let claim = Claim {
            key: record.key,
            scope: record.scope,
            operation: Arc::clone(&record.operation),
            // Another id, by which to tell a key that was forgotten and issued meanwhile.
            operation_id: OperationId::random(),
            fingerprint: record.fingerprint.clone(),
            token: Token::random(),
            lease: DEFAULT_LEASE,
            // Kept no longer than it was, if this ends here.
            ttl: record.kept_left,
            // A record that is gone is not made anew.
            issued_only: true,
            on_unknown: OnUnknown::Rerun,
            format: FORMAT,
        };
        let claimed = match self.shared.claim(&claim).await {
            Ok(claimed) => claimed,
            Err(error) => {
                self.shared.take_back(&claim);
                return Err(SettleError::LookUp(error.into()));
            }
        };
        match claimed {
            Claimed::Granted(record) if record.operation_id == id => Ok(record),
            Claimed::Granted(record) => {
                // The key was forgotten and used again: that one is not ours to settle.
                let _ = self.give_back(&record).await;
                Err(SettleError::NotFound)
            }
            Claimed::Found(record) if record.operation_id != id => Err(SettleError::NotFound),
            Claimed::Found(record) => {
                unsettled(&record)?;
                // It was not when the claim was decided: its lease has ended since.
                Err(SettleError::StillRunning { lease_left: record.lease_left })
            }
            Claimed::Unknown => Err(SettleError::NotFound),
        }
    }

    /// Gives a claim back under which nothing was done.
    async fn give_back(&self, claimed: &Record) -> Result<Written, StoreError> {
        let store = &self.shared.store;
        let (key, token) = (&claimed.key, &claimed.token);
        match claimed.attempt {
            1 => self.shared.ask(store.forget(key, token)).await,
            _ => self.shared.ask(store.release(key, token)).await,
        }
    }

    /// What came of writing a settlement under its claim.
    async fn settled(
        &self,
        claimed: &Record,
        written: Result<Written, StoreError>,
        outcome: Outcome,
    ) -> Result<(), SettleError> {
        match written {
            Ok(Written::Done) => {
                self.shared.waits.ended(&claimed.key);
                self.shared.signal(Signal::Ended(claimed.key));
                self.tell(outcome, &claimed.operation, Some(claimed));
                Ok(())
            }
            Ok(Written::Gone) => Err(SettleError::NotFound),
            // The lease ended before this was written, and somebody has claimed since.
            Ok(Written::Fenced(record)) => {
                unsettled(&record)?;
                Err(SettleError::StillRunning { lease_left: record.lease_left })
            }
            Err(error) => {
                // If it was not written, it is to be settled again at once, and otherwise this
                // changes nothing.
                let _ = self.give_back(claimed).await;
                Err(SettleError::LookUp(error.into()))
            }
        }
    }

    fn tell(&self, outcome: Outcome, operation: &str, record: Option<&Record>) {
        self.shared.observe(&Event {
            outcome,
            operation,
            operation_id: record.map(|record| record.operation_id),
            attempt: record.map(|record| record.attempt),
            error: None,
            enforced: true,
        });
    }
}

/// Whether a record is one to settle.
fn unsettled(record: &Record) -> Result<(), SettleError> {
    match record.seen() {
        Seen::Released { valid: true } | Seen::Running { leased: false, valid: true } => Ok(()),
        Seen::Running { leased: true, .. } => {
            Err(SettleError::StillRunning { lease_left: record.lease_left })
        }
        Seen::Completed { .. } => Err(SettleError::AlreadySettled),
        Seen::Issued { .. } => Err(SettleError::NeverUsed),
        Seen::Released { valid: false } | Seen::Running { leased: false, valid: false } => {
            Err(SettleError::Expired)
        }
        Seen::Nothing => Err(SettleError::NotFound),
    }
}

/// Why an outcome was not settled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError {
    /// There is no such operation, or no longer: its record is over, or was forgotten or purged.
    #[error("there is no such operation")]
    NotFound,
    /// An attempt, or somebody else who settles it, holds the claim.
    #[error("it is running, under a lease of {lease_left:?} more")]
    StillRunning {
        /// What is left of the lease, if it is not renewed.
        lease_left: Duration,
    },
    /// It has its answer.
    #[error("it has been completed")]
    AlreadySettled,
    /// Its key was handed out, and nothing has used it: there is nothing to settle.
    #[error("its key was issued and never used")]
    NeverUsed,
    /// The time in which its key, which the server handed out, could be used is over: no request
    /// will ever ask for the outcome. It can be purged.
    #[error("its key has expired")]
    Expired,
    /// The answer is not one that can be recorded.
    #[error("it cannot be recorded: {0}")]
    NotAnAnswer(&'static str),
    /// The value cannot be written as JSON.
    #[error("the value cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    /// The record could not be looked up, or the store failed.
    #[error("it could not be settled")]
    LookUp(#[from] LookUpError),
}
