//! Look-ups and operators: they read beside the writer, and only what is to be removed goes through
//! it.

use futures_util::future::BoxFuture;
use sqlx::{Row as _, sqlite::SqliteRow};

use super::{
    NAME, SWEPT_AT_ONCE, SqliteStore, batch, failure,
    queue::{Doomed, Op},
};
use crate::{
    key::{Key, OperationId, ScopeDigest},
    record::{FORMAT, Record},
    store::{
        Kind, Listing, Manage, Page, Place, Purge, Purged, StoreError, StoreErrorKind, row::found,
    },
};

impl SqliteStore {
    async fn find_operation(
        &self,
        operation_id: &OperationId,
    ) -> Result<Option<Record>, StoreError> {
        let failed = |error| failure(error).error();
        let row = sqlx::query(
            "SELECT key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
                    lease_end, valid_until, kept_until, created, format, flags, payload
             FROM idem_records WHERE operation_id = ?1",
        )
        .bind(&operation_id.as_bytes()[..])
        .fetch_optional(&self.0.pool)
        .await
        .map_err(failed)?;
        let now = self.0.clock.now();
        let row = row.map(|row| batch::decode(&row)).transpose();
        let record =
            row.and_then(|row| Ok(found(row.as_ref(), FORMAT, now)?.map(|row| row.record(now))));
        record.map_err(|kind| StoreError::new(NAME, kind))
    }

    async fn page(&self, listing: &Listing) -> Result<Page, StoreError> {
        let failed = |error| failure(error).error();
        let limit = listing.limit.max(1);
        let now = self.0.clock.now();
        // A row without a place cannot be listed, nor can one behind it.
        let statement = format!(
            "SELECT key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
                    lease_end, valid_until, kept_until, created, format, flags, x'' AS payload
             FROM idem_records
             WHERE kept_until > ?1 AND created >= 0 AND length(key) = 32
               AND (created, key) > (?2, ?3)
               AND (?4 IS NULL OR scope = ?4)
               AND {}
             ORDER BY created, key
             LIMIT ?5",
            condition(listing.kind),
        );
        let after = listing.after.unwrap_or(Place { created: -1, key: Key::from_bytes([0; 32]) });
        let rows = sqlx::query(sqlx::AssertSqlSafe(statement))
            .bind(now)
            .bind(after.created)
            .bind(&after.key.as_bytes()[..])
            .bind(listing.scope.as_ref().map(|scope| &scope.as_bytes()[..]))
            // One more, which says whether there is another page.
            .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1))
            .fetch_all(&self.0.pool)
            .await
            .map_err(failed)?;
        let mut records = Vec::with_capacity(rows.len().min(limit));
        for row in rows.iter().take(limit) {
            match batch::decode(row) {
                Ok(row) => records.push(row.record(now)),
                Err(kind) => {
                    tracing::warn!(key = ?place(row)?.key, "not listed: {kind}");
                }
            }
        }
        let next = match rows.get(limit) {
            Some(_) => rows.get(limit - 1).map(place).transpose()?,
            None => None,
        };
        Ok(Page { records, next })
    }

    async fn purge_scope(&self, scope: ScopeDigest, limit: usize) -> Result<Purged, StoreError> {
        let failed = |error| failure(error).error();
        // Found beside the writer, since to read through the table takes its time, and looked at
        // again under its lock.
        let found = sqlx::query(
            "SELECT key FROM idem_records
             WHERE scope = ?1 AND NOT (state = 1 AND lease_end > ?2) AND length(key) = 32
             LIMIT ?3",
        )
        .bind(&scope.as_bytes()[..])
        .bind(self.0.clock.now())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.0.pool)
        .await
        .map_err(failed)?;
        let keys = found.iter().map(batch::key_of).collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|()| StoreError::new(NAME, StoreErrorKind::Corrupt))?;
        let mut purged = Purged::default();
        for keys in keys.chunks(SWEPT_AT_ONCE) {
            purged.removed += self.purge_keys(keys.to_vec(), Some(scope)).await?.removed;
        }
        if keys.len() < limit {
            let running: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM idem_records
                 WHERE scope = ?1 AND state = 1 AND lease_end > ?2",
            )
            .bind(&scope.as_bytes()[..])
            .bind(self.0.clock.now())
            .fetch_one(&self.0.pool)
            .await
            .map_err(failed)?;
            purged.running = usize::try_from(running).unwrap_or(usize::MAX);
        }
        Ok(purged)
    }

    async fn purge_keys(
        &self,
        keys: Vec<Key>,
        scope: Option<ScopeDigest>,
    ) -> Result<Purged, StoreError> {
        self.write(|reply| Op::Purge(Doomed { keys, scope }, reply)).await
    }
}

/// What [`Kind::covers`] says, of rows that are kept; `?1` is now.
const fn condition(kind: Kind) -> &'static str {
    match kind {
        Kind::Any => "TRUE",
        Kind::Running => "state = 1 AND lease_end > ?1",
        Kind::Unsettled => "(state = 2 OR state = 1 AND lease_end <= ?1)",
        Kind::Tombstones => "state = 3 AND flags & 1 = 1",
    }
}

/// The place of a row that was listed.
fn place(row: &SqliteRow) -> Result<Place, StoreError> {
    let key = batch::key_of(row).map_err(|()| StoreError::new(NAME, StoreErrorKind::Corrupt))?;
    let created = row.try_get("created").map_err(|error| failure(error).error())?;
    Ok(Place { created, key })
}

impl Manage for SqliteStore {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.find_operation(operation_id))
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(self.page(listing))
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            match *purge {
                Purge::Key(key) => self.purge_keys(vec![key], None).await,
                Purge::Scope { scope, limit } => self.purge_scope(scope, limit).await,
            }
        })
    }
}
