//! idem makes axum handlers safe to retry, and plain functions safe to call again.
//!
//! A client that sees a timeout cannot know whether its request ran. With an *idempotency key* it
//! need not: the first request with a key runs and its answer is recorded, a retry gets the
//! recorded answer, another request under the same key is refused.
//!
//! Start with [`#[idempotent]`](macro@idempotent), which says it of a handler, and
//! [`Idempotency`], the engine behind it. [`Idempotency::layer`] protects all writes of a router at
//! once. What became of a request, an application looks up by [`Idempotency::look_up`]; what
//! operators do with records is in [`Idempotency::admin`].
//!
//! The module `guide`, which documentation with all features has, goes from the first handler to a
//! service in operation.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | [anchor](Anchor) | where in a request the idempotency key comes from |
//! | [scope](Scope) | whose key it is |
//! | space | within what a key is unique: the operation, or a name that several handlers share |
//! | operation | method, matched route and decoded parameter values; of a plain function, its path |
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
//! | `postgres` | `store::PostgresStore`, which many processes share, on PostgreSQL |
//! | `mysql` | `store::MySqlStore`, which many processes share, on MySQL or MariaDB |
//! | `redis` | `store::RedisStore`, which many processes share, on Redis, Valkey or Redis Cluster |
//! | `cache` | completed records of a remote store, kept at hand: `store::ReplayCache`; the three before turn it on, say it for a remote store of your own |
//! | `marks` | places at which idem's own tests kill a process; no part of what idem promises |
//! | `seal` | encrypted records, `KeyRing`, with XChaCha20-Poly1305 |
//! | `testing` | `assert_idempotent` for handlers, and the laws of the [`Store`](store::Store) and [`Manage`](store::Manage) traits as public tests |
//!
//! None is on by default; the memory store needs none.

#[doc(hidden)]
#[macro_use]
pub mod marks;

#[doc(hidden)]
pub mod __private;
mod admin;
mod anchor;
mod builder;
mod decision;
mod detach;
mod engine;
mod fingerprint;
mod function;
// Its examples use these features.
#[cfg(all(feature = "seal", feature = "sqlite", feature = "testing"))]
pub mod guide;
mod hooks;
mod http;
mod issue;
mod json;
mod key;
mod known;
mod leases;
mod look_up;
mod observer;
mod operation;
mod policy;
mod record;
mod refusal;
mod seal;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
mod waits;

pub use idem_macros::AnchorValue;
#[doc = include_str!("docs/idempotent.md")]
pub use idem_macros::idempotent;

pub use crate::http::{
    EngineInExtension, EngineInRouterState, EngineSource, Guarded, Handled, Idem, IdempotencyLayer,
    IdempotencyService, Idempotent, IdempotentArguments, IdempotentExt, MissingEngine,
    assert_handler,
};
#[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
pub use crate::http::{Tx, TxRejection};
pub use admin::{Admin, SettleError};
pub use anchor::{Anchor, AnchorError, AnchorRequest, AnchorValue, Format, Scope};
pub use builder::{Builder, IGNORED, OPERATION, REPLAYED, Scoped, Unscoped};
pub use decision::{Asked, Decision, OnUnknown, Seen, decide};
pub use engine::Idempotency;
pub use fingerprint::FingerprintScheme;
pub use function::CallError;
pub use hooks::{Denied, Recovered, ReplayShape, RequestContext, Settle};
pub use issue::{IssueError, Issued, IssuedError};
pub use key::{
    InvalidOperationId, Key, KeyName, KeyNameError, OperationId, ScopeDigest, Token, Values,
};
pub use look_up::{Became, Found, LookUp, LookUpError};
pub use observer::{Event, Observer, Outcome, Tracing};
pub use operation::{DerivedKey, Operation, StepError};
pub use policy::{InFlight, Mode, Policy, Recording, StoreOutage};
pub use record::{
    Answer, CorruptPayload, FORMAT, Fingerprint, Flags, Progress, Record, RecordedResponse,
    RecordedValue, State, Ttl,
};
pub use refusal::{ProblemDocuments, Refusal, RefusalKind, Refusals};
#[cfg(feature = "seal")]
pub use seal::KeyRing;
pub use seal::{Seal, SealError};
