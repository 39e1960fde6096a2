//! One transaction: the rows that its calls need, read at once; each call decided on them, in
//! order; what changed, written.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use sqlx::{Connection as _, Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};

use super::{
    Failure, NAME, failure,
    queue::{Doomed, Op, Reply},
};
use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{FORMAT, Fingerprint, Flags, State},
    store::{
        Clock, Purged, Renewal, StoreError, StoreErrorKind, Written,
        clock::Millis,
        row::{Ended, Opening, Row, found},
    },
};

/// The head of a statement on many keys: they come as one blob, `?1`, that is cut up again, since
/// SQLite knows no parameter that is a list.
macro_rules! wanted {
    () => {
        "WITH RECURSIVE wanted (at) AS (
             SELECT 1 UNION ALL SELECT at + 32 FROM wanted WHERE at + 32 < length(?1))"
    };
}

/// A row as it was read, or why it cannot be.
type Loaded = Result<Row, StoreErrorKind>;

/// A transaction that holds SQLite's only write lock.
pub(super) struct Batch<'c> {
    transaction: Transaction<'c, Sqlite>,
    now: Millis,
    /// What the table holds for the keys of the calls.
    rows: HashMap<Key, Loaded>,
}

/// What a call met.
enum Broken {
    /// It alone has failed, and nothing of it is written.
    Call(StoreError),
    /// The transaction has.
    Batch(Failure),
}

impl From<StoreErrorKind> for Broken {
    fn from(kind: StoreErrorKind) -> Self {
        Self::Call(StoreError::new(NAME, kind))
    }
}

impl From<sqlx::Error> for Broken {
    /// A row that SQLite finds too large concerns its own call only: the statement has changed
    /// nothing, and the transaction goes on. After any other failure it may have been rolled back.
    fn from(error: sqlx::Error) -> Self {
        let failure = failure(error);
        match failure.kind {
            StoreErrorKind::TooLarge => Self::Call(failure.error()),
            _ => Self::Batch(failure),
        }
    }
}

/// An answer that waits for the commit.
pub(super) struct Answer(Box<Settle>);

type Settle = dyn FnOnce(Option<&Failure>) + Send;

impl Answer {
    /// Gives the answer, or the failure of the transaction.
    pub(super) fn settle(self, failure: Option<&Failure>) {
        self.0(failure);
    }
}

impl<'c> Batch<'c> {
    /// Begins a transaction and reads the rows that these calls need.
    pub(super) async fn begin(
        connection: &'c mut SqliteConnection,
        clock: &Clock,
        ops: &[Op],
    ) -> Result<Self, Failure> {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failure)?;
        // Under the lock, so that time runs forward from one transaction to the next.
        let now = clock.now();
        let mut keys = Vec::with_capacity(ops.len());
        ops.iter().for_each(|op| op.keys(&mut keys));
        let rows = load(&mut transaction, &keys).await.map_err(failure)?;
        Ok(Self { transaction, now, rows })
    }

    /// Does what a call asks for. Its answer is due after the commit; a failure of the whole
    /// transaction is answered at once.
    pub(super) async fn apply(&mut self, op: Op) -> Result<Answer, Failure> {
        match op {
            Op::Claim(claim, reply) => answer(reply, self.open(&*claim).await),
            Op::Issue(issue, reply) => answer(reply, self.open(&*issue).await),
            Op::Checkpoint(checkpoint, reply) => {
                let change = |row: &mut Row| row.checkpoint(&checkpoint);
                answer(reply, self.change(&checkpoint.key, checkpoint.format, change).await)
            }
            Op::Complete(completion, reply) => {
                let now = self.now;
                let change = |row: &mut Row| row.complete(&completion, now);
                answer(reply, self.change(&completion.key, completion.format, change).await)
            }
            Op::Release(key, token, reply) => {
                let now = self.now;
                answer(reply, self.change(&key, FORMAT, |row| row.release(token, now)).await)
            }
            Op::Forget(key, token, reply) => {
                let now = self.now;
                answer(reply, self.change(&key, FORMAT, |row| row.forget(token, now)).await)
            }
            Op::Renew(renewals, reply) => answer(reply, self.renew(&renewals).await),
            Op::Sweep(limit, reply) => answer(reply, self.sweep(limit).await),
            Op::Purge(doomed, reply) => answer(reply, self.purge(&doomed).await),
        }
    }

    pub(super) async fn commit(self) -> Result<(), Failure> {
        self.transaction.commit().await.map_err(failure)
    }

    pub(super) async fn rollback(self) -> Result<(), Failure> {
        self.transaction.rollback().await.map_err(failure)
    }

    /// The row of a key, unless it is over.
    fn found(&self, key: &Key, format: u16) -> Result<Option<&Row>, StoreErrorKind> {
        let row = self.rows.get(key).map(Result::as_ref).transpose().map_err(|kind| *kind)?;
        found(row, format, self.now)
    }

    /// Claims or issues a key.
    async fn open<O: Opening>(&mut self, opening: &O) -> Result<O::Answer, Broken> {
        let (row, answer) = match self.found(opening.key(), opening.format())? {
            Some(row) => {
                let mut row = row.clone();
                let (changed, answer) = opening.on_row(&mut row, self.now);
                (changed.then_some(row), answer)
            }
            None => opening.on_nothing(self.now),
        };
        if let Some(row) = row {
            self.put(row).await?;
        }
        Ok(answer)
    }

    /// Changes a row under a token, as `change` says.
    async fn change(
        &mut self,
        key: &Key,
        format: u16,
        change: impl FnOnce(&mut Row) -> Ended,
    ) -> Result<Written, Broken> {
        let Some(row) = self.found(key, format)? else { return Ok(Written::Gone) };
        let mut row = row.clone();
        match change(&mut row) {
            Ended::Changed => self.put(row).await?,
            Ended::Removed => self.remove(key).await?,
            Ended::Already => {}
            Ended::Fenced => return Ok(Written::Fenced(row.record(self.now))),
        }
        Ok(Written::Done)
    }

    async fn renew(&mut self, renewals: &[Renewal]) -> Result<Vec<bool>, Broken> {
        let mut held = Vec::with_capacity(renewals.len());
        for renewal in renewals {
            // A row that this release cannot read is not one that it holds.
            let row = self.found(&renewal.key, FORMAT).ok().flatten().cloned();
            let renewed = row.and_then(|mut row| row.renew(renewal, self.now).then_some(row));
            held.push(renewed.is_some());
            if let Some(row) = renewed {
                self.put(row).await?;
            }
        }
        Ok(held)
    }

    /// Removes rows that are over. Those that this release does not understand stay, whatever they
    /// seem to say of their time.
    async fn sweep(&mut self, limit: usize) -> Result<usize, Broken> {
        let swept = sqlx::query(
            "DELETE FROM idem_records WHERE rowid IN (
                 SELECT rowid FROM idem_records
                 WHERE kept_until BETWEEN 0 AND ?1
                   AND format BETWEEN 1 AND ?2
                   AND state BETWEEN 0 AND 3
                   AND length(key) = 32 AND length(scope) = 32 AND length(fingerprint) = 32
                   AND length(operation_id) = 16 AND length(token) = 16
                   AND attempt BETWEEN 0 AND 4294967295 AND flags BETWEEN 0 AND 65535
                   AND lease_end >= 0 AND created >= 0 AND valid_until BETWEEN 0 AND kept_until
                 ORDER BY kept_until
                 LIMIT ?3)
             RETURNING key",
        )
        .bind(self.now)
        .bind(i64::from(FORMAT))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *self.transaction)
        .await?;
        self.forget_rows(&swept);
        Ok(swept.len())
    }

    /// Removes rows, sound or not, but for those whose lease is alive.
    async fn purge(&mut self, doomed: &Doomed) -> Result<Purged, Broken> {
        let keys: Vec<u8> = doomed.keys.iter().flat_map(Key::as_bytes).copied().collect();
        let removed = sqlx::query(concat!(
            "DELETE FROM idem_records WHERE key IN (",
            wanted!(),
            " SELECT substr(?1, at, 32) FROM wanted)
               AND (?2 IS NULL OR scope = ?2)
               AND NOT (state = 1 AND lease_end > ?3)
             RETURNING key",
        ))
        .bind(&keys)
        .bind(doomed.scope.as_ref().map(|scope| &scope.as_bytes()[..]))
        .bind(self.now)
        .fetch_all(&mut *self.transaction)
        .await?;
        self.forget_rows(&removed);
        let left: i64 = sqlx::query_scalar(concat!(
            "SELECT count(*) FROM idem_records WHERE key IN (",
            wanted!(),
            " SELECT substr(?1, at, 32) FROM wanted)",
        ))
        .bind(&keys)
        .fetch_one(&mut *self.transaction)
        .await?;
        let running = usize::try_from(left).unwrap_or(usize::MAX);
        Ok(Purged { removed: removed.len(), running })
    }

    /// Forgets what was read of rows that are gone.
    fn forget_rows(&mut self, gone: &[SqliteRow]) {
        for key in gone.iter().flat_map(key_of) {
            self.rows.remove(&key);
        }
    }

    /// Writes a row over whatever is there.
    async fn put(&mut self, row: Row) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO idem_records (
                 key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
                 lease_end, valid_until, kept_until, created, format, flags, payload)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
             ON CONFLICT (key) DO UPDATE SET
                 scope = excluded.scope, operation = excluded.operation,
                 operation_id = excluded.operation_id, state = excluded.state,
                 scheme = excluded.scheme, fingerprint = excluded.fingerprint,
                 token = excluded.token, attempt = excluded.attempt,
                 lease_end = excluded.lease_end, valid_until = excluded.valid_until,
                 kept_until = excluded.kept_until, created = excluded.created,
                 format = excluded.format, flags = excluded.flags, payload = excluded.payload",
        )
        .bind(&row.key.as_bytes()[..])
        .bind(&row.scope.as_bytes()[..])
        .bind(&*row.operation)
        .bind(&row.operation_id.as_bytes()[..])
        .bind(state_number(row.state))
        .bind(&*row.fingerprint.scheme)
        .bind(&row.fingerprint.digest[..])
        .bind(&row.token.as_bytes()[..])
        .bind(i64::from(row.attempt))
        .bind(row.lease_end)
        .bind(row.valid_until)
        .bind(row.kept_until)
        .bind(row.created)
        .bind(i64::from(row.format))
        .bind(i64::from(row.flags.bits()))
        .bind(&row.payload[..])
        .execute(&mut *self.transaction)
        .await?;
        self.rows.insert(row.key, Ok(row));
        Ok(())
    }

    async fn remove(&mut self, key: &Key) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM idem_records WHERE key = ?1")
            .bind(&key.as_bytes()[..])
            .execute(&mut *self.transaction)
            .await?;
        self.rows.remove(key);
        Ok(())
    }
}

fn answer<T: Send + 'static>(
    reply: Reply<T>,
    result: Result<T, Broken>,
) -> Result<Answer, Failure> {
    let result = match result {
        Ok(answer) => Ok(answer),
        Err(Broken::Call(error)) => Err(error),
        Err(Broken::Batch(failure)) => {
            // Whoever no longer waits needs no answer.
            drop(reply.send(Err(failure.error())));
            return Err(failure);
        }
    };
    Ok(Answer(Box::new(move |failure| {
        drop(reply.send(failure.map_or(result, |failure| Err(failure.error()))));
    })))
}

/// Reads the rows of many keys in one statement; a key without a row is not in the answer.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    keys: &[Key],
) -> Result<HashMap<Key, Loaded>, sqlx::Error> {
    let mut loaded = HashMap::with_capacity(keys.len());
    if keys.is_empty() {
        return Ok(loaded);
    }
    let digests: Vec<u8> = keys.iter().flat_map(Key::as_bytes).copied().collect();
    // CROSS JOIN has SQLite look each of them up, instead of reading the table.
    let rows = sqlx::query(concat!(
        wanted!(),
        " SELECT key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
                lease_end, valid_until, kept_until, created, format, flags, payload
         FROM wanted CROSS JOIN idem_records ON key = substr(?1, at, 32)",
    ))
    .bind(digests)
    .fetch_all(connection)
    .await?;
    for row in rows {
        // Each key was asked for, so each has its 32 bytes.
        let Ok(key) = key_of(&row) else { continue };
        loaded.insert(key, decode(&row));
    }
    Ok(loaded)
}

/// Reads a row back. What a newer release wrote may be different in any respect, so that failing to
/// understand it says nothing of its health.
pub(super) fn decode(row: &SqliteRow) -> Result<Row, StoreErrorKind> {
    let damaged = |()| StoreErrorKind::Corrupt;
    let format: u16 = number(row, "format").map_err(damaged)?;
    if format == 0 {
        return Err(StoreErrorKind::Corrupt);
    }
    fields(format, row)
        .map_err(|()| if format > FORMAT { StoreErrorKind::Newer } else { StoreErrorKind::Corrupt })
}

fn fields(format: u16, row: &SqliteRow) -> Result<Row, ()> {
    let kept_until = instant(row, "kept_until")?;
    let valid_until = instant(row, "valid_until")?;
    if valid_until > kept_until {
        return Err(());
    }
    Ok(Row {
        key: key_of(row)?,
        scope: ScopeDigest::from_bytes(bytes(column(row, "scope")?)?),
        operation: Arc::from(column::<&str>(row, "operation")?),
        operation_id: OperationId::from_bytes(bytes(column(row, "operation_id")?)?),
        state: state(column(row, "state")?)?,
        fingerprint: Fingerprint {
            scheme: column::<String>(row, "scheme")?.into(),
            digest: bytes(column(row, "fingerprint")?)?,
        },
        token: Token::from_bytes(bytes(column(row, "token")?)?),
        attempt: number(row, "attempt")?,
        lease_end: instant(row, "lease_end")?,
        valid_until,
        kept_until,
        created: instant(row, "created")?,
        format,
        flags: Flags::from_bits(number(row, "flags")?),
        payload: Bytes::from(column::<Vec<u8>>(row, "payload")?),
    })
}

pub(super) fn key_of(row: &SqliteRow) -> Result<Key, ()> {
    column(row, "key").and_then(bytes).map(Key::from_bytes)
}

/// A column of a type; whatever else is in it, or NULL, is damage.
fn column<'r, T>(row: &'r SqliteRow, name: &str) -> Result<T, ()>
where
    T: sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite>,
{
    row.try_get(name).map_err(drop)
}

fn bytes<const N: usize>(blob: &[u8]) -> Result<[u8; N], ()> {
    blob.try_into().map_err(drop)
}

fn number<T: TryFrom<i64>>(row: &SqliteRow, name: &str) -> Result<T, ()> {
    T::try_from(column(row, name)?).map_err(drop)
}

fn instant(row: &SqliteRow, name: &str) -> Result<Millis, ()> {
    column(row, name).and_then(|instant: Millis| if instant < 0 { Err(()) } else { Ok(instant) })
}

const fn state_number(state: State) -> i64 {
    match state {
        State::Issued => 0,
        State::Running => 1,
        State::Released => 2,
        State::Completed => 3,
    }
}

const fn state(number: i64) -> Result<State, ()> {
    match number {
        0 => Ok(State::Issued),
        1 => Ok(State::Running),
        2 => Ok(State::Released),
        3 => Ok(State::Completed),
        _ => Err(()),
    }
}
