//! Who is who.

use axum::{
    extract::FromRequestParts,
    http::{HeaderValue, request::Parts},
};
use idem_runtime::{AnchorError, Scope, Values};

use crate::errors::Error;

/// The API keys of the demonstration, whose they are, and whether they may change anything.
pub(crate) const API_KEYS: [(&str, &str, bool); 4] = [
    ("acme-1", "acme", true),
    ("acme-2", "acme", true),
    ("acme-reader", "acme", false),
    ("globex-1", "globex", true),
];

/// Whoever is behind an `X-API-Key`.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) tenant: &'static str,
    pub(crate) trades: bool,
}

impl Caller {
    pub(crate) fn of(api_key: Option<&HeaderValue>) -> Option<Self> {
        let sent = api_key?.as_bytes();
        let &(_, tenant, trades) = API_KEYS.iter().find(|(key, ..)| key.as_bytes() == sent)?;
        Some(Self { tenant, trades })
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        Self::of(parts.headers.get("X-API-Key")).ok_or(Error::UNAUTHORIZED)
    }
}

/// Keys are the tenant's.
pub(crate) const TENANT: Scope = Scope::custom(|request| {
    let caller = Caller::of(request.headers().get("X-API-Key"));
    let caller = caller.ok_or(AnchorError::missing("X-API-Key"))?;
    Ok(Values::from_iter([caller.tenant]))
});

/// A caller who may change things.
pub(crate) struct Trader(pub(crate) Caller);

impl<S: Sync> FromRequestParts<S> for Trader {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, state).await?;
        caller.trades.then_some(Self(caller)).ok_or(Error::FORBIDDEN)
    }
}
