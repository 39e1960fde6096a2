//! The store that the engine sees when payloads are sealed or redacted: another store behind them.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::{
    Begun, Checkpoint, Claim, Claimed, Completion, Issue, Listing, Manage, Page, Purge, Purged,
    Renewal, Store, StoreError, StoreErrorKind, Transact, Transaction, Wake, Written,
};
use crate::{
    key::{Key, OperationId, Token},
    record::{Flags, Record, RecordedResponse, State},
    seal::{self, Seal},
};

/// Takes out of a response what is not to be stored.
pub(crate) type Redact = Arc<dyn Fn(&mut RecordedResponse) + Send + Sync>;

/// Payloads are redacted and sealed on their way in and opened on their way out. Everything else
/// passes.
pub(crate) struct Sealed {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) veil: Veil,
}

/// What is done to payloads.
#[derive(Clone)]
pub(crate) struct Veil {
    pub(crate) seal: Option<Arc<dyn Seal>>,
    pub(crate) redact: Option<Redact>,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("store", &self.store).field("veil", &self.veil).finish()
    }
}

impl fmt::Debug for Veil {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Veil")
            .field("seal", &self.seal)
            .field("redacts", &self.redact.is_some())
            .finish()
    }
}

impl Veil {
    fn close(&self, key: &Key, payload: &Bytes) -> Result<Bytes, StoreError> {
        let Some(seal) = &self.seal else { return Ok(payload.clone()) };
        seal::close(&**seal, key, payload)
            .map_err(|error| StoreError::caused_by("seal", StoreErrorKind::Refused, error))
    }

    /// An answer as it is stored.
    fn sealed(&self, completion: &Completion) -> Result<Completion, StoreError> {
        let mut completion = self.redacted(completion);
        completion.payload = self.close(&completion.key, &completion.payload)?;
        Ok(completion)
    }

    /// A record as it was before it was sealed.
    pub(super) fn open(&self, record: Record) -> Record {
        // A record that was only claimed has no payload, and nobody has sealed it. What was issued
        // or recorded is never nothing: there, an empty payload is one that was emptied.
        let may_be_empty = matches!(record.state, State::Running | State::Released);
        match &self.seal {
            Some(seal) if !(record.payload.is_empty() && may_be_empty) => {
                Record { payload: seal::open(&**seal, &record.key, &record.payload), ..record }
            }
            _ => record,
        }
    }

    fn open_fenced(&self, written: Written) -> Written {
        match written {
            Written::Fenced(record) => Written::Fenced(self.open(record)),
            written @ (Written::Done | Written::Gone) => written,
        }
    }

    /// Redacts an answer. Of one that cannot be redacted only the fact is stored: that it was
    /// done must be known, and what was to be taken out must not.
    fn redacted(&self, completion: &Completion) -> Completion {
        let mut completion = completion.clone();
        if let Some(redact) = &self.redact
            && !completion.flags.contains(Flags::TOMBSTONE)
            && let Ok(mut response) = RecordedResponse::decode(&completion.payload)
        {
            let (status, length) = (response.status, response.body.len());
            if catch_unwind(AssertUnwindSafe(|| redact(&mut response))).is_err() {
                tracing::error!("redacting an answer panicked: only the fact is recorded");
                completion.flags = completion.flags.with(Flags::TOMBSTONE);
                response = RecordedResponse { status, headers: Vec::new(), body: Bytes::new() };
            }
            // A server believes a length that is said.
            if response.body.len() != length {
                response.headers.retain(|(name, _)| name != "content-length");
            }
            let headers: Vec<_> = response.headers.iter().map(|(k, v)| (&k[..], &v[..])).collect();
            completion.payload =
                RecordedResponse::encode(response.status, &headers, &response.body);
        }
        completion
    }
}

impl Store for Sealed {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            Ok(match self.store.claim(claim).await? {
                Claimed::Granted(record) => Claimed::Granted(self.veil.open(record)),
                Claimed::Found(record) => Claimed::Found(self.veil.open(record)),
                Claimed::Unknown => Claimed::Unknown,
            })
        })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let payload = self.veil.close(&issue.key, &issue.payload)?;
            let issue = Issue { payload, ..issue.clone() };
            Ok(self.veil.open_fenced(self.store.issue(&issue).await?))
        })
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let payload = self.veil.close(&checkpoint.key, &checkpoint.payload)?;
            let checkpoint = Checkpoint { payload, ..checkpoint.clone() };
            Ok(self.veil.open_fenced(self.store.checkpoint(&checkpoint).await?))
        })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let completion = self.veil.sealed(completion)?;
            Ok(self.veil.open_fenced(self.store.complete(&completion).await?))
        })
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { Ok(self.veil.open_fenced(self.store.release(key, token).await?)) })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { Ok(self.veil.open_fenced(self.store.forget(key, token).await?)) })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        self.store.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(
            async move { Ok(self.store.read(key).await?.map(|record| self.veil.open(record))) },
        )
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.store.sweep(limit)
    }

    fn manage(&self) -> Option<&dyn Manage> {
        self.store.manage().is_some().then_some(self)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        self.store.wake()
    }

    fn transact(&self) -> Option<&dyn Transact> {
        self.store.transact().is_some().then_some(self)
    }
}

impl Sealed {
    /// The store's own records; asked for only where it has them.
    fn managed(&self) -> Result<&dyn Manage, StoreError> {
        self.store.manage().ok_or(StoreError::new("seal", StoreErrorKind::Refused))
    }
}

impl Manage for Sealed {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            let record = self.managed()?.find(operation_id).await?;
            Ok(record.map(|record| self.veil.open(record)))
        })
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        // What is listed comes without its payload.
        Box::pin(async move { self.managed()?.list(listing).await })
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move { self.managed()?.purge(purge).await })
    }
}

impl Sealed {
    /// The store's own transactions; asked for only where it has them.
    fn transacted(&self) -> Result<&dyn Transact, StoreError> {
        self.store.transact().ok_or(StoreError::new("seal", StoreErrorKind::Refused))
    }

    fn veiled(&self, transaction: Box<dyn Transaction>) -> Box<dyn Transaction> {
        Box::new(SealedTransaction { transaction, veil: self.veil.clone() })
    }
}

impl Transact for Sealed {
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>> {
        Box::pin(async move {
            Ok(match self.transacted()?.begin(claim).await? {
                Begun::Granted(transaction, record) => {
                    Begun::Granted(self.veiled(transaction), self.veil.open(record))
                }
                Begun::Found(record) => Begun::Found(self.veil.open(record)),
                begun @ (Begun::Held | Begun::Unknown) => begun,
            })
        })
    }

    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>> {
        Box::pin(async move { self.transacted()?.begin_unclaimed().await })
    }

    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { self.transacted()?.is_held(key).await })
    }
}

/// A transaction whose record is sealed.
#[derive(Debug)]
struct SealedTransaction {
    transaction: Box<dyn Transaction>,
    veil: Veil,
}

impl Transaction for SealedTransaction {
    fn connection(&self) -> &(dyn Any + Send) {
        self.transaction.connection()
    }

    fn connection_mut(&mut self) -> &mut (dyn Any + Send) {
        self.transaction.connection_mut()
    }

    fn undo(&mut self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.transaction.undo()
    }

    fn complete<'a>(
        &'a mut self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let completion = self.veil.sealed(completion)?;
            Ok(self.veil.open_fenced(self.transaction.complete(&completion).await?))
        })
    }

    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        self.transaction.commit()
    }

    fn roll_back(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        self.transaction.roll_back()
    }
}

#[cfg(all(test, feature = "seal", feature = "testing"))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        record::{FORMAT, Ttl},
        seal::KeyRing,
        store::{Clock, ManualClock, MemoryStore},
        testing::StoreFixture,
    };

    fn sealed(store: &MemoryStore) -> Arc<Sealed> {
        let seal: Arc<dyn Seal> = Arc::new(KeyRing::new(1, &[7; 32]));
        let veil = Veil { seal: Some(seal), redact: None };
        Arc::new(Sealed { store: Arc::new(store.clone()), veil })
    }

    struct Fixture {
        store: MemoryStore,
        clock: ManualClock,
    }

    impl Fixture {
        fn new() -> Self {
            let clock = Clock::manual();
            Self { store: MemoryStore::builder().clock(clock.clone()).build(), clock }
        }
    }

    impl StoreFixture for Fixture {
        fn store(&self) -> Arc<dyn Store> {
            sealed(&self.store)
        }

        fn second(&self) -> Arc<dyn Store> {
            sealed(&self.store)
        }

        fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
            Box::pin(async move { self.clock.advance(by) })
        }
    }

    crate::store_laws!(Fixture::new());
    crate::manage_laws!(Fixture::new());

    #[test]
    fn a_length_that_became_wrong_is_left_out() {
        for (redacted, lines) in [("body", 1), ("", 0)] {
            let redact: Redact = Arc::new(move |response| response.body = redacted.into());
            let veil = Veil { seal: None, redact: Some(redact) };
            let payload = RecordedResponse::encode(200, &[(b"content-length", b"4")], b"paid");
            let (key, token, flags) = (Key::from_bytes([7; 32]), Token::random(), Flags::NONE);
            let completion =
                Completion { key, token, ttl: Ttl::Forever, flags, payload, format: FORMAT };
            let stored = veil.redacted(&completion).payload;
            let response = RecordedResponse::decode(&stored).unwrap();
            assert_eq!((&response.body[..], response.headers.len()), (redacted.as_bytes(), lines));
        }
    }
}
