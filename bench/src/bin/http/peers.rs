//! The crates that do what idem does, each as its documentation shows, with a store in memory.

use std::sync::Arc;

use axum::{Router, http::StatusCode, routing::post};
use axum_idempotent::{IdempotentLayer, IdempotentOptions};
use idempotent::{memory::MemoryStore, middleware::IdempotencyLayer};
use ruts::{
    CookieOptions, Session, SessionLayer,
    store::{Ttl, moka::MokaStore},
};
use tower_cookies::CookieManagerLayer;

use crate::contenders::bare;

/// Keys for a day.
const TTL: u32 = 24 * 60 * 60;

/// Keys belong to who sends the API key, which its documentation asks for.
pub(crate) fn idempotent() -> Router {
    let store = MemoryStore::builder().try_build().expect("a store");
    let layer = IdempotencyLayer::new(store).scope(|parts| {
        let tenant = parts.headers.get("x-api-key")?;
        tenant.to_str().ok().map(String::from)
    });
    bare().layer(layer)
}

/// Keys belong to a session, which a client without one gets at `/session`.
pub(crate) fn axum_idempotent() -> Router {
    let options = IdempotentOptions::default()
        .use_idempotency_key_header(Some("Idempotency-Key"), true)
        .expire_after(i64::from(TTL));
    let sessions = Router::new().route(
        "/session",
        post(|session: Session<MokaStore>| async move {
            let ttl = Ttl::new(i64::from(TTL)).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
            let begun = session.set("tenant", &"tenant-1", ttl, None).await;
            begun.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
        }),
    );
    bare()
        .layer(IdempotentLayer::<MokaStore>::new(options))
        .merge(sessions)
        .layer(
            SessionLayer::new(Arc::new(MokaStore::builder().build()))
                .with_cookie_options(CookieOptions::build().name("session")),
        )
        .layer(CookieManagerLayer::new())
}
