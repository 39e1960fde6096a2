//! Observation: what became of each request, for metrics and logs.

use std::fmt;

use crate::{key::OperationId, refusal::RefusalKind, store::StoreError};

/// Hears what became of each request. The default one writes `tracing` events.
///
/// It is called on the request's path: it must not block.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, event: &Event<'_>);
}

impl<F: Fn(&Event<'_>) + Send + Sync + 'static> Observer for F {
    fn observe(&self, event: &Event<'_>) {
        self(event);
    }
}

/// Something that happened to a request.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a> {
    /// What.
    pub outcome: Outcome,
    /// Method and route, without the values of parameters.
    pub operation: &'a str,
    /// Which operation, once it is known.
    pub operation_id: Option<OperationId>,
    /// The attempt, where one ran.
    pub attempt: Option<u32>,
    /// What the store failed with, where that is the reason.
    pub error: Option<&'a StoreError>,
    /// Whether it took effect: in [`Mode::Observe`](crate::Mode::Observe) a refusal or a replay is
    /// only told.
    pub enforced: bool,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The handler ran and its answer is recorded.
    Recorded,
    /// The handler ran; that it did is recorded, its answer could not be kept.
    Tombstoned,
    /// The handler ran and nothing happened: the key is free again.
    Forgotten,
    /// The handler ran and nobody knows whether its effect happened: the claim is given up.
    Released,
    /// The handler ran and its answer could not be recorded yet; writing it goes on in the
    /// background.
    RecordDelayed,
    /// An answer that was delayed is recorded now.
    RecordCaughtUp,
    /// An answer could not be recorded before the record's time was over.
    RecordLost,
    /// The recorded answer was sent.
    Replayed,
    /// The request was refused.
    Refused(RefusalKind),
    /// The handler ran without protection: it has no key, or the store could not be asked.
    Unprotected,
    /// A [layer](crate::Idempotency::layer) left the request alone, though it has a key, and so did
    /// its handler.
    Ignored,
    /// The client hung up; the handler goes on in the background.
    Detached,
    /// Another attempt holds the claim of one that is still running.
    LeaseLost,
    /// Leases could not be renewed this time; it is tried again.
    RenewalFailed,
}

impl Outcome {
    /// A short stable name, fit for a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Recorded => "recorded",
            Self::Tombstoned => "tombstoned",
            Self::Forgotten => "forgotten",
            Self::Released => "released",
            Self::RecordDelayed => "record_delayed",
            Self::RecordCaughtUp => "record_caught_up",
            Self::RecordLost => "record_lost",
            Self::Replayed => "replayed",
            Self::Refused(kind) => kind.code(),
            Self::Unprotected => "unprotected",
            Self::Ignored => "ignored",
            Self::Detached => "detached",
            Self::LeaseLost => "lease_lost_while_running",
            Self::RenewalFailed => "renewal_failed",
        }
    }

    /// Whether a person should know.
    const fn is_trouble(self) -> bool {
        matches!(
            self,
            Self::RecordDelayed
                | Self::RecordLost
                | Self::LeaseLost
                | Self::RenewalFailed
                | Self::Refused(
                    RefusalKind::StoreUnavailable
                        | RefusalKind::StoreFull
                        | RefusalKind::RecordUnreadable
                        | RefusalKind::LeaseLost
                        | RefusalKind::Busy
                )
        )
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The default observer: warnings for what a person should know, debug events for the rest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tracing;

impl Observer for Tracing {
    fn observe(&self, event: &Event<'_>) {
        let id = event.operation_id.map(tracing::field::display);
        let error = event.error.map(|error| error as &dyn std::error::Error);
        let (operation, outcome, attempt, enforced) =
            (event.operation, event.outcome.name(), event.attempt, event.enforced);
        if event.outcome.is_trouble() {
            tracing::warn!(operation, outcome, attempt, enforced, operation_id = id, error);
        } else {
            tracing::debug!(operation, outcome, attempt, enforced, operation_id = id, error);
        }
    }
}
