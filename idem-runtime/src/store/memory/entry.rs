//! A row in one buffer: what a million of them take is what is in them.
//!
//! Operations and the usual schemes are few: a row has their number, and their text only where it
//! has none.

use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;

use super::super::{
    StoreErrorKind,
    clock::Millis,
    row::{Payload, Row, is_found},
};
use crate::{
    fingerprint::PLAIN,
    key::{Key, OperationId, ScopeDigest, Token},
    known::Known,
    record::{Fingerprint, Flags, State},
};

/// A row as the store keeps it: what is of one length, then operation, scheme and payload. It is
/// never changed, only replaced, so a replay can share it.
///
/// The layout is this process's own.
#[derive(Debug)]
pub(super) struct Entry(Bytes);

/// A row for what is done under a token.
pub(super) type Bare<'p> = Row<(), Kept<'p>>;

/// The payload of a row, as its entry has it until somebody replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept<'p> {
    AsItIs,
    By(&'p [u8]),
}

impl<'p> Payload<'p> for Kept<'p> {
    fn of(payload: &'p Bytes) -> Self {
        Self::By(payload)
    }
}

/// Where the parts of one length begin, and at last where they end.
mod at {
    pub(super) const KEY: usize = 0;
    pub(super) const SCOPE: usize = KEY + 32;
    pub(super) const OPERATION_ID: usize = SCOPE + 32;
    pub(super) const TOKEN: usize = OPERATION_ID + 16;
    pub(super) const DIGEST: usize = TOKEN + 16;
    pub(super) const LEASE_END: usize = DIGEST + 32;
    pub(super) const VALID_UNTIL: usize = LEASE_END + 8;
    pub(super) const KEPT_UNTIL: usize = VALID_UNTIL + 8;
    pub(super) const CREATED: usize = KEPT_UNTIL + 8;
    pub(super) const ATTEMPT: usize = CREATED + 8;
    pub(super) const OPERATION: usize = ATTEMPT + 4;
    pub(super) const SCHEME: usize = OPERATION + 4;
    pub(super) const FORMAT: usize = SCHEME + 4;
    pub(super) const FLAGS: usize = FORMAT + 2;
    pub(super) const STATE: usize = FLAGS + 2;
    pub(super) const END: usize = STATE + 1;
}

/// Operations that many rows have.
#[derive(Debug, Default)]
pub(super) struct Operations(Known<Arc<str>>);

impl Operations {
    /// An API has no more; what an application names at will, or a client, must not pile up.
    const MOST: usize = 128;

    fn number(&self, operation: &Arc<str>) -> Option<usize> {
        let is_it = |known: &Arc<str>| Arc::ptr_eq(known, operation) || known == operation;
        self.0.find(Self::MOST, is_it, || Arc::clone(operation)).map(|(number, _)| number)
    }
}

/// A text, or where it stands.
#[derive(Clone, Copy)]
enum Text {
    Number(usize),
    Length(usize),
}

/// In the first bit, which of both it is.
impl Text {
    const fn from_bytes(bytes: [u8; 4]) -> Self {
        let value = u32::from_ne_bytes(bytes);
        let number = (value >> 1) as usize;
        if value & 1 == 1 { Self::Number(number) } else { Self::Length(number) }
    }

    /// A text in a record is far below 2 GiB.
    const fn to_bytes(self) -> [u8; 4] {
        let value = match self {
            Self::Number(number) => (number as u32) << 1 | 1,
            Self::Length(length) => (length as u32) << 1,
        };
        value.to_ne_bytes()
    }

    const fn length(self) -> usize {
        match self {
            Self::Number(_) => 0,
            Self::Length(length) => length,
        }
    }
}

impl Entry {
    pub(super) fn of(row: &Row, operations: &Operations) -> Self {
        let number = operations.number(&row.operation);
        let text = if number.is_some() { "" } else { &*row.operation };
        let operation = number.map_or(Text::Length(text.len()), Text::Number);
        Self::encoded(row, &row.payload, operation, text.as_bytes())
    }

    /// A row of the same operation.
    pub(super) fn with(&self, row: &Bare<'_>) -> Self {
        let operation = self.operation();
        let text = &self.0[at::END..][..operation.length()];
        let payload = match row.payload {
            Kept::AsItIs => &self.0[self.texts_end()..],
            Kept::By(payload) => payload,
        };
        Self::encoded(row, payload, operation, text)
    }

    fn encoded<O, P>(
        row: &Row<O, P>,
        payload: &[u8],
        operation: Text,
        operation_text: &[u8],
    ) -> Self {
        let Fingerprint { scheme, digest } = &row.fingerprint;
        let usual = PLAIN.iter().position(|plain| plain == scheme);
        let scheme_text = if usual.is_some() { "" } else { scheme };
        let scheme = usual.map_or(Text::Length(scheme_text.len()), Text::Number);
        let mut head = [0; at::END];
        put::<{ at::KEY }, 32>(&mut head, *row.key.as_bytes());
        put::<{ at::SCOPE }, 32>(&mut head, *row.scope.as_bytes());
        put::<{ at::OPERATION_ID }, 16>(&mut head, *row.operation_id.as_bytes());
        put::<{ at::TOKEN }, 16>(&mut head, *row.token.as_bytes());
        put::<{ at::DIGEST }, 32>(&mut head, *digest);
        put::<{ at::LEASE_END }, 8>(&mut head, row.lease_end.to_ne_bytes());
        put::<{ at::VALID_UNTIL }, 8>(&mut head, row.valid_until.to_ne_bytes());
        put::<{ at::KEPT_UNTIL }, 8>(&mut head, row.kept_until.to_ne_bytes());
        put::<{ at::CREATED }, 8>(&mut head, row.created.to_ne_bytes());
        put::<{ at::ATTEMPT }, 4>(&mut head, row.attempt.to_ne_bytes());
        put::<{ at::OPERATION }, 4>(&mut head, operation.to_bytes());
        put::<{ at::SCHEME }, 4>(&mut head, scheme.to_bytes());
        put::<{ at::FORMAT }, 2>(&mut head, row.format.to_ne_bytes());
        put::<{ at::FLAGS }, 2>(&mut head, row.flags.bits().to_ne_bytes());
        put::<{ at::STATE }, 1>(&mut head, [number(row.state)]);
        // Exactly as long as what is in it: the buffer is kept as it is.
        let texts = operation_text.len() + scheme_text.len();
        let mut bytes = Vec::with_capacity(at::END + texts + payload.len());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(operation_text);
        bytes.extend_from_slice(scheme_text.as_bytes());
        bytes.extend_from_slice(payload);
        Self(Bytes::from(bytes))
    }

    /// The row, whose payload is a part of the buffer.
    pub(super) fn row(&self, operations: &Operations) -> Row {
        let operation = match self.operation() {
            Text::Number(number) => operations.0.get(number).cloned().unwrap_or_default(),
            Text::Length(length) => Arc::from(self.text(at::END..at::END + length)),
        };
        self.decoded(operation, self.0.slice(self.texts_end()..))
    }

    /// The row for what is done under a token.
    pub(super) fn bare_row<'p>(&self) -> Bare<'p> {
        self.decoded((), Kept::AsItIs)
    }

    fn decoded<O, P>(&self, operation: O, payload: P) -> Row<O, P> {
        let scheme = self.scheme();
        let operation_end = at::END + self.operation().length();
        Row {
            key: self.key(),
            scope: self.scope(),
            operation,
            operation_id: self.operation_id(),
            state: state(self.get::<{ at::STATE }, 1>()),
            fingerprint: Fingerprint {
                scheme: match scheme {
                    Text::Number(number) => Cow::Borrowed(PLAIN.get(number).copied().unwrap_or("")),
                    Text::Length(_) => {
                        Cow::Owned(self.text(operation_end..self.texts_end()).to_owned())
                    }
                },
                digest: self.get::<{ at::DIGEST }, 32>(),
            },
            token: Token::from_bytes(self.get::<{ at::TOKEN }, 16>()),
            attempt: u32::from_ne_bytes(self.get::<{ at::ATTEMPT }, 4>()),
            lease_end: Millis::from_ne_bytes(self.get::<{ at::LEASE_END }, 8>()),
            valid_until: Millis::from_ne_bytes(self.get::<{ at::VALID_UNTIL }, 8>()),
            kept_until: self.kept_until(),
            created: self.created(),
            format: self.format(),
            flags: Flags::from_bits(u16::from_ne_bytes(self.get::<{ at::FLAGS }, 2>())),
            payload,
        }
    }

    fn operation(&self) -> Text {
        Text::from_bytes(self.get::<{ at::OPERATION }, 4>())
    }

    fn scheme(&self) -> Text {
        Text::from_bytes(self.get::<{ at::SCHEME }, 4>())
    }

    /// Where the payload begins.
    fn texts_end(&self) -> usize {
        at::END + self.operation().length() + self.scheme().length()
    }

    pub(super) fn key(&self) -> Key {
        Key::from_bytes(self.get::<{ at::KEY }, 32>())
    }

    pub(super) fn is_of(&self, key: &Key) -> bool {
        self.get::<{ at::KEY }, 32>() == *key.as_bytes()
    }

    pub(super) fn scope(&self) -> ScopeDigest {
        ScopeDigest::from_bytes(self.get::<{ at::SCOPE }, 32>())
    }

    pub(super) fn operation_id(&self) -> OperationId {
        OperationId::from_bytes(self.get::<{ at::OPERATION_ID }, 16>())
    }

    pub(super) fn kept_until(&self) -> Millis {
        Millis::from_ne_bytes(self.get::<{ at::KEPT_UNTIL }, 8>())
    }

    pub(super) fn created(&self) -> Millis {
        Millis::from_ne_bytes(self.get::<{ at::CREATED }, 8>())
    }

    fn format(&self) -> u16 {
        u16::from_ne_bytes(self.get::<{ at::FORMAT }, 2>())
    }

    /// Whether a reader of a format finds it.
    pub(super) fn is_found(&self, format: u16, now: Millis) -> Result<bool, StoreErrorKind> {
        is_found(self.format(), self.kept_until(), format, now)
    }

    /// How many bytes it takes, without the allocator's own share.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + self.0.len()
    }

    fn get<const AT: usize, const LENGTH: usize>(&self) -> [u8; LENGTH] {
        let mut part = [0; LENGTH];
        part.copy_from_slice(&self.0[AT..AT + LENGTH]);
        part
    }

    /// What was text when it was put in, and is so still.
    fn text(&self, range: Range<usize>) -> &str {
        std::str::from_utf8(&self.0[range]).unwrap_or_default()
    }
}

fn put<const AT: usize, const LENGTH: usize>(head: &mut [u8; at::END], part: [u8; LENGTH]) {
    head[AT..AT + LENGTH].copy_from_slice(&part);
}

const fn number(state: State) -> u8 {
    match state {
        State::Issued => 0,
        State::Running => 1,
        State::Released => 2,
        State::Completed => 3,
    }
}

const fn state(number: [u8; 1]) -> State {
    match number {
        [0] => State::Issued,
        [1] => State::Running,
        [2] => State::Released,
        _ => State::Completed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: State, scheme: &'static str, operation: &str) -> Row {
        Row {
            key: Key::from_bytes([1; 32]),
            scope: ScopeDigest::from_bytes([2; 32]),
            operation: Arc::from(operation),
            operation_id: OperationId::from_bytes([3; 16]),
            state,
            fingerprint: Fingerprint { scheme: scheme.into(), digest: [4; 32] },
            token: Token::from_bytes([5; 16]),
            attempt: u32::MAX - 1,
            lease_end: 6,
            valid_until: 7,
            kept_until: Millis::MAX,
            created: -1,
            format: u16::MAX,
            flags: Flags::TOMBSTONE,
            payload: Bytes::from_static(b"\x00answer"),
        }
    }

    #[test]
    fn a_row_comes_out_as_it_went_in() {
        let operations = Operations::default();
        for state in [State::Issued, State::Running, State::Released, State::Completed] {
            for scheme in ["request/1", "none/1", "fields/1 /größe", ""] {
                for operation in ["POST /zahlungen/{größe}", ""] {
                    let row = row(state, scheme, operation);
                    assert_eq!(Entry::of(&row, &operations).row(&operations), row);
                    let bare = Row { payload: Bytes::new(), ..row.clone() };
                    assert_eq!(Entry::of(&bare, &operations).row(&operations), bare);
                    let entry = Entry::of(&row, &operations);
                    let mut changed = entry.bare_row();
                    changed.attempt = 7;
                    let expected = Row { attempt: 7, ..row.clone() };
                    assert_eq!(entry.with(&changed).row(&operations), expected);
                    changed.payload = Kept::By(b"other");
                    let expected = Row { payload: Bytes::from_static(b"other"), ..expected };
                    assert_eq!(entry.with(&changed).row(&operations), expected);
                }
            }
        }
    }

    #[test]
    fn beyond_the_usual_operations_a_row_has_its_text() {
        let operations = Operations::default();
        for number in 0..2 * Operations::MOST {
            let row = row(State::Running, "json/1", &format!("fn operation {number}"));
            let entry = Entry::of(&row, &operations);
            let is_usual = number < Operations::MOST;
            let text = if is_usual { 0 } else { row.operation.len() };
            assert_eq!(entry.0.len(), at::END + text + row.payload.len());
            assert_eq!(entry.row(&operations), row);
        }
    }
}
