//! Who is who.

use axum::{
    extract::FromRequestParts,
    http::{HeaderValue, request::Parts},
};
use idem_runtime::{AnchorError, Scope, Values};

use crate::errors::Error;

/// The API keys of the demonstration, each with the id by which it is known inside.
pub(crate) const API_KEYS: [(&str, &str); 3] =
    [("buyer-1", "key_buyer"), ("buyer-2", "key_buyer_too"), ("seller-1", "key_seller")];

/// Whoever is behind an `X-API-Key`.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    /// Of the API key.
    pub(crate) id: &'static str,
}

impl Caller {
    fn of(api_key: Option<&HeaderValue>) -> Option<Self> {
        let sent = api_key?.as_bytes();
        let &(_, id) = API_KEYS.iter().find(|(key, _)| key.as_bytes() == sent)?;
        Some(Self { id })
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        Self::of(parts.headers.get("X-API-Key")).ok_or(Error::UNAUTHORIZED)
    }
}

/// Keys, and events, are the API key's.
pub(crate) const API_KEY: Scope = Scope::custom(|request| {
    let caller = Caller::of(request.headers().get("X-API-Key"));
    let caller = caller.ok_or(AnchorError::missing("X-API-Key"))?;
    Ok(Values::from_iter([caller.id]))
});
