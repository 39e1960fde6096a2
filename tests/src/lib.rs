//! What the tests share: servers on loopback, stores that fail on purpose, an observer that
//! remembers.

#![expect(clippy::expect_used, reason = "what cannot be set up fails the test that needs it")]

pub mod faults;
pub mod server;
pub mod shop;
pub mod stores;
