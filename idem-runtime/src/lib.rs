//! idem makes HTTP handlers safe to retry.

mod decision;
mod key;
mod record;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use decision::{Asked, Decision, OnUnknown, Seen, decide};
pub use key::{Key, OperationId, ScopeDigest, Token, Values};
pub use record::{
    CorruptPayload, FORMAT, Fingerprint, Flags, Record, RecordedResponse, State, Ttl,
};
