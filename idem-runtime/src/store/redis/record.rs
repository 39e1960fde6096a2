//! How a record is written in Redis: one string, so that one key holds all of it and one command
//! writes it.
//!
//! ```text
//! bytes
//!   0..2     format, the version of all that follows; a newer one is refused and kept
//!   2..3     state: 0 issued, 1 running, 2 released, 3 completed; 4 more if spans are written
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
//!
//! A plain `SET` knows no time. So what is written without a look at the server's clock, which is
//! what most records are from beginning to end, has spans instead of the first three instants. They
//! count from when it was written, and that is as long before the key's own expiry, which Redis
//! keeps in milliseconds, as the third of them says. `created` is then by the claimant's clock:
//! listings are sorted by it, and nothing is decided by it. The scripts make instants of the spans
//! before they answer.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{Fingerprint, Flags, State, Ttl},
    store::{
        Claim, Completion, StoreErrorKind,
        clock::{self, Millis},
        row::Row,
    },
};

/// Where what is not of a fixed length begins.
pub(super) const FIXED: usize = 153;
/// The largest integer up to which the scripts' numbers are exact.
const NEVER: u64 = (1 << 53) - 1;
/// The longest span that is written as one: an instant that lies as far ahead is still exact.
const LONGEST_SPAN: u64 = NEVER / 2;
/// What a state is more by where spans are written.
const SPANS: u8 = 4;
const RUNNING: u8 = 1;
const COMPLETED: u8 = 3;
/// How much of a record lies before the instant at which it was made.
const BEFORE_CREATED: usize = 33;

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
    let mut what = Vec::with_capacity(FIXED - 65 + fingerprint.scheme.len() + operation.len());
    put_what(&mut what, operation_id, scope, fingerprint, operation);
    what
}

fn put_what(
    out: &mut Vec<u8>,
    operation_id: &OperationId,
    scope: &ScopeDigest,
    fingerprint: &Fingerprint,
    operation: &str,
) {
    let scheme = fingerprint.scheme.as_bytes();
    out.extend_from_slice(operation_id.as_bytes());
    out.extend_from_slice(scope.as_bytes());
    out.extend_from_slice(&fingerprint.digest);
    // Nothing that is too long for its length is ever sent: see `Shared::check_size`.
    out.extend_from_slice(&(scheme.len() as u32).to_be_bytes());
    out.extend_from_slice(&(operation.len() as u32).to_be_bytes());
    out.extend_from_slice(scheme);
    out.extend_from_slice(operation.as_bytes());
}

/// The record that a first claim makes, in spans, and for how many milliseconds it is kept; `None`
/// where spans cannot say it.
pub(super) fn first(claim: &Claim) -> Option<(Vec<u8>, u64)> {
    let lease = millis(claim.lease);
    let kept = ttl_millis(claim.ttl).max(lease);
    if kept == 0 || kept > LONGEST_SPAN {
        return None;
    }
    let Claim { operation_id, scope, fingerprint, operation, .. } = claim;
    let mut record = Vec::with_capacity(FIXED + fingerprint.scheme.len() + operation.len());
    put_head(&mut record, claim.format, SPANS + RUNNING, Flags::NONE, [lease, kept, kept]);
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    record.extend_from_slice(&millis(created).min(NEVER - 1).to_be_bytes());
    record.extend_from_slice(&[0; 8]);
    record.extend_from_slice(claim.token.as_bytes());
    put_what(&mut record, operation_id, scope, fingerprint, operation);
    Some((record, kept))
}

/// What the record of a first claim begins with when it is completed, up to the instant at which it
/// was made: in spans if they can say it.
pub(super) fn completed_head(completion: &Completion) -> Vec<u8> {
    let kept = ttl_millis(completion.ttl);
    let is_span = (1..=LONGEST_SPAN).contains(&kept);
    let state = if is_span { SPANS + COMPLETED } else { COMPLETED };
    let mut head = Vec::with_capacity(BEFORE_CREATED);
    put_head(&mut head, completion.format, state, completion.flags, [0, kept, kept]);
    head
}

fn put_head(out: &mut Vec<u8>, format: u16, state: u8, flags: Flags, spans: [u64; 3]) {
    out.extend_from_slice(&format.to_be_bytes());
    out.push(state);
    out.extend_from_slice(&flags.bits().to_be_bytes());
    // The attempt.
    out.extend_from_slice(&1_u32.to_be_bytes());
    for span in spans {
        out.extend_from_slice(&span.to_be_bytes());
    }
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
