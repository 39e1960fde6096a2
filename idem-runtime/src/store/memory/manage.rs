//! Look-ups and operators: through all shards, one at a time.
//!
//! There is no index by operation id, scope or age: it would cost each record, and each request, for
//! what is asked rarely. Between two shards other tasks have their turn.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;

use super::{MemoryStore, NAME, Shared, lock};
use crate::{
    key::{Key, OperationId, ScopeDigest},
    record::{FORMAT, Record},
    store::{Listing, Manage, Page, Place, Purge, Purged, StoreError},
};

impl Shared {
    async fn find(&self, operation_id: OperationId) -> Result<Option<Record>, StoreError> {
        for shard in &self.shards {
            {
                let shard = lock(shard);
                let now = self.clock.now();
                let mut entries = shard.entries.iter();
                if let Some(entry) = entries.find(|entry| entry.operation_id() == operation_id) {
                    return match entry.is_found(FORMAT, now) {
                        Ok(is_found) => {
                            Ok(is_found.then(|| entry.row(&self.operations).into_record(now)))
                        }
                        Err(kind) => Err(StoreError::new(NAME, kind)),
                    };
                }
            }
            tokio::task::yield_now().await;
        }
        Ok(None)
    }

    async fn list(&self, listing: &Listing) -> Page {
        // The oldest so far, and one more, which says whether there is another page.
        let limit = listing.limit.clamp(1, usize::MAX - 1);
        let mut oldest = BTreeMap::new();
        for shard in &self.shards {
            {
                let shard = lock(shard);
                let now = self.clock.now();
                for entry in &shard.entries {
                    let place = Place { created: entry.created(), key: entry.key() };
                    let is_behind = listing.after.is_none_or(|after| place > after);
                    let may_enter = oldest.len() <= limit
                        || oldest.last_key_value().is_some_and(|(youngest, _)| place < *youngest);
                    let is_theirs = listing.scope.is_none_or(|scope| entry.scope() == scope);
                    if !(is_behind && may_enter && is_theirs && entry.kept_until() > now) {
                        continue;
                    }
                    let record = entry.row(&self.operations).summary(now);
                    if listing.kind.covers(&record) {
                        oldest.insert(place, record);
                    }
                    if oldest.len() > limit + 1 {
                        oldest.pop_last();
                    }
                }
            }
            tokio::task::yield_now().await;
        }
        let has_more = oldest.len() > limit;
        if has_more {
            oldest.pop_last();
        }
        let next = oldest.last_key_value().filter(|_| has_more).map(|(place, _)| *place);
        Page { records: oldest.into_values().collect(), next }
    }

    fn purge_key(&self, key: &Key) -> Purged {
        let mut shard = self.shard(key);
        let now = self.clock.now();
        let place = shard.entries.find_entry(super::hash(key), |entry| entry.is_of(key));
        let Ok(place) = place else { return Purged::default() };
        if place.get().bare_row().is_leased(now) {
            return Purged { removed: 0, running: 1 };
        }
        let (entry, _) = place.remove();
        self.discard(&entry);
        shard.compact();
        Purged { removed: 1, running: 0 }
    }

    async fn purge_scope(&self, scope: ScopeDigest, limit: usize) -> Purged {
        let mut purged = Purged::default();
        for shard in &self.shards {
            {
                let mut shard = lock(shard);
                let now = self.clock.now();
                let gone = shard.entries.extract_if(|entry| {
                    let is_theirs = entry.scope() == scope;
                    let leased = is_theirs && entry.bare_row().is_leased(now);
                    let goes = is_theirs && !leased && purged.removed < limit;
                    purged.running += usize::from(leased);
                    purged.removed += usize::from(goes);
                    goes
                });
                gone.for_each(|entry| self.discard(&entry));
                shard.compact();
            }
            tokio::task::yield_now().await;
        }
        purged
    }
}

impl Manage for MemoryStore {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.0.find(*operation_id))
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move { Ok(self.0.list(listing).await) })
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            Ok(match *purge {
                Purge::Key(key) => self.0.purge_key(&key),
                Purge::Scope { scope, limit } => self.0.purge_scope(scope, limit).await,
            })
        })
    }
}
