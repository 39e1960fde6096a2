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

/// Finds handlers whose word `transaction` and whose arguments do not agree, through aliases, when
/// they are compiled.
pub mod transaction {
    use std::{fmt, marker::PhantomData};

    /// Stands for the type of an argument.
    pub struct Of<T>(PhantomData<T>);

    impl<T> fmt::Debug for Of<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Of")
        }
    }

    /// What every other type answers.
    pub trait Fallback {
        /// How many transactions it is.
        const COUNT: usize = 0;
    }

    impl<T> Fallback for Of<T> {}

    #[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
    impl<DB: sqlx::Database> Of<crate::Tx<DB>> {
        /// How many transactions it is.
        pub const COUNT: usize = 1;
    }

    /// What a handler that says `transaction` takes.
    #[track_caller]
    pub const fn one(count: usize) {
        match count {
            0 => panic!(
                "this handler says `transaction` and takes no `Tx`: add an argument such as `mut tx: Tx<Postgres>`, and use `&mut *tx` as the connection"
            ),
            1 => {}
            _ => panic!("this handler takes more than one `Tx`: there is one transaction"),
        }
    }

    /// What a handler that does not say it takes.
    #[track_caller]
    pub const fn none(count: usize) {
        assert!(
            count == 0,
            "this handler takes a `Tx` and does not say `transaction`: nobody would commit it"
        );
    }
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
