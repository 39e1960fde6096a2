//! The laws of the [`Store`] trait as tests that any store can run (feature `testing`).
//!
//! A store that passes them is one that the engine can rely on. Write a [`StoreFixture`] for it and
//! name it in [`store_laws!`](crate::store_laws); each law then is a test of its own. A law panics
//! when it is broken, and says what was seen. A store that can be searched is named in
//! [`manage_laws!`](crate::manage_laws) too.
//!
//! Laws advance time and never sleep. They leave ten seconds' tolerance to stores whose clock runs
//! on by itself, which is why their leases last for minutes.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use idem_runtime::{
//!     store::{Clock, ManualClock, MemoryStore, Store},
//!     testing::StoreFixture,
//! };
//!
//! struct Memory {
//!     store: MemoryStore,
//!     clock: ManualClock,
//! }
//!
//! impl Memory {
//!     async fn start() -> Self {
//!         let clock = Clock::manual();
//!         Self { store: MemoryStore::builder().clock(clock.clone()).build(), clock }
//!     }
//! }
//!
//! impl StoreFixture for Memory {
//!     fn store(&self) -> Arc<dyn Store> {
//!         Arc::new(self.store.clone())
//!     }
//!
//!     fn second(&self) -> Arc<dyn Store> {
//!         Arc::new(self.store.clone())
//!     }
//!
//!     fn advance(&self, by: Duration) -> futures_util::future::BoxFuture<'_, ()> {
//!         Box::pin(async move { self.clock.advance(by) })
//!     }
//! }
//!
//! mod laws {
//!     use super::Memory;
//!     idem_runtime::store_laws!(Memory::start().await);
//! }
//! # fn main() {}
//! ```

mod checkpoints;
mod claiming;
mod ending;
mod issuing;
mod managing;
mod time;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use self::claiming::race;
pub use self::{
    checkpoints::{a_checkpoint_survives_the_attempt, a_fenced_owner_checkpoints_nothing},
    claiming::{
        a_claim_follows_the_decision, a_lapsed_lease_is_taken_over,
        a_refused_claim_changes_nothing, claiming_twice_with_one_token_is_one_claim,
        first_claim_wins, keys_differ_by_every_bit, one_of_many_racing_claims_wins,
    },
    ending::{
        a_claim_that_never_was_is_gone, a_completed_record_keeps_every_byte,
        a_fenced_owner_changes_nothing, a_forgotten_key_starts_afresh,
        a_late_owner_completes_if_nobody_claimed_since, a_newer_record_is_refused_and_kept,
        a_released_record_keeps_what_it_must, completing_happens_once,
    },
    issuing::{
        a_forgotten_issued_key_is_issued_again, a_released_issued_key_stays_with_its_request,
        an_issued_key_keeps_its_validity, issuing_happens_once,
        only_issued_keys_are_granted_to_who_asks_for_them,
    },
    managing::{
        a_listing_goes_from_the_oldest_to_the_youngest, a_purge_ends_at_its_scope,
        a_purge_leaves_the_running, a_purged_key_was_never_used, an_operation_is_found_by_its_id,
    },
    time::{
        an_unfinished_record_is_kept_for_its_time_to_live,
        expired_records_are_gone_before_any_sweep, for_ever_has_no_end,
        renewing_extends_only_what_is_held, sweeping_leaves_the_living,
        time_to_live_counts_from_completion,
    },
};
use crate::{
    decision::OnUnknown,
    key::{Key, OperationId, ScopeDigest, Token},
    record::{FORMAT, Fingerprint, Flags, Record, Ttl},
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, Store, StoreError, StoreErrorKind, Written,
    },
};

/// An empty store and its clock. Each law gets one of its own.
pub trait StoreFixture: Send + Sync {
    /// The store.
    fn store(&self) -> Arc<dyn Store>;

    /// The same records through another handle, as another process would hold one.
    fn second(&self) -> Arc<dyn Store>;

    /// Has time pass, for all handles. Laws go up to a few centuries.
    ///
    /// A store whose clock cannot be moved may bring all that it has stored forward instead.
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()>;
}

/// Makes one test of each law of the [`Store`](crate::store::Store) trait.
///
/// It takes an expression that makes a [`StoreFixture`](crate::testing::StoreFixture) and may
/// `.await`; each test evaluates it anew. The crate that calls it needs `tokio` with the features
/// `macros` and `rt-multi-thread`. To run the laws against several stores, call it in a module for
/// each. See [`testing`](crate::testing) for an example.
#[macro_export]
macro_rules! store_laws {
    ($fixture:expr $(,)?) => {
        $crate::store_laws! { @each $fixture;
            first_claim_wins
            one_of_many_racing_claims_wins
            claiming_twice_with_one_token_is_one_claim
            a_refused_claim_changes_nothing
            a_claim_follows_the_decision
            a_lapsed_lease_is_taken_over
            keys_differ_by_every_bit
            a_completed_record_keeps_every_byte
            completing_happens_once
            a_late_owner_completes_if_nobody_claimed_since
            a_fenced_owner_changes_nothing
            a_released_record_keeps_what_it_must
            a_forgotten_key_starts_afresh
            a_claim_that_never_was_is_gone
            renewing_extends_only_what_is_held
            time_to_live_counts_from_completion
            an_unfinished_record_is_kept_for_its_time_to_live
            expired_records_are_gone_before_any_sweep
            for_ever_has_no_end
            sweeping_leaves_the_living
            a_newer_record_is_refused_and_kept
            only_issued_keys_are_granted_to_who_asks_for_them
            issuing_happens_once
            an_issued_key_keeps_its_validity
            a_forgotten_issued_key_is_issued_again
            a_released_issued_key_stays_with_its_request
            a_checkpoint_survives_the_attempt
            a_fenced_owner_checkpoints_nothing
        }
    };
    (@each $fixture:expr; $($law:ident)+) => {
        $(
            #[::tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $law() {
                $crate::testing::$law(&$fixture).await;
            }
        )+
    };
}

/// Makes one test of each law of the [`Manage`](crate::store::Manage) trait, as
/// [`store_laws!`](crate::store_laws) does of those of the store.
///
/// The store must be one that can be searched: where [`manage`](crate::store::Store::manage) is
/// `None`, each law is broken.
#[macro_export]
macro_rules! manage_laws {
    ($fixture:expr $(,)?) => {
        $crate::store_laws! { @each $fixture;
            an_operation_is_found_by_its_id
            a_listing_goes_from_the_oldest_to_the_youngest
            a_purged_key_was_never_used
            a_purge_leaves_the_running
            a_purge_ends_at_its_scope
        }
    };
}

/// How long the claims of the laws hold.
const LEASE: Duration = Duration::from_secs(60);
/// How long their records live.
const TTL: Duration = Duration::from_secs(3600);
/// How long their issued keys can be used.
const VALID: Duration = TTL;
/// How long their issued keys are known.
const KEPT: Duration = Duration::from_secs(3 * 3600);
/// How much time may pass by itself between two calls of a law.
const SLACK: Duration = Duration::from_secs(10);

/// A claim on a key that nothing else uses.
fn any_claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

/// A claim on a key, by a claimant of its own.
fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([0x5c; 32]),
        operation: Arc::from("POST /laws/{}"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "law/1".into(), digest: [0xf1; 32] },
        token: Token::random(),
        lease: LEASE,
        ttl: Ttl::For(TTL),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

/// The issuing of a key that nothing else uses.
fn any_issue() -> Issue {
    issue_on(Key::from_bytes(rand::random()))
}

/// The issuing of a key, by an issuer of its own.
fn issue_on(key: Key) -> Issue {
    Issue {
        key,
        scope: ScopeDigest::from_bytes([0x5c; 32]),
        operation: Arc::from("POST /laws"),
        operation_id: OperationId::random(),
        token: Token::random(),
        valid_for: Ttl::For(VALID),
        kept_for: Ttl::For(KEPT),
        payload: Bytes::from_static(b"bound \0 to the key \xff"),
        format: FORMAT,
    }
}

/// A checkpoint under a claim.
fn checkpoint_of(claim: &Claim, payload: &'static [u8]) -> Checkpoint {
    let payload = Bytes::from_static(payload);
    Checkpoint { key: claim.key, token: claim.token, payload, format: claim.format }
}

/// The completion of a claim.
fn completion_of(claim: &Claim, payload: &'static [u8]) -> Completion {
    Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: Bytes::from_static(payload),
        format: claim.format,
    }
}

/// What a law asks of a store, where an error or another answer breaks the law.
///
/// Each takes a reason that ends the sentence "… must …".
trait Ask {
    async fn granted(&self, claim: &Claim, reason: &str) -> Record;
    async fn refused(&self, claim: &Claim, reason: &str) -> Record;
    async fn unknown(&self, claim: &Claim, reason: &str);
    async fn kept(&self, key: &Key, reason: &str) -> Record;
    async fn none(&self, key: &Key, reason: &str);
    async fn swept(&self, limit: usize) -> usize;
}

impl Ask for Arc<dyn Store> {
    async fn granted(&self, claim: &Claim, reason: &str) -> Record {
        match self.claim(claim).await {
            Ok(Claimed::Granted(record)) => record,
            answer => panic!("the claim must be granted: {reason}; got {answer:?}"),
        }
    }

    async fn refused(&self, claim: &Claim, reason: &str) -> Record {
        match self.claim(claim).await {
            Ok(Claimed::Found(record)) => record,
            answer => panic!("the claim must be refused: {reason}; got {answer:?}"),
        }
    }

    async fn unknown(&self, claim: &Claim, reason: &str) {
        match self.claim(claim).await {
            Ok(Claimed::Unknown) => {}
            answer => panic!("the key must be unknown: {reason}; got {answer:?}"),
        }
    }

    async fn kept(&self, key: &Key, reason: &str) -> Record {
        match self.read(key).await {
            Ok(Some(record)) => record,
            answer => panic!("there must be a record: {reason}; got {answer:?}"),
        }
    }

    async fn none(&self, key: &Key, reason: &str) {
        match self.read(key).await {
            Ok(None) => {}
            answer => panic!("there must be no record: {reason}; got {answer:?}"),
        }
    }

    async fn swept(&self, limit: usize) -> usize {
        self.sweep(limit).await.unwrap_or_else(|error| panic!("sweeping failed: {error:?}"))
    }
}

/// The answer is that it is written.
#[track_caller]
fn assert_done(answer: &Result<Written, StoreError>, reason: &str) {
    assert!(matches!(answer, Ok(Written::Done)), "must be done: {reason}; got {answer:?}");
}

/// The answer is that there is no record.
#[track_caller]
fn assert_gone(answer: &Result<Written, StoreError>, reason: &str) {
    assert!(matches!(answer, Ok(Written::Gone)), "must be gone: {reason}; got {answer:?}");
}

/// The answer is that the key is not held under this token, with the record as it is.
#[track_caller]
fn assert_fenced(answer: Result<Written, StoreError>, record: &Record, reason: &str) {
    match answer {
        Ok(Written::Fenced(found)) => assert_same(record, &found, Duration::ZERO, reason),
        answer => panic!("must be fenced: {reason}; got {answer:?}"),
    }
}

/// The answer is that the record is too new.
#[track_caller]
fn assert_newer<T: std::fmt::Debug>(answer: &Result<T, StoreError>, reason: &str) {
    assert!(
        matches!(answer, Err(error) if error.kind() == StoreErrorKind::Newer),
        "must be refused as newer: {reason}; got {answer:?}",
    );
}

/// A record is what it was, but for the time that has passed.
#[track_caller]
fn assert_same(before: &Record, after: &Record, passed: Duration, reason: &str) {
    let untimed = |record: &Record| Record {
        lease_left: Duration::ZERO,
        valid_left: Ttl::Forever,
        kept_left: Ttl::Forever,
        age: Duration::ZERO,
        ..record.clone()
    };
    assert_eq!(untimed(before), untimed(after), "the record must be unchanged: {reason}");
    assert_left(after.lease_left, before.lease_left.saturating_sub(passed), "lease", reason);
    assert_ttl(after.valid_left, shortened(before.valid_left, passed), "validity", reason);
    assert_ttl(after.kept_left, shortened(before.kept_left, passed), "time it is kept", reason);
    assert!(after.age >= before.age, "its age must not go back: {reason}; got {after:?}");
}

fn shortened(ttl: Ttl, passed: Duration) -> Ttl {
    match ttl {
        Ttl::For(span) => Ttl::For(span.saturating_sub(passed)),
        Ttl::Forever => Ttl::Forever,
    }
}

/// So much is left of a span, or less by the tolerance; never more.
#[track_caller]
fn assert_left(actual: Duration, expected: Duration, what: &str, reason: &str) {
    assert!(
        actual <= expected && actual.saturating_add(SLACK) >= expected,
        "the {what} left must be {expected:?}: {reason}; got {actual:?}",
    );
}

/// So much is left of a time to live, or less by the tolerance; never more.
#[track_caller]
fn assert_ttl(actual: Ttl, expected: Ttl, what: &str, reason: &str) {
    match (actual, expected) {
        (Ttl::For(actual), Ttl::For(expected)) => assert_left(actual, expected, what, reason),
        (actual, expected) => {
            assert_eq!(actual, expected, "the {what} left: {reason}");
        }
    }
}

#[cfg(test)]
mod tests;
