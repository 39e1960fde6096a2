//! A store on which no call is alone.

use futures_util::{future::BoxFuture, join};
use idem_runtime::{
    FORMAT, Key, OperationId, Record, Token,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, Manage, Renewal, Store, StoreError,
        Transact, Wake, Written,
    },
};

/// Beside each claim and each completion others are made, on keys of their own, one before it and
/// one after it: with a single lane, the first one takes that and the others travel together.
///
/// Nothing of them is left when the call is answered.
#[derive(Clone, Debug)]
pub struct Crowd<S>(pub S);

impl<S: Store> Crowd<S> {
    async fn claim_beside(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        let another = || Claim {
            key: Key::from_bytes(rand::random()),
            operation_id: OperationId::random(),
            token: Token::random(),
            issued_only: false,
            format: FORMAT,
            ..claim.clone()
        };
        let (before, after) = (another(), another());
        let (first, answer, last) =
            join!(self.0.claim(&before), self.0.claim(claim), self.0.claim(&after));
        for (beside, claimed) in [(before, first), (after, last)] {
            assert!(matches!(claimed, Ok(Claimed::Granted(_))), "{claimed:?}");
            let forgotten = self.0.forget(&beside.key, &beside.token).await;
            assert!(matches!(forgotten, Ok(Written::Done)), "{forgotten:?}");
        }
        answer
    }

    async fn complete_beside(&self, completion: &Completion) -> Result<Written, StoreError> {
        let another = || Completion {
            key: Key::from_bytes(rand::random()),
            format: FORMAT,
            ..completion.clone()
        };
        let (before, after) = (another(), another());
        let (first, answer, last) =
            join!(self.0.complete(&before), self.0.complete(completion), self.0.complete(&after));
        for written in [first, last] {
            assert!(matches!(written, Ok(Written::Gone)), "{written:?}");
        }
        answer
    }
}

impl<S: Store> Store for Crowd<S> {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(self.claim_beside(claim))
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.complete_beside(completion))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.0.issue(issue)
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.0.checkpoint(checkpoint)
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.0.release(key, token)
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.0.forget(key, token)
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        self.0.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.0.read(key)
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.0.sweep(limit)
    }

    fn manage(&self) -> Option<&dyn Manage> {
        self.0.manage()
    }

    fn wake(&self) -> Option<&dyn Wake> {
        self.0.wake()
    }

    fn transact(&self) -> Option<&dyn Transact> {
        self.0.transact()
    }
}
