//! Rows as the statements give them back.

use std::sync::Arc;

use bytes::Bytes;
use sqlx::{Row as _, postgres::PgRow};

use super::calls::Fault;
use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{FORMAT, Fingerprint, Flags, Record, State},
    store::{
        StoreErrorKind,
        clock::Millis,
        row::{Row, found},
    },
};

/// The record of a row that may be there, as this release reads it.
pub(super) fn record_of(row: Option<PgRow>) -> Result<Option<Record>, Fault> {
    let Some(row) = row else { return Ok(None) };
    let (now, row) = (now(&row)?, decode(&row)?);
    Ok(found(Some(&row), FORMAT, now)?.map(|row| row.record(now)))
}

/// What time it was for the statement.
pub(super) fn now(row: &PgRow) -> Result<Millis, sqlx::Error> {
    row.try_get("ms")
}

/// Reads a row back. What a newer release wrote may be different in any respect, so that failing to
/// understand it says nothing of its health.
pub(super) fn decode(row: &PgRow) -> Result<Row, Fault> {
    let format = u16::try_from(row.try_get::<i32, _>("format")?);
    let format = format.map_err(|_| StoreErrorKind::Corrupt)?;
    fields(format, row).map_err(|_| {
        let newer = format > FORMAT;
        Fault::Record(if newer { StoreErrorKind::Newer } else { StoreErrorKind::Corrupt })
    })
}

fn fields(format: u16, row: &PgRow) -> Result<Row, sqlx::Error> {
    let (valid_until, kept_until) = (row.try_get("valid_until")?, row.try_get("kept_until")?);
    if valid_until > kept_until {
        return Err(sqlx::Error::Decode("it is valid for longer than it is kept".into()));
    }
    Ok(Row {
        key: Key::from_bytes(bytes(row, "key")?),
        scope: ScopeDigest::from_bytes(bytes(row, "scope")?),
        operation: Arc::from(row.try_get::<&str, _>("operation")?),
        operation_id: OperationId::from_bytes(bytes(row, "operation_id")?),
        state: state(row.try_get("state")?)?,
        fingerprint: Fingerprint {
            scheme: row.try_get::<String, _>("scheme")?.into(),
            digest: bytes(row, "fingerprint")?,
        },
        token: Token::from_bytes(bytes(row, "token")?),
        attempt: number(row, "attempt")?,
        lease_end: row.try_get("lease_end")?,
        valid_until,
        kept_until,
        created: row.try_get("created")?,
        format,
        flags: Flags::from_bits(number(row, "flags")?),
        payload: Bytes::from(row.try_get::<Vec<u8>, _>("payload")?),
    })
}

pub(super) fn bytes<const N: usize>(row: &PgRow, name: &str) -> Result<[u8; N], sqlx::Error> {
    let bytes: &[u8] = row.try_get(name)?;
    bytes.try_into().map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn number<T: TryFrom<i32>>(row: &PgRow, name: &str) -> Result<T, sqlx::Error>
where
    T::Error: std::error::Error + Send + Sync + 'static,
{
    T::try_from(row.try_get(name)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn state(number: i16) -> Result<State, sqlx::Error> {
    match number {
        0 => Ok(State::Issued),
        1 => Ok(State::Running),
        2 => Ok(State::Released),
        3 => Ok(State::Completed),
        _ => Err(sqlx::Error::Decode("no such state".into())),
    }
}
