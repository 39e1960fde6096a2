//! The operation, as the handler sees it: its id, its attempt, and keys derived from it.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::key::OperationId;

/// What idem knows of the request that a handler is working on; take it as an argument.
///
/// The id is stored with the claim before the handler starts, and stays the same through crash,
/// release and takeover. In a handler that is not protected (no `#[idempotent]`, an optional key
/// that is absent, a mode or an outage that lets it run) each request is an operation of its own.
///
/// It is filled when the claim is granted: ask it in the handler's body. Before that, in an
/// extractor or a layer, it answers as for a handler that is not protected, with an id that is
/// nobody else's.
#[derive(Clone, Default)]
pub struct Operation(Arc<Known>);

/// What is known of an operation, shared by the request's extensions, its handler and the engine.
#[derive(Default)]
struct Known {
    /// The attempt whose claim was granted: it counts from then on.
    granted: OnceLock<Arc<Attempt>>,
    /// What was made up for whoever asked without a claim, or before it.
    unprotected: OnceLock<Arc<Attempt>>,
}

impl Operation {
    /// The identity of the operation, the same for all its attempts.
    pub fn id(&self) -> OperationId {
        self.get().id
    }

    /// Which attempt this is, the first being 1. From 2 on, an earlier one ended without saying
    /// whether its effect happened.
    pub fn attempt(&self) -> u32 {
        self.get().number
    }

    /// A key for a downstream call that is the same in every attempt.
    ///
    /// The name says which call it is, where a handler makes several. The derivation is a version 5
    /// UUID (RFC 9562 §5.5) with the operation's id as namespace, so that it can be recomputed
    /// anywhere.
    ///
    /// ```
    /// use idem_runtime::Operation;
    ///
    /// let operation = Operation::default();
    /// assert_eq!(operation.derive("psp"), operation.derive("psp"));
    /// assert_ne!(operation.derive("psp"), operation.derive("ledger"));
    /// ```
    pub fn derive(&self, name: &str) -> DerivedKey {
        DerivedKey(Uuid::new_v5(&self.id().as_uuid(), name.as_bytes()))
    }

    /// Whether another attempt has taken over: this one's answer will not be sent.
    pub fn is_lease_lost(&self) -> bool {
        self.get().is_lost()
    }

    /// Waits until another attempt has taken over; for ever if none does.
    pub async fn lease_lost(&self) {
        let attempt = Arc::clone(self.get());
        loop {
            let changed = attempt.changed.notified();
            if attempt.is_lost() {
                return;
            }
            changed.await;
        }
    }

    fn get(&self) -> &Arc<Attempt> {
        let made_up = || Attempt::new(OperationId::random(), 1);
        self.0.granted.get().unwrap_or_else(|| self.0.unprotected.get_or_init(made_up))
    }

    /// Says which attempt the handler works on.
    pub(crate) fn grant(&self, attempt: &Arc<Attempt>) {
        if self.0.unprotected.get().is_some() {
            tracing::warn!("somebody asked for the operation before its claim was granted");
        }
        if self.0.granted.set(Arc::clone(attempt)).is_err() {
            tracing::error!("two claims were granted to one request");
        }
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Operation");
        if let Some(attempt) = self.0.granted.get().or(self.0.unprotected.get()) {
            shown.field("id", &attempt.id).field("attempt", &attempt.number);
        }
        shown.finish()
    }
}

/// One granted claim, as its handler and the keeper of leases share it.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) id: OperationId,
    pub(crate) number: u32,
    lost: AtomicBool,
    changed: Notify,
    /// Whether its end is being written: that a claim is over then says nothing of who ended it.
    ending: AtomicBool,
}

impl Attempt {
    pub(crate) fn new(id: OperationId, number: u32) -> Arc<Self> {
        Arc::new(Self {
            id,
            number,
            lost: AtomicBool::new(false),
            changed: Notify::new(),
            ending: AtomicBool::new(false),
        })
    }

    pub(crate) fn begin_to_end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

/// A key for a downstream call; prints as a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DerivedKey(Uuid);

impl DerivedKey {
    /// As a UUID.
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }

    /// The same 16 bytes as 22 characters of URL-safe base64, for services with short keys.
    pub fn short(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0.as_bytes())
    }
}

impl fmt::Display for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DerivedKey({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The derivation cannot change: a rerun after an upgrade must send the same key.
    #[test]
    fn derived_keys_are_what_they_were() {
        let operation = Operation::default();
        operation.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 2));
        let key = operation.derive("psp");
        assert_eq!(key.to_string(), "abc07c76-d767-5510-a4c0-d18621aba31b");
        assert_eq!(key.short(), "q8B8dtdnVRCkwNGGIaujGw");
        assert_eq!(operation.attempt(), 2);
    }

    /// Otherwise each attempt would call its provider under another key.
    #[test]
    fn what_was_asked_too_early_does_not_count_once_the_claim_is_granted() {
        let operation = Operation::default();
        let early = operation.id();
        operation.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 2));
        assert_ne!(operation.id(), early);
        assert_eq!(operation.id(), OperationId::from_bytes([7; 16]));
        assert_eq!(operation.attempt(), 2);
    }

    #[tokio::test]
    async fn a_lost_lease_wakes_who_watches_for_it() {
        let operation = Operation::default();
        let attempt = Attempt::new(OperationId::random(), 1);
        operation.grant(&attempt);
        assert!(!operation.is_lease_lost());
        let watch = tokio::spawn({
            let operation = operation.clone();
            async move { operation.lease_lost().await }
        });
        tokio::task::yield_now().await;
        attempt.lose();
        watch.await.unwrap();
        operation.lease_lost().await;
    }
}
