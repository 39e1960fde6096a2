//! Fingerprints: what makes two requests "the same request".
//!
//! The scheme says which parts of a request count. Its text is stored beside the digest, so that a
//! record is always compared in the way in which it was made: after a deploy that changes a
//! handler's scheme, the retries of older requests still match.
//!
//! ```text
//! scheme    = name "/1" { " " json pointer } { " +" header name }
//! digest of = bytes("idem-fingerprint/1") bytes(scheme) list(operation, if the space is named)
//!             bytes(query, unless only fields count) { list(values of a header) } bytes(content)
//! ```

mod arguments;

use std::borrow::Cow;

use http::HeaderMap;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

pub(crate) use self::arguments::{CallSubject, Incomparable, is_of_function};
use crate::{
    anchor::{is_field_path, is_header_name},
    json::{self, JsonError},
    key::{Digester, Endpoint, Values, put_bytes},
    record::Fingerprint,
};

const TAG: &[u8] = b"idem-fingerprint/1";

/// What may not stand in a path inside a scheme's text as it is.
const RESERVED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');

/// What of a request a fingerprint covers.
///
/// The default is [`request`](Self::request). With a named space the operation is covered too,
/// except by [`none`](Self::none).
///
/// ```
/// use idem_runtime::FingerprintScheme;
///
/// const BUT_THE_CLOCK: FingerprintScheme = FingerprintScheme::exclude(&["meta.sent_at"]);
/// assert_eq!(BUT_THE_CLOCK.to_string(), "exclude/1 /meta/sent_at");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FingerprintScheme {
    basis: Basis,
    paths: &'static [&'static str],
    headers: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    Request,
    Json,
    Fields,
    Exclude,
    None,
}

impl Basis {
    const ALL: [Self; 5] = [Self::Request, Self::Json, Self::Fields, Self::Exclude, Self::None];

    const fn tag(self) -> &'static str {
        match self {
            Self::Request => "request/1",
            Self::Json => "json/1",
            Self::Fields => "fields/1",
            Self::Exclude => "exclude/1",
            Self::None => "none/1",
        }
    }
}

impl FingerprintScheme {
    /// The query string and the body, byte for byte. What well-behaved clients repeat exactly.
    pub const fn request() -> Self {
        Self::new(Basis::Request, &[])
    }

    /// The query string and the body as a JSON value: members unordered, numbers by their exact
    /// decimal value (1 and 1.0 are equal, 2^53 and 2^53 + 1 are not), duplicate names refused. A
    /// body that is not JSON counts as bytes.
    pub const fn json() -> Self {
        Self::new(Basis::Json, &[])
    }

    /// Only these fields of the JSON body, named by dots or by JSON Pointers. A body that is not
    /// JSON counts whole, as bytes.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when there is none, or a path is empty or has an empty name
    /// between dots.
    #[track_caller]
    pub const fn body_fields(paths: &'static [&'static str]) -> Self {
        assert!(!paths.is_empty(), "FingerprintScheme::body_fields: no field is named");
        assert_paths(paths);
        Self::new(Basis::Fields, paths)
    }

    /// Like [`json`](Self::json), without these fields.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when a path is empty or has an empty name between dots.
    #[track_caller]
    pub const fn exclude(paths: &'static [&'static str]) -> Self {
        assert_paths(paths);
        Self::new(Basis::Exclude, paths)
    }

    /// Nothing: any request with the key is the same request.
    pub const fn none() -> Self {
        Self::new(Basis::None, &[])
    }

    /// Adds headers, all of whose lines count in their order. Name all of them in one call.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when a name is not a header name (RFC 9110 §5.1), or the
    /// scheme has headers already.
    #[must_use]
    #[track_caller]
    pub const fn headers(mut self, names: &'static [&'static str]) -> Self {
        assert!(self.headers.is_empty(), "FingerprintScheme::headers: name all in one call");
        let mut rest = names;
        while let [name, others @ ..] = rest {
            assert!(is_header_name(name), "FingerprintScheme::headers: not a valid header name");
            rest = others;
        }
        self.headers = names;
        self
    }

    const fn new(basis: Basis, paths: &'static [&'static str]) -> Self {
        Self { basis, paths, headers: &[] }
    }

    pub(crate) const fn needs_body(&self) -> bool {
        !matches!(self.basis, Basis::None)
    }

    /// The fingerprint of a request under this scheme.
    /// Its head is put together in a buffer.
    pub(crate) fn fingerprint(
        &self,
        digester: &Digester,
        buffer: &mut Vec<u8>,
        subject: &Subject<'_>,
    ) -> Result<Fingerprint, JsonError> {
        let scheme = match (self.basis, self.headers) {
            (Basis::Request | Basis::Json | Basis::None, []) => Cow::Borrowed(self.basis.tag()),
            _ => Cow::Owned(self.to_string()),
        };
        Scheme {
            basis: self.basis,
            paths: self.paths.iter().map(|path| json::segments(path)).collect(),
            headers: self.headers.iter().map(|name| Cow::Borrowed(*name)).collect(),
        }
        .fingerprint(scheme, digester, buffer, subject)
    }
}

#[track_caller]
const fn assert_paths(paths: &[&str]) {
    let mut rest = paths;
    while let [path, others @ ..] = rest {
        assert!(is_field_path(path), "FingerprintScheme: a name in a path is empty");
        rest = others;
    }
}

impl std::fmt::Display for FingerprintScheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.basis.tag())?;
        for path in self.paths {
            f.write_str(" ")?;
            for segment in json::segments(path) {
                let pointer = segment.replace('~', "~0").replace('/', "~1");
                write!(f, "/{}", utf8_percent_encode(&pointer, RESERVED))?;
            }
        }
        self.headers.iter().try_for_each(|name| write!(f, " +{}", name.to_ascii_lowercase()))
    }
}

/// The parts of a request that a fingerprint may cover.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    /// Given where the space is named: the key alone does not say which operation it is.
    pub(crate) endpoint: Option<&'a Endpoint>,
    pub(crate) query: &'a str,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a [u8],
}

/// The fingerprint of a request under the scheme of an older record, or `None` where this release
/// does not know the scheme.
pub(crate) fn under_scheme(
    scheme: &str,
    digester: &Digester,
    subject: &Subject<'_>,
) -> Option<Result<Fingerprint, JsonError>> {
    let parsed = Scheme::parse(scheme)?;
    let scheme = Cow::Owned(scheme.to_owned());
    Some(parsed.fingerprint(scheme, digester, &mut Vec::new(), subject))
}

/// The schemes that have neither paths nor headers.
pub(crate) const PLAIN: [&str; 3] = [Basis::Request.tag(), Basis::Json.tag(), Basis::None.tag()];

/// Whether the body must be read before a request can have a fingerprint under a record's scheme.
pub(crate) fn scheme_needs_body(scheme: &str) -> bool {
    Scheme::parse(scheme).is_some_and(|scheme| scheme.basis != Basis::None)
}

/// A scheme as it is carried out: from a policy or read back from a record.
struct Scheme<'s> {
    basis: Basis,
    paths: Vec<Vec<Cow<'s, str>>>,
    headers: Vec<Cow<'s, str>>,
}

impl Scheme<'static> {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let tag = words.next()?;
        let basis = Basis::ALL.into_iter().find(|basis| basis.tag() == tag)?;
        let (mut paths, mut headers) = (Vec::new(), Vec::new());
        for word in words {
            match word.strip_prefix('+') {
                Some(name) => headers.push(Cow::Owned(name.to_owned())),
                None if word.starts_with('/') => {
                    let pointer = percent_decode_str(word).decode_utf8().ok()?;
                    let path = json::segments(&pointer);
                    paths
                        .push(path.into_iter().map(|name| Cow::Owned(name.into_owned())).collect());
                }
                None => return None,
            }
        }
        Some(Self { basis, paths, headers })
    }
}

impl Scheme<'_> {
    fn fingerprint(
        &self,
        scheme: Cow<'static, str>,
        digester: &Digester,
        head: &mut Vec<u8>,
        subject: &Subject<'_>,
    ) -> Result<Fingerprint, JsonError> {
        if self.basis == Basis::None && self.headers.is_empty() {
            return Ok(Fingerprint { scheme, ..Fingerprint::NONE });
        }
        head.clear();
        put_bytes(head, TAG);
        put_bytes(head, scheme.as_bytes());
        match subject.endpoint {
            Some(endpoint) if self.basis != Basis::None => endpoint.write_to(&[], head),
            _ => Values::new().write_to(head),
        }
        if matches!(self.basis, Basis::Request | Basis::Json | Basis::Exclude) {
            put_bytes(head, subject.query.as_bytes());
        }
        for name in &self.headers {
            let mut lines = Values::new();
            subject.headers.get_all(name.as_ref()).iter().for_each(|line| lines.push(line));
            lines.write_to(head);
        }
        let content = self.content(subject.body)?;
        head.extend_from_slice(&(content.len() as u64).to_be_bytes());
        let digest = digester.digest(&[head, &content]);
        Ok(Fingerprint { scheme, digest })
    }

    /// The part that the body contributes: itself, or what it means.
    fn content<'b>(&self, body: &'b [u8]) -> Result<Cow<'b, [u8]>, JsonError> {
        let digest = match self.basis {
            Basis::None => return Ok(Cow::Borrowed(b"")),
            Basis::Request => return Ok(Cow::Borrowed(body)),
            Basis::Json => json::canonical_digest(body, &[]),
            Basis::Exclude => json::canonical_digest(body, &self.paths),
            Basis::Fields => return self.fields(body),
        };
        match digest {
            Ok(digest) => Ok(Cow::Owned([b"json".as_slice(), &digest].concat())),
            Err(JsonError::Syntax(_)) => Ok(Cow::Owned([b"text".as_slice(), body].concat())),
            Err(refused @ JsonError::DuplicateName) => Err(refused),
        }
    }

    fn fields<'b>(&self, body: &'b [u8]) -> Result<Cow<'b, [u8]>, JsonError> {
        let mut content = b"json".to_vec();
        for path in &self.paths {
            match json::find(body, path) {
                Ok(Some(value)) => {
                    content.push(1);
                    content.extend(json::canonical_digest(value.get().as_bytes(), &[])?);
                }
                Ok(None) => content.push(0),
                Err(JsonError::Syntax(_)) => {
                    return Ok(Cow::Owned([b"text".as_slice(), body].concat()));
                }
                Err(refused @ JsonError::DuplicateName) => return Err(refused),
            }
        }
        Ok(Cow::Owned(content))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::key::Route;

    fn subject<'a>(headers: &'a HeaderMap, query: &'a str, body: &'a str) -> Subject<'a> {
        Subject { endpoint: None, query, headers, body: body.as_bytes() }
    }

    fn of(scheme: FingerprintScheme, body: &str) -> Fingerprint {
        scheme
            .fingerprint(&Digester::Plain, &mut Vec::new(), &subject(&HeaderMap::new(), "", body))
            .unwrap()
    }

    #[test]
    fn request_covers_every_byte_of_query_and_body() {
        let (headers, scheme) = (HeaderMap::new(), FingerprintScheme::request());
        let of = |query, body| {
            scheme
                .fingerprint(&Digester::Plain, &mut Vec::new(), &subject(&headers, query, body))
                .unwrap()
        };
        assert_eq!(of("a=1", "{}"), of("a=1", "{}"));
        assert_ne!(of("a=1", "{}"), of("a=2", "{}"));
        assert_ne!(of("a=1", "{}"), of("a=1", "{ }"));
        assert_ne!(of("a", "=1"), of("a=", "1"));
    }

    #[test]
    fn json_covers_the_meaning_and_takes_other_bodies_as_bytes() {
        let json = FingerprintScheme::json();
        assert_eq!(of(json, r#"{"a":1,"b":2}"#), of(json, r#"{ "b":2.0, "a":1 }"#));
        assert_ne!(of(json, "not json"), of(json, "not  json"));
        assert_eq!(of(json, "not json"), of(json, "not json"));
    }

    #[test]
    fn fields_cover_nothing_else() {
        let scheme = FingerprintScheme::body_fields(&["tx.sig"]);
        assert_eq!(
            of(scheme, r#"{"tx":{"sig":"a"},"x":1}"#),
            of(scheme, r#"{"x":2,"tx":{"sig":"a"}}"#)
        );
        assert_ne!(of(scheme, r#"{"tx":{"sig":"a"}}"#), of(scheme, r#"{"tx":{"sig":"b"}}"#));
        assert_ne!(of(scheme, r#"{"tx":{"sig":null}}"#), of(scheme, r#"{"tx":{}}"#));
    }

    #[test]
    fn without_a_fingerprint_all_requests_are_the_same() {
        assert_eq!(of(FingerprintScheme::none(), "{}"), Fingerprint::NONE);
    }

    #[test]
    fn named_headers_count_and_others_do_not() {
        let scheme = FingerprintScheme::request().headers(&["X-Currency"]);
        let of = |pairs: &[(&'static str, &'static str)]| {
            let headers =
                pairs.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect();
            scheme
                .fingerprint(&Digester::Plain, &mut Vec::new(), &subject(&headers, "", ""))
                .unwrap()
                .digest
        };
        let reference = of(&[("x-currency", "EUR")]);
        assert_eq!(of(&[("x-currency", "EUR"), ("x-stainless-retry-count", "2")]), reference);
        assert_ne!(of(&[("x-currency", "USD")]), reference);
        assert_ne!(of(&[]), reference);
    }

    #[test]
    fn a_named_space_covers_the_operation() {
        let headers = HeaderMap::new();
        let [a, b] = ["/a", "/b"]
            .map(|path| Endpoint::matched(Arc::new(Route::new("POST", Some(path))), []));
        let of = |scheme: FingerprintScheme, endpoint| {
            let subject = Subject { endpoint: Some(endpoint), ..subject(&headers, "", "{}") };
            scheme.fingerprint(&Digester::Plain, &mut Vec::new(), &subject).unwrap().digest
        };
        assert_ne!(of(FingerprintScheme::request(), &a), of(FingerprintScheme::request(), &b));
        assert_eq!(of(FingerprintScheme::none(), &a), of(FingerprintScheme::none(), &b));
    }

    #[test]
    fn every_scheme_is_carried_out_again_from_its_text() {
        let headers: HeaderMap =
            [("x-a".parse().unwrap(), "1".parse().unwrap())].into_iter().collect();
        let subject = subject(&headers, "q=1", r#"{"a b%/c~":{"d":1},"e":2}"#);
        for scheme in [
            FingerprintScheme::request(),
            FingerprintScheme::json().headers(&["X-A", "x-b"]),
            FingerprintScheme::body_fields(&["/a b%~1c~0/d", "e"]),
            FingerprintScheme::exclude(&["/a b%~1c~0/d"]),
            FingerprintScheme::none(),
            FingerprintScheme::none().headers(&["x-a"]),
        ] {
            let first = scheme.fingerprint(&Digester::Plain, &mut Vec::new(), &subject).unwrap();
            let again = under_scheme(&first.scheme, &Digester::Plain, &subject).unwrap().unwrap();
            assert_eq!(first, again, "{scheme}");
        }
        assert!(under_scheme("quantum/7", &Digester::Plain, &subject).is_none());
        assert!(under_scheme("request/1 junk", &Digester::Plain, &subject).is_none());
    }

    /// The schemes cannot change: what was computed once is computed for ever.
    #[test]
    fn fingerprints_are_what_they_were() {
        let hex = |scheme: FingerprintScheme| {
            let digest = of(scheme, r#"{"amount":100,"to":"a"}"#).digest;
            digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        assert_eq!(
            hex(FingerprintScheme::request()),
            "6813fb8693c707c6099c264c90c45cf3b68df806c8fc76f2f064cfb0c2674118"
        );
        assert_eq!(
            hex(FingerprintScheme::json()),
            "d28f8e2976883682a3038aa8b1031114b36c435948c3dbcbb5dc11c74858d2ac"
        );
        assert_eq!(
            hex(FingerprintScheme::body_fields(&["to"])),
            "55029d5dbfdace69945802bb622564099882a49a2731bbc45f012be185191816"
        );
        assert_eq!(
            hex(FingerprintScheme::exclude(&["to"])),
            "e522630cdd26cba5b91f664edcfa7c96a921e75160a57b8fbe268fdacb5c05f8"
        );
    }
}
