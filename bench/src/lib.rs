//! What the measurements share: statistics, the report that each writes, its plot, and what the
//! system says of processes and of itself.
//!
//! Each question is a program of its own in `src/bin`; `README.md` says what they measure.

#[cfg(feature = "servers")]
pub mod databases;
pub mod keys;
pub mod machine;
pub mod order;
pub mod plot;
pub mod processes;
pub mod report;
pub mod statistics;
