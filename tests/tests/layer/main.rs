//! A layer that protects all writes of a router: alone, and together with policies of handlers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod both;
mod hangup;
mod operation;
mod refusals;
mod routes;
mod services;

use axum::Router;
use idem_runtime::{Anchor, Policy};
use reqwest::Method;
use tests::{
    server::{Answer, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");
const WRITES: Policy = Policy::new(KEY);

/// Serves a router under a layer with this policy.
async fn serve(bench: &Bench, policy: impl Into<Policy>, routes: Router) -> Server {
    Server::start(routes.layer(bench.engine().build().layer(policy))).await
}

/// A request of tenant `a` with the key `k`.
async fn ask(server: &Server, method: Method, path: &str) -> Answer {
    let request = server.request(method, path).header("x-api-key", "a");
    send(request.header("idempotency-key", "k")).await
}

/// Whether the answer says that the key was ignored.
fn is_ignored(answer: &Answer) -> bool {
    answer.header("idempotent-ignored") == Some("true")
}

/// The operation that the answer names.
fn operation_of(answer: &Answer) -> String {
    answer.header("idempotent-operation").expect("an operation").to_owned()
}
