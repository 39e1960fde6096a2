//! idem in axum: the life of a request, the extractors, the combinator, the layer.
//!
//! Nothing outside this folder and the hidden module of generated code names axum.

mod answer;
mod body;
mod combinator;
mod extract;
mod layer;
mod serve;

pub(crate) use self::extract::ProvidesEngine;
pub use self::{
    answer::Handled,
    combinator::{Idempotent, IdempotentExt},
    extract::{
        EngineInExtension, EngineInRouterState, EngineSource, Guarded, Idem, IdempotentArguments,
        MissingEngine, assert_handler, parse, run, run_parsed,
    },
    layer::{IdempotencyLayer, IdempotencyService},
    serve::Arguments,
};
