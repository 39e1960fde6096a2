//! What generated code calls, and nothing else. No part of it is public: the two crates are
//! released together and may change it at any time.

pub use idem_macros::idempotent;

pub use crate::{
    anchor::{Anchor, Arguments, Format, Scope},
    decision::OnUnknown,
    fingerprint::FingerprintScheme,
    function::{Function, FunctionCall, call},
    hooks::{Denied, Recovered, ReplayShape, RequestContext},
    http::{EngineInExtension, EngineInRouterState, Guarded, Idem, parse, run, run_parsed},
    operation::Operation,
    policy::{InFlight, Mode, Policy, Recording, StoreOutage},
};

use axum::{
    extract::{FromRequest, FromRequestParts},
    http::StatusCode,
    response::IntoResponse,
};
use futures_util::future::BoxFuture;

use crate::{engine::Idempotency, function::FunctionEngine, http::ProvidesEngine};

/// Boxes a handler's body: whatever follows is not generic over it.
pub fn boxed<R>(body: impl Future<Output = R> + Send + 'static) -> BoxFuture<'static, R> {
    Box::pin(body)
}

/// What a `recover` function says.
pub async fn recovered(said: impl Future<Output = Recovered>) -> Recovered {
    said.await
}

/// What an `admit` function says.
pub async fn admitted<E: IntoResponse>(
    said: impl Future<Output = Result<(), E>>,
) -> Result<(), Denied> {
    said.await.map_err(Denied::with)
}

/// The status of a replay; what the macro lets through is one.
pub const fn status(code: u16) -> StatusCode {
    match StatusCode::from_u16(code) {
        Ok(status) => status,
        Err(_) => panic!("replay: not an HTTP status"),
    }
}

/// With `state = S`: the state has an engine.
pub fn check_engine<S: ProvidesEngine>() {}

/// With `state = S`: the argument is an extractor.
pub fn check_argument<T: FromRequestParts<S>, S>() {}

/// With `state = S`: the last argument is an extractor.
pub fn check_last_argument<T: FromRequest<S, M>, S, M>() {}

/// The engine of a plain function.
pub fn engine<E: FunctionEngine + ?Sized>(engine: &E) -> &Idempotency {
    engine.engine()
}

/// Without `nothing_happened`: no error says so.
pub const fn never<E>(_: &E) -> bool {
    false
}

/// Finds handlers that return a stream, through aliases, when they are compiled.
pub mod probe {
    use std::{fmt, marker::PhantomData};

    use axum::response::Sse;

    /// A response whose body is complete when the handler returns. It is never implemented: the
    /// types that are not are the only ones that are asked.
    #[diagnostic::on_unimplemented(
        message = "this handler streams its response body: it cannot be recorded and replayed",
        label = "streaming response",
        note = "`#[idempotent]` needs a response whose body is complete when the handler returns: answer with what names the stream, and stream from another handler"
    )]
    pub trait Recordable {}

    /// Stands for a return type.
    pub struct Of<R>(PhantomData<R>);

    impl<R> fmt::Debug for Of<R> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Of")
        }
    }

    /// What every other type answers.
    pub trait Fallback {
        /// Nothing is wrong.
        fn idem_answer_is_complete() {}
    }

    impl<R> Fallback for Of<R> {}

    macro_rules! streams {
        ($([$($parameter:ident),*] $response:ty;)*) => {$(
            impl<$($parameter),*> Of<$response> {
                /// Something is.
                pub fn idem_answer_is_complete()
                where
                    Sse<S>: Recordable,
                {
                }
            }
        )*};
    }

    streams! {
        [S] Sse<S>;
        [A, S] (A, Sse<S>);
        [A, B, S] (A, B, Sse<S>);
        [S, E] Result<Sse<S>, E>;
        [A, S, E] Result<(A, Sse<S>), E>;
        [A, B, S, E] Result<(A, B, Sse<S>), E>;
    }
}
