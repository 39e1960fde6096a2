//! Why a call has no value of its function's own making.

use std::{error::Error, time::Duration};

use crate::{
    key::OperationId,
    refusal::{Refusal, RefusalKind},
    store::StoreError,
};

/// Why the call of an idempotent function neither ran to its end nor was replayed: what a refusal is
/// to a request.
///
/// The error of such a function implements `From<CallError>`, as every boxed error does.
///
/// ```
/// use idem_runtime::{CallError, RefusalKind};
///
/// #[derive(Debug, thiserror::Error)]
/// enum DeliveryError {
///     #[error("the receiver did not take it")]
///     NotTaken,
///     #[error(transparent)]
///     Idempotency(#[from] CallError),
/// }
///
/// /// What a consumer does with its message.
/// fn acknowledges(result: &Result<(), DeliveryError>) -> bool {
///     match result {
///         Ok(()) => true,
///         Err(DeliveryError::NotTaken) => false,
///         // It was done, though its value was not kept.
///         Err(DeliveryError::Idempotency(error)) => error.kind() == RefusalKind::NotReplayable,
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct CallError {
    kind: RefusalKind,
    why: &'static str,
    operation_id: Option<OperationId>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CallError {
    pub(super) const fn new(kind: RefusalKind) -> Self {
        Self { kind, why: why(kind), operation_id: None, source: None }
    }

    /// The engine's scope reads requests, and the function said no other.
    pub(super) fn scope_unsaid() -> Self {
        let why = "the engine's scope reads requests, and a call has none: write `scope = arg(..)` or `scope = global` on the function";
        Self { why, ..Self::new(RefusalKind::ScopeMissing) }
    }

    pub(super) fn of(refusal: &Refusal, error: Option<StoreError>) -> Self {
        let source = error.map(Into::into);
        let operation_id = refusal.operation_id();
        Self { operation_id, source, ..Self::new(refusal.kind()) }
    }

    pub(super) fn about(self, operation_id: OperationId) -> Self {
        Self { operation_id: Some(operation_id), ..self }
    }

    pub(super) fn caused_by(self, source: impl Error + Send + Sync + 'static) -> Self {
        Self { source: Some(Box::new(source)), ..self }
    }

    /// Why. Of the kinds that there are, a call meets these:
    ///
    /// | kind | |
    /// |---|---|
    /// | [`InFlight`](RefusalKind::InFlight) | the same call is running |
    /// | [`Mismatch`](RefusalKind::Mismatch) | another call has used the key |
    /// | [`UnknownOutcome`](RefusalKind::UnknownOutcome) | `on_unknown = refuse`, and an earlier attempt did not say what happened |
    /// | [`LeaseLost`](RefusalKind::LeaseLost) | another attempt took over while this one ran |
    /// | [`NotReplayable`](RefusalKind::NotReplayable) | it was done, and its value was too large to keep |
    /// | [`HandlerPanicked`](RefusalKind::HandlerPanicked) | the function panicked |
    /// | [`KeyMalformed`](RefusalKind::KeyMalformed), [`ScopeMissing`](RefusalKind::ScopeMissing), [`BodyMalformed`](RefusalKind::BodyMalformed) | anchor, scope or fingerprint cannot be what the arguments give; the source says why |
    /// | [`StoreUnavailable`](RefusalKind::StoreUnavailable), [`StoreFull`](RefusalKind::StoreFull) | nothing ran; the source is the [`StoreError`] |
    /// | [`RecordUnreadable`](RefusalKind::RecordUnreadable) | nothing ran; the record is damaged, from a newer release, of another value type, or compared in an argument that the fingerprint no longer has |
    /// | [`Busy`](RefusalKind::Busy), [`ShuttingDown`](RefusalKind::ShuttingDown) | nothing ran |
    pub const fn kind(&self) -> RefusalKind {
        self.kind
    }

    /// The operation that ran or stands in the way, if there is one.
    pub const fn operation_id(&self) -> Option<OperationId> {
        self.operation_id
    }

    /// How long to wait before the call is repeated, where that helps by itself.
    pub const fn retry_after(&self) -> Option<Duration> {
        self.kind.retry_after()
    }

    /// Whether it makes sense to deliver the same message again later. Otherwise nothing changes by
    /// itself: the message is wrong, it was done
    /// ([`NotReplayable`](RefusalKind::NotReplayable)), or a person must say what happened
    /// ([`UnknownOutcome`](RefusalKind::UnknownOutcome)).
    pub const fn is_retryable(&self) -> bool {
        self.retry_after().is_some() || matches!(self.kind, RefusalKind::HandlerPanicked)
    }
}

const fn why(kind: RefusalKind) -> &'static str {
    match kind {
        RefusalKind::InFlight => "the same call is running",
        RefusalKind::Mismatch => "another call has used the key",
        RefusalKind::UnknownOutcome => "an earlier attempt ended without saying what happened",
        RefusalKind::LeaseLost => "another attempt of the call took over",
        RefusalKind::NotReplayable => "the call was done, but its value was not kept",
        RefusalKind::HandlerPanicked => "the function panicked",
        RefusalKind::KeyMalformed => "the anchor's values cannot be a key",
        RefusalKind::ScopeMissing => "the scope's values cannot say whose the call is",
        RefusalKind::BodyMalformed => "the arguments cannot be fingerprinted",
        RefusalKind::StoreUnavailable => "the idempotency store is unavailable",
        RefusalKind::StoreFull => "the idempotency store is full",
        RefusalKind::RecordUnreadable => "the record of the call cannot be read",
        RefusalKind::Busy => "too many calls and requests are running that nobody waits for",
        RefusalKind::ShuttingDown => "the engine is shutting down",
        kind => kind.code(),
    }
}
