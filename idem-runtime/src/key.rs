//! Idempotency keys: what goes into one, and the digest that a store sees.
//!
//! A [`Key`] is the digest of a *pre-image*: a scheme tag, the space within which the key is
//! unique, the scope that owns it, and the anchor's values. Every part carries its length and every
//! list its count, so that no two different tuples share a pre-image: `("ab", "c")` and `("a",
//! "bc")` are different keys, and so are an empty part and a missing one.
//!
//! The layout is a format that cannot change: a process that computed keys in another way would
//! not find the records of the one before it, and would run their requests again.
//!
//! ```text
//! pre-image = bytes("idem-key/1") list(space) list(scope) list(values)
//! list(x)   = count: u32 big endian, then bytes(part) for each part
//! bytes(x)  = length: u64 big endian, then the bytes
//! space     = ["operation", method, "route", route with erased names, parameter, …]
//!           | ["operation", method, "path", decoded segment, …]
//!           | ["function", path of the module and name]
//!           | ["space", name]
//!           | ["layer", and what stands there for the operation …]
//! ```

mod name;

use std::{borrow::Cow, fmt, str::FromStr, sync::Arc, time::SystemTime};

use hmac::{Hmac, KeyInit, Mac};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

pub use self::name::{KeyName, KeyNameError};
use crate::{known::Known, record::Fingerprint};

/// The scheme tag at the head of every key's pre-image.
const KEY_SCHEME: &[u8] = b"idem-key/1";
/// The tag at the head of what a [`ScopeDigest`] is computed from.
const SCOPE_SCHEME: &[u8] = b"idem-scope/1";

/// What a record is found by: 32 bytes, the digest of a request's space, scope and anchor values.
///
/// HMAC-SHA-256 when the engine has a secret, SHA-256 otherwise. The values themselves are never
/// stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 32]);

impl Key {
    /// A key from its digest, as a store reads it back.
    pub const fn from_bytes(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", ShortHex(&self.0))
    }
}

/// The digest of a scope's values alone, so that all records of one tenant can be found.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScopeDigest([u8; 32]);

impl ScopeDigest {
    /// A scope digest from its bytes, as a store reads it back.
    pub const fn from_bytes(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for ScopeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScopeDigest({})", ShortHex(&self.0))
    }
}

/// The fencing token of one claim: 128 random bits that the claimant chooses before it asks.
///
/// Because the claimant knows its token even when the store's answer is lost, asking again with the
/// same token is the same claim.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; 16]);

impl Token {
    /// A fresh token.
    pub fn random() -> Self {
        Self(rand::random::<u128>().to_ne_bytes())
    }

    /// A token from its bytes, as a store reads it back.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", ShortHex(&self.0))
    }
}

/// The identity of one logical operation, the same through crash, release and takeover.
///
/// It is stored with the claim before the handler starts. It prints as a UUID, and is read back from
/// one: from text, or as a parameter of a route or a field of a body.
///
/// ```
/// use idem_runtime::OperationId;
///
/// let id = OperationId::random();
/// assert_eq!(id.to_string().parse(), Ok(id));
/// assert!("order-1".parse::<OperationId>().is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OperationId(Uuid);

impl OperationId {
    /// A fresh operation id: a version 7 UUID, 74 bits of which are random.
    ///
    /// Those of one time begin alike, so that in an index over millions of them a database changes
    /// few places, and those that it has at hand (RFC 9562 §6.13). Nothing is decided by the time.
    pub fn random() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // Good for another half a billion years.
        let millis = now.as_millis() as u64;
        Self(uuid::Builder::from_unix_timestamp_millis(millis, &rand::random()).into_uuid())
    }

    /// The operation id of a transactional handler, of which nothing is stored before the commit:
    /// the same request has the same one after a crash (a version 5 UUID over the key's digest, the
    /// fingerprint's scheme and its digest).
    pub(crate) fn derived(key: &Key, fingerprint: &Fingerprint) -> Self {
        const NAMESPACE: Uuid = Uuid::from_u128(0x9d1c_3a1e_7b0f_4c55_8d2a_64f3_0b6e_52c1);
        let name = [&key.0[..], fingerprint.scheme.as_bytes(), &fingerprint.digest].concat();
        Self(Uuid::new_v5(&NAMESPACE, &name))
    }

    /// An operation id from its 16 bytes, as a store reads it back.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// As a UUID.
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for OperationId {
    type Err = InvalidOperationId;

    fn from_str(text: &str) -> Result<Self, InvalidOperationId> {
        Uuid::try_parse(text).map(Self).map_err(InvalidOperationId)
    }
}

impl From<Uuid> for OperationId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl TryFrom<String> for OperationId {
    type Error = InvalidOperationId;

    fn try_from(text: String) -> Result<Self, InvalidOperationId> {
        text.parse()
    }
}

impl From<OperationId> for String {
    fn from(id: OperationId) -> Self {
        id.to_string()
    }
}

/// The text is not an operation id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an operation id is a UUID")]
pub struct InvalidOperationId(#[source] uuid::Error);

impl fmt::Debug for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OperationId({})", self.0)
    }
}

/// The first bytes of a digest: enough to tell two apart in a log, too few to look one up.
struct ShortHex<'a>(&'a [u8]);

impl fmt::Display for ShortHex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.iter().take(4) {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("…")
    }
}

/// A list of values in the order in which they enter a digest, each with its length.
///
/// [`AnchorValue`](crate::AnchorValue) implementations and custom anchors write into one.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Values {
    count: u32,
    encoded: Vec<u8>,
}

impl Values {
    /// An empty list.
    pub const fn new() -> Self {
        Self { count: 0, encoded: Vec::new() }
    }

    /// Adds one value.
    pub fn push(&mut self, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        self.count += 1;
        self.encoded.reserve(8 + value.len());
        put_bytes(&mut self.encoded, value);
    }

    /// Adds all values of another list.
    pub fn extend(&mut self, other: &Self) {
        self.count += other.count;
        self.encoded.extend_from_slice(&other.encoded);
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values, in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.encoded.as_slice();
        std::iter::from_fn(move || take_bytes(&mut rest))
    }

    pub(crate) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.count.to_be_bytes());
        out.extend_from_slice(&self.encoded);
    }
}

impl<T: AsRef<[u8]>> FromIterator<T> for Values {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut list = Self::new();
        values.into_iter().for_each(|value| list.push(value));
        list
    }
}

/// Values are credentials and keys: only their number is shown.
impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Values({} redacted)", self.count)
    }
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
    out.extend_from_slice(bytes);
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_be_bytes(*length)).ok()?;
    let (bytes, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(bytes)
}

/// The operation that a request asks for: method, matched route, decoded parameter values.
///
/// The names of the route's parameters are erased, so that renaming `{id}` changes no key; their
/// values are percent-decoded, so that two spellings of one path are one operation. A value that is
/// the key, too, stands here as it stands there: in the spelling of the anchor's format.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    route: Arc<Route>,
    parameters: Values,
}

impl Endpoint {
    /// The endpoint of a request that a route matched. `parameters` are decoded, in the order in
    /// which the route names them.
    pub(crate) fn matched<'a>(
        route: Arc<Route>,
        parameters: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        Self { route, parameters: parameters.into_iter().collect() }
    }

    /// The endpoint of a request that no route matched: the segments of its path, each decoded, so
    /// that an encoded slash stays apart from one between segments.
    pub(crate) fn unmatched(route: Arc<Route>, path: &str) -> Self {
        let segments = path.split('/');
        let decoded = segments.map(|segment| Cow::<[u8]>::from(percent_decode_str(segment)));
        Self { route, parameters: decoded.collect() }
    }

    /// What an operator reads in the record: method and route.
    pub(crate) fn text(&self) -> &Arc<str> {
        &self.route.text
    }

    /// Writes its parts as one list, after those that make a space of it.
    pub(crate) fn write_to(&self, before: &[&str], out: &mut Vec<u8>) {
        let Route { parts, .. } = &*self.route;
        let count = before.len() as u32 + parts.count + self.parameters.count;
        out.extend_from_slice(&count.to_be_bytes());
        before.iter().for_each(|part| put_bytes(out, part.as_bytes()));
        out.extend_from_slice(&parts.encoded);
        out.extend_from_slice(&self.parameters.encoded);
    }
}

/// What all requests have in common that a route matched, or that none did.
#[derive(Debug)]
pub(crate) struct Route {
    method: Box<str>,
    path: Option<Box<str>>,
    text: Arc<str>,
    parts: Values,
}

impl Route {
    /// The route of a path as the router has it; without one, the way of paths that it does not
    /// have. Such a path may itself be somebody's key, so the text that operators read does not
    /// repeat it.
    pub(crate) fn new(method: &str, path: Option<&str>) -> Self {
        let mut parts = Values::from_iter(["operation", method]);
        match path {
            Some(path) => {
                parts.push("route");
                parts.push(erase_names(path));
            }
            None => parts.push("path"),
        }
        let text = Arc::from([method, " ", path.unwrap_or("(no route)")].concat());
        Self { method: method.into(), path: path.map(Box::from), text, parts }
    }
}

/// The routes that a policy's requests came by: not all of them for ever, since a client may send
/// any method.
#[derive(Debug, Default)]
pub(crate) struct Routes(Known<Arc<Route>>);

impl Routes {
    const MOST: usize = 32;

    /// A route that is known, or becomes so while there is room.
    pub(crate) fn get(&self, method: &str, path: Option<&str>) -> Arc<Route> {
        let new = || Arc::new(Route::new(method, path));
        let is_it = |route: &Arc<Route>| *route.method == *method && route.path.as_deref() == path;
        let found = self.0.find(Self::MOST, is_it, new);
        found.map_or_else(new, |(_, route)| Arc::clone(route))
    }
}

/// `/a/{id}/{*rest}` as `/a/{}/{*}`; a doubled brace is a literal one and stays.
fn erase_names(route: &str) -> String {
    let mut erased = String::with_capacity(route.len());
    let mut characters = route.chars().peekable();
    while let Some(c) = characters.next() {
        erased.push(c);
        if c != '{' {
            continue;
        }
        match characters.next() {
            Some('{') => erased.push('{'),
            Some('*') => {
                erased.push('*');
                skip_name(&mut characters);
                erased.push('}');
            }
            Some('}') => erased.push('}'),
            Some(_) => {
                skip_name(&mut characters);
                erased.push('}');
            }
            None => {}
        }
    }
    erased
}

/// The names that [`erase_names`] erases, in order.
fn parameter_names(route: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = route;
    while let Some((_, after)) = rest.split_once('{') {
        if let Some(literal) = after.strip_prefix('{') {
            rest = literal;
            continue;
        }
        let (name, after) = after.split_once('}').unwrap_or((after, ""));
        names.push(name.strip_prefix('*').unwrap_or(name));
        rest = after;
    }
    names
}

fn skip_name(characters: &mut impl Iterator<Item = char>) {
    for c in characters {
        if c == '}' {
            break;
        }
    }
}

/// Computes all digests of an engine: SHA-256, or HMAC-SHA-256 under its secret.
#[derive(Clone)]
pub(crate) enum Digester {
    Plain,
    Keyed(Box<Hmac<Sha256>>),
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "SHA-256",
            Self::Keyed(_) => "HMAC-SHA-256",
        })
    }
}

impl Digester {
    pub(crate) fn keyed(secret: &[u8]) -> Self {
        // RFC 2104: a key longer than a block is hashed, a shorter one padded with zeros.
        let mut block = [0; 64];
        match block.get_mut(..secret.len()) {
            Some(start) => start.copy_from_slice(secret),
            None => block[..32].copy_from_slice(&Sha256::digest(secret)),
        }
        Self::Keyed(Box::new(Hmac::new(&block.into())))
    }

    /// The digest of several pieces, taken as if they were one.
    pub(crate) fn digest(&self, pieces: &[&[u8]]) -> [u8; 32] {
        match self {
            Self::Plain => {
                let mut hash = Sha256::new();
                pieces.iter().for_each(|piece| hash.update(piece));
                hash.finalize().into()
            }
            Self::Keyed(mac) => {
                let mut mac = mac.clone();
                pieces.iter().for_each(|piece| mac.update(piece));
                mac.finalize().into_bytes().into()
            }
        }
    }

    pub(crate) fn key(&self, space: Space<'_>, scope: &Values, values: &Values) -> Key {
        self.key_in(&mut Vec::new(), space, scope, values)
    }

    pub(crate) fn scope(&self, scope: &Values) -> ScopeDigest {
        self.scope_in(&mut Vec::new(), scope)
    }

    /// A key and the digest of its scope. What is digested is put together in a buffer, so that
    /// several digests have one.
    pub(crate) fn key_and_scope(
        &self,
        buffer: &mut Vec<u8>,
        space: Space<'_>,
        scope: &Values,
        values: &Values,
    ) -> (Key, ScopeDigest) {
        (self.key_in(buffer, space, scope, values), self.scope_in(buffer, scope))
    }

    fn key_in(
        &self,
        buffer: &mut Vec<u8>,
        space: Space<'_>,
        scope: &Values,
        values: &Values,
    ) -> Key {
        buffer.clear();
        write_preimage(buffer, space, scope, values);
        Key(self.digest(&[buffer]))
    }

    fn scope_in(&self, buffer: &mut Vec<u8>, scope: &Values) -> ScopeDigest {
        buffer.clear();
        put_bytes(buffer, SCOPE_SCHEME);
        scope.write_to(buffer);
        ScopeDigest(self.digest(&[buffer]))
    }
}

/// Within what a key is unique.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Space<'a> {
    Operation(&'a Endpoint),
    /// A layer's operations are apart from those of the handlers behind it: both may have a claim
    /// on one request.
    Layer(&'a Endpoint),
    Function(&'a str),
    Named(&'a str),
}

fn write_preimage(bytes: &mut Vec<u8>, space: Space<'_>, scope: &Values, values: &Values) {
    put_bytes(bytes, KEY_SCHEME);
    match space {
        Space::Operation(endpoint) => endpoint.write_to(&[], bytes),
        Space::Layer(endpoint) => endpoint.write_to(&["layer"], bytes),
        Space::Function(path) => Values::from_iter(["function", path]).write_to(bytes),
        Space::Named(name) => Values::from_iter(["space", name]).write_to(bytes),
    }
    scope.write_to(bytes);
    values.write_to(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scheme, then space, scope and values.
    type Decoded = (Vec<u8>, [Parts; 3]);
    type Parts = Vec<Vec<u8>>;

    /// The inverse of [`write_preimage`]: that it exists is what makes a key unambiguous.
    fn decode(mut bytes: &[u8]) -> Option<Decoded> {
        let scheme = take_bytes(&mut bytes)?.to_vec();
        let lists = [take_list(&mut bytes)?, take_list(&mut bytes)?, take_list(&mut bytes)?];
        bytes.is_empty().then_some((scheme, lists))
    }

    fn take_list(rest: &mut &[u8]) -> Option<Parts> {
        let (count, after) = rest.split_first_chunk::<4>()?;
        *rest = after;
        (0..u32::from_be_bytes(*count)).map(|_| take_bytes(rest).map(<[u8]>::to_vec)).collect()
    }

    fn values(parts: &[Vec<u8>]) -> Values {
        let mut values = Values::new();
        parts.iter().for_each(|part| values.push(part));
        values
    }

    /// Parts that are often empty, often alike, and full of what a separator might be.
    fn random_parts() -> Parts {
        const ALPHABET: &[u8] = b"ab\0:/|\x01\xff,\"\\";
        (0..rand::random::<u8>() % 5)
            .map(|_| {
                (0..rand::random::<u8>() % 6)
                    .map(|_| ALPHABET[rand::random::<u8>() as usize % ALPHABET.len()])
                    .collect()
            })
            .collect()
    }

    #[test]
    fn a_preimage_decodes_back_to_what_went_in() {
        for _ in 0..20_000 {
            let (scope, anchor) = (random_parts(), random_parts());
            let name = String::from_utf8_lossy(&random_parts().concat()).into_owned();
            let mut bytes = Vec::new();
            let (scoped, anchored) = (values(&scope), values(&anchor));
            write_preimage(&mut bytes, Space::Named(&name), &scoped, &anchored);
            let space = vec![b"space".to_vec(), name.into_bytes()];
            assert_eq!(decode(&bytes), Some((KEY_SCHEME.to_vec(), [space, scope, anchor])));
        }
    }

    #[test]
    fn moving_a_byte_between_neighbours_changes_the_key() {
        for _ in 0..20_000 {
            let mut parts = random_parts();
            let before = Digester::Plain.key(Space::Named("s"), &Values::new(), &values(&parts));
            let Some(from) = parts.iter().position(|part| !part.is_empty()) else { continue };
            let byte = parts[from].pop().unwrap();
            match parts.get_mut(from + 1) {
                Some(next) => next.insert(0, byte),
                None => parts.push(vec![byte]),
            }
            let after = Digester::Plain.key(Space::Named("s"), &Values::new(), &values(&parts));
            assert_ne!(before, after, "{parts:?}");
        }
    }

    #[test]
    fn moving_a_value_between_scope_and_anchor_changes_the_key() {
        let (one, none) = (values(&[b"x".to_vec()]), Values::new());
        assert_ne!(
            Digester::Plain.key(Space::Named("s"), &one, &none),
            Digester::Plain.key(Space::Named("s"), &none, &one),
        );
    }

    /// The scheme cannot change: a digest that was computed once is computed for ever.
    #[test]
    fn keys_are_what_they_were() {
        let route = Arc::new(Route::new("POST", Some("/payments/{id}")));
        let endpoint = Endpoint::matched(route, ["7"]);
        let (scope, anchor) = (values(&[b"tenant".to_vec()]), values(&[b"key-1".to_vec()]));
        let hex = |key: Key| key.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            hex(Digester::Plain.key(Space::Operation(&endpoint), &scope, &anchor)),
            "34588ec1570ff670656920ac07d25c778ec0b29fa89a790ae5a0cd35ed815f7e",
        );
        assert_eq!(
            hex(Digester::keyed(b"secret").key(Space::Named("api"), &scope, &anchor)),
            "83667bf3e64184945dc539c93d42966e91b5610d10a7fd6c51dacac909703b65",
        );
        assert_eq!(
            hex(Digester::Plain.key(Space::Function("a::f"), &scope, &anchor)),
            "6657ac4fc917c9b4621b8857cf931996dbf3af769947fcca03703af660f6fa81",
        );
    }

    #[test]
    fn a_route_loses_the_names_of_its_parameters_and_nothing_else() {
        for (route, erased) in [
            ("/a/{id}/b", "/a/{}/b"),
            ("/a/{other_name}/b", "/a/{}/b"),
            ("/{*rest}", "/{*}"),
            ("/{{literal}}/{x}", "/{{literal}}/{}"),
            ("/plain", "/plain"),
        ] {
            assert_eq!(erase_names(route), erased);
        }
    }

    #[test]
    fn the_names_of_a_routes_parameters_are_those_that_it_loses() {
        for (route, names) in [
            ("/a/{id}/b/{other_name}", &["id", "other_name"][..]),
            ("/{*rest}", &["rest"]),
            ("/{{literal}}/{x}", &["x"]),
            ("/file-{name}.{extension}", &["name", "extension"]),
            ("/plain", &[]),
        ] {
            assert_eq!(parameter_names(route), names);
        }
    }

    #[test]
    fn debug_output_shows_no_value() {
        let shown = format!("{:?}", values(&[b"secret".to_vec()]));
        assert!(!shown.contains("secret"), "{shown}");
    }
}
