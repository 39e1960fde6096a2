//! Look-ups and operators. To find an operation there is an index; the rest reads the table.

use futures_util::future::BoxFuture;
use sqlx::{Row as _, postgres::PgRow};

use super::{
    PostgresStore, SWEPT_AT_ONCE,
    calls::{Call, Fault, Session},
    rows::{bytes, decode, now, record_of},
};
use crate::{
    key::{Key, OperationId, ScopeDigest},
    record::Record,
    store::{Kind, Listing, Manage, Page, Place, Purge, Purged, StoreError},
};

impl Call for OperationId {
    type Answer = Option<Record>;

    async fn once(&self, session: Session<'_>) -> Result<Option<Option<Record>>, Fault> {
        // What is over may still be there under the id.
        let query = sqlx::query(
            "SELECT ms, key, scope, operation, operation_id, state, scheme, fingerprint, token,
                    attempt, lease_end, valid_until, kept_until, created, format, flags, payload
             FROM idem_records,
                  (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms) AS now
             WHERE operation_id = $1
             ORDER BY kept_until DESC
             LIMIT 1",
        )
        .bind(self.as_bytes());
        record_of(session.row(query).await?).map(Some)
    }
}

impl Call for Listing {
    type Answer = Page;

    async fn once(&self, session: Session<'_>) -> Result<Option<Page>, Fault> {
        let limit = self.limit.max(1);
        // The kinds are those of `Kind::covers`.
        let query = sqlx::query(
            "SELECT ms, key, scope, operation, operation_id, state, scheme, fingerprint, token,
                    attempt, lease_end, valid_until, kept_until, created, format, flags,
                    ''::bytea AS payload
             FROM idem_records,
                  (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms) AS now
             WHERE kept_until > ms
               AND ($1::bytea IS NULL OR scope = $1)
               AND ($2::bigint IS NULL OR (created, key) > ($2, $3::bytea))
               AND CASE $4::text WHEN 'any' THEN true
                                 WHEN 'running' THEN state = 1 AND lease_end > ms
                                 WHEN 'unsettled' THEN state = 2 OR state = 1 AND lease_end <= ms
                                 WHEN 'tombstones' THEN state = 3 AND flags & 1 = 1
                   END
             ORDER BY created, key
             LIMIT $5",
        )
        .bind(self.scope.as_ref().map(ScopeDigest::as_bytes))
        .bind(self.after.map(|place| place.created))
        .bind(self.after.as_ref().map(|place| place.key.as_bytes()))
        .bind(match self.kind {
            Kind::Any => "any",
            Kind::Running => "running",
            Kind::Unsettled => "unsettled",
            Kind::Tombstones => "tombstones",
        })
        // One more, which says whether there is another page.
        .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1));
        let rows = session.rows(query).await?;
        let mut records = Vec::with_capacity(rows.len().min(limit));
        for row in rows.iter().take(limit) {
            match decode(row) {
                Ok(record) => records.push(record.summary(now(row)?)),
                Err(_) => tracing::warn!(key = ?place(row)?.key, "a damaged record is not listed"),
            }
        }
        let next = match rows.get(limit) {
            Some(_) => rows.get(limit - 1).map(place).transpose()?,
            None => None,
        };
        Ok(Some(Page { records, next }))
    }
}

/// The place of a row that was listed.
fn place(row: &PgRow) -> Result<Place, sqlx::Error> {
    Ok(Place { created: row.try_get("created")?, key: Key::from_bytes(bytes(row, "key")?) })
}

/// To remove the record of a key.
struct PurgeKey(Key);

impl Call for PurgeKey {
    type Answer = Purged;

    async fn once(&self, session: Session<'_>) -> Result<Option<Purged>, Fault> {
        let query = sqlx::query(
            "WITH now AS MATERIALIZED (
                 SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms
             ), removed AS (
                 DELETE FROM idem_records AS r USING now
                 WHERE r.key = $1 AND NOT (r.state = 1 AND r.lease_end > ms)
                 RETURNING r.key
             )
             SELECT (SELECT count(*) FROM removed) AS removed,
                    (SELECT count(*) FROM idem_records, now
                     WHERE key = $1 AND state = 1 AND lease_end > ms) AS running",
        )
        .bind(self.0.as_bytes());
        purged(session.row(query).await?).map(Some)
    }
}

/// To remove at most so many records of a scope.
struct PurgeScope(ScopeDigest, usize);

impl Call for PurgeScope {
    type Answer = Purged;

    async fn once(&self, session: Session<'_>) -> Result<Option<Purged>, Fault> {
        let query = sqlx::query(
            "WITH now AS MATERIALIZED (
                 SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms
             ), removed AS (
                 DELETE FROM idem_records WHERE ctid = ANY (ARRAY(
                     SELECT ctid FROM idem_records
                     WHERE scope = $1 AND NOT (state = 1 AND lease_end > (SELECT ms FROM now))
                     LIMIT $2
                     FOR UPDATE SKIP LOCKED))
                 RETURNING key
             )
             SELECT (SELECT count(*) FROM removed) AS removed,
                    CASE WHEN (SELECT count(*) FROM removed) < $2
                         THEN (SELECT count(*) FROM idem_records, now
                               WHERE scope = $1 AND state = 1 AND lease_end > ms)
                         ELSE 0 END AS running",
        )
        .bind(self.0.as_bytes())
        .bind(i64::try_from(self.1).unwrap_or(i64::MAX));
        purged(session.row(query).await?).map(Some)
    }
}

fn purged(row: Option<PgRow>) -> Result<Purged, Fault> {
    let row = row.ok_or(sqlx::Error::RowNotFound)?;
    let count = |name| {
        let count: i64 = row.try_get(name)?;
        Ok::<_, sqlx::Error>(usize::try_from(count).unwrap_or_default())
    };
    Ok(Purged { removed: count("removed")?, running: count("running")? })
}

impl PostgresStore {
    async fn purge_scope(&self, scope: ScopeDigest, limit: usize) -> Result<Purged, StoreError> {
        let mut purged = Purged::default();
        loop {
            let at_once = SWEPT_AT_ONCE.min(limit - purged.removed);
            let step = self.ask(&PurgeScope(scope, at_once)).await?;
            purged.removed += step.removed;
            purged.running = step.running;
            if step.removed < at_once || purged.removed == limit {
                return Ok(purged);
            }
        }
    }
}

impl Manage for PostgresStore {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.ask(operation_id))
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(self.ask(listing))
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            match *purge {
                Purge::Key(key) => self.ask(&PurgeKey(key)).await,
                Purge::Scope { scope, limit } => self.purge_scope(scope, limit).await,
            }
        })
    }
}
