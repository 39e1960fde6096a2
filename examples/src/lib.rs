//! What the examples share: their switches, the simulated downstream, and a server that stops
//! without losing anything; and a client of each.
//!
//! An example itself, with all that it shows of idem, is one file of `src/bin`.

pub mod clients;

mod downstream;
mod server;
mod stores;
mod switches;
pub mod wallet;
pub mod webhooks;

use std::{error::Error, process::ExitCode};

pub use crate::{
    downstream::{Behaviour, Downstream, Failure},
    server::{Server, asked_to_stop},
    stores::{NoStore, StoreChoice, StoreParser},
    switches::Switches,
};

/// A result whose error, where none is named, is whatever ends an example early.
pub type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Ends a program, and tells its error with all the causes.
pub fn exit(result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprint!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
