//! Transactional handlers that run without a claim.

use std::sync::Arc;

use axum::response::Response;
use http::Extensions;

use super::answer::{refuse, say};
use crate::{
    engine::{Shared, transaction::Slot},
    hooks::{Fate, Settle},
    observer::Outcome,
    policy::Resolved,
    refusal::{Refusal, RefusalKind},
    store::StoreError,
};

/// A transactional handler that runs without a claim: it has its transaction all the same.
pub(crate) struct Unclaimed {
    shared: Arc<Shared>,
    policy: Arc<Resolved>,
    slot: Slot,
}

impl Unclaimed {
    pub(super) fn of(
        shared: &Arc<Shared>,
        policy: &Arc<Resolved>,
        extensions: &mut Extensions,
    ) -> Option<Box<Self>> {
        policy.transaction.then(|| {
            Box::new(Self {
                shared: Arc::clone(shared),
                policy: Arc::clone(policy),
                slot: extensions.get_or_insert_default::<Slot>().clone(),
            })
        })
    }

    /// Runs the handler; what it did is committed unless its answer is an error, or says that nothing
    /// happened or that nobody knows: as under a claim.
    pub(crate) async fn run(self, work: impl Future<Output = Response>) -> Response {
        let transaction = match self.shared.unclaimed_transaction(&self.slot).await {
            Ok(transaction) => transaction,
            Err((kind, error)) => return self.refused(kind, &error),
        };
        let response = work.await;
        let settle = response.extensions().get::<Settle>().copied().unwrap_or(Settle::BY_POLICY);
        let is_error = response.status().as_u16() >= 400;
        let keep = match settle.fate {
            Fate::Forget | Fate::Release => false,
            Fate::ByPolicy | Fate::Record | Fate::Tombstone => !is_error || settle.keeps_effects,
        };
        match transaction.end(&self.shared, keep).await {
            Ok(()) => response,
            Err((kind, error)) => self.refused(kind, &error),
        }
    }

    fn refused(&self, kind: RefusalKind, error: &StoreError) -> Response {
        let outcome = Outcome::Refused(kind);
        self.shared.tell("(without a claim)", None, outcome, Some(error));
        let mut response = refuse(&self.shared, &self.policy, Refusal::new(kind));
        say(&self.shared, &self.policy, &mut response, outcome, None);
        response
    }
}
