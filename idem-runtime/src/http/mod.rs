//! idem in axum: the life of a request, the extractors, the combinator.
//!
//! Nothing outside this folder and the hidden module of generated code names axum.

mod body;
mod combinator;
mod extract;
mod serve;

pub(crate) use self::extract::ProvidesEngine;
pub use self::{
    combinator::{Idempotent, IdempotentExt},
    extract::{
        EngineInExtension, EngineInRouterState, EngineSource, Guarded, Idem, IdempotentArguments,
        MissingEngine, assert_handler, parse, run, run_parsed,
    },
    serve::{Handled, REPLAYED},
};
