//! The guide: from the first protected handler to a service in operation. Documentation only.
//!
//! | page | for whom |
//! |---|---|
//! | [getting started](getting_started) | has a payment API to protect this afternoon |
//! | [choosing a store](choosing_a_store) | decides where records live: what each store guarantees, costs and takes |
//! | [choosing anchor and scope](choosing_anchor_and_scope) | decides what a key is, whose it is, and how long it lives |
//! | [what happens on a crash](what_happens_on_a_crash) | wants to know what a retry meets, at each moment, under each policy |
//! | [recovering unknown outcomes](recovering_unknown_outcomes) | calls other services, and has to find out what they did |
//! | [transactional handlers](transactional_handlers) | has effects in a database, and wants them exactly once |
//! | [testing] | wants a test to fail when a handler stops being safe to retry |
//! | [operating] | runs it: shutdown, limits, metrics, tickets, keys, deploys |
//! | [migrating] | comes from `axum-idempotent`, or from code of their own |
//!
//! What one option, method or type means in full stands with it: begin at
//! [`#[idempotent]`](macro@crate::idempotent) and [`Builder`](crate::Builder).

#[doc = include_str!("guide/choosing_a_store.md")]
pub mod choosing_a_store {}

#[doc = include_str!("guide/choosing_anchor_and_scope.md")]
pub mod choosing_anchor_and_scope {}

#[doc = include_str!("guide/getting_started.md")]
pub mod getting_started {}

#[doc = include_str!("guide/migrating.md")]
pub mod migrating {}

#[doc = include_str!("guide/operating.md")]
pub mod operating {}

#[doc = include_str!("guide/recovering_unknown_outcomes.md")]
pub mod recovering_unknown_outcomes {}

#[doc = include_str!("guide/testing.md")]
pub mod testing {}

#[doc = include_str!("guide/transactional_handlers.md")]
pub mod transactional_handlers {}

#[doc = include_str!("guide/what_happens_on_a_crash.md")]
pub mod what_happens_on_a_crash {}
