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
//! what most records are from beginning to end, has spans instead of the four instants. They count
//! from when it was written, and that is as long before the key's own expiry, which Redis keeps in
//! milliseconds, as the third of them says; the last of them is the record's age by then. The scripts
//! make instants of the spans before they answer.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    key::{Key, OperationId, ScopeDigest, Token},
    record::{Fingerprint, Flags, Record, State, Ttl},
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
/// How much of a record lies before the number of the last checkpoint.
const BEFORE_STAMP: usize = 41;
/// How much of a record tells the claim that made it from all others.
pub(super) const IDENTITY: usize = 81;

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
    let kept = span(ttl_millis(claim.ttl).max(lease))?;
    let Claim { operation_id, scope, fingerprint, operation, .. } = claim;
    let mut record = Vec::with_capacity(FIXED + fingerprint.scheme.len() + operation.len());
    put_head(&mut record, claim.format, RUNNING, Flags::NONE, [lease, kept, kept, 0]);
    record.extend_from_slice(&[0; 8]);
    record.extend_from_slice(claim.token.as_bytes());
    put_what(&mut record, operation_id, scope, fingerprint, operation);
    Some((record, kept))
}

/// What becomes of the record of a first claim when it is completed so much later in the same format,
/// and for how many milliseconds that is kept; `None` where spans cannot say it.
pub(super) fn completed(
    first: &[u8],
    age: Duration,
    completion: &Completion,
) -> Option<(Vec<u8>, u64)> {
    let kept = span(ttl_millis(completion.ttl))?;
    if !first.starts_with(&completion.format.to_be_bytes()) {
        return None;
    }
    let mut record = Vec::with_capacity(first.len() + completion.payload.len());
    let spans = [0, kept, kept, span(millis(age)).unwrap_or(0)];
    put_head(&mut record, completion.format, COMPLETED, completion.flags, spans);
    record.extend_from_slice(first.get(BEFORE_STAMP..)?);
    record.extend_from_slice(&completion.payload);
    Some((record, kept))
}

/// A time to live that can be written as a span: Redis takes none that is over at once.
fn span(millis: u64) -> Option<u64> {
    (1..=LONGEST_SPAN).contains(&millis).then_some(millis)
}

fn put_head(out: &mut Vec<u8>, format: u16, state: u8, flags: Flags, spans: [u64; 4]) {
    out.extend_from_slice(&format.to_be_bytes());
    out.push(SPANS + state);
    out.extend_from_slice(&flags.bits().to_be_bytes());
    // The attempt.
    out.extend_from_slice(&1_u32.to_be_bytes());
    for span in spans {
        out.extend_from_slice(&span.to_be_bytes());
    }
}

/// Reads a record with instants back.
///
/// Where texts are no longer UTF-8 they are read as nearly as possible: the operation is for
/// people, and a scheme that nobody knows is nobody's fingerprint.
pub(super) fn decode(key: Key, record: &Bytes) -> Result<Row, StoreErrorKind> {
    match fields(key, record) {
        Some((row, false)) => Ok(row),
        _ => Err(StoreErrorKind::Corrupt),
    }
}

/// Whether a record is a completed one with spans.
pub(super) fn is_replay(record: &[u8]) -> bool {
    record.get(2) == Some(&(SPANS + COMPLETED))
}

/// Reads a completed record with spans back, of which so many milliseconds are left; `None` if that
/// cannot be, or if it is of a newer format than this.
pub(super) fn replay(key: Key, record: &Bytes, left: i64, newest: u16) -> Option<Record> {
    let (mut row, true) = fields(key, record)? else { return None };
    let now = row.kept_until - left;
    if left <= 0 || now < 0 || row.valid_until > row.kept_until || row.format > newest {
        return None;
    }
    // The instant zero is that of the completion.
    row.created = -row.created;
    Some(row.record(now))
}

/// A record, and whether it has spans.
fn fields(key: Key, record: &Bytes) -> Option<(Row, bool)> {
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
    let has_spans = state >= SPANS;
    let state = match if has_spans { state - SPANS } else { state } {
        0 => State::Issued,
        1 => State::Running,
        2 => State::Released,
        3 => State::Completed,
        _ => return None,
    };
    let row = Row {
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
    };
    Some((row, has_spans))
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
    use crate::decision::OnUnknown;

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

    fn claim() -> Claim {
        Claim {
            key: Key::from_bytes([9; 32]),
            scope: ScopeDigest::from_bytes([2; 32]),
            operation: Arc::from("POST /é"),
            operation_id: OperationId::from_bytes([1; 16]),
            fingerprint: Fingerprint { scheme: "json/1".into(), digest: [3; 32] },
            token: Token::from_bytes([8; 16]),
            lease: Duration::from_secs(30),
            ttl: Ttl::For(Duration::from_secs(60)),
            issued_only: false,
            on_unknown: OnUnknown::Rerun,
            format: 1,
        }
    }

    fn completion(ttl: Ttl) -> Completion {
        Completion {
            key: claim().key,
            token: claim().token,
            ttl,
            flags: Flags::TOMBSTONE,
            payload: Bytes::from_static(b"\0payload\xff"),
            format: 1,
        }
    }

    #[test]
    fn a_first_claim_and_its_answer_are_written_in_spans() {
        let (record, kept) = first(&claim()).unwrap();
        assert_eq!(kept, 60_000);
        assert_eq!(record[..IDENTITY][IDENTITY - 32..], [[8; 16], [1; 16]].concat());
        let key = claim().key;
        assert_eq!(decode(key, &record.clone().into()), Err(StoreErrorKind::Corrupt));
        let (row, true) = fields(key, &record.clone().into()).unwrap() else { panic!("instants") };
        assert_eq!(row, Row::fresh(&claim(), 0));
        assert!(!is_replay(&record));

        let ttl = Ttl::For(Duration::from_secs(90));
        let age = Duration::from_secs(2);
        let (completed, kept) = completed(&record, age, &completion(ttl)).unwrap();
        assert_eq!(kept, 90_000);
        assert!(is_replay(&completed));
        let completed = Bytes::from(completed);
        let replayed = replay(key, &completed, 89_000, 1).unwrap();
        assert_eq!((replayed.state, replayed.flags), (State::Completed, Flags::TOMBSTONE));
        assert_eq!(replayed.kept_left, Ttl::For(Duration::from_secs(89)));
        assert_eq!(replayed.valid_left, replayed.kept_left);
        assert_eq!((replayed.attempt, replayed.token), (1, claim().token));
        assert_eq!(replayed.payload, &b"\0payload\xff"[..]);
        assert_eq!(replayed.age, Duration::from_secs(3));
        for left in [-2, -1, 0, 90_001] {
            assert_eq!(replay(key, &completed, left, 1), None, "{left}");
        }
        assert_eq!(replay(key, &completed, 89_000, 0), None, "a newer format");
        let mut damaged = completed.to_vec();
        damaged[17] = 1;
        assert_eq!(replay(key, &damaged.into(), 89_000, 1), None, "valid for longer than kept");
    }

    #[test]
    fn what_spans_cannot_say_is_left_to_the_script() {
        for ttl in [Ttl::Forever, Ttl::For(Duration::MAX)] {
            assert_eq!(first(&Claim { ttl, ..claim() }), None);
        }
        let nothing = Ttl::For(Duration::ZERO);
        assert_eq!(first(&Claim { lease: Duration::ZERO, ttl: nothing, ..claim() }), None);
        let (record, kept) = first(&Claim { ttl: nothing, ..claim() }).unwrap();
        assert_eq!(kept, 30_000, "kept as long as its lease");
        for ttl in [nothing, Ttl::Forever] {
            assert_eq!(completed(&record, Duration::ZERO, &completion(ttl)), None);
        }
        let other = Completion { format: 2, ..completion(Ttl::For(Duration::from_secs(1))) };
        assert_eq!(completed(&record, Duration::ZERO, &other), None);
    }

    #[test]
    fn spans_are_whole_milliseconds_and_never_wrap() {
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_millis(7)), 7);
        assert_eq!(millis(Duration::MAX), NEVER);
        assert_eq!(ttl_millis(Ttl::Forever), NEVER);
    }
}
