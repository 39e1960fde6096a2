//! idem makes HTTP handlers safe to retry.

#[doc(hidden)]
pub mod __private;
mod anchor;
mod decision;
mod detach;
mod engine;
mod fingerprint;
mod http;
mod json;
mod key;
mod leases;
mod observer;
mod operation;
mod policy;
mod record;
mod refusal;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use idem_macros::{AnchorValue, idempotent};

pub use crate::http::{
    EngineSource, Guarded, Handled, Idem, Idempotent, IdempotentArguments, IdempotentExt,
    MissingEngine, REPLAYED, assert_handler,
};
pub use anchor::{Anchor, AnchorError, AnchorRequest, AnchorValue, Format, Scope};
pub use decision::{Asked, Decision, OnUnknown, Seen, decide};
pub use engine::{Builder, Idempotency, Scoped, Unscoped};
pub use fingerprint::FingerprintScheme;
pub use key::{Key, OperationId, ScopeDigest, Token, Values};
pub use observer::{Event, Observer, Outcome, Tracing};
pub use operation::{DerivedKey, Operation};
pub use policy::{InFlight, Mode, Policy, Recording, StoreOutage};
pub use record::{
    CorruptPayload, FORMAT, Fingerprint, Flags, Record, RecordedResponse, State, Ttl,
};
pub use refusal::{ProblemDocuments, Refusal, RefusalKind, Refusals};
