//! The shapes of handlers that people write for axum: each compiles under `#[idempotent]`, serves a
//! request, and answers its retry from the record.
//!
//! Shapes that the macro cannot do are in `ui/`, each with what rustc says of it.

// What we generate is as clean as what we write.
#![deny(warnings)]
#![forbid(unsafe_code)]

mod anchors;
mod arguments;
mod combinator;
mod direct_calls;
mod functions;
mod hygiene;
mod last_argument;
mod options;
mod other_attributes;
mod plain;
mod returns;
mod routing;
mod state;
mod support;
