//! `handler.idempotent(POLICY)`: for closures, and for handlers that one did not write.

use std::{fmt, marker::PhantomData, sync::Arc};

use axum::{
    extract::{FromRef, Request},
    handler::Handler,
    response::Response,
};
use futures_util::{FutureExt, future::BoxFuture};

use super::serve::{Arrived, Ran, serve};
use crate::{engine::Idempotency, policy::Policy};

/// Makes any axum handler idempotent without the macro.
///
/// The claim comes before *all* of the handler's extractors, so a replay runs none of them: what
/// decides who may call belongs into a layer or the scope. Anchors over the handler's arguments
/// need the macro.
///
/// ```
/// use axum::{Router, routing::post};
/// use idem_runtime::{Anchor, Idempotency, IdempotentExt, Policy, Scope, store::MemoryStore};
///
/// const BY_HEADER: Policy = Policy::new(Anchor::header("Idempotency-Key"));
///
/// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
/// let app: Router = Router::new()
///     .route("/notes", post((|note: String| async move { note }).idempotent(BY_HEADER)))
///     .with_state(idem);
/// # let _ = app;
/// ```
pub trait IdempotentExt<T, S>: Handler<T, S> {
    /// This handler, made idempotent.
    fn idempotent(self, policy: impl Into<Policy>) -> Idempotent<Self, T, S> {
        Idempotent { handler: self, policy: policy.into(), types: PhantomData }
    }
}

#[diagnostic::do_not_recommend]
impl<H: Handler<T, S>, T, S> IdempotentExt<T, S> for H {}

/// A handler that [`idempotent`](IdempotentExt::idempotent) made idempotent.
pub struct Idempotent<H, T, S> {
    handler: H,
    policy: Policy,
    types: PhantomData<fn() -> (T, S)>,
}

impl<H: Clone, T, S> Clone for Idempotent<H, T, S> {
    fn clone(&self) -> Self {
        Self { handler: self.handler.clone(), policy: self.policy, types: PhantomData }
    }
}

impl<H, T, S> fmt::Debug for Idempotent<H, T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotent").field("policy", &self.policy).finish_non_exhaustive()
    }
}

#[diagnostic::do_not_recommend]
impl<H, T, S> Handler<T, S> for Idempotent<H, T, S>
where
    H: Handler<T, S>,
    T: 'static,
    S: Clone + Send + Sync + 'static,
    Idempotency: FromRef<S>,
{
    type Future = BoxFuture<'static, Response>;

    fn call(self, request: Request, state: S) -> Self::Future {
        let engine = Idempotency::from_ref(&state);
        let handler = self.handler;
        let any_state = Arc::new(state.clone());
        let runner = Box::new(move |arrived: Box<Arrived>| {
            let request = arrived.into_request();
            async move { Ran::Answered(handler.call(request, state).await) }.boxed()
        });
        let shared = engine.shared;
        let policy = Arc::new(self.policy.resolve(&shared.options, shared.scope));
        serve(Arrived::new(shared, request, any_state), policy, runner).boxed()
    }
}
