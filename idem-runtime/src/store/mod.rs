//! Where records live: the [`Store`] trait, its laws, and the stores that come with idem.
//!
//! | store | feature | for |
//! |---|---|---|
//! | [`MemoryStore`] | – | tests and single processes that may forget at a restart |
#![cfg_attr(
    feature = "sqlite",
    doc = "| [`SqliteStore`] | `sqlite` | one machine: survives restarts and crashes |"
)]
#![cfg_attr(
    feature = "postgres",
    doc = "| [`PostgresStore`] | `postgres` | any number of processes, on PostgreSQL |"
)]
#![cfg_attr(
    feature = "mysql",
    doc = "| [`MySqlStore`] | `mysql` | any number of processes, on MySQL or MariaDB |"
)]
#![cfg_attr(
    feature = "redis",
    doc = "| [`RedisStore`] | `redis` | many processes: Redis, Valkey or Redis Cluster |"
)]

#[cfg(feature = "cache")]
mod cached;
mod clock;
#[cfg(any(feature = "mysql", feature = "postgres"))]
mod lanes;
mod manage;
mod memory;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod row;
mod sealed;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transact;
mod wake;

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;

#[cfg(feature = "cache")]
pub use self::cached::ReplayCache;
#[cfg(feature = "cache")]
pub(crate) use self::cached::{Cached, Replays};
pub use self::clock::{Clock, ManualClock};
#[cfg(any(feature = "mysql", feature = "postgres"))]
pub use self::lanes::Bundled;
pub use self::manage::{Kind, Listing, Manage, Page, Place, Purge, Purged};
pub use self::memory::{MemoryStore, MemoryStoreBuilder};
#[cfg(feature = "mysql")]
pub use self::mysql::MySqlStore;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresStore, SchemaMismatch};
#[cfg(feature = "redis")]
pub use self::redis::{RedisStore, RedisStoreBuilder};
pub(crate) use self::sealed::{Redact, Sealed, Veil};
#[cfg(feature = "sqlite")]
pub use self::sqlite::SqliteStore;
pub use self::transact::{Begun, Transact, Transaction};
pub use self::wake::{Signal, Wake};
use crate::{
    decision::OnUnknown,
    key::{Key, OperationId, ScopeDigest, Token},
    record::{Fingerprint, Flags, Record, Ttl},
};

/// A place where records live, and the only judge of time.
///
/// A store speaks of durations relative to its own now. Whether a lease or a record is over is
/// judged when the record is read, by one clock for all processes that share the store; sweeping
/// only frees space.
///
/// # Laws
///
/// Each law is a public test of the same name in the `testing` module (feature `testing`).
///
/// Claiming:
///
/// 1. `first_claim_wins`: a claim on a key without a record is granted, as attempt 1 and under the
///    operation id that the claimant proposed.
/// 2. `one_of_many_racing_claims_wins`: of any number of claims at once, exactly one is granted.
/// 3. `claiming_twice_with_one_token_is_one_claim`: asking again under the token that holds the
///    claim is granted again, with the same attempt, and renews the lease (whether or not it is
///    over, and without shortening it).
/// 4. `a_refused_claim_changes_nothing`: whoever is not granted gets the record as it is.
/// 5. `a_claim_follows_the_decision`: a claim on an existing record is granted exactly when
///    [`decide`](crate::decide) says [`Run`](crate::Decision::Run); fingerprints of different
///    schemes are never the same.
/// 6. `a_lapsed_lease_is_taken_over`: after the lease's end, and not before, the next claim is
///    granted, as the next attempt and under the same operation id.
/// 7. `keys_differ_by_every_bit`: keys are bytes; case, trailing spaces and zeros matter.
///
/// Ending a claim:
///
/// 8. `a_completed_record_keeps_every_byte`: payload, flags, fingerprint, scope, operation,
///    operation id and attempt come back as they were written.
/// 9. `completing_happens_once`: a second completion under the same token is
///    [`Done`](Written::Done) and changes nothing, since the first one's answer may have been lost;
///    releasing and forgetting after it change nothing either and answer
///    [`Fenced`](Written::Fenced).
/// 10. `a_late_owner_completes_if_nobody_claimed_since`: the lease's end alone takes nothing away.
/// 11. `a_fenced_owner_changes_nothing`: under a token that another claim has replaced, completing,
///     releasing and forgetting answer [`Fenced`](Written::Fenced) with the record as it is.
/// 12. `a_released_record_keeps_what_it_must`: fingerprint, operation id, attempt and what is left
///     of its time stay; only the claim is given up.
/// 13. `a_forgotten_key_starts_afresh`: nothing is left, not even the operation id; ending a claim
///     on it afterwards answers [`Gone`](Written::Gone).
/// 14. `a_claim_that_never_was_is_gone`: ending a claim on a key without a record answers
///     [`Gone`](Written::Gone) and makes none.
///
/// Time:
///
/// 15. `renewing_extends_only_what_is_held`: many claims at once, each answered for itself; a lapsed
///     lease that nobody took over is renewed.
/// 16. `time_to_live_counts_from_completion`: and reading or refusing does not extend it.
/// 17. `an_unfinished_record_is_kept_for_its_time_to_live`: counted from its last claim, and never
///     for the lease only; a running record whose lease is alive outlives even that.
/// 18. `expired_records_are_gone_before_any_sweep`: for readers, for claims (which start afresh) and
///     for ending or renewing a claim.
/// 19. `for_ever_has_no_end`.
/// 20. `sweeping_leaves_the_living`: it removes what is over and nothing else, at most as many as
///     it was told, also when two processes sweep while claims arrive.
///
/// Formats:
///
/// 21. `a_newer_record_is_refused_and_kept`: a record of a newer format than the caller's is
///     [`StoreErrorKind::Newer`] to claims, to issuing, to reads and to what is written under its
///     token, and stays as it is.
///
/// Server-issued keys:
///
/// 22. `only_issued_keys_are_granted_to_who_asks_for_them`: to a claim that is
///     [`issued_only`](Claim::issued_only), a key without a record is
///     [`Unknown`](Claimed::Unknown), and none is made. Of any number of claims on an issued key at
///     once exactly one is granted, as attempt 1, with what was issued as the payload, and with the
///     operation, operation id and fingerprint that the claim says.
/// 23. `issuing_happens_once`: of any number of calls under tokens of their own, exactly one issues
///     the key. The same again under its token is [`Done`](Written::Done) and changes nothing,
///     since the first answer may have been lost; over any other record that is still kept, issuing
///     answers [`Fenced`](Written::Fenced) with the record as it is.
/// 24. `an_issued_key_keeps_its_validity`: it counts from issuing, and neither claim nor renewal,
///     checkpoint, completion, release or forgetting moves it. When it is over the key is refused,
///     completed or not, and known for as long as it is kept, which is never shorter than its
///     validity or a lease; a run that began in time completes after it.
/// 25. `a_forgotten_issued_key_is_issued_again`: with its validity, and with its payload as it
///     stands; its next user is attempt 1 and says anew what the operation is.
/// 26. `a_released_issued_key_stays_with_its_request`: payload, fingerprint and operation id stay;
///     the same request is the next attempt, another one is refused.
///
/// Checkpoints:
///
/// 27. `a_checkpoint_survives_the_attempt`: whoever is granted the next claim, after a release or
///     after the lease's end, finds the last checkpoint's payload and format; only completing and
///     forgetting end it. A late owner checkpoints if nobody has claimed since. It moves no time,
///     and the same again is [`Done`](Written::Done). One that its caller no longer waits for
///     never replaces a later one.
/// 28. `a_fenced_owner_checkpoints_nothing`: nor does one that has ended its claim; where there is
///     no record, the answer is [`Gone`](Written::Gone) and none is made.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Claims a key in one atomic step.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. The claim may then have been granted all the same: ask again
    /// with the same token, or release it.
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>>;

    /// Hands a key out: makes a record that is [`Issued`](crate::State::Issued) and
    /// [`Flags::ISSUED`], as attempt 0 and under [`Fingerprint::NONE`], in one atomic step.
    ///
    /// [`Written::Done`] says that the key is issued, now or by an earlier call under the same
    /// token; [`Written::Fenced`] that it is already in use, and by which record. It is never
    /// [`Written::Gone`].
    ///
    /// # Errors
    ///
    /// When the store cannot answer, or is [`Full`](StoreErrorKind::Full). The key may then have
    /// been issued all the same, which is harmless: nobody knows it, or the call is made again.
    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Replaces the payload of a running record, under the token that holds the claim: what the
    /// next attempt is to know if this one ends without an answer.
    ///
    /// Of two calls under one token the later one's payload stands, also when nobody waited for
    /// the answer to the earlier one.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. The payload may then have been written all the same; it is
    /// harmless to ask again.
    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Records the answer, under the token that holds the claim.
    ///
    /// # Errors
    ///
    /// When the store cannot answer. The answer may then have been recorded all the same; it is
    /// harmless to ask again.
    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Gives up the claim and keeps the record.
    ///
    /// # Errors
    ///
    /// As for [`complete`](Self::complete).
    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Removes the record: nothing happened.
    ///
    /// The record of a key that the server handed out ([`Flags::ISSUED`]) goes back to being
    /// issued. Its payload stays as the last checkpoint left it: what belongs to the forgotten
    /// operation can be told by its operation id, since the next user brings another one.
    ///
    /// # Errors
    ///
    /// As for [`complete`](Self::complete).
    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>>;

    /// Extends the leases of many claims, counted from now. The answer says for each, in order,
    /// whether it is still held.
    ///
    /// # Errors
    ///
    /// When the store cannot answer; some leases may then have been extended.
    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>>;

    /// Reads a record without touching it.
    ///
    /// # Errors
    ///
    /// When the store cannot answer or the record cannot be read.
    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// Removes at most `limit` records that are no longer kept and says how many it removed.
    ///
    /// # Errors
    ///
    /// When the store cannot answer.
    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Whether each call goes over a network. In front of such a store an engine keeps the
    /// completed records that it was shown at hand for some seconds, and answers repetitions from
    /// them (feature `cache`, [`Builder::replay_cache`](crate::Builder)): `true` costs a store that
    /// is fast some memory, `false` costs one that is not the trip for each replay.
    fn is_remote(&self) -> bool {
        false
    }

    /// The store's records for look-ups and operators, if it can search them.
    fn manage(&self) -> Option<&dyn Manage> {
        None
    }

    /// The store's messages between processes, if it has any; without them, who waits looks at the
    /// record now and then.
    fn wake(&self) -> Option<&dyn Wake> {
        None
    }

    /// The store's transactions, if an application's effects can be committed with its records.
    fn transact(&self) -> Option<&dyn Transact> {
        None
    }
}

/// A store behind a pointer, so that a program can choose one when it starts, as `Arc<dyn Store>`.
impl<S: Store + ?Sized> Store for Arc<S> {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        S::claim(self, claim)
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        S::complete(self, completion)
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        S::issue(self, issue)
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        S::checkpoint(self, checkpoint)
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        S::release(self, key, token)
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        S::forget(self, key, token)
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        S::renew(self, claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        S::read(self, key)
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        S::sweep(self, limit)
    }

    fn is_remote(&self) -> bool {
        S::is_remote(self)
    }

    fn manage(&self) -> Option<&dyn Manage> {
        S::manage(self)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        S::wake(self)
    }

    fn transact(&self) -> Option<&dyn Transact> {
        S::transact(self)
    }
}

/// A request for a claim.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The key.
    pub key: Key,
    /// Whose it is.
    pub scope: ScopeDigest,
    /// Method and route in plain text, for people.
    pub operation: Arc<str>,
    /// The operation id that a fresh record gets.
    pub operation_id: OperationId,
    /// What the request is.
    pub fingerprint: Fingerprint,
    /// The claimant's token.
    pub token: Token,
    /// For how long the claim holds without being renewed.
    pub lease: Duration,
    /// For how long an unfinished record is kept, counted from now.
    pub ttl: Ttl,
    /// Whether only a key that the server handed out will do: without a record, nothing is
    /// granted. A record that is there is decided like any other.
    pub issued_only: bool,
    /// What an unknown outcome leads to.
    pub on_unknown: OnUnknown,
    /// The newest format that the claimant reads, and the one of a fresh record.
    pub format: u16,
}

/// A store's answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// It is granted. The record is as it now stands: running, under the claimant's token.
    Granted(Record),
    /// It is not: this is the record that stands in its way, unchanged.
    Found(Record),
    /// It is not: the claim asked for a key that the server handed out, and there is no record.
    Unknown,
}

/// A key to be handed out.
#[derive(Clone)]
pub struct Issue {
    /// The key.
    pub key: Key,
    /// Whose it is.
    pub scope: ScopeDigest,
    /// Method and route of whoever hands it out, in plain text, for people. The first claim
    /// replaces it by its own.
    pub operation: Arc<str>,
    /// The operation id of whoever hands it out. The first claim replaces it by its own.
    pub operation_id: OperationId,
    /// The token by which the same call is known if it is made again.
    pub token: Token,
    /// For how long the key can be used, counted from now.
    pub valid_for: Ttl,
    /// For how long the key is known, counted from now: in the time between, it is expired instead
    /// of unknown. Where this is shorter than its validity, the validity counts.
    pub kept_for: Ttl,
    /// What is bound to the key, for whoever claims it.
    pub payload: Bytes,
    /// The format of the payload.
    pub format: u16,
}

/// What is bound to a key is somebody's data: only its size is shown.
impl fmt::Debug for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issue")
            .field("key", &self.key)
            .field("operation", &self.operation)
            .field("operation_id", &self.operation_id)
            .field("token", &self.token)
            .field("valid_for", &self.valid_for)
            .field("kept_for", &self.kept_for)
            .field("payload_bytes", &self.payload.len())
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

/// What an attempt leaves to the next one.
#[derive(Clone)]
pub struct Checkpoint {
    /// The key.
    pub key: Key,
    /// The token that holds the claim.
    pub token: Token,
    /// The record's new payload, which replaces the one before.
    pub payload: Bytes,
    /// The format of the payload.
    pub format: u16,
}

/// Payloads are somebody's data: only their size is shown.
impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("key", &self.key)
            .field("token", &self.token)
            .field("payload_bytes", &self.payload.len())
            .field("format", &self.format)
            .finish()
    }
}

/// An answer to be recorded.
#[derive(Clone)]
pub struct Completion {
    /// The key.
    pub key: Key,
    /// The token that holds the claim.
    pub token: Token,
    /// For how long the answer is valid and kept, counted from now; without effect on a record
    /// that is [`Flags::ISSUED`].
    pub ttl: Ttl,
    /// Flags to set beside those that the record has.
    pub flags: Flags,
    /// The answer.
    pub payload: Bytes,
    /// The format of the payload.
    pub format: u16,
}

/// Answers are somebody's data: only their size is shown.
impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("key", &self.key)
            .field("token", &self.token)
            .field("ttl", &self.ttl)
            .field("flags", &self.flags)
            .field("payload_bytes", &self.payload.len())
            .field("format", &self.format)
            .finish()
    }
}

/// A store's answer to what is written under a token.
#[expect(
    clippy::large_enum_variant,
    reason = "an answer lives for one match; a box would cost each fenced owner an allocation"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is written, now or by an earlier call of the same kind whose answer was lost.
    Done,
    /// It is not: the key is not held under this token. This is its record, unchanged.
    Fenced(Record),
    /// It is not: there is no record.
    Gone,
}

/// A lease to extend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The key.
    pub key: Key,
    /// The token that holds the claim.
    pub token: Token,
    /// For how long it holds from now.
    pub lease: Duration,
}

/// Why a store could not answer: a kind to act on, the store's name and the cause.
///
/// A clone shares its cause: one statement that has failed fails all the calls that it carried.
#[derive(Clone, Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    store: &'static str,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.store, self.kind)
    }
}

impl StdError for StoreError {
    /// The cause itself: `thiserror` would give the pointer that clones share.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|cause| cause as &(dyn StdError + 'static))
    }
}

impl StoreError {
    /// An error without a deeper cause.
    pub const fn new(store: &'static str, kind: StoreErrorKind) -> Self {
        Self { kind, store, source: None }
    }

    /// An error with its cause.
    pub fn caused_by(
        store: &'static str,
        kind: StoreErrorKind,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, store, source: Some(Arc::from(source.into())) }
    }

    /// What kind of failure it is.
    pub const fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Which store it was.
    pub const fn store(&self) -> &'static str {
        self.store
    }
}

/// What kind of failure a store met, by what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// It could not be reached, or the connection broke. Trying again may help.
    Unreachable,
    /// It did not answer in time. Trying again may help.
    TimedOut,
    /// It is at its bound and takes no new records. Trying again helps once some have expired.
    Full,
    /// More calls wait for it than it takes, so that this one was not made. Trying again helps once
    /// fewer wait.
    Overloaded,
    /// It answered with a refusal: permissions, a missing table, a broken constraint. A person must
    /// look.
    Refused,
    /// A record is larger than it can hold.
    TooLarge,
    /// A record was written by a newer release. It is kept; a newer process can read it.
    Newer,
    /// A record cannot be understood. It is kept; a person must look.
    Corrupt,
}

impl StoreErrorKind {
    /// Whether the same call may succeed a moment later.
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unreachable | Self::TimedOut)
    }
}

impl fmt::Display for StoreErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "the store cannot be reached",
            Self::TimedOut => "the store did not answer in time",
            Self::Full => "the store is full",
            Self::Overloaded => "too many calls wait for the store",
            Self::Refused => "the store refused the call",
            Self::TooLarge => "the record is too large for the store",
            Self::Newer => "the record was written by a newer release of idem",
            Self::Corrupt => "the record is damaged",
        })
    }
}
