//! idem makes axum handlers safe to retry.
//!
//! A client that sees a timeout cannot know whether its request ran. With an *idempotency key* it
//! need not: the first request with a key runs and its answer is recorded, a retry gets the
//! recorded answer, another request under the same key is refused.
//!
//! Start with [`#[idempotent]`](macro@idempotent), which says it of a handler, and
//! [`Idempotency`], the engine behind it.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | [anchor](Anchor) | where in a request the idempotency key comes from |
//! | [scope](Scope) | whose key it is |
//! | space | within what a key is unique: the operation, or a name that several handlers share |
//! | operation | method, matched route and decoded parameter values |
//! | [fingerprint](FingerprintScheme) | what makes two requests the same request |
//! | claim | the right to run the handler for a key, held under a lease and named by a fencing token |
//! | [record](Record) | what the store holds for a key: issued, running, released or completed |
//! | replay | an answer from a completed record |
//! | mismatch | the same key with another fingerprint |
//! | in flight | the same key, still running |
//! | unknown outcome | an attempt ended without saying whether its effect happened |
//! | tombstone | a completed record whose answer could not be kept |
//! | release, forget | to give up the claim and keep the record; to remove the record |
//!
//! # Features
//!
//! | feature | |
//! |---|---|
//! | `sqlite` | the embedded durable store, `store::SqliteStore`, on a bundled SQLite |
//! | `mysql` | `store::MySqlStore`, which many processes share, on MySQL or MariaDB |
//! | `testing` | the laws of the [`Store`](store::Store) trait as public tests |
//!
//! None is on by default; the memory store needs none.

#[doc(hidden)]
pub mod __private;
mod anchor;
mod builder;
mod decision;
mod detach;
mod engine;
mod fingerprint;
mod hooks;
mod http;
mod issue;
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
mod waits;

pub use idem_macros::AnchorValue;
#[doc = include_str!("docs/idempotent.md")]
pub use idem_macros::idempotent;

pub use crate::http::{
    EngineInExtension, EngineInRouterState, EngineSource, Guarded, Handled, Idem, Idempotent,
    IdempotentArguments, IdempotentExt, MissingEngine, REPLAYED, assert_handler,
};
pub use anchor::{Anchor, AnchorError, AnchorRequest, AnchorValue, Format, Scope};
pub use builder::{Builder, Scoped, Unscoped};
pub use decision::{Asked, Decision, OnUnknown, Seen, decide};
pub use engine::Idempotency;
pub use fingerprint::FingerprintScheme;
pub use hooks::{Denied, Recovered, ReplayShape, RequestContext, Settle};
pub use issue::{IssueError, Issued, IssuedError};
pub use key::{Key, OperationId, ScopeDigest, Token, Values};
pub use observer::{Event, Observer, Outcome, Tracing};
pub use operation::{DerivedKey, Operation, StepError};
pub use policy::{InFlight, Mode, Policy, Recording, StoreOutage};
pub use record::{
    CorruptPayload, FORMAT, Fingerprint, Flags, Progress, Record, RecordedResponse, State, Ttl,
};
pub use refusal::{ProblemDocuments, Refusal, RefusalKind, Refusals};
