//! A request as anchors and scopes see it, and why it has no usable key.

use std::{borrow::Cow, fmt};

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Uri, request::Parts};

use crate::json::{self, JsonError, Scalar};

/// A request as anchors and scopes see it: its head, the parameters of its route, and its body if
/// it was buffered.
#[derive(Clone, Copy)]
pub struct AnchorRequest<'a> {
    pub(crate) head: &'a Parts,
    pub(crate) parameters: &'a [(String, String)],
    pub(crate) body: &'a [u8],
    /// Names of headers that are parsed already.
    pub(crate) names: &'a [(&'static str, HeaderName)],
}

impl<'a> AnchorRequest<'a> {
    /// The method.
    pub fn method(&self) -> &'a Method {
        &self.head.method
    }

    /// The URI, as the handler sees it.
    pub fn uri(&self) -> &'a Uri {
        &self.head.uri
    }

    /// All headers.
    pub fn headers(&self) -> &'a HeaderMap {
        &self.head.headers
    }

    /// What layers left for the handler.
    pub fn extensions(&self) -> &'a Extensions {
        &self.head.extensions
    }

    /// The one value of a header.
    ///
    /// # Errors
    ///
    /// When the header stands there twice or has bytes outside visible ASCII and spaces.
    pub fn header(&self, name: &'static str) -> Result<Option<&'a str>, AnchorError> {
        let headers = &self.head.headers;
        let parsed = self.names.iter().find(|(known, _)| std::ptr::eq(*known, name));
        let mut lines = match parsed {
            Some((_, parsed)) => headers.get_all(parsed).iter(),
            None => headers.get_all(name).iter(),
        };
        let Some(line) = lines.next() else { return Ok(None) };
        if lines.next().is_some() {
            return Err(AnchorError::malformed(name, "the header stands there twice"));
        }
        HeaderValue::to_str(line)
            .map(Some)
            .map_err(|_| AnchorError::malformed(name, "only visible ASCII and spaces are allowed"))
    }

    /// A parameter of the matched route, percent-decoded.
    pub fn path(&self, name: &str) -> Option<&'a str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter of the query string, decoded.
    ///
    /// # Errors
    ///
    /// When the name stands there twice.
    pub fn query(&self, name: &'static str) -> Result<Option<Cow<'a, str>>, AnchorError> {
        the_one_pair(self.head.uri.query().unwrap_or_default().as_bytes(), name)
    }

    /// The body; empty if nothing needed it.
    pub fn body(&self) -> &'a [u8] {
        self.body
    }

    /// The text of a scalar in the JSON body, or of a field of a form. `None` where it is missing
    /// or `null`.
    ///
    /// # Errors
    ///
    /// When the body is not JSON, a name stands twice on the path, or the value is an object or an
    /// array.
    pub fn body_field(&self, path: &'static str) -> Result<Option<String>, AnchorError> {
        if self.body.is_empty() {
            return Ok(None);
        }
        if self.is_form() {
            return Ok(the_one_pair(self.body, path)?.map(Cow::into_owned));
        }
        let found = json::find(self.body, &json::segments(path))
            .and_then(|value| value.map(json::scalar).transpose());
        match found {
            Ok(Some(Scalar::Text(text))) => Ok(Some(text)),
            Ok(Some(Scalar::Null) | None) => Ok(None),
            Ok(Some(Scalar::Compound)) => {
                Err(AnchorError::malformed(path, "it is an object or an array"))
            }
            Err(source @ (JsonError::Syntax(_) | JsonError::DuplicateName)) => {
                Err(AnchorError::malformed(path, source.to_string()))
            }
        }
    }

    fn is_form(&self) -> bool {
        self.head
            .headers
            .get(http::header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|essence| {
                essence.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
            })
    }
}

/// The head may hold credentials and the body anything: neither is shown.
impl fmt::Debug for AnchorRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnchorRequest").field("method", &self.head.method).finish_non_exhaustive()
    }
}

fn the_one_pair<'q>(
    encoded: &'q [u8],
    name: &'static str,
) -> Result<Option<Cow<'q, str>>, AnchorError> {
    let mut values =
        form_urlencoded::parse(encoded).filter_map(|(key, value)| (key == name).then_some(value));
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(AnchorError::malformed(name, "it stands there twice")),
    }
}

/// Why a request has no usable key.
///
/// The message names the header, field or parameter and never repeats its value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnchorError {
    /// It is not there.
    #[error("{what} is missing")]
    Missing {
        /// The header, field or parameter.
        what: Cow<'static, str>,
    },
    /// It is not there, and other parts of the key are: even where a key is optional, this is none.
    #[error("{what} is missing")]
    Incomplete {
        /// The header, field or parameter.
        what: Cow<'static, str>,
    },
    /// It is there and cannot be a key.
    #[error("{what}: {why}")]
    Malformed {
        /// The header, field or parameter.
        what: Cow<'static, str>,
        /// What is wrong with it.
        why: Cow<'static, str>,
    },
}

impl AnchorError {
    /// It is not there.
    pub fn missing(what: impl Into<Cow<'static, str>>) -> Self {
        Self::Missing { what: what.into() }
    }

    /// It is there and cannot be a key. The reason is shown to the client: do not repeat the value.
    pub fn malformed(
        what: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Malformed { what: what.into(), why: why.into() }
    }
}
