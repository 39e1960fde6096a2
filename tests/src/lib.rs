//! What the tests share: servers on loopback, stores that fail on purpose, an observer that
//! remembers, histories and what they are checked by, and (feature `servers`) real database servers.

#![expect(clippy::expect_used, reason = "what cannot be set up fails the test that needs it")]

pub mod crowd;
pub mod faults;
pub mod history;
pub mod ledger;
pub mod server;
pub mod shop;
pub mod stores;

#[cfg(feature = "servers")]
pub use servers;
