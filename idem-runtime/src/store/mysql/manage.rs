//! Look-ups and operators: what they ask reads through the table without a lock, and only what is to
//! be removed is looked up by its key.

use futures_util::future::BoxFuture;
use sqlx::{MySqlConnection, Row as _, mysql::MySqlRow};

use super::{
    MySqlStore, SWEPT_AT_ONCE,
    calls::{Call, count, list, listed},
    failure::Failure,
    row::{Loaded, columns, decode, key_of, now},
};
use crate::{
    key::{Key, OperationId, ScopeDigest},
    record::{FORMAT, Record},
    store::{
        Kind, Listing, Manage, Page, Place, Purge, Purged, StoreError, StoreErrorKind,
        clock::Millis, row::found,
    },
};

/// Rows whose owner holds the claim, as far as anybody knows.
macro_rules! leased {
    () => {
        concat!("(state = 1 AND lease_end > ", now!(), ")")
    };
}

/// Finds a record by its operation.
pub(super) struct Find<'a>(pub(super) &'a OperationId);

impl Call for Find<'_> {
    type Answer = Option<Record>;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<Option<Record>, Failure> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            ", payload, ",
            now!(),
            " AS read_at FROM idem_records WHERE operation_id = ?
             ORDER BY kept_until DESC LIMIT 1"
        ))
        .bind(&self.0.as_bytes()[..])
        .fetch_optional(connection)
        .await?;
        let Some(Loaded { row, now, .. }) = row.map(|row| decode(&row)).transpose()? else {
            return Ok(None);
        };
        Ok(found(Some(&row), FORMAT, now)?.map(|row| row.record(now)))
    }
}

/// Lists records.
pub(super) struct List<'a>(pub(super) &'a Listing);

impl Call for List<'_> {
    type Answer = Page;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<Page, Failure> {
        let listing = self.0;
        let limit = listing.limit.max(1);
        let statement = format!(
            concat!(
                "SELECT ",
                columns!(),
                ", x'' AS payload, ",
                now!(),
                " AS read_at FROM idem_records
                 WHERE kept_until > ",
                now!(),
                " AND (created > ? OR created = ? AND record_key > ?)
                   AND (? OR scope = ?)
                   AND {}
                 ORDER BY created, record_key LIMIT ?"
            ),
            condition(listing.kind),
        );
        // Nothing was made before that, and a key of zeros may have been made then.
        let beginning = Place { created: Millis::MIN, key: Key::from_bytes([0; 32]) };
        let after = listing.after.unwrap_or(beginning);
        let scope = listing.scope.as_ref().map_or(&[][..], |scope| &scope.as_bytes()[..]);
        let rows = sqlx::query(sqlx::AssertSqlSafe(statement))
            .bind(after.created)
            .bind(after.created)
            .bind(&after.key.as_bytes()[..])
            .bind(listing.scope.is_none())
            .bind(scope)
            // One more, which says whether there is another page.
            .bind((limit as u64).saturating_add(1))
            .fetch_all(connection)
            .await?;
        let mut records = Vec::with_capacity(rows.len().min(limit));
        for row in rows.iter().take(limit) {
            match decode(row) {
                Ok(Loaded { row, now, .. }) => records.push(row.record(now)),
                Err(kind) => tracing::warn!(key = ?place(row)?.key, "not listed: {kind}"),
            }
        }
        let next = match rows.get(limit) {
            Some(_) => rows.get(limit - 1).map(place).transpose()?,
            None => None,
        };
        Ok(Page { records, next })
    }
}

/// What [`Kind::covers`] says, of rows that are kept.
const fn condition(kind: Kind) -> &'static str {
    match kind {
        Kind::Any => "TRUE",
        Kind::Running => leased!(),
        Kind::Unsettled => concat!("(state = 2 OR state = 1 AND lease_end <= ", now!(), ")"),
        Kind::Tombstones => "state = 3 AND flags & 1",
    }
}

/// The place of a row that was listed.
fn place(row: &MySqlRow) -> Result<Place, Failure> {
    let key = key_of(row).map_err(|()| StoreErrorKind::Corrupt)?;
    Ok(Place { created: row.try_get("created")?, key })
}

/// Removes the record of a key, unless its lease is alive.
pub(super) struct PurgeKey<'a>(pub(super) &'a Key);

impl Call for PurgeKey<'_> {
    type Answer = Purged;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<Purged, Failure> {
        let removed = sqlx::query(concat!(
            "DELETE FROM idem_records WHERE record_key = ? AND NOT ",
            leased!()
        ))
        .bind(&self.0.as_bytes()[..])
        .execute(&mut *connection)
        .await?;
        if removed.rows_affected() > 0 {
            return Ok(Purged { removed: 1, running: 0 });
        }
        let running: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM idem_records WHERE record_key = ?")
                .bind(&self.0.as_bytes()[..])
                .fetch_one(connection)
                .await?;
        Ok(Purged { removed: 0, running: usize::try_from(running).unwrap_or(usize::MAX) })
    }
}

/// Removes some records of a scope, but for those whose lease is alive.
pub(super) struct PurgeScope<'a> {
    pub(super) scope: &'a ScopeDigest,
    pub(super) limit: usize,
}

impl Call for PurgeScope<'_> {
    type Answer = Purged;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<Purged, Failure> {
        // Found without a lock, since to read through the table takes its time, and looked at again
        // by the statement that removes them.
        let rows = sqlx::query(concat!(
            "SELECT record_key FROM idem_records WHERE scope = ? AND NOT ",
            leased!(),
            " LIMIT ?"
        ))
        .bind(&self.scope.as_bytes()[..])
        .bind(self.limit as u64)
        .fetch_all(&mut *connection)
        .await?;
        let keys: Vec<_> = rows.iter().flat_map(key_of).collect();
        let list = list(keys.iter().map(|key| (*key, String::new())));
        let removed = sqlx::query(concat!(
            "DELETE existing FROM ",
            listed!(),
            " WHERE scope = ? AND NOT ",
            leased!()
        ))
        .bind(&list)
        .bind(&self.scope.as_bytes()[..])
        .execute(&mut *connection)
        .await?;
        let removed = count(removed.rows_affected());
        if keys.len() == self.limit {
            return Ok(Purged { removed, running: 0 });
        }
        let running: i64 = sqlx::query_scalar(concat!(
            "SELECT COUNT(*) FROM idem_records WHERE scope = ? AND ",
            leased!()
        ))
        .bind(&self.scope.as_bytes()[..])
        .fetch_one(connection)
        .await?;
        Ok(Purged { removed, running: usize::try_from(running).unwrap_or(usize::MAX) })
    }
}

impl Manage for MySqlStore {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { self.call(&Find(operation_id)).await })
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move { self.call(&List(listing)).await })
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(async move {
            match purge {
                Purge::Key(key) => self.call(&PurgeKey(key)).await,
                Purge::Scope { scope, limit } => {
                    let mut all = Purged::default();
                    loop {
                        let limit = SWEPT_AT_ONCE.min(limit - all.removed);
                        let purged = self.call(&PurgeScope { scope, limit }).await?;
                        all.removed += purged.removed;
                        all.running = purged.running;
                        if purged.removed < limit || limit == 0 {
                            return Ok(all);
                        }
                    }
                }
            }
        })
    }
}
