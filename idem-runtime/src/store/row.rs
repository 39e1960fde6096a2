//! A record in absolute time, and what claims and their ends do to it.
//!
//! The embedded stores keep rows of this type and change them only by these functions, inside
//! whatever makes a step atomic for them: the laws of [`Store`](super::Store) hold by one piece of
//! code. Every function either changes the row completely or leaves it as it was.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    Checkpoint, Claim, Claimed, Completion, Issue, Renewal, StoreErrorKind, Written,
    clock::{Millis, after, end_of, left, until},
};
use crate::{
    decision::{Asked, Decision, Seen, decide},
    key::{Key, OperationId, ScopeDigest, Token},
    record::{Fingerprint, Flags, Record, State},
};

/// A [`Record`] whose times are instants of its store's clock.
///
/// What is done under a token does not touch the operation, and does no more to the payload than
/// replace it: it can be done to a row that has neither of them itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row<Operation = Arc<str>, Payload = Bytes> {
    pub(super) key: Key,
    pub(super) scope: ScopeDigest,
    pub(super) operation: Operation,
    pub(super) operation_id: OperationId,
    pub(super) state: State,
    pub(super) fingerprint: Fingerprint,
    pub(super) token: Token,
    pub(super) attempt: u32,
    /// Without meaning unless it is running.
    pub(super) lease_end: Millis,
    pub(super) valid_until: Millis,
    /// Never before `valid_until`, nor before the end of a lease.
    pub(super) kept_until: Millis,
    pub(super) created: Millis,
    pub(super) format: u16,
    pub(super) flags: Flags,
    pub(super) payload: Payload,
}

/// What a call under a token did to its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It changed it.
    Changed,
    /// Nothing: the same call had been made before.
    Already,
    /// Nothing is left to keep: the row is to be removed.
    Removed,
    /// Nothing: the key is not claimed under this token.
    Fenced,
}

/// What a row has as its payload.
pub(super) trait Payload<'p> {
    fn of(payload: &'p Bytes) -> Self;
}

impl Payload<'_> for Bytes {
    fn of(payload: &Self) -> Self {
        payload.clone()
    }
}

/// A call that may make a row.
pub(super) trait Opening: Sync {
    type Answer: Send;

    fn key(&self) -> &Key;

    /// The newest format that the caller reads.
    fn format(&self) -> u16;

    /// Where there is no row: the row to make, if any.
    fn make(&self, now: Millis) -> Option<Row>;

    /// The answer, once it is made or not.
    fn made(&self, row: Option<Row>, now: Millis) -> Self::Answer;

    /// Both at once.
    #[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
    fn on_nothing(&self, now: Millis) -> (Option<Row>, Self::Answer) {
        let row = self.make(now);
        (row.clone(), self.made(row, now))
    }

    /// Where there is one: whether it was changed.
    fn on_row(&self, row: &mut Row, now: Millis) -> (bool, Self::Answer);
}

impl Opening for Claim {
    type Answer = Claimed;

    fn key(&self) -> &Key {
        &self.key
    }

    fn format(&self) -> u16 {
        self.format
    }

    fn make(&self, now: Millis) -> Option<Row> {
        let runs = decide(Seen::Nothing, self.asked(false)) == Decision::Run;
        runs.then(|| Row::fresh(self, now))
    }

    fn made(&self, row: Option<Row>, now: Millis) -> Claimed {
        row.map_or(Claimed::Unknown, |row| Claimed::Granted(row.into_record(now)))
    }

    fn on_row(&self, row: &mut Row, now: Millis) -> (bool, Claimed) {
        let claimed = row.claim(self, now);
        (matches!(claimed, Claimed::Granted(_)), claimed)
    }
}

impl Opening for Issue {
    type Answer = Written;

    fn key(&self) -> &Key {
        &self.key
    }

    fn format(&self) -> u16 {
        self.format
    }

    fn make(&self, now: Millis) -> Option<Row> {
        Some(Row::issued(self, now))
    }

    fn made(&self, _: Option<Row>, _: Millis) -> Written {
        Written::Done
    }

    fn on_row(&self, row: &mut Row, now: Millis) -> (bool, Written) {
        let already = row.state == State::Issued && row.token == self.token;
        (false, if already { Written::Done } else { Written::Fenced(row.record(now)) })
    }
}

impl Claim {
    /// What it asks of the decision, on a record whose fingerprint is its own or another one.
    pub(super) const fn asked(&self, same: bool) -> Asked {
        Asked { same, issued_only: self.issued_only, on_unknown: self.on_unknown }
    }
}

/// Whether a reader of a format finds a row that was written in one and is kept until an instant:
/// not once it is over, whether or not it was swept.
///
/// A newer row is refused before its times are looked at, since only its own release knows what
/// they mean.
pub(super) const fn is_found(
    written_in: u16,
    kept_until: Millis,
    format: u16,
    now: Millis,
) -> Result<bool, StoreErrorKind> {
    if written_in > format {
        return Err(StoreErrorKind::Newer);
    }
    Ok(kept_until > now)
}

/// What a reader of a format finds.
#[cfg(any(test, feature = "mysql", feature = "postgres", feature = "sqlite"))]
pub(super) fn found(
    row: Option<&Row>,
    format: u16,
    now: Millis,
) -> Result<Option<&Row>, StoreErrorKind> {
    let Some(row) = row else { return Ok(None) };
    Ok(is_found(row.format, row.kept_until, format, now)?.then_some(row))
}

impl Row {
    /// The row of a first claim.
    pub(super) fn fresh(claim: &Claim, now: Millis) -> Self {
        let lease_end = after(now, claim.lease);
        let end = end_of(now, claim.ttl).max(lease_end);
        Self {
            key: claim.key,
            scope: claim.scope,
            operation: Arc::clone(&claim.operation),
            operation_id: claim.operation_id,
            state: State::Running,
            fingerprint: claim.fingerprint.clone(),
            token: claim.token,
            attempt: 1,
            lease_end,
            valid_until: end,
            kept_until: end,
            created: now,
            format: claim.format,
            flags: Flags::NONE,
            payload: Bytes::new(),
        }
    }

    /// The row of a key that is handed out.
    fn issued(issue: &Issue, now: Millis) -> Self {
        let valid_until = end_of(now, issue.valid_for);
        Self {
            key: issue.key,
            scope: issue.scope,
            operation: Arc::clone(&issue.operation),
            operation_id: issue.operation_id,
            state: State::Issued,
            fingerprint: Fingerprint::NONE,
            token: issue.token,
            attempt: 0,
            lease_end: now,
            valid_until,
            kept_until: end_of(now, issue.kept_for).max(valid_until),
            created: now,
            format: issue.format,
            flags: Flags::ISSUED,
            payload: issue.payload.clone(),
        }
    }

    /// Grants a claim on this row, or leaves the row as it is.
    fn claim(&mut self, claim: &Claim, now: Millis) -> Claimed {
        if self.is_held_by(claim.token) {
            self.hold(claim, now);
            return Claimed::Granted(self.record(now));
        }
        let record = self.record(now);
        let asked = claim.asked(self.fingerprint == claim.fingerprint);
        if decide(record.seen(), asked) != Decision::Run {
            return Claimed::Found(record);
        }
        if self.state == State::Issued {
            // What was issued is the key alone: its first user says what the operation is.
            self.scope = claim.scope;
            self.operation = Arc::clone(&claim.operation);
            self.operation_id = claim.operation_id;
            self.fingerprint = claim.fingerprint.clone();
        }
        self.state = State::Running;
        self.token = claim.token;
        self.attempt = self.attempt.saturating_add(1);
        self.lease_end = now;
        // The format stays the payload's.
        self.hold(claim, now);
        Claimed::Granted(self.record(now))
    }

    /// Holds the row for a claim's lease, and keeps it for the claim's time to live.
    fn hold(&mut self, claim: &Claim, now: Millis) {
        if !self.flags.contains(Flags::ISSUED) {
            self.valid_until = end_of(now, claim.ttl);
            self.kept_until = self.valid_until;
        }
        self.extend(after(now, claim.lease));
    }

    /// The record, with its times relative to now.
    pub(super) fn record(&self, now: Millis) -> Record {
        self.clone().into_record(now)
    }

    /// The record without its payload.
    pub(super) fn summary(&self, now: Millis) -> Record {
        Self { payload: Bytes::new(), ..self.clone() }.into_record(now)
    }

    /// The record that it becomes.
    pub(super) fn into_record(self, now: Millis) -> Record {
        Record {
            key: self.key,
            scope: self.scope,
            operation: self.operation,
            operation_id: self.operation_id,
            state: self.state,
            fingerprint: self.fingerprint,
            token: self.token,
            attempt: self.attempt,
            lease_left: match self.state {
                State::Running => until(now, self.lease_end),
                _ => Duration::ZERO,
            },
            valid_left: left(now, self.valid_until),
            kept_left: left(now, self.kept_until),
            age: until(self.created, now),
            format: self.format,
            flags: self.flags,
            payload: self.payload,
        }
    }
}

impl<O, P> Row<O, P> {
    /// Extends the lease, if it is still held under this token.
    pub(super) fn renew(&mut self, renewal: &Renewal, now: Millis) -> bool {
        let held = self.is_held_by(renewal.token);
        if held {
            self.extend(after(now, renewal.lease));
        }
        held
    }

    /// Lets the lease last until an instant at least, and the row as long as the lease.
    fn extend(&mut self, lease_end: Millis) {
        self.lease_end = self.lease_end.max(lease_end);
        self.kept_until = self.kept_until.max(self.lease_end);
        // An issued key's validity stays: a run that began in time may finish after it.
        if !self.flags.contains(Flags::ISSUED) {
            self.valid_until = self.valid_until.max(self.lease_end);
        }
    }

    /// Replaces what the next attempt finds.
    pub(super) fn checkpoint<'p>(&mut self, checkpoint: &'p Checkpoint) -> Ended
    where
        P: Payload<'p>,
    {
        if !self.is_held_by(checkpoint.token) {
            return Ended::Fenced;
        }
        self.format = checkpoint.format;
        self.payload = P::of(&checkpoint.payload);
        Ended::Changed
    }

    /// Records the answer.
    pub(super) fn complete<'p>(&mut self, completion: &'p Completion, now: Millis) -> Ended
    where
        P: Payload<'p>,
    {
        if self.token == completion.token && self.state == State::Completed {
            return Ended::Already;
        }
        if !self.is_held_by(completion.token) {
            return Ended::Fenced;
        }
        self.state = State::Completed;
        self.lease_end = now;
        if !self.flags.contains(Flags::ISSUED) {
            self.valid_until = end_of(now, completion.ttl);
            self.kept_until = self.valid_until;
        }
        self.format = completion.format;
        self.flags = Flags::from_bits(self.flags.bits() | completion.flags.bits());
        self.payload = P::of(&completion.payload);
        Ended::Changed
    }

    /// Gives the claim up.
    pub(super) fn release(&mut self, token: Token, now: Millis) -> Ended {
        if self.token == token && self.state == State::Released {
            return Ended::Already;
        }
        if !self.is_held_by(token) {
            return Ended::Fenced;
        }
        self.state = State::Released;
        self.lease_end = now;
        Ended::Changed
    }

    /// Undoes the claim, as if nothing had happened. An issued key goes back to being issued.
    pub(super) fn forget(&mut self, token: Token, now: Millis) -> Ended {
        let issued = self.flags.contains(Flags::ISSUED);
        if issued && self.token == token && self.state == State::Issued {
            return Ended::Already;
        }
        if !self.is_held_by(token) {
            return Ended::Fenced;
        }
        if !issued {
            return Ended::Removed;
        }
        self.state = State::Issued;
        self.attempt = 0;
        self.lease_end = now;
        Ended::Changed
    }

    /// Whether a claim under this token holds it.
    pub(super) fn is_held_by(&self, token: Token) -> bool {
        self.state == State::Running && self.token == token
    }

    /// Whether its owner holds the claim, as far as anybody knows.
    pub(super) fn is_leased(&self, now: Millis) -> bool {
        self.state == State::Running && self.lease_end > now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decision::OnUnknown,
        record::{FORMAT, Ttl},
        store::clock::NEVER,
    };

    const SECOND: Millis = 1_000;

    fn claim() -> Claim {
        Claim {
            key: Key::from_bytes([1; 32]),
            scope: ScopeDigest::from_bytes([2; 32]),
            operation: Arc::from("POST /"),
            operation_id: OperationId::random(),
            fingerprint: Fingerprint { scheme: "test".into(), digest: [3; 32] },
            token: Token::random(),
            lease: Duration::from_secs(30),
            ttl: Ttl::For(Duration::from_secs(3600)),
            issued_only: false,
            on_unknown: OnUnknown::Rerun,
            format: FORMAT,
        }
    }

    fn completion(claim: &Claim) -> Completion {
        Completion {
            key: claim.key,
            token: claim.token,
            ttl: Ttl::Forever,
            flags: Flags::TOMBSTONE,
            payload: Bytes::from_static(b"answer"),
            format: FORMAT,
        }
    }

    /// A key that was issued at 0, may be used for 60 seconds and is remembered for 600.
    fn issued() -> Row {
        let issue = Issue {
            key: Key::from_bytes([1; 32]),
            scope: ScopeDigest::from_bytes([2; 32]),
            operation: Arc::from("POST /flows"),
            operation_id: OperationId::random(),
            token: Token::random(),
            valid_for: Ttl::For(Duration::from_secs(60)),
            kept_for: Ttl::For(Duration::from_secs(600)),
            payload: Bytes::from_static(b"bound"),
            format: FORMAT,
        };
        Row::issued(&issue, 0)
    }

    #[test]
    fn the_first_user_of_an_issued_key_says_what_the_operation_is() {
        let mut row = issued();
        let user = Claim {
            operation: Arc::from("POST /redeem"),
            fingerprint: Fingerprint { scheme: "other".into(), digest: [9; 32] },
            ..claim()
        };
        assert!(matches!(row.claim(&user, 5 * SECOND), Claimed::Granted(_)));
        assert_eq!(row.attempt, 1);
        assert_eq!(row.operation_id, user.operation_id);
        assert_eq!(row.operation, user.operation);
        assert_eq!(row.fingerprint, user.fingerprint);
        assert_eq!(row.created, 0);
        assert_eq!(row.payload, &b"bound"[..]);
    }

    #[test]
    fn neither_claim_nor_renewal_nor_completion_moves_an_issued_keys_validity() {
        let mut row = issued();
        let user = claim();
        row.claim(&user, 50 * SECOND);
        assert_eq!((row.valid_until, row.kept_until), (60 * SECOND, 600 * SECOND));
        let renewal = Renewal { key: user.key, token: user.token, lease: Duration::from_secs(900) };
        assert!(row.renew(&renewal, 55 * SECOND));
        assert_eq!(row.valid_until, 60 * SECOND);
        assert_eq!(row.kept_until, 955 * SECOND, "kept as long as its lease");
        assert_eq!(
            row.complete(&completion(&user), 70 * SECOND),
            Ended::Changed,
            "it began in time"
        );
        assert_eq!(row.valid_until, 60 * SECOND);
        assert!(row.flags.contains(Flags::ISSUED) && row.flags.contains(Flags::TOMBSTONE));
        assert!(matches!(row.claim(&claim(), 70 * SECOND), Claimed::Found(_)));
    }

    #[test]
    fn an_issued_key_past_its_validity_is_refused_and_still_known() {
        let mut row = issued();
        let before = row.clone();
        assert!(matches!(row.claim(&claim(), 60 * SECOND), Claimed::Found(_)));
        assert_eq!(row, before, "a refusal changes nothing");
        assert!(found(Some(&row), FORMAT, 599 * SECOND).unwrap().is_some());
        assert!(found(Some(&row), FORMAT, 600 * SECOND).unwrap().is_none());
    }

    #[test]
    fn forgetting_a_claim_on_an_issued_key_gives_the_key_back() {
        let mut row = issued();
        let user = claim();
        row.claim(&user, 0);
        assert_eq!(row.forget(user.token, SECOND), Ended::Changed);
        assert_eq!((row.state, row.attempt), (State::Issued, 0));
        assert_eq!(row.forget(user.token, SECOND), Ended::Already, "the answer may have been lost");
        assert_eq!(row.complete(&completion(&user), SECOND), Ended::Fenced);
        let next = claim();
        assert!(
            matches!(row.claim(&next, SECOND), Claimed::Granted(record) if record.attempt == 1)
        );
        assert_eq!(row.forget(user.token, SECOND), Ended::Fenced);
    }

    #[test]
    fn extremes_neither_overflow_nor_end() {
        let endless = Claim { lease: Duration::MAX, ttl: Ttl::For(Duration::MAX), ..claim() };
        let mut row = Row::fresh(&endless, NEVER - 1);
        assert_eq!((row.lease_end, row.kept_until), (NEVER, NEVER));
        row.attempt = u32::MAX;
        assert_eq!(row.release(endless.token, NEVER - 1), Ended::Changed);
        assert!(matches!(row.claim(&claim(), NEVER - 1), Claimed::Granted(_)));
        assert_eq!(row.attempt, u32::MAX);
        assert_eq!(row.kept_until, NEVER);
        assert!(matches!(found(Some(&row), FORMAT, NEVER - 1), Ok(Some(_))));
        assert_eq!(Row::fresh(&endless, NEVER - 1).record(NEVER - 1).kept_left, Ttl::Forever);
    }
}
