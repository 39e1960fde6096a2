//! The extractor that stands in for a handler's last argument, and what stands in for its answer.

use std::{fmt, marker::PhantomData, sync::Arc};

use axum::{
    extract::{FromRef, FromRequest, FromRequestParts, Request},
    response::{IntoResponse, IntoResponseParts, Response, ResponseParts},
};
use futures_util::{FutureExt, future::BoxFuture};
use http::{Extensions, StatusCode, request::Parts};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::{
    serve::{AnyState, Arrived, Exchange, Opened, Ran, Unkeyed, serve},
    unclaimed::Unclaimed,
};
use crate::{
    anchor::Arguments,
    engine::Idempotency,
    hooks::{AnyResponse, Denied, Recovered, Recovery, Settle},
    issue::Issued,
    operation::Operation,
    policy::Policy,
};

/// Where a handler finds its engine.
#[diagnostic::on_unimplemented(
    message = "the router state `{S}` does not provide an idempotency engine",
    label = "no `Idempotency` in `{S}`",
    note = "add an `Idempotency` field to `{S}` and `#[derive(FromRef)]`, or use `engine = extension`"
)]
pub trait EngineSource<S> {
    /// The engine.
    ///
    /// # Errors
    ///
    /// When it is not there.
    fn engine(extensions: &Extensions, state: &S) -> Result<Idempotency, MissingEngine>;
}

/// The engine is a part of the router's state: that it is there is proved at compile time.
#[derive(Clone, Copy, Debug)]
pub struct EngineInRouterState;

#[diagnostic::do_not_recommend]
impl<S> EngineSource<S> for EngineInRouterState
where
    Idempotency: FromRef<S>,
{
    fn engine(_: &Extensions, state: &S) -> Result<Idempotency, MissingEngine> {
        Ok(Idempotency::from_ref(state))
    }
}

/// The engine is an [`Extension`](axum::Extension): a missing one is found at the first request.
#[derive(Clone, Copy, Debug)]
pub struct EngineInExtension;

#[diagnostic::do_not_recommend]
impl<S> EngineSource<S> for EngineInExtension {
    fn engine(extensions: &Extensions, _: &S) -> Result<Idempotency, MissingEngine> {
        extensions.get::<Idempotency>().cloned().ok_or(MissingEngine(()))
    }
}

/// No engine was layered over a handler with `engine = extension`.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "no `Extension<Idempotency>` is layered over this handler, which says `engine = extension`"
)]
pub struct MissingEngine(());

impl IntoResponse for MissingEngine {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}

/// A router state from which an engine can be taken.
#[diagnostic::on_unimplemented(
    message = "the router state `{Self}` does not provide an idempotency engine",
    label = "no `Idempotency` in `{Self}`",
    note = "add an `Idempotency` field to `{Self}` and `#[derive(FromRef)]`, or use `engine = extension`"
)]
pub trait ProvidesEngine {}

#[diagnostic::do_not_recommend]
impl<S> ProvidesEngine for S where Idempotency: FromRef<S> {}

/// The last argument of an idempotent handler: the extractor `E` that its author wrote, not yet
/// run.
///
/// In a unit test, `.into()` makes one of the extractor itself; the handler's body then runs
/// without an engine, and [`Guarded::into_inner`] gives what it returned.
///
/// `Source` has no default on purpose: rustc leaves defaults out, and where a router's state has no
/// engine, the name `EngineInRouterState` is the only hint that its message can give.
#[must_use]
pub struct Idem<E, Source> {
    state: Waiting<E>,
    source: PhantomData<fn() -> Source>,
}

enum Waiting<E> {
    Request(Box<Arrived>, Extract<E>),
    Detached(E),
}

/// Runs the inner extractor; the state is of the type that it was made for.
type Extract<E> = fn(Box<Arrived>, AnyState) -> BoxFuture<'static, Result<E, Response>>;

impl<E, Source> fmt::Debug for Idem<E, Source> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idem").finish_non_exhaustive()
    }
}

impl<E, Source> From<E> for Idem<E, Source> {
    fn from(extractor: E) -> Self {
        Self { state: Waiting::Detached(extractor), source: PhantomData }
    }
}

/// Marks the way in which the inner extractor is one.
#[derive(Debug)]
pub struct Via<M>(PhantomData<M>);

#[diagnostic::do_not_recommend]
impl<E, Source, S, M> FromRequest<S, Via<M>> for Idem<E, Source>
where
    E: FromRequest<S, M> + Send + 'static,
    S: Clone + Send + Sync + 'static,
    Source: EngineSource<S>,
{
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let engine =
            Source::engine(request.extensions(), state).map_err(IntoResponse::into_response)?;
        let extract: Extract<E> = |arrived, state| {
            async move {
                match state.downcast_ref::<S>() {
                    Some(state) => E::from_request(arrived.into_request(), state)
                        .await
                        .map_err(IntoResponse::into_response),
                    None => Err(StatusCode::INTERNAL_SERVER_ERROR.into_response()),
                }
            }
            .boxed()
        };
        let arrived = Arrived::new(engine.shared, request, Arc::new(state.clone()));
        Ok(Self { state: Waiting::Request(arrived, extract), source: PhantomData })
    }
}

/// What an idempotent handler returns: the engine's response, or in a unit test what its body did.
#[derive(Debug)]
#[must_use]
pub enum Guarded<R> {
    /// The handler was called with a plain extractor: this is what its body returned.
    Detached(R),
    /// The engine's response.
    Response(Response),
}

impl<R> Guarded<R> {
    /// What the handler's body returned, if it was called with a plain extractor.
    pub fn into_inner(self) -> Option<R> {
        match self {
            Self::Detached(returned) => Some(returned),
            Self::Response(_) => None,
        }
    }
}

impl<R: IntoResponse> IntoResponse for Guarded<R> {
    fn into_response(self) -> Response {
        match self {
            Self::Detached(returned) => returned.into_response(),
            Self::Response(response) => response,
        }
    }
}

/// Runs a handler whose anchors are all in the request: the claim comes before its last extractor,
/// so that a replay parses nothing.
///
/// Its future is in a box: a type that names the handler's own types would have the compiler tell
/// their mistakes a second time.
pub fn run<E, Source, R, F>(
    idem: Idem<E, Source>,
    policy: &'static Policy,
    body: F,
) -> BoxFuture<'static, Guarded<R>>
where
    E: Send + 'static,
    R: IntoResponse + 'static,
    F: FnOnce(E) -> BoxFuture<'static, R> + Send + 'static,
{
    let (arrived, extract) = match idem.state {
        Waiting::Detached(extractor) => return body(extractor).map(Guarded::Detached).boxed(),
        Waiting::Request(arrived, extract) => (arrived, extract),
    };
    let (policy, state) = (arrived.shared().resolved(policy), arrived.state());
    let runner = Box::new(move |arrived| {
        let extracted = extract(arrived, state);
        async move {
            match extracted.await {
                Ok(extractor) => Ran::Answered(body(extractor).await.into_response()),
                Err(rejection) => Ran::Rejected(rejection),
            }
        }
        .boxed()
    });
    serve(arrived, policy, runner).map(Guarded::Response).boxed()
}

/// A request whose last extractor was run, before its key is known.
#[derive(Debug)]
pub struct ParsedCall(Parsed);

enum Parsed {
    Detached,
    /// It runs as plain axum.
    Plain(Option<Box<Unclaimed>>),
    Keyed(Exchange),
}

impl fmt::Debug for Parsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Detached => "Detached",
            Self::Plain(_) => "Plain",
            Self::Keyed(_) => "Keyed",
        })
    }
}

/// Runs the last extractor of a handler with an anchor or scope in its arguments.
///
/// # Errors
///
/// The response to send instead, where the request is refused or the extractor turned it away.
pub async fn parse<E, Source, R>(
    idem: Idem<E, Source>,
    policy: &'static Policy,
) -> Result<(ParsedCall, E), Guarded<R>> {
    let (arrived, extract) = match idem.state {
        Waiting::Detached(extractor) => return Ok((ParsedCall(Parsed::Detached), extractor)),
        Waiting::Request(arrived, extract) => (arrived, extract),
    };
    let (policy, state) = (arrived.shared().resolved(policy), arrived.state());
    let (parsed, arrived) = match Exchange::open(arrived, policy).await {
        Opened::Keyed(mut exchange) => {
            let arrived = exchange.for_extractor();
            (Parsed::Keyed(exchange), arrived)
        }
        Opened::Unkeyed(Unkeyed::Plain(arrived, unclaimed)) => (Parsed::Plain(unclaimed), arrived),
        Opened::Unkeyed(Unkeyed::Observed(request) | Unkeyed::Unprotected(request)) => {
            match request.admitted().boxed().await {
                Ok((arrived, unclaimed)) => (Parsed::Plain(unclaimed), arrived),
                Err(denied) => return Err(Guarded::Response(denied)),
            }
        }
        Opened::Unkeyed(Unkeyed::Refused(response)) => return Err(Guarded::Response(*response)),
    };
    match extract(arrived, state).await {
        Ok(extractor) => Ok((ParsedCall(parsed), extractor)),
        Err(rejection) => Err(Guarded::Response(rejection)),
    }
}

/// Runs a handler whose last extractor was run already.
pub fn run_parsed<E, R, F>(
    call: ParsedCall,
    arguments: Arguments,
    extractor: E,
    body: F,
) -> BoxFuture<'static, Guarded<R>>
where
    E: Send + 'static,
    R: IntoResponse + 'static,
    F: FnOnce(E) -> BoxFuture<'static, R> + Send + 'static,
{
    match call.0 {
        Parsed::Detached => body(extractor).map(Guarded::Detached).boxed(),
        Parsed::Plain(unclaimed) => {
            let work = body(extractor).map(IntoResponse::into_response);
            match unclaimed {
                Some(unclaimed) => unclaimed.run(work).map(Guarded::Response).boxed(),
                None => work.map(Guarded::Response).boxed(),
            }
        }
        Parsed::Keyed(exchange) => {
            let runner = Box::new(move |_| {
                async move { Ran::Answered(body(extractor).await.into_response()) }.boxed()
            });
            exchange.conduct(arguments, runner).answered().map(Guarded::Response).boxed()
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Operation {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::of(&mut parts.extensions))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Issued<T> {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        Operation::from_request_parts(parts, state).await.map(Self::new)
    }
}

impl IntoResponseParts for Settle {
    type Error = std::convert::Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Self::Error> {
        parts.extensions_mut().insert(self);
        Ok(parts)
    }
}

impl Recovered {
    /// It happened, and this was its answer: it is recorded, and replayed from now on.
    pub fn answered(response: impl IntoResponse) -> Self {
        Self(Recovery::Answered(any(response)))
    }
}

impl Denied {
    /// With this response.
    pub fn with(response: impl IntoResponse) -> Self {
        Self(any(response))
    }
}

fn any(response: impl IntoResponse) -> AnyResponse {
    response.into_response().map(|body| body.map_err(Into::into).boxed_unsync())
}

/// The arguments of a handler of which the last is [`Idem`].
#[diagnostic::on_unimplemented(
    message = "this handler is not idempotent",
    note = "annotate it with `#[idempotent(anchor = …)]`"
)]
pub trait IdempotentArguments {}

/// The last of them. A trait of its own, since an `Idem` in the tuple would have rustc complain of
/// the handler's signature instead.
pub trait IdempotentArgument {}

impl<E, Source> IdempotentArgument for Idem<E, Source> {}

macro_rules! last_is_idem {
    ($($argument:ident)*) => {
        #[diagnostic::do_not_recommend]
        impl<M, $($argument,)* Last: IdempotentArgument> IdempotentArguments
            for (M, $($argument,)* Last)
        {
        }
    };
}

last_is_idem!();
last_is_idem!(A1);
last_is_idem!(A1 A2);
last_is_idem!(A1 A2 A3);
last_is_idem!(A1 A2 A3 A4);
last_is_idem!(A1 A2 A3 A4 A5);
last_is_idem!(A1 A2 A3 A4 A5 A6);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12 A13);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12 A13 A14);
last_is_idem!(A1 A2 A3 A4 A5 A6 A7 A8 A9 A10 A11 A12 A13 A14 A15);

/// Asserts, when it is compiled, that a function is an idempotent handler for a router state.
///
/// A handler that lost its `#[idempotent]` in a refactoring does not compile here:
///
/// ```
/// use axum::{extract::State, Json};
/// use idem_runtime::{Idempotency, assert_handler, idempotent};
///
/// #[idempotent(anchor = header("Idempotency-Key"))]
/// async fn pay(State(_): State<Idempotency>, body: String) -> String { body }
///
/// assert_handler::<Idempotency, _, _>(pay);
/// ```
///
/// ```compile_fail,E0277
/// # use idem_runtime::{Idempotency, assert_handler};
/// async fn pay(body: String) -> String { body }
///
/// assert_handler::<Idempotency, _, _>(pay);
/// ```
pub fn assert_handler<S, T, H>(_: H)
where
    H: axum::handler::Handler<T, S>,
    T: IdempotentArguments,
{
}
