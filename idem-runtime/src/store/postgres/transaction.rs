//! Handlers' transactions in PostgreSQL.
//!
//! A key is held by an advisory lock of the transaction's: the server lets it go with the
//! transaction, however that ends, and a claim that does not get it knows so at once. Nothing is
//! written before the answer is: a handler that shares its keys without a transaction goes by the
//! record alone, and whoever of the two comes second finds that the record has changed.
//!
//! A claim is two round trips. The first begins, asks for the lock, remembers in a setting of the
//! transaction's whether it was got, and sets the savepoint, which must be younger than the lock: to
//! roll back to an older one would let the lock go. The second reads the record. It must be a
//! statement of its own, since one statement has one snapshot: with the lock, it could miss what was
//! committed just before the lock was let go. (Above READ COMMITTED, a transaction has one snapshot.
//! The record that such a transaction has missed makes its completion fail.)

use std::{any::Any, fmt, fmt::Write as _};

use futures_util::{FutureExt, future::BoxFuture};
use sqlx::{PgConnection, Postgres, Row as _, postgres::PgRow};
use tokio::time::timeout;

use super::{
    NAME, PostgresStore, TIMEOUT,
    calls::{Call, Fault, Session},
    failure, kind_of,
    rows::{decode, now},
    state_of,
};
use crate::{
    key::Key,
    record::{Flags, State, Ttl},
    store::{
        Begun, Claim, Claimed, Completion, StoreError, StoreErrorKind, Transact, Transaction,
        Written,
        clock::{Millis, end_of},
        row::{Ended, Opening, Row, found},
    },
};

/// Keeps idem's locks apart from those that the application may take: the number space is one.
const LOCKS: i64 = i64::from_be_bytes(*b"idem-tx\0");

/// The name of a key's lock. Two keys may share one; the second is then refused for a while.
fn lock_of(key: &Key) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = *key.as_bytes();
    i64::from_be_bytes([a, b, c, d, e, f, g, h]) ^ LOCKS
}

/// A transaction of a handler.
struct Handlers {
    store: PostgresStore,
    open: sqlx::Transaction<'static, Postgres>,
    claimed: Option<Claimant>,
}

/// What was claimed.
struct Claimant {
    /// As it would be committed now.
    row: Row,
    /// As it was found.
    seen: Option<Row>,
    now: Millis,
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.claimed.as_ref().map(|claimed| &claimed.row.key);
        f.debug_struct("PostgresTransaction").field("key", &key).finish_non_exhaustive()
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Database(error) => failure(error),
            Fault::Record(kind) => Self::new(NAME, kind),
        }
    }
}

impl Handlers {
    /// Begins by these statements. Whoever finds that the server has closed a connection takes
    /// another one: nothing has happened yet.
    async fn begin(store: &PostgresStore, statements: &str) -> Result<Self, StoreError> {
        store.ready().await?;
        let mut stale = store.0.pool.num_idle();
        let begin = async {
            loop {
                let statements = sqlx::AssertSqlSafe(statements.to_owned());
                match store.0.pool.begin_with(statements).await {
                    Ok(open) => return Ok(Self { store: store.clone(), open, claimed: None }),
                    Err(error) if stale > 0 && kind_of(&error) == StoreErrorKind::Unreachable => {
                        stale -= 1;
                    }
                    Err(error) => return Err(failure(error)),
                }
            }
        };
        timeout(TIMEOUT, begin).await.unwrap_or_else(|elapsed| {
            Err(StoreError::caused_by(NAME, StoreErrorKind::TimedOut, elapsed))
        })
    }

    fn session(&mut self) -> Session<'_> {
        Session { connection: &mut self.open, prepares: self.store.0.prepares }
    }

    async fn execute(&mut self, sql: &'static str) -> Result<(), StoreError> {
        sqlx::raw_sql(sql).execute(&mut *self.open).await.map(drop).map_err(failure)
    }

    async fn claim(mut self, claim: &Claim) -> Result<Begun, StoreError> {
        mark!("postgres.transaction.begun");
        let looked = look(&mut self.session(), &claim.key).await?;
        mark!("postgres.transaction.read");
        if looked.holder != hex(claim.token.as_bytes()) {
            self.roll_back().await?;
            return Ok(Begun::Held);
        }
        let (seen, now) = (looked.row, looked.now);
        let known = found(seen.as_ref(), claim.format, now);
        let known = known.map_err(|kind| StoreError::new(NAME, kind))?;
        let (row, claimed) = match known.cloned() {
            Some(mut row) => {
                let (changed, claimed) = claim.on_row(&mut row, now);
                (changed.then_some(row), claimed)
            }
            None => claim.on_nothing(now),
        };
        match (row, claimed) {
            (Some(row), Claimed::Granted(record)) => {
                self.claimed = Some(Claimant { row, seen, now });
                Ok(Begun::Granted(Box::new(self), record))
            }
            (_, Claimed::Found(record) | Claimed::Granted(record)) => {
                self.roll_back().await?;
                Ok(Begun::Found(record))
            }
            (_, Claimed::Unknown) => {
                self.roll_back().await?;
                Ok(Begun::Unknown)
            }
        }
    }

    async fn roll_back(self) -> Result<(), StoreError> {
        self.open.rollback().await.map_err(failure)
    }

    async fn commit(mut self) -> Result<(), StoreError> {
        if self.claimed.is_none() {
            // The server takes COMMIT for ROLLBACK, and says nothing of it, after a statement has
            // failed. With a claim, the completion has found that out.
            self.execute("RELEASE SAVEPOINT idem_effects").await.map_err(|error| {
                let kind = StoreErrorKind::Refused;
                StoreError::caused_by(NAME, kind, error)
            })?;
        }
        self.open.commit().await.map_err(|error| match is_rolled_back(&error) {
            true => StoreError::caused_by(NAME, StoreErrorKind::Refused, error),
            false if kind_of(&error).is_transient() => failure(error),
            false => StoreError::caused_by(NAME, StoreErrorKind::Unreachable, error),
        })
    }
}

/// Whether a COMMIT that has failed has certainly come to nothing: the server has refused the data,
/// the transaction's state or its order among others, and that comes before it commits. Whatever
/// else it says (that it is shut down, say) may come after.
fn is_rolled_back(error: &sqlx::Error) -> bool {
    let state = state_of(error).unwrap_or_default();
    // All of class 40 but statement_completion_unknown.
    ["22", "23", "25", "40", "P0"].iter().any(|class| state.starts_with(class)) && state != "40003"
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// What is committed under a key, and what time it is.
struct Looked {
    /// Who got the key's lock in this transaction.
    holder: String,
    row: Option<Row>,
    now: Millis,
}

async fn look(session: &mut Session<'_>, key: &Key) -> Result<Looked, Fault> {
    let query = sqlx::query(
        "SELECT coalesce(current_setting('idem.holder', true), '') AS holder,
                floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms,
                r.key IS NOT NULL AS there, r.key, r.scope, r.operation, r.operation_id, r.state,
                r.scheme, r.fingerprint, r.token, r.attempt, r.lease_end, r.valid_until,
                r.kept_until, r.created, r.format, r.flags, r.payload
         FROM (VALUES ($1::bytea)) AS asked (key) LEFT JOIN idem_records AS r ON r.key = asked.key",
    );
    let row: Option<PgRow> = session.row(query.bind(key.as_bytes())).await?;
    let row = row.ok_or(sqlx::Error::RowNotFound)?;
    let there = row.try_get("there")?;
    Ok(Looked {
        holder: row.try_get("holder")?,
        row: if there { Some(decode(&row)?) } else { None },
        now: now(&row)?,
    })
}

/// Writes the record, if it is as it was found and this is still the transaction of the claim;
/// whether that was so.
async fn write(
    session: &mut Session<'_>,
    row: &Row,
    seen: Option<&Row>,
    ttl: Ttl,
) -> Result<bool, sqlx::Error> {
    let issued = row.flags.contains(Flags::ISSUED);
    let query = sqlx::query(
        "WITH asked AS MATERIALIZED (
             SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms
         )
         INSERT INTO idem_records AS r (
             key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
             lease_end, valid_until, kept_until, created, checkpoint, format, flags, payload)
         SELECT $1, $2, $3, $4, 3, $5, $6, $7, $8, ms,
                -- An issued key has its times from there.
                coalesce($9::bigint, ms + least($11::bigint, 9223372036854775807 - ms)),
                coalesce($10::bigint, ms + least($11, 9223372036854775807 - ms)),
                $12, 0, $13, $14, $15
         FROM asked
         WHERE current_setting('idem.holder', true) = $16
         ON CONFLICT (key) DO UPDATE
         SET scope = excluded.scope, operation = excluded.operation,
             operation_id = excluded.operation_id, state = excluded.state,
             scheme = excluded.scheme, fingerprint = excluded.fingerprint, token = excluded.token,
             attempt = excluded.attempt, lease_end = excluded.lease_end,
             valid_until = excluded.valid_until, kept_until = excluded.kept_until,
             created = excluded.created, checkpoint = excluded.checkpoint,
             format = excluded.format, flags = excluded.flags, payload = excluded.payload
         WHERE r.token = $17 AND r.state = $18 AND r.lease_end = $19 AND r.kept_until = $20
         RETURNING true AS written",
    )
    .bind(row.key.as_bytes())
    .bind(row.scope.as_bytes())
    .bind(&*row.operation)
    .bind(row.operation_id.as_bytes())
    .bind(&*row.fingerprint.scheme)
    .bind(row.fingerprint.digest)
    .bind(row.token.as_bytes())
    .bind(i32::try_from(row.attempt).unwrap_or(i32::MAX))
    .bind(issued.then_some(row.valid_until))
    .bind(issued.then_some(row.kept_until))
    .bind(end_of(0, ttl))
    .bind(row.created)
    .bind(i32::from(row.format))
    .bind(i32::from(row.flags.bits()))
    .bind(&row.payload[..])
    .bind(hex(row.token.as_bytes()))
    .bind(seen.map(|seen| *seen.token.as_bytes()))
    .bind(seen.map(|seen| number_of(seen.state)))
    .bind(seen.map(|seen| seen.lease_end))
    .bind(seen.map(|seen| seen.kept_until));
    Ok(session.row(query).await?.is_some())
}

const fn number_of(state: State) -> i16 {
    match state {
        State::Issued => 0,
        State::Running => 1,
        State::Released => 2,
        State::Completed => 3,
    }
}

/// Whether a transaction holds the lock of this number.
struct IsHeld(i64);

impl Call for IsHeld {
    type Answer = bool;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<bool>, Fault> {
        let query = sqlx::query(
            "SELECT EXISTS (
                 SELECT FROM pg_locks
                 WHERE locktype = 'advisory' AND granted AND objsubid = 1
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                   AND classid = ($1::bigint >> 32 & 4294967295)::oid
                   AND objid = ($1::bigint & 4294967295)::oid) AS held",
        );
        let row = session.row(query.bind(self.0)).await?;
        Ok(Some(row.ok_or(sqlx::Error::RowNotFound)?.try_get("held")?))
    }
}

impl Transact for PostgresStore {
    fn begin<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Begun, StoreError>> {
        Box::pin(async move {
            let (lock, token) = (lock_of(&claim.key), hex(claim.token.as_bytes()));
            let statements = format!(
                "BEGIN; SELECT set_config('idem.holder', CASE WHEN pg_try_advisory_xact_lock({lock}) \
                 THEN '{token}' ELSE '' END, true); SAVEPOINT idem_effects"
            );
            Handlers::begin(self, &statements).await?.claim(claim).await
        })
    }

    fn begin_unclaimed(&self) -> BoxFuture<'_, Result<Box<dyn Transaction>, StoreError>> {
        Box::pin(async move {
            let begun = Handlers::begin(self, "BEGIN; SAVEPOINT idem_effects").await?;
            Ok(Box::new(begun) as Box<dyn Transaction>)
        })
    }

    fn is_held<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<bool, StoreError>> {
        let asked = IsHeld(lock_of(key));
        Box::pin(async move { self.ask(&asked).await })
    }
}

impl Transaction for Handlers {
    fn connection(&self) -> &(dyn Any + Send) {
        let connection: &PgConnection = &self.open;
        connection
    }

    fn connection_mut(&mut self) -> &mut (dyn Any + Send) {
        let connection: &mut PgConnection = &mut self.open;
        connection
    }

    fn undo(&mut self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.execute("ROLLBACK TO SAVEPOINT idem_effects").boxed()
    }

    fn complete<'a>(
        &'a mut self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let Some(mut claimed) = self.claimed.take() else { return Ok(Written::Gone) };
            match claimed.row.complete(completion, claimed.now) {
                Ended::Fenced => return Ok(Written::Fenced(claimed.row.record(claimed.now))),
                Ended::Changed | Ended::Already | Ended::Removed => {}
            }
            let Claimant { row, seen, .. } = &claimed;
            if write(&mut self.session(), row, seen.as_ref(), completion.ttl)
                .await
                .map_err(failure)?
            {
                self.claimed = Some(claimed);
                return Ok(Written::Done);
            }
            let looked = look(&mut self.session(), &completion.key).await?;
            if looked.holder != hex(completion.token.as_bytes()) {
                let cause = "the handler has ended the transaction that it does not own";
                return Err(StoreError::caused_by(NAME, StoreErrorKind::Refused, cause));
            }
            let found = found(looked.row.as_ref(), completion.format, looked.now);
            let found = found.map_err(|kind| StoreError::new(NAME, kind))?;
            Ok(found.map_or(Written::Gone, |row| Written::Fenced(row.record(looked.now))))
        })
    }

    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Handlers::commit(*self).boxed()
    }

    fn roll_back(self: Box<Self>) -> BoxFuture<'static, Result<(), StoreError>> {
        Handlers::roll_back(*self).boxed()
    }
}
