//! The record: what a store holds for a key, and the response or value inside it.
//!
//! Both are formats. A process of the next release reads what this one wrote, and the other way
//! round while the two run side by side; what is newer or damaged is refused, never replayed and
//! never deleted.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    decision::Seen,
    key::{Key, OperationId, ScopeDigest, Token},
    seal::{self, SealError},
};

/// The version of the record that this release writes, and the newest that it reads.
pub const FORMAT: u16 = 1;

/// How long something lasts: a span of time, or for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ttl {
    /// This long, to the millisecond.
    For(Duration),
    /// Without an end.
    Forever,
}

impl Ttl {
    /// Whether no time is left.
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::For(Duration::ZERO))
    }
}

impl From<Duration> for Ttl {
    fn from(duration: Duration) -> Self {
        Self::For(duration)
    }
}

/// What has become of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The server handed the key out; nothing has used it yet.
    Issued,
    /// An owner holds the claim, or held it until its lease ended.
    Running,
    /// An owner gave the claim up without saying whether its effect happened.
    Released,
    /// The answer is recorded.
    Completed,
}

/// Facts about a record that are one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// Nothing special.
    pub const NONE: Self = Self(0);
    /// A completed record whose response could not be kept.
    pub const TOMBSTONE: Self = Self(1);
    /// A key that the server handed out: its validity counts from then, and neither a claim nor a
    /// completion moves it.
    pub const ISSUED: Self = Self(1 << 1);

    /// Flags from their bits, as a store reads them back.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// These flags and those of `other`.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of `other` are set here too.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The digest of what makes two requests "the same request", and how it was computed.
///
/// Two fingerprints can be compared only under one scheme: a record is compared under the scheme
/// that it carries, whatever the handler's policy has become since.
#[derive(Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// The scheme's text, as [`FingerprintScheme`](crate::FingerprintScheme) prints it: as long as
    /// the paths and headers that the application named.
    pub scheme: Cow<'static, str>,
    /// The digest under that scheme.
    pub digest: [u8; 32],
}

impl Fingerprint {
    /// The fingerprint by which all requests are the same one.
    pub const NONE: Self = Self { scheme: Cow::Borrowed("none/1"), digest: [0; 32] };
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.digest;
        write!(f, "Fingerprint({}, {a:02x}{b:02x}{c:02x}{d:02x}…)", self.scheme)
    }
}

/// What a store holds for a key, with its times relative to the store's own now.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is found by.
    pub key: Key,
    /// Whose it is.
    pub scope: ScopeDigest,
    /// Method and route, or `fn` and the path of a plain function, in plain text, for people.
    pub operation: Arc<str>,
    /// The identity of the logical operation, through all its attempts.
    pub operation_id: OperationId,
    /// What has become of it.
    pub state: State,
    /// What the request was.
    pub fingerprint: Fingerprint,
    /// Who claimed it last; of a key that nobody has claimed, who issued it.
    pub token: Token,
    /// How many claims on it have been granted, the first being 1; 0 while it is issued.
    pub attempt: u32,
    /// What is left of the lease; zero unless it is running and the lease is alive.
    pub lease_left: Duration,
    /// For how long it may still be used.
    pub valid_left: Ttl,
    /// For how long it is still kept; never shorter than its validity and its lease.
    pub kept_left: Ttl,
    /// How long ago it was made.
    pub age: Duration,
    /// The version of the format that it was written in, its payload above all.
    pub format: u16,
    /// One-bit facts.
    pub flags: Flags,
    /// A completed record's response or value. Until then, what was issued with the key or what the last
    /// checkpoint wrote; otherwise nothing.
    pub payload: Bytes,
}

/// Payloads are somebody's data: only their size is shown.
impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("key", &self.key)
            .field("operation", &self.operation)
            .field("operation_id", &self.operation_id)
            .field("state", &self.state)
            .field("fingerprint", &self.fingerprint)
            .field("token", &self.token)
            .field("attempt", &self.attempt)
            .field("lease_left", &self.lease_left)
            .field("valid_left", &self.valid_left)
            .field("kept_left", &self.kept_left)
            .field("age", &self.age)
            .field("format", &self.format)
            .field("flags", &self.flags)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Record {
    /// Whether a plain function made it, whose answers are values. What stands behind the method of a
    /// request begins with a slash or a bracket.
    pub(crate) fn is_of_function(&self) -> bool {
        let path = self.operation.strip_prefix("fn ");
        path.is_some_and(|path| !path.starts_with(['/', '(']))
    }

    /// What the decision needs to know of this record.
    pub fn seen(&self) -> Seen {
        let valid = !self.valid_left.is_over();
        match self.state {
            State::Issued => Seen::Issued { valid },
            State::Released => Seen::Released { valid },
            State::Running => Seen::Running { leased: !self.lease_left.is_zero(), valid },
            State::Completed => {
                Seen::Completed { valid, tombstone: self.flags.contains(Flags::TOMBSTONE) }
            }
        }
    }
}

/// A recorded response: status, headers in order and with repeats, body.
///
/// Encoded as a single buffer, of which a replay takes slices.
#[derive(Clone, PartialEq, Eq)]
pub struct RecordedResponse {
    /// The HTTP status.
    pub status: u16,
    /// Header names in lower case and their values, in order.
    pub headers: Vec<(Bytes, Bytes)>,
    /// The whole body.
    pub body: Bytes,
}

/// Headers and body are somebody's data: only their size is shown.
impl fmt::Debug for RecordedResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedResponse")
            .field("status", &self.status)
            .field("header_lines", &self.headers.len())
            .field("body_bytes", &self.body.len())
            .finish()
    }
}

/// The first byte of a payload that is a response.
const RESPONSE: u8 = 1;

impl RecordedResponse {
    /// Writes a response as a record's payload.
    ///
    /// ```text
    /// 1: u8, status: u16, headers: u32, then for each header
    ///     name length: u32, value length: u32, name, value
    /// then the body to the end (all numbers big endian)
    /// ```
    pub fn encode(status: u16, headers: &[(&[u8], &[u8])], body: &[u8]) -> Bytes {
        let lines = || headers.iter().copied();
        let size = lines().map(|(name, value)| Self::line_size(name, value)).sum();
        Self::encode_lines(status, size, lines(), body)
    }

    /// How many bytes a header line takes in a payload.
    pub(crate) const fn line_size(name: &[u8], value: &[u8]) -> usize {
        8 + name.len() + value.len()
    }

    /// [`encode`](Self::encode) of lines that stand nowhere together, in a buffer for lines of so
    /// many bytes.
    pub(crate) fn encode_lines<'h>(
        status: u16,
        size: usize,
        lines: impl Iterator<Item = (&'h [u8], &'h [u8])>,
        body: &[u8],
    ) -> Bytes {
        let mut out = Vec::with_capacity(7 + size + body.len());
        out.push(RESPONSE);
        out.extend_from_slice(&status.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        let mut count = 0_u32;
        for (name, value) in lines {
            count += 1;
            // A header line is far below 4 GiB: every HTTP server bounds the whole head.
            out.extend_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend_from_slice(&(value.len() as u32).to_be_bytes());
            out.extend_from_slice(name);
            out.extend_from_slice(value);
        }
        out[3..7].copy_from_slice(&count.to_be_bytes());
        out.extend_from_slice(body);
        Bytes::from(out)
    }

    /// Reads a record's payload back.
    ///
    /// # Errors
    ///
    /// [`CorruptPayload`] when the payload is not what [`encode`](Self::encode) writes.
    pub fn decode(payload: &Bytes) -> Result<Self, CorruptPayload> {
        let mut rest = payload.clone();
        if take(&mut rest, 1)?[0] != RESPONSE {
            return Err(CorruptPayload::of(payload));
        }
        let status = u16::from_be_bytes(take_array(&mut rest)?);
        if !(100..=999).contains(&status) {
            return Err(CorruptPayload(None));
        }
        let count = u32::from_be_bytes(take_array(&mut rest)?) as usize;
        // Each header takes eight bytes at least, so a wild count allocates nothing.
        if count > rest.len() / 8 {
            return Err(CorruptPayload(None));
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let name = u32::from_be_bytes(take_array(&mut rest)?) as usize;
            let value = u32::from_be_bytes(take_array(&mut rest)?) as usize;
            headers.push((take(&mut rest, name)?, take(&mut rest, value)?));
        }
        Ok(Self { status, headers, body: rest })
    }
}

/// A recorded value: what a plain function returned.
#[derive(Clone, PartialEq, Eq)]
pub struct RecordedValue {
    /// The value as JSON; nothing in a tombstone.
    pub json: Bytes,
}

/// The first byte of a payload that is a value.
const VALUE: u8 = 4;

impl RecordedValue {
    /// Writes a value as a record's payload.
    ///
    /// ```text
    /// 4: u8, then the value as JSON to the end
    /// ```
    pub fn encode(json: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(1 + json.len());
        out.put_u8(VALUE);
        out.put_slice(json);
        out.freeze()
    }

    /// Reads a record's payload back.
    ///
    /// # Errors
    ///
    /// [`CorruptPayload`] when the payload is not what [`encode`](Self::encode) writes.
    pub fn decode(payload: &Bytes) -> Result<Self, CorruptPayload> {
        let mut rest = payload.clone();
        match take_array(&mut rest)? {
            [VALUE] => Ok(Self { json: rest }),
            _ => Err(CorruptPayload::of(payload)),
        }
    }
}

/// A value is somebody's data: only its size is shown.
impl fmt::Debug for RecordedValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedValue").field("json_bytes", &self.json.len()).finish()
    }
}

/// What a completed record carries. Of a handler's answer, an axum response can be made
/// (`into_response`): status, headers and body as they were recorded, and `Idempotent-Replayed:
/// true`; of a function's, its JSON. What a handler does to its replays (`replay = …`) is not done
/// to it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// That of an HTTP handler.
    Response(RecordedResponse),
    /// The value that a plain function returned.
    Value(RecordedValue),
}

impl Answer {
    /// Reads the payload of a completed record.
    pub(crate) fn decode(payload: &Bytes) -> Result<Self, CorruptPayload> {
        match payload.first() {
            Some(&VALUE) => RecordedValue::decode(payload).map(Self::Value),
            _ => RecordedResponse::decode(payload).map(Self::Response),
        }
    }

    /// The payload that is left where the answer is too large to keep: that there was one.
    pub(crate) fn tombstone_of(payload: &Bytes) -> Bytes {
        match Self::decode(payload) {
            Ok(Self::Value(_)) => RecordedValue::encode(b""),
            Ok(Self::Response(RecordedResponse { status, .. })) => {
                RecordedResponse::encode(status, &[], b"")
            }
            Err(_) => RecordedResponse::encode(200, &[], b""),
        }
    }
}

/// What a record carries before it is completed: the payload of an issued key, and the results of
/// the steps that were taken.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// What was bound to the key when it was issued.
    pub issued: Option<Bytes>,
    /// Whose steps they are: a key that was forgotten and used again carries those of another
    /// operation.
    pub steps_of: Option<OperationId>,
    /// The results of steps, by their names, in order.
    pub steps: Vec<(String, Bytes)>,
}

/// The first byte of a payload that is progress.
const PROGRESS: u8 = 2;

impl Progress {
    /// Writes progress as a record's payload; none is an empty payload.
    ///
    /// ```text
    /// 2: u8, issued: u8 (0 or 1), then if it is 1: length: u32, the issued payload
    /// steps: u8 (0 or 1), then if it is 1: operation id: 16 bytes
    /// then for each step: name length: u32, result length: u32, name, result
    /// ```
    pub fn encode(&self) -> Bytes {
        if self.issued.is_none() && self.steps.is_empty() {
            return Bytes::new();
        }
        let mut out = BytesMut::new();
        out.put_u8(PROGRESS);
        out.put_u8(u8::from(self.issued.is_some()));
        if let Some(issued) = &self.issued {
            out.put_u32(issued.len() as u32);
            out.put_slice(issued);
        }
        out.put_u8(u8::from(self.steps_of.is_some()));
        if let Some(operation_id) = &self.steps_of {
            out.put_slice(operation_id.as_bytes());
        }
        for (name, result) in &self.steps {
            out.put_u32(name.len() as u32);
            out.put_u32(result.len() as u32);
            out.put_slice(name.as_bytes());
            out.put_slice(result);
        }
        out.freeze()
    }

    /// Reads a record's payload back.
    ///
    /// # Errors
    ///
    /// [`CorruptPayload`] when the payload is not what [`encode`](Self::encode) writes.
    pub fn decode(payload: &Bytes) -> Result<Self, CorruptPayload> {
        let mut rest = payload.clone();
        if rest.is_empty() {
            return Ok(Self::default());
        }
        let [PROGRESS, has_issued @ (0 | 1)] = take_array(&mut rest)? else {
            return Err(CorruptPayload::of(payload));
        };
        let issued = match has_issued {
            1 => {
                let length = u32::from_be_bytes(take_array(&mut rest)?) as usize;
                Some(take(&mut rest, length)?)
            }
            _ => None,
        };
        let steps_of = match take_array(&mut rest)? {
            [0] => None,
            [1] => Some(OperationId::from_bytes(take_array(&mut rest)?)),
            _ => return Err(CorruptPayload(None)),
        };
        let mut steps = Vec::new();
        while !rest.is_empty() {
            let name = u32::from_be_bytes(take_array(&mut rest)?) as usize;
            let result = u32::from_be_bytes(take_array(&mut rest)?) as usize;
            let name = String::from_utf8(take(&mut rest, name)?.into());
            let name = name.map_err(|_| CorruptPayload(None))?;
            steps.push((name, take(&mut rest, result)?));
        }
        Ok(Self { issued, steps_of, steps })
    }
}

/// Payloads and results are somebody's data: only the names of steps are shown.
impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: Vec<_> = self.steps.iter().map(|(name, _)| name).collect();
        f.debug_struct("Progress")
            .field("issued", &self.issued.is_some())
            .field("steps", &steps)
            .finish()
    }
}

fn take(rest: &mut Bytes, length: usize) -> Result<Bytes, CorruptPayload> {
    if rest.len() < length {
        return Err(CorruptPayload(None));
    }
    Ok(rest.split_to(length))
}

fn take_array<const N: usize>(rest: &mut Bytes) -> Result<[u8; N], CorruptPayload> {
    let (head, _) = rest.split_first_chunk::<N>().ok_or(CorruptPayload(None))?;
    let head = *head;
    let _ = rest.split_to(N);
    Ok(head)
}

/// A record's payload is not one that this release can read; the source says so where its seal is
/// the reason.
#[derive(Debug, thiserror::Error)]
#[error("the record's payload is damaged")]
pub struct CorruptPayload(#[source] Option<SealError>);

impl CorruptPayload {
    /// Of a payload that is of another kind than was asked for.
    fn of(payload: &Bytes) -> Self {
        Self(seal::why_unreadable(payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Bytes {
        let headers: [(&[u8], &[u8]); 3] =
            [(b"set-x", b"1"), (b"set-x", b"\xff\x00"), (b"content-type", b"text/plain")];
        RecordedResponse::encode(201, &headers, b"\x00body\xff")
    }

    #[test]
    fn a_response_survives_with_binary_body_and_repeated_headers_in_order() {
        let response = RecordedResponse::decode(&sample()).unwrap();
        assert_eq!(response.status, 201);
        assert_eq!(response.body, &b"\x00body\xff"[..]);
        let names: Vec<_> = response.headers.iter().map(|(name, _)| name.as_ref()).collect();
        assert_eq!(names, [&b"set-x"[..], b"set-x", b"content-type"]);
        assert_eq!(response.headers[1].1, &b"\xff\x00"[..]);
    }

    #[test]
    fn a_head_cut_short_is_corrupt_and_never_a_response() {
        let whole = sample();
        let head = whole.len() - b"\x00body\xff".len();
        for length in 0..head {
            assert!(RecordedResponse::decode(&whole.slice(..length)).is_err(), "{length}");
        }
    }

    #[test]
    fn progress_survives_and_is_refused_when_cut_short() {
        for issued in [None, Some(Bytes::new()), Some(Bytes::from_static(b"\x00payload"))] {
            for steps in 0..3 {
                let steps =
                    (0..steps).map(|n| (format!("step {n}"), Bytes::from(vec![n; n.into()])));
                let steps_of = Some(OperationId::from_bytes([7; 16]));
                let issued = issued.clone();
                let progress = Progress { issued, steps_of, steps: steps.collect() };
                let payload = progress.encode();
                let decoded = Progress::decode(&payload).unwrap();
                assert_eq!((decoded.issued, decoded.steps), (progress.issued, progress.steps));
            }
        }
        let steps = vec![("a".to_owned(), Bytes::from_static(b"1"))];
        let issued = Some(Bytes::from_static(b"p"));
        let whole = Progress { issued, steps_of: None, steps }.encode();
        let at_a_boundary = [0, 8];
        for length in (0..whole.len()).filter(|length| !at_a_boundary.contains(length)) {
            assert!(Progress::decode(&whole.slice(..length)).is_err(), "{length}");
        }
        assert!(Progress::decode(&sample()).is_err(), "a response is no progress");
    }

    #[test]
    fn a_value_and_a_response_are_told_apart() {
        let value = RecordedValue::encode(br#"{"a":1}"#);
        assert_eq!(RecordedValue::decode(&value).unwrap().json, &br#"{"a":1}"#[..]);
        assert!(matches!(Answer::decode(&value), Ok(Answer::Value(_))));
        assert!(matches!(Answer::decode(&sample()), Ok(Answer::Response(_))));
        assert!(RecordedResponse::decode(&value).is_err());
        assert!(RecordedValue::decode(&sample()).is_err());
        assert!(RecordedValue::decode(&Bytes::new()).is_err());
        assert!(Progress::decode(&value).is_err());
    }

    #[test]
    fn a_tombstone_keeps_what_kind_of_answer_there_was() {
        let of_value = Answer::tombstone_of(&RecordedValue::encode(b"[1,2]"));
        assert_eq!(of_value, RecordedValue::encode(b""));
        let of_response = Answer::tombstone_of(&sample());
        assert_eq!(of_response, RecordedResponse::encode(201, &[], b""));
    }

    #[test]
    fn arbitrary_bytes_never_panic() {
        for _ in 0..20_000 {
            let bytes: Vec<u8> =
                (0..rand::random::<u8>() % 40).map(|_| rand::random::<u8>() % 4).collect();
            let bytes = Bytes::from(bytes);
            let _ = Answer::decode(&bytes);
            let _ = Answer::tombstone_of(&bytes);
            let _ = Progress::decode(&bytes);
        }
    }
}
