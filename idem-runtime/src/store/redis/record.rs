//! How a record is written in Redis: one string, so that one key holds all of it and one command
//! writes it.
//!
//! ```text
//! bytes
//!   0..2     format, the version of all that follows; a newer one is refused and kept
//!   2..3     state: 0 issued, 1 running, 2 released, 3 completed
//!   3..5     flags
//!   5..9     attempt
//!   9..17    the lease's end    } instants of the server's clock, in milliseconds since 1970;
//!  17..25    valid until        } 2^53 − 1 is never
//!  25..33    kept until         }
//!  33..41    created            }
//!  41..49    the number of the last checkpoint under this token, 0 if there is none
//!  49..65    token
//!  65..81    operation id
//!  81..113   scope
//! 113..145   fingerprint
//! 145..149   length of the fingerprint's scheme
//! 149..153   length of the operation
//! 153..      scheme, operation, payload
//! ```
//!
//! Numbers are unsigned and big endian. Scripts read and write the same bytes: see `script.lua`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{Fingerprint, Flags, State, Ttl},
    store::{
        StoreErrorKind,
        clock::{self, Millis},
        row::Row,
    },
};

/// Where what is not of a fixed length begins.
pub(super) const FIXED: usize = 153;
/// The largest integer up to which the scripts' numbers are exact.
const NEVER: u64 = (1 << 53) - 1;

/// A span for a script, in milliseconds. A part of one counts as a whole one, so that nothing ends
/// before it was promised to.
pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(NEVER).min(NEVER)
}

/// A time to live for a script, in milliseconds.
pub(super) fn ttl_millis(ttl: Ttl) -> u64 {
    match ttl {
        Ttl::For(span) => millis(span),
        Ttl::Forever => NEVER,
    }
}

/// The part of a record that says what the request is: bytes 65 to the payload.
pub(super) fn what(
    operation_id: &OperationId,
    scope: &ScopeDigest,
    fingerprint: &Fingerprint,
    operation: &str,
) -> Vec<u8> {
    let scheme = fingerprint.scheme.as_bytes();
    let mut what = Vec::with_capacity(FIXED - 65 + scheme.len() + operation.len());
    what.extend_from_slice(operation_id.as_bytes());
    what.extend_from_slice(scope.as_bytes());
    what.extend_from_slice(&fingerprint.digest);
    // Nothing that is too long for its length is ever sent: see `Shared::check_size`.
    what.extend_from_slice(&(scheme.len() as u32).to_be_bytes());
    what.extend_from_slice(&(operation.len() as u32).to_be_bytes());
    what.extend_from_slice(scheme);
    what.extend_from_slice(operation.as_bytes());
    what
}

/// Reads a record back.
///
/// Where texts are no longer UTF-8 they are read as nearly as possible: the operation is for
/// people, and a scheme that nobody knows is nobody's fingerprint.
pub(super) fn decode(key: Key, record: &Bytes) -> Result<Row, StoreErrorKind> {
    fields(key, record).ok_or(StoreErrorKind::Corrupt)
}

fn fields(key: Key, record: &Bytes) -> Option<Row> {
    let mut rest = record.as_ref();
    let format = u16::from_be_bytes(take(&mut rest)?);
    let [state] = take(&mut rest)?;
    let flags = Flags::from_bits(u16::from_be_bytes(take(&mut rest)?));
    let attempt = u32::from_be_bytes(take(&mut rest)?);
    let lease_end = instant(take(&mut rest)?)?;
    let valid_until = instant(take(&mut rest)?)?;
    let kept_until = instant(take(&mut rest)?)?;
    let created = instant(take(&mut rest)?)?;
    let _stamp: [u8; 8] = take(&mut rest)?;
    let token = Token::from_bytes(take(&mut rest)?);
    let operation_id = OperationId::from_bytes(take(&mut rest)?);
    let scope = ScopeDigest::from_bytes(take(&mut rest)?);
    let digest = take(&mut rest)?;
    let scheme = usize::try_from(u32::from_be_bytes(take(&mut rest)?)).ok()?;
    let operation = usize::try_from(u32::from_be_bytes(take(&mut rest)?)).ok()?;
    let (scheme, rest) = rest.split_at_checked(scheme)?;
    let (operation, payload) = rest.split_at_checked(operation)?;
    let state = match state {
        0 => State::Issued,
        1 => State::Running,
        2 => State::Released,
        3 => State::Completed,
        _ => return None,
    };
    Some(Row {
        key,
        scope,
        operation: Arc::from(String::from_utf8_lossy(operation)),
        operation_id,
        state,
        fingerprint: Fingerprint {
            scheme: String::from_utf8_lossy(scheme).into_owned().into(),
            digest,
        },
        token,
        attempt,
        lease_end,
        valid_until,
        kept_until,
        created,
        format,
        flags,
        payload: record.slice(record.len() - payload.len()..),
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

fn instant(bytes: [u8; 8]) -> Option<Millis> {
    match u64::from_be_bytes(bytes) {
        NEVER => Some(clock::NEVER),
        instant => Millis::try_from(instant).ok().filter(|instant| *instant < clock::NEVER),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Bytes {
        let fingerprint = Fingerprint { scheme: "json/1".into(), digest: [3; 32] };
        let mut record = vec![0, 1, 3, 0, 2, 0, 0, 0, 7];
        for instant in [5, 6, NEVER, 4, 9] {
            record.extend_from_slice(&instant.to_be_bytes());
        }
        record.extend_from_slice(&[8; 16]);
        let operation_id = OperationId::from_bytes([1; 16]);
        let scope = ScopeDigest::from_bytes([2; 32]);
        record.extend(what(&operation_id, &scope, &fingerprint, "POST /é"));
        record.extend_from_slice(b"\0payload\xff");
        record.into()
    }

    #[test]
    fn a_record_is_read_by_its_offsets() {
        let row = decode(Key::from_bytes([9; 32]), &sample()).unwrap();
        assert_eq!((row.format, row.state, row.flags), (1, State::Completed, Flags::ISSUED));
        assert_eq!((row.attempt, row.lease_end, row.valid_until), (7, 5, 6));
        assert_eq!((row.kept_until, row.created), (clock::NEVER, 4));
        assert_eq!(row.token, Token::from_bytes([8; 16]));
        assert_eq!(row.operation_id, OperationId::from_bytes([1; 16]));
        assert_eq!((row.scope.as_bytes(), row.fingerprint.digest), (&[2; 32], [3; 32]));
        assert_eq!((&*row.fingerprint.scheme, &*row.operation), ("json/1", "POST /é"));
        assert_eq!(row.payload, &b"\0payload\xff"[..]);
    }

    #[test]
    fn a_record_cut_short_is_corrupt_and_never_another_one() {
        let whole = sample();
        let fixed = whole.len() - b"\0payload\xff".len();
        for length in 0..fixed {
            let cut = whole.slice(..length);
            assert_eq!(decode(Key::from_bytes([9; 32]), &cut), Err(StoreErrorKind::Corrupt));
        }
    }

    #[test]
    fn spans_are_whole_milliseconds_and_never_wrap() {
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_millis(7)), 7);
        assert_eq!(millis(Duration::MAX), NEVER);
        assert_eq!(ttl_millis(Ttl::Forever), NEVER);
    }
}
