//! Anchors and scopes: where in a request the idempotency key comes from, and whose it is.

mod request;
mod value;

use std::{borrow::Cow, fmt, ops::RangeInclusive, time::Duration};

use uuid::Uuid;

pub use self::{
    request::{AnchorError, AnchorRequest},
    value::{AnchorValue, Arguments},
};
use crate::{fingerprint::FingerprintScheme, key::Values, policy::Options, record::Ttl};

/// Where in a request the idempotency key comes from.
///
/// An anchor is a constant: declared once, checked by the compiler even when nothing uses it yet,
/// and shared by any number of handlers. What it says of time to live, scope, space and the like
/// holds for each of them unless the handler says otherwise.
///
/// ```
/// use std::time::Duration;
/// use idem_runtime::{Anchor, Format};
///
/// pub const FLOW_ID: Anchor = Anchor::body_field("flowId")
///     .format(Format::Uuid)
///     .ttl(Duration::from_secs(24 * 60 * 60));
///
/// pub const RECEIPT: Anchor = Anchor::all(&[
///     Anchor::body_field("network"),
///     Anchor::body_field("receipt_hash").format(Format::Hex(32)),
/// ])
/// .space("receipts");
/// ```
///
/// A name that cannot be one does not compile:
///
/// ```compile_fail,E0080
/// const BAD: idem_runtime::Anchor = idem_runtime::Anchor::header("Idem potency");
/// ```
#[derive(Clone, Copy)]
pub struct Anchor {
    source: Source,
    pub(crate) format: Option<Format>,
    pub(crate) options: Options,
}

#[derive(Clone, Copy)]
enum Source {
    Header(&'static str),
    BodyField(&'static str),
    Path(&'static str),
    Query(&'static str),
    All(&'static [Anchor]),
    Custom(fn(&AnchorRequest<'_>) -> Result<Values, AnchorError>),
    /// The next of the values that generated code took from the handler's arguments.
    Argument,
}

/// A part of a key.
struct Part {
    format: Option<Format>,
    /// Whether it may be more than one value.
    several: bool,
}

impl Anchor {
    /// A request header, the usual one being `Idempotency-Key`.
    ///
    /// The value may be raw (`abc`, as all real clients send it) or an RFC 9651 string (`"abc"`, as
    /// the IETF draft writes it): both are the key `abc`. Two lines of the header are refused.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is not a header name (RFC 9110 §5.1).
    #[track_caller]
    pub const fn header(name: &'static str) -> Self {
        assert!(is_header_name(name), "Anchor::header: not a valid header name");
        Self::of(Source::Header(name))
    }

    /// A field of the JSON body, named by dots (`message.nonce`) or by a JSON Pointer (RFC 6901,
    /// `/message/nonce`); in a body of `application/x-www-form-urlencoded`, the field of exactly
    /// this name.
    ///
    /// Numbers and booleans enter the key as their text, numbers by their exact decimal value. A
    /// missing field and `null` are a missing key; objects and arrays are refused, and so is a name
    /// that stands twice on the path.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when the path is empty or has an empty name between dots.
    #[track_caller]
    pub const fn body_field(path: &'static str) -> Self {
        assert!(is_field_path(path), "Anchor::body_field: a name in the path is empty");
        Self::of(Source::BodyField(path))
    }

    /// A parameter of the matched route, percent-decoded.
    ///
    /// With a [`format`](Self::format), all spellings of a value are one key, also where the
    /// operation, of which the parameter is a part, is the space. The handler sees the parameter as
    /// it was sent: it must take all spellings for the same thing, too. Without a format, each
    /// spelling is a key of its own: look such an id up exactly as it is written.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is empty.
    #[track_caller]
    pub const fn path(name: &'static str) -> Self {
        assert!(!name.is_empty(), "Anchor::path: the name is empty");
        Self::of(Source::Path(name))
    }

    /// A parameter of the query string, decoded; twice the same name is refused.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is empty.
    #[track_caller]
    pub const fn query(name: &'static str) -> Self {
        assert!(!name.is_empty(), "Anchor::query: the name is empty");
        Self::of(Source::Query(name))
    }

    /// Several anchors together, in this order. Each keeps its own format; what else they say is
    /// not heard, say it of the whole. Where the key is optional, a request that has some of them
    /// and not all is refused.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when there is none.
    #[track_caller]
    pub const fn all(anchors: &'static [Self]) -> Self {
        assert!(!anchors.is_empty(), "Anchor::all: at least one anchor is needed");
        Self::of(Source::All(anchors))
    }

    /// Code of the application's. It sees the request's head and its buffered body and says the
    /// key's values, or why there are none.
    ///
    /// ```
    /// use idem_runtime::{Anchor, AnchorError, AnchorRequest, Values};
    ///
    /// fn order_and_line(request: &AnchorRequest<'_>) -> Result<Values, AnchorError> {
    ///     let order = request.header("X-Order")?.ok_or(AnchorError::missing("X-Order"))?;
    ///     let line = request.body_field("line")?.ok_or(AnchorError::missing("line"))?;
    ///     let mut values = Values::new();
    ///     values.push(order);
    ///     values.push(line);
    ///     Ok(values)
    /// }
    ///
    /// pub const ORDER_LINE: Anchor = Anchor::custom(order_and_line);
    /// ```
    pub const fn custom(read: fn(&AnchorRequest<'_>) -> Result<Values, AnchorError>) -> Self {
        Self::of(Source::Custom(read))
    }

    #[doc(hidden)]
    pub const fn argument() -> Self {
        Self::of(Source::Argument)
    }

    /// Checks each value and brings it into one canonical form before it enters the key.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when it is [`Format::Hex`] of no bytes.
    #[must_use]
    #[track_caller]
    pub const fn format(mut self, format: Format) -> Self {
        assert!(!matches!(format, Format::Hex(0)), "format: a key of no bytes is no key");
        self.format = Some(format);
        self
    }

    /// How long a recorded answer is replayed, counted from when it was recorded.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when it is zero.
    #[must_use]
    #[track_caller]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        assert!(!ttl.is_zero(), "Anchor::ttl: a record that expires at once protects nothing");
        self.options.ttl = Some(Ttl::For(ttl));
        self
    }

    /// A recorded answer is replayed for ever.
    #[must_use]
    pub const fn forever(mut self) -> Self {
        self.options.ttl = Some(Ttl::Forever);
        self
    }

    /// Whose the key is.
    #[must_use]
    pub const fn scope(mut self, scope: Scope) -> Self {
        self.options.scope = Some(scope);
        self
    }

    /// Within what the key is unique: all handlers that name this space share their keys. Without
    /// it, each operation is a space of its own.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when the name is empty.
    #[must_use]
    #[track_caller]
    pub const fn space(mut self, name: &'static str) -> Self {
        assert!(!name.is_empty(), "Anchor::space: the name is empty");
        self.options.space = Some(name);
        self
    }

    /// Without a key the handler runs as plain axum.
    #[must_use]
    pub const fn optional(mut self) -> Self {
        self.options.optional = Some(true);
        self
    }

    /// Only keys that the server handed out by [`issue`](crate::Idempotency::issue) are taken, for
    /// their time to live from then.
    #[must_use]
    pub const fn issued(mut self) -> Self {
        self.options.issued = Some(true);
        self
    }

    /// What makes two requests the same.
    #[must_use]
    pub const fn fingerprint(mut self, scheme: FingerprintScheme) -> Self {
        self.options.fingerprint = Some(scheme);
        self
    }

    const fn of(source: Source) -> Self {
        Self { source, format: None, options: Options::NONE }
    }

    /// Whether the values are in the body, so that it must be buffered before a key is known.
    pub(crate) fn needs_body(&self) -> bool {
        self.source.needs_body()
    }

    /// Whether the values come from the handler's arguments.
    pub(crate) fn needs_arguments(&self) -> bool {
        self.source.needs_arguments()
    }

    /// The names of the headers that it reads.
    pub(crate) fn headers(&self, into: &mut Vec<&'static str>) {
        match self.source {
            Source::All(anchors) => anchors.iter().for_each(|anchor| anchor.headers(into)),
            source => into.extend(source.header()),
        }
    }

    /// Whether the client sent a key, well formed or not, as far as the head says. A parameter of
    /// the route is there whether it is meant as one or not.
    pub(crate) fn was_sent(&self, request: &AnchorRequest<'_>) -> bool {
        match self.source {
            Source::Header(name) => !matches!(request.header(name), Ok(None)),
            Source::Query(name) => !matches!(request.query(name), Ok(None)),
            Source::All(anchors) => anchors.iter().any(|anchor| anchor.was_sent(request)),
            Source::Path(_) | Source::BodyField(_) | Source::Custom(_) | Source::Argument => false,
        }
    }

    /// Values that did not come out of a request, checked and canonical as if they had.
    pub(crate) fn checked(&self, values: &Values, longest: usize) -> Result<Values, AnchorError> {
        let mut parts = Vec::new();
        self.parts(None, &mut parts);
        let found = values.len();
        // One part of many values takes what the others leave.
        let spare = match found.checked_sub(parts.len()) {
            Some(0) => 0,
            Some(spare) if parts.iter().filter(|part| part.several).count() == 1 => spare,
            _ => {
                let why = format!("the anchor has {} values", parts.len());
                return Err(AnchorError::malformed("the key", why));
            }
        };
        let formats = parts.iter().flat_map(|part| {
            let times = if part.several { 1 + spare } else { 1 };
            std::iter::repeat_n(part.format, times)
        });
        let mut canonical = Values::new();
        for (value, format) in values.iter().zip(formats) {
            let rules = KeyRules { format, longest };
            rules.check_all("the key", &Values::from_iter([value]), &mut canonical)?;
        }
        Ok(canonical)
    }

    /// The parts of which a key is made, in order, as [`collect`](Self::collect) takes them.
    fn parts(&self, outer: Option<Format>, into: &mut Vec<Part>) {
        let format = self.format.or(outer);
        match self.source {
            Source::All(anchors) => anchors.iter().for_each(|anchor| anchor.parts(format, into)),
            // Only these have as many as they say at each request.
            Source::Custom(_) | Source::Argument => into.push(Part { format, several: true }),
            _ => into.push(Part { format, several: false }),
        }
    }

    /// The spelling in which a parameter of the route enters the operation: the canonical one, where
    /// this anchor has a format for it. What the format refuses stays as it is; it is no key either.
    pub(crate) fn spelling<'v>(&self, parameter: &str, value: &'v str) -> Cow<'v, str> {
        self.canonical(parameter, value, None).unwrap_or(Cow::Borrowed(value))
    }

    fn canonical<'v>(
        &self,
        parameter: &str,
        value: &'v str,
        outer: Option<Format>,
    ) -> Option<Cow<'v, str>> {
        let format = self.format.or(outer);
        match self.source {
            Source::Path(name) if name == parameter => format?.canonical(name, value).ok(),
            Source::All(parts) => {
                parts.iter().find_map(|part| part.canonical(parameter, value, format))
            }
            _ => None,
        }
    }

    /// Takes the values out of a request, checked and canonical.
    pub(crate) fn collect(
        &self,
        request: &AnchorRequest<'_>,
        arguments: &mut dyn Iterator<Item = Values>,
        rules: KeyRules,
        into: &mut Values,
    ) -> Result<(), AnchorError> {
        let rules = KeyRules { format: self.format.or(rules.format), ..rules };
        self.source.collect(request, arguments, rules, Quoting::Accepted, into)
    }
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// Whose a key is: the tenant or principal within which keys are unique.
///
/// An engine cannot be built before a scope was said. A value that is absent from a request is
/// refused before any look-up. Do not scope by a credential that rotates or signs each request: a
/// retry under the next one would be somebody else's. Scope by the principal behind it.
#[derive(Clone, Copy)]
pub struct Scope(ScopeKind);

#[derive(Clone, Copy)]
enum ScopeKind {
    Global,
    One(Source),
    All(&'static [Scope]),
}

impl Scope {
    /// One scope for everybody: keys are unique across all callers. Only where a key names a thing
    /// in the world (a receipt's hash, a transaction's signature), never for keys that clients
    /// choose.
    pub const fn global() -> Self {
        Self(ScopeKind::Global)
    }

    /// A request header that names the principal, such as an API key that does not rotate.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is not a header name.
    #[track_caller]
    pub const fn header(name: &'static str) -> Self {
        assert!(is_header_name(name), "Scope::header: not a valid header name");
        Self(ScopeKind::One(Source::Header(name)))
    }

    /// A parameter of the matched route, percent-decoded.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is empty.
    #[track_caller]
    pub const fn path(name: &'static str) -> Self {
        assert!(!name.is_empty(), "Scope::path: the name is empty");
        Self(ScopeKind::One(Source::Path(name)))
    }

    /// A parameter of the query string, decoded; twice the same name is refused.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when `name` is empty.
    #[track_caller]
    pub const fn query(name: &'static str) -> Self {
        assert!(!name.is_empty(), "Scope::query: the name is empty");
        Self(ScopeKind::One(Source::Query(name)))
    }

    /// A field of the body, named as for [`Anchor::body_field`].
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when the path is empty or has an empty name between dots.
    #[track_caller]
    pub const fn body_field(path: &'static str) -> Self {
        assert!(is_field_path(path), "Scope::body_field: a name in the path is empty");
        Self(ScopeKind::One(Source::BodyField(path)))
    }

    /// Code of the application's; the usual one reads what an authentication layer left in the
    /// request's extensions. It sees the body only if something else, such as the fingerprint, needs
    /// it.
    ///
    /// ```
    /// use idem_runtime::{AnchorError, Scope, Values};
    ///
    /// #[derive(Clone)]
    /// struct Tenant(String);
    ///
    /// const TENANT: Scope = Scope::custom(|request| {
    ///     let Tenant(id) = request.extensions().get().ok_or(AnchorError::missing("the tenant"))?;
    ///     Ok(Values::from_iter([id]))
    /// });
    /// ```
    pub const fn custom(read: fn(&AnchorRequest<'_>) -> Result<Values, AnchorError>) -> Self {
        Self(ScopeKind::One(Source::Custom(read)))
    }

    /// Several together, in this order.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when there is none.
    #[track_caller]
    pub const fn all(scopes: &'static [Self]) -> Self {
        assert!(!scopes.is_empty(), "Scope::all: at least one scope is needed");
        Self(ScopeKind::All(scopes))
    }

    #[doc(hidden)]
    pub const fn argument() -> Self {
        Self(ScopeKind::One(Source::Argument))
    }

    /// The names of the headers that it reads.
    pub(crate) fn headers(&self, into: &mut Vec<&'static str>) {
        match self.0 {
            ScopeKind::Global => {}
            ScopeKind::One(source) => into.extend(source.header()),
            ScopeKind::All(scopes) => scopes.iter().for_each(|scope| scope.headers(into)),
        }
    }

    /// Whether it is the scope of everybody, which reads nothing.
    pub(crate) const fn is_global(&self) -> bool {
        matches!(self.0, ScopeKind::Global)
    }

    /// Whether the body must be buffered before the scope is known. Code may look at it, but most
    /// reads the head: it is given the body only if something else needs it.
    pub(crate) fn needs_body(&self) -> bool {
        match self.0 {
            ScopeKind::Global => false,
            ScopeKind::One(source) => matches!(source, Source::BodyField(_)),
            ScopeKind::All(scopes) => scopes.iter().any(Self::needs_body),
        }
    }

    /// Whether the values come from the handler's arguments.
    pub(crate) fn needs_arguments(&self) -> bool {
        match self.0 {
            ScopeKind::Global => false,
            ScopeKind::One(source) => source.needs_arguments(),
            ScopeKind::All(scopes) => scopes.iter().any(Self::needs_arguments),
        }
    }

    pub(crate) fn collect(
        &self,
        request: &AnchorRequest<'_>,
        arguments: &mut dyn Iterator<Item = Values>,
        into: &mut Values,
    ) -> Result<(), AnchorError> {
        match self.0 {
            ScopeKind::Global => Ok(()),
            ScopeKind::One(source) => {
                source.collect(request, arguments, KeyRules::SCOPE, Quoting::Literal, into)
            }
            ScopeKind::All(scopes) => {
                scopes.iter().try_for_each(|scope| scope.collect(request, arguments, into))
            }
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ScopeKind::Global => f.write_str("global"),
            ScopeKind::One(source) => source.fmt(f),
            ScopeKind::All(scopes) => f.debug_list().entries(scopes).finish(),
        }
    }
}

/// What a value must be to enter a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyRules {
    pub(crate) format: Option<Format>,
    /// The longest value, in characters, where no format says otherwise.
    pub(crate) longest: usize,
}

impl KeyRules {
    /// A scope is a credential or a name, whose form is not the client's choice.
    const SCOPE: Self = Self { format: None, longest: 8 * 1024 };

    fn check<'v>(&self, what: &'static str, value: &'v str) -> Result<Cow<'v, str>, AnchorError> {
        // Of ASCII, as most values are, it is told without a decision for each byte.
        let has_controls = match value.is_ascii() {
            true => value.bytes().fold(false, |any, byte| any | byte.is_ascii_control()),
            false => value.chars().any(char::is_control),
        };
        if has_controls {
            return Err(AnchorError::malformed(what, "control characters are not allowed"));
        }
        match self.format {
            Some(format) => format.canonical(what, value),
            None => Format::text(1..=self.longest).canonical(what, value),
        }
    }
}

/// Whether a header's value may be an RFC 9651 string.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quoting {
    Accepted,
    Literal,
}

impl Source {
    const fn header(self) -> Option<&'static str> {
        match self {
            Self::Header(name) => Some(name),
            _ => None,
        }
    }

    fn needs_body(self) -> bool {
        match self {
            Self::BodyField(_) | Self::Custom(_) => true,
            Self::All(anchors) => anchors.iter().any(Anchor::needs_body),
            Self::Header(_) | Self::Path(_) | Self::Query(_) | Self::Argument => false,
        }
    }

    fn needs_arguments(self) -> bool {
        match self {
            Self::Argument => true,
            Self::All(anchors) => anchors.iter().any(Anchor::needs_arguments),
            _ => false,
        }
    }

    fn collect(
        self,
        request: &AnchorRequest<'_>,
        arguments: &mut dyn Iterator<Item = Values>,
        rules: KeyRules,
        quoting: Quoting,
        into: &mut Values,
    ) -> Result<(), AnchorError> {
        let (what, value) = match self {
            Self::Header(name) => {
                let value = request.header(name)?.ok_or(AnchorError::missing(name))?;
                match quoting {
                    Quoting::Accepted if value.starts_with('"') => (name, unquote(name, value)?),
                    _ => (name, Cow::Borrowed(value)),
                }
            }
            Self::BodyField(path) => {
                (path, request.body_field(path)?.ok_or(AnchorError::missing(path))?.into())
            }
            Self::Path(name) => {
                (name, request.path(name).ok_or(AnchorError::missing(name))?.into())
            }
            Self::Query(name) => (name, request.query(name)?.ok_or(AnchorError::missing(name))?),
            Self::Custom(read) => {
                let what = match quoting {
                    Quoting::Accepted => "the key",
                    Quoting::Literal => "the scope",
                };
                return rules.check_all(what, &read(request)?, into);
            }
            Self::Argument => {
                let values = arguments.next().unwrap_or_default();
                return rules.check_all("the argument", &values, into);
            }
            Self::All(anchors) => {
                let (before, mut missing) = (into.len(), None);
                for anchor in anchors {
                    match anchor.collect(request, arguments, rules, into) {
                        Err(AnchorError::Missing { what }) => missing = missing.or(Some(what)),
                        collected => collected?,
                    }
                }
                return match missing {
                    None => Ok(()),
                    Some(what) if into.len() == before => Err(AnchorError::Missing { what }),
                    Some(what) => Err(AnchorError::Incomplete { what }),
                };
            }
        };
        into.push(rules.check(what, &value)?.as_bytes());
        Ok(())
    }
}

impl KeyRules {
    fn check_all(
        &self,
        what: &'static str,
        values: &Values,
        into: &mut Values,
    ) -> Result<(), AnchorError> {
        if values.is_empty() {
            return Err(AnchorError::missing(what));
        }
        for value in values.iter() {
            let text = std::str::from_utf8(value)
                .map_err(|_| AnchorError::malformed(what, "it is not UTF-8"))?;
            into.push(self.check(what, text)?.as_bytes());
        }
        Ok(())
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header({name:?})"),
            Self::BodyField(path) => write!(f, "body_field({path:?})"),
            Self::Path(name) => write!(f, "path({name:?})"),
            Self::Query(name) => write!(f, "query({name:?})"),
            Self::All(anchors) => f.debug_list().entries(*anchors).finish(),
            Self::Custom(_) => f.write_str("custom"),
            Self::Argument => f.write_str("arg"),
        }
    }
}

/// The text of an RFC 9651 string. Its parameters are ignored, as the IETF draft has it.
fn unquote(name: &'static str, value: &str) -> Result<Cow<'static, str>, AnchorError> {
    let item: sfv::Item = sfv::Parser::new(value.as_bytes()).parse().map_err(|_| {
        AnchorError::malformed(name, "it begins like a quoted string and is not one")
    })?;
    match item.bare_item {
        sfv::BareItem::String(text) => Ok(Cow::Owned(text.as_str().to_owned())),
        _ => Err(AnchorError::malformed(name, "it is not a string")),
    }
}

/// What form a value must have; it enters the key in one canonical spelling. In the macro: `uuid`,
/// `hex(32)`, `text(1..=64)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A UUID (RFC 9562) of any version; canonical in lower case with hyphens.
    Uuid,
    /// So many *bytes*, at least one, in twice as many hexadecimal digits, with or without `0x`;
    /// canonical in lower case without it. `Hex(32)` is 64 digits: a SHA-256, an `0x` nonce.
    Hex(usize),
    /// Between so many and so many characters, none of them a control character; as it is. Made by
    /// [`text`](Self::text).
    #[non_exhaustive]
    Text {
        /// The fewest characters, at least one.
        min: usize,
        /// The most characters.
        max: usize,
    },
}

impl Format {
    /// Between so many and so many characters.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when the range is empty or begins at zero, since a key is
    /// never empty.
    #[track_caller]
    pub const fn text(length: RangeInclusive<usize>) -> Self {
        let (min, max) = (*length.start(), *length.end());
        assert!(min >= 1 && min <= max, "Format::text: the range must be within 1..");
        Self::Text { min, max }
    }

    fn canonical<'v>(
        self,
        what: &'static str,
        value: &'v str,
    ) -> Result<Cow<'v, str>, AnchorError> {
        match self {
            Self::Uuid => match Uuid::try_parse(value) {
                Ok(uuid) => Ok(Cow::Owned(uuid.to_string())),
                Err(_) => Err(AnchorError::malformed(what, "it is not a UUID")),
            },
            Self::Hex(bytes) => {
                let digits =
                    value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")).unwrap_or(value);
                if digits.len() != 2 * bytes || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                    let why = format!("it is not {bytes} bytes in hexadecimal digits");
                    return Err(AnchorError::malformed(what, why));
                }
                Ok(Cow::Owned(digits.to_ascii_lowercase()))
            }
            Self::Text { min, max } => match characters(value) {
                0 => Err(AnchorError::malformed(what, "it is empty")),
                length if length < min => {
                    let why = format!("it has {length} characters, fewer than {min}");
                    Err(AnchorError::malformed(what, why))
                }
                length if length > max => {
                    let why = format!("it has {length} characters, more than {max}");
                    Err(AnchorError::malformed(what, why))
                }
                _ => Ok(Cow::Borrowed(value)),
            },
        }
    }
}

fn characters(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.chars().count() }
}

/// RFC 9110 §5.6.2, `token`.
pub(crate) const fn is_header_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let tchar = bytes[i].is_ascii_alphanumeric()
            || matches!(
                bytes[i],
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        if !tchar {
            return false;
        }
        i += 1;
    }
    // The http crate's bound, beyond which looking the name up would find nothing.
    !bytes.is_empty() && bytes.len() < 1 << 16
}

/// Names between dots are not empty; a JSON Pointer may name anything, but has its escapes right.
pub(crate) const fn is_field_path(path: &str) -> bool {
    let bytes = path.as_bytes();
    if bytes.is_empty() {
        return false;
    }
    let pointer = bytes[0] == b'/';
    let mut i = 0;
    while i < bytes.len() {
        if pointer {
            let escape = bytes[i] == b'~';
            if escape && !(i + 1 < bytes.len() && matches!(bytes[i + 1], b'0' | b'1')) {
                return false;
            }
        } else if bytes[i] == b'.' && (i == 0 || i + 1 == bytes.len() || bytes[i + 1] == b'.') {
            return false;
        }
        i += 1;
    }
    true
}
