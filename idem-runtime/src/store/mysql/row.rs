//! Rows as the table has them, and the statements that read, make and replace one.

use std::sync::Arc;

use sqlx::{MySql, MySqlConnection, Row as _, mysql::MySqlRow};

use super::failure::Failure;
use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{FORMAT, Fingerprint, Flags, State},
    store::{StoreErrorKind, clock::Millis, row::Row},
};

/// The server's present instant, in milliseconds since 1970: one and the same throughout a
/// statement.
///
/// Taken from UTC, since a local time (`NOW`) names two instants while clocks are set back, and
/// begins with the statement (unlike `SYSDATE`), which a replica that repeats it can follow.
macro_rules! now {
    () => {
        "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)"
    };
}

/// The instant so many milliseconds from now, at most never.
macro_rules! from_now {
    ($span:literal) => {
        concat!("(", now!(), " + LEAST(", $span, ", 9223372036854775807 - ", now!(), "))")
    };
}

/// All columns but the payload. The texts as bytes, so that the connection's character set does
/// not matter.
macro_rules! columns {
    () => {
        $crate::store::mysql::row::columns!("")
    };
    ($table:literal) => {
        concat!(
            $table,
            "record_key, scope, CAST(operation AS BINARY) AS operation, operation_id, state, \
             CAST(scheme AS BINARY) AS scheme, fingerprint, ",
            $table,
            "token, attempt, lease_end, valid_until, kept_until, created, format, flags, version"
        )
    };
}

pub(super) use {columns, from_now, now};

/// A row as it was read.
pub(super) struct Loaded {
    pub(super) row: Row,
    /// When it was read, by the server's clock.
    pub(super) now: Millis,
    pub(super) stamp: Stamp,
}

impl Loaded {
    /// Whether it is as a statement made it that marked its rows so.
    pub(super) const fn is_of(&self, mark: i64) -> bool {
        self.stamp.version == mark
    }
}

/// By what a row that was changed since it was read is told from one that was not.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    key: Key,
    token: Token,
    version: i64,
}

/// Reads a row.
pub(super) async fn load(
    connection: &mut MySqlConnection,
    key: &Key,
) -> Result<Option<Loaded>, Failure> {
    let row = sqlx::query(concat!(
        "SELECT ",
        columns!(),
        ", payload, ",
        now!(),
        " AS read_at FROM idem_records WHERE record_key = ?"
    ))
    .bind(&key.as_bytes()[..])
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| decode(&row)).transpose()?)
}

/// Makes a row whose times are spans from now, made now; `false` if the key has one, over or not.
pub(super) async fn insert(connection: &mut MySqlConnection, row: &Row) -> Result<bool, Failure> {
    let inserted = sqlx::query(concat!(
        "INSERT INTO idem_records (
             record_key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt,
             lease_end, valid_until, kept_until, created, format, flags, version, payload)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ",
        from_now!("?"),
        ", ",
        from_now!("?"),
        ", ",
        from_now!("?"),
        ", ",
        now!(),
        ", ?, ?, 0, ?)"
    ))
    .bind(&row.key.as_bytes()[..])
    .bind(&row.scope.as_bytes()[..])
    .bind(row.operation.as_bytes())
    .bind(&row.operation_id.as_bytes()[..])
    .bind(state_number(row.state))
    .bind(row.fingerprint.scheme.as_bytes())
    .bind(&row.fingerprint.digest[..])
    .bind(&row.token.as_bytes()[..])
    .bind(row.attempt)
    .bind(row.lease_end)
    .bind(row.valid_until)
    .bind(row.kept_until)
    .bind(row.format)
    .bind(row.flags.bits())
    .bind(&row.payload[..])
    .execute(connection)
    .await;
    match inserted {
        Ok(_) => Ok(true),
        // Told by the error: an upsert's count of rows is the same for a row that it made and for
        // one that it left as it was, since sqlx has the server count the rows that it found.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes a row over the one that was read; `false` if that one has changed since.
pub(super) async fn replace(
    connection: &mut MySqlConnection,
    stamp: Stamp,
    row: &Row,
) -> Result<bool, Failure> {
    // No assignment reads a column that another one writes: the server makes them from left to
    // right, each seeing those before it.
    let replaced = sqlx::query(
        "UPDATE idem_records SET
             scope = ?, operation = ?, operation_id = ?, state = ?, scheme = ?, fingerprint = ?,
             token = ?, attempt = ?, lease_end = ?, valid_until = ?, kept_until = ?, created = ?,
             format = ?, flags = ?, version = version + 1, payload = ?
         WHERE record_key = ? AND token = ? AND version = ?",
    )
    .bind(&row.scope.as_bytes()[..])
    .bind(row.operation.as_bytes())
    .bind(&row.operation_id.as_bytes()[..])
    .bind(state_number(row.state))
    .bind(row.fingerprint.scheme.as_bytes())
    .bind(&row.fingerprint.digest[..])
    .bind(&row.token.as_bytes()[..])
    .bind(row.attempt)
    .bind(row.lease_end)
    .bind(row.valid_until)
    .bind(row.kept_until)
    .bind(row.created)
    .bind(row.format)
    .bind(row.flags.bits())
    .bind(&row.payload[..])
    .bind(&stamp.key.as_bytes()[..])
    .bind(&stamp.token.as_bytes()[..])
    .bind(stamp.version)
    .execute(connection)
    .await?;
    Ok(replaced.rows_affected() > 0)
}

/// Removes the row that was read; `false` if it has changed since.
pub(super) async fn remove(
    connection: &mut MySqlConnection,
    stamp: Stamp,
) -> Result<bool, Failure> {
    let removed =
        sqlx::query("DELETE FROM idem_records WHERE record_key = ? AND token = ? AND version = ?")
            .bind(&stamp.key.as_bytes()[..])
            .bind(&stamp.token.as_bytes()[..])
            .bind(stamp.version)
            .execute(connection)
            .await?;
    Ok(removed.rows_affected() > 0)
}

/// Reads a row back. What a newer release wrote may be different in any respect, so that failing to
/// understand it says nothing of its health.
pub(super) fn decode(row: &MySqlRow) -> Result<Loaded, StoreErrorKind> {
    let damaged = |()| StoreErrorKind::Corrupt;
    let format: u16 = column(row, "format").map_err(damaged)?;
    if format == 0 {
        return Err(StoreErrorKind::Corrupt);
    }
    fields(format, row)
        .map_err(|()| if format > FORMAT { StoreErrorKind::Newer } else { StoreErrorKind::Corrupt })
}

fn fields(format: u16, row: &MySqlRow) -> Result<Loaded, ()> {
    let now = column(row, "read_at")?;
    let (key, token) = claim_of(row)?;
    let stamp = Stamp { key, token, version: column(row, "version")? };
    let kept_until = column(row, "kept_until")?;
    let valid_until = column(row, "valid_until")?;
    if valid_until > kept_until {
        return Err(());
    }
    let row = Row {
        key,
        scope: ScopeDigest::from_bytes(bytes(row, "scope")?),
        operation: Arc::from(text(row, "operation")?),
        operation_id: OperationId::from_bytes(bytes(row, "operation_id")?),
        state: state(column(row, "state")?)?,
        fingerprint: Fingerprint {
            scheme: text(row, "scheme")?.to_owned().into(),
            digest: bytes(row, "fingerprint")?,
        },
        token,
        attempt: column(row, "attempt")?,
        lease_end: column(row, "lease_end")?,
        valid_until,
        kept_until,
        created: column(row, "created")?,
        format,
        flags: Flags::from_bits(column(row, "flags")?),
        payload: column::<Vec<u8>>(row, "payload")?.into(),
    };
    Ok(Loaded { row, now, stamp })
}

/// The key of a row.
pub(super) fn key_of(row: &MySqlRow) -> Result<Key, ()> {
    bytes(row, "record_key").map(Key::from_bytes)
}

/// The key of a row and the token under which it is held.
pub(super) fn claim_of(row: &MySqlRow) -> Result<(Key, Token), ()> {
    Ok((key_of(row)?, Token::from_bytes(bytes(row, "token")?)))
}

/// A column of a type; whatever else is in it, or NULL, is damage.
fn column<'r, T>(row: &'r MySqlRow, name: &str) -> Result<T, ()>
where
    T: sqlx::Decode<'r, MySql> + sqlx::Type<MySql>,
{
    row.try_get(name).map_err(drop)
}

fn bytes<const N: usize>(row: &MySqlRow, name: &str) -> Result<[u8; N], ()> {
    column::<&[u8]>(row, name)?.try_into().map_err(drop)
}

fn text<'r>(row: &'r MySqlRow, name: &str) -> Result<&'r str, ()> {
    std::str::from_utf8(column(row, name)?).map_err(drop)
}

const fn state_number(state: State) -> u8 {
    match state {
        State::Issued => 0,
        State::Running => 1,
        State::Released => 2,
        State::Completed => 3,
    }
}

const fn state(number: u8) -> Result<State, ()> {
    match number {
        0 => Ok(State::Issued),
        1 => Ok(State::Running),
        2 => Ok(State::Released),
        3 => Ok(State::Completed),
        _ => Err(()),
    }
}
