//! What the tests share: servers on loopback, stores that fail on purpose, an observer that
//! remembers.

pub mod faults;
pub mod server;
pub mod shop;
