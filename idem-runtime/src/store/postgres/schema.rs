//! The tables: created on request, and used only if they are those of this release.

use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use super::{
    NAME, PostgresStore, TIMEOUT,
    calls::{Call, Fault, Session},
    failure, state_of,
};
use crate::store::{StoreError, StoreErrorKind};

/// The version of the tables that this release reads and writes.
const VERSION: i32 = 1;
/// What those who create the tables wait for, so that they do it one after the other: "idem".
const LOCK: i64 = 0x6964_656d;

/// The tables are not those of this release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "idem's tables are {}, and this release needs version {VERSION}",
    .found.map_or("missing".into(), |version| format!("of version {version}")),
)]
pub struct SchemaMismatch {
    /// The version of those that there are; `None` if there are none.
    pub found: Option<i32>,
}

impl SchemaMismatch {
    /// The error of whoever meets these tables.
    fn check(found: Option<i32>) -> Result<(), StoreError> {
        let kind = match found {
            Some(VERSION) => return Ok(()),
            Some(VERSION..) => StoreErrorKind::Newer,
            _ => StoreErrorKind::Refused,
        };
        Err(StoreError::caused_by(NAME, kind, Self { found }))
    }
}

/// To look which tables there are.
pub(super) struct Version;

impl Call for Version {
    /// The version, if there are any.
    type Answer = Option<i32>;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Option<i32>>, Fault> {
        let query = sqlx::query("SELECT version FROM idem_schema WHERE id = 1");
        match session.row(query).await {
            Ok(row) => Ok(Some(row.map(|row| sqlx::Row::try_get(&row, 0)).transpose()?)),
            // undefined_table.
            Err(error) if state_of(&error).as_deref() == Some("42P01") => Ok(Some(None)),
            Err(error) => Err(error.into()),
        }
    }
}

impl PostgresStore {
    /// Creates the tables if they do not exist. Any number of processes may do so at once.
    ///
    /// Where they exist, no right to create anything is needed.
    ///
    /// # Errors
    ///
    /// [`Newer`](StoreErrorKind::Newer) or [`Refused`](StoreErrorKind::Refused) with a
    /// [`SchemaMismatch`] when the tables are those of another release, and whatever keeps the
    /// database from answering.
    pub async fn create_schema(&self) -> Result<(), StoreError> {
        if self.ask_unchecked(&Version).await?.is_none() {
            let creating = async {
                let mut connection = self.0.pool.acquire().await?;
                create(&mut connection).await
            };
            match timeout(TIMEOUT, creating).await {
                Ok(created) => created.map_err(failure)?,
                Err(elapsed) => {
                    return Err(StoreError::caused_by(NAME, StoreErrorKind::TimedOut, elapsed));
                }
            }
        }
        self.check_schema().await
    }

    /// Refuses tables that are not those of this release.
    pub(super) async fn check_schema(&self) -> Result<(), StoreError> {
        SchemaMismatch::check(self.ask_unchecked(&Version).await?)
    }
}

async fn create(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    // Even CREATE TABLE IF NOT EXISTS fails for one of two that run it at once.
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(LOCK)
        .persistent(false)
        .execute(&mut *transaction)
        .await?;
    let exists = sqlx::query_scalar("SELECT to_regclass('idem_schema') IS NOT NULL");
    let exists: bool = exists.persistent(false).fetch_one(&mut *transaction).await?;
    if !exists {
        sqlx::raw_sql(PostgresStore::SCHEMA).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}
