//! idem in axum: the life of a request, the extractors, the combinator, the layer.
//!
//! Nothing outside this folder and the hidden module of generated code names axum.

mod answer;
#[cfg(feature = "testing")]
mod assert;
mod body;
mod combinator;
mod extract;
mod layer;
mod look_up;
mod serve;
#[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
mod transaction;
mod unclaimed;

#[cfg(feature = "testing")]
pub use self::assert::{BrokenPromise, BrokenPromises, Check, Phase, Promise, assert_idempotent};
pub(crate) use self::extract::ProvidesEngine;
#[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
pub use self::transaction::{Tx, TxRejection};
pub use self::{
    answer::Handled,
    combinator::{Idempotent, IdempotentExt},
    extract::{
        EngineInExtension, EngineInRouterState, EngineSource, Guarded, Idem, IdempotentArguments,
        MissingEngine, assert_handler, parse, run, run_parsed,
    },
    layer::{IdempotencyLayer, IdempotencyService},
};
