//! Finding, listing and removing records: what look-ups and operators ask of a store.

use futures_util::future::BoxFuture;

use super::StoreError;
use crate::{
    decision::Seen,
    key::{Key, OperationId, ScopeDigest},
    record::Record,
};

/// What look-ups and operators ask of a store, beside the claims of the engine.
///
/// Nothing here is on the way of a request: a store may look through everything that it has.
/// Payloads, which may be somebody's data, are read by [`find`](Self::find) alone.
///
/// # Laws
///
/// They go on from those of [`Store`](super::Store); each is a public test of the same name in the
/// `testing` module, and `manage_laws!` names them.
///
/// 29. `an_operation_is_found_by_its_id`: whatever its state, for as long as its record is kept,
///     and by the id that the record has now.
/// 30. `a_listing_goes_from_the_oldest_to_the_youngest`: it holds exactly the records of its kind
///     and scope that are still kept, page by page, each once, and without their payloads.
/// 31. `a_purged_key_was_never_used`: nothing is left of it; the next claim is attempt 1 under its
///     own operation id.
/// 32. `a_purge_leaves_the_running`: a record whose lease is alive stays, and is counted.
/// 33. `a_purge_ends_at_its_scope`: it removes all records of the scope, at most as many as it was
///     told in one call, and no other's.
pub trait Manage: Send + Sync {
    /// The record of an operation, as [`read`](super::Store::read) gives it.
    ///
    /// # Errors
    ///
    /// When the store cannot answer or the record cannot be read.
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// The oldest records of a kind, by when they were made and then by key.
    ///
    /// Records of a newer format are among them: to list them reads no payload. What is damaged so
    /// that it cannot be told what it is, is left out; a store says so in its log.
    ///
    /// # Errors
    ///
    /// When the store cannot answer.
    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>>;

    /// Removes records whatever their state and format, sound or damaged, but for those whose lease
    /// is alive: their handlers are running, and a request with the same key would run beside them.
    ///
    /// What is over and was not swept yet is removed too, and may be counted.
    ///
    /// # Errors
    ///
    /// When the store cannot answer; some records may then have been removed.
    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>>;
}

/// Which records to list.
#[derive(Clone, Copy, Debug)]
pub struct Listing {
    /// Of what kind.
    pub kind: Kind,
    /// Of whom; `None` is everybody.
    pub scope: Option<ScopeDigest>,
    /// Behind which place: where the page before ended.
    pub after: Option<Place>,
    /// At most how many; zero is taken as one.
    pub limit: usize,
}

/// A kind of records, by what an operator can do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// All that are kept.
    Any,
    /// Running under a lease that is alive.
    Running,
    /// Ended without saying whether the effect happened: released, or running under a lease that is
    /// over.
    Unsettled,
    /// Completed, with an answer that could not be kept.
    Tombstones,
}

impl Kind {
    /// Whether a record is of this kind.
    pub fn covers(self, record: &Record) -> bool {
        match self {
            Self::Any => true,
            Self::Running => matches!(record.seen(), Seen::Running { leased: true, .. }),
            Self::Unsettled => {
                matches!(record.seen(), Seen::Released { .. } | Seen::Running { leased: false, .. })
            }
            Self::Tombstones => matches!(record.seen(), Seen::Completed { tombstone: true, .. }),
        }
    }
}

/// A place in a listing, made by the store that gave the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// When the record was made, in the store's own measure.
    pub created: i64,
    /// The record's key.
    pub key: Key,
}

/// A part of a listing.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The records, oldest first, without their payloads.
    pub records: Vec<Record>,
    /// Where the next page begins; `None` if this is the last one.
    pub next: Option<Place>,
}

/// What to remove.
#[derive(Clone, Copy, Debug)]
pub enum Purge {
    /// The record of one key.
    Key(Key),
    /// The records of one tenant or principal.
    Scope {
        /// Whose.
        scope: ScopeDigest,
        /// At most how many in this call.
        limit: usize,
    },
}

/// What a purge came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// How many records were removed.
    pub removed: usize,
    /// How many it met and left, since they are running. Of a scope it is said once nothing else is
    /// left to remove, and may otherwise be too small.
    pub running: usize,
}
